"""DiffusionNFT: fine-tuning on what is better and what is worse than expected, without likelihoods.

Zheng et al. (2025), https://arxiv.org/abs/2509.16117. Pictures are drawn by an old policy, with any sampler and without
keeping how; the policy is then trained by denoising them, towards those with a positive advantage and away from the
others (`nft_loss`), and the old policy follows it. See docs/nft.md for each departure from the authors' code.
"""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy, Trajectory
from overpaint.policy.noise import draw_noise
from overpaint.policy.process import add_noise
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import AnyFloat, Count, Field, settings
from overpaint.training import (
    EarlyStopping,
    HeldOut,
    TrainingConfig,
    TrainingRun,
    check_trainable,
    evaluate_held_out,
    train,
)
from overpaint.training.loop import check_image_size
from rewards import RewardLike, as_reward

from .advantage import centred_advantages, group_advantages
from .collect import Collector, drawing_ends, requested_again_on_failure, tagged
from .nft_loss import Forgetting, kept_share, nft_loss
from .requests import Pairs, draw_requests, pairs_of_update
from .scoring import ScoringConfig

BASELINES = {"group": group_advantages, "centred": centred_advantages}


@settings
class NFTConfig:
    """What DiffusionNFT does in a round; by default the authors' settings, as far as they do not depend on a model."""

    samples_per_round: int = Field(1152, ge=1)
    """Images that are drawn and scored in a round, over all processes."""

    images_per_prompt: int = Field(24, ge=2)
    """Images of each prompt, whose rewards are compared with each other."""

    baseline: Literal["group", "centred"] = "group"
    """What rewards are compared with, as in `DDPOConfig`: mean and standard deviation of the prompt's images, or the
    mean alone, and one standard deviation of the round."""

    sampling_batch_size: int = Field(8, ge=1)
    """Images that a process draws at a time."""

    minibatch_size: int = Field(8, ge=1)
    """Pairs of sample and level that go through the network at a time in an update."""

    updates_per_round: int = Field(1, ge=1)
    """Optimizer steps of a round, each on an equal part of its samples."""

    steps: int = Field(10, ge=2)
    """Denoising steps of an image. The levels of all of them but the last are trained at."""

    trained_levels: int | None = Field(None, ge=1)
    """At how many of these levels each sample is trained, drawn anew for each; None is all."""

    height: int | None = Field(None, ge=1)
    """As in `DDPOConfig`, with the next one."""

    width: int | None = Field(None, ge=1)
    """Width of the images."""

    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance of the drawing. What is trained is the prediction for the prompt alone, which learns
    what guidance would do: above 1 the two are not of one distribution, and learning is slower."""

    eta: float = Field(0.0, ge=0, le=1)
    """Noise of the drawing in [0, 1]."""

    beta: float = Field(1.0, gt=0)
    """How far the predictions that are compared lie from the old policy's."""

    max_advantage: float = Field(5.0, gt=0)
    """Where advantages are clipped."""

    space: Literal["clean", "network"] | None = None
    """Whose errors count: those of the clean latents, or those of what the network predicts. None is the former for
    flow matching, as the authors have it, and the latter for diffusion."""

    kl_weight: float = Field(1e-4, ge=0)
    """Of the mean squared distance of the prediction from the reference policy's; other than 0, it costs a further
    network call without gradient."""

    forgetting: Forgetting = "soon"
    """How fast the old policy follows, see `nft_loss.kept_share`."""

    evaluate_every: int = Field(1, ge=1)
    """Rounds between two evaluations of the held-out prompts, if there are any."""

    patience: int = Field(0, ge=0)
    """As in `DDPOConfig`."""

    def __post_init__(self) -> None:
        """Checks that samples divide into groups, and that there are as many levels as are to be trained."""
        if self.samples_per_round % self.images_per_prompt:
            raise ValueError(
                f"samples_per_round must be a multiple of images_per_prompt={self.images_per_prompt}, got "
                f"{self.samples_per_round}"
            )
        if self.trained_levels is not None and self.trained_levels >= self.steps:
            raise ValueError(f"trained_levels must be below steps={self.steps}, got {self.trained_levels}")

    @property
    def levels_per_sample(self) -> int:
        """At how many levels each sample is trained."""
        return self.steps - 1 if self.trained_levels is None else self.trained_levels


class NFTMetrics(NamedTuple):
    """What one round measured: means over all processes."""

    reward: AnyFloat
    reward_std: AnyFloat
    loss: AnyFloat
    plus: AnyFloat
    """Error of the prediction that is led towards a sample, in units of its mean absolute error."""
    minus: AnyFloat
    """Of the one that is led away."""
    kl: AnyFloat
    """Mean squared distance of the prediction from the reference policy's; 0 where it does not count."""
    kept: AnyFloat
    """Share of the old policy that stayed after the round."""
    grad_norm: AnyFloat
    retries: AnyFloat
    seconds_sampling: AnyFloat
    seconds_reward: AnyFloat
    seconds_update: AnyFloat


class OldPolicy:
    """The policy that draws, and follows the trained one slowly; part of a checkpoint.

    Args:
        policy: Its trained weights are the first.
    """

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.policy = policy
        self.weights = policy.trainable_state()
        self.updates = 0

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Turns the policy into the old one, without gradients, for the length of a `with` block."""
        with self.policy.with_weights(self.weights):
            yield

    def follow(self, updates: int, forgetting: Forgetting) -> float:
        """Moves towards the trained policy after some more updates; returns the share that stayed."""
        self.updates += updates
        kept = kept_share(self.updates, forgetting)
        for name, value in self.policy.trainable_state().items():
            self.weights[name] = torch.lerp(value, self.weights[name].to(value), kept)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights, and the number of updates."""
        return {"weights": dict(self.weights), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes back what `state_dict` returned."""
        self.weights, self.updates = dict(state["weights"]), int(state["updates"])


class NFTTrainer:
    """Tunes a policy by DiffusionNFT; the reward needs no gradient, the sampler no density.

    An iteration of the run is a round: samples are drawn and scored, and trained on in one or more updates. Arguments
    and errors are those of `DDPOTrainer`, but there is no erasure constraint.
    """

    name: str = "NFT"

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardLike,
        prompts: Sequence[str],
        config: NFTConfig | None = None,
        *,
        held_out: HeldOut | None = None,
        scoring: ScoringConfig | None = None,
    ) -> None:
        check_trainable(policy)
        self.policy = policy
        self.reward = reward = as_reward(reward)
        self.prompts = check_prompts(prompts)
        self.config = cfg = config or NFTConfig()
        self.early_stopping = EarlyStopping.of(cfg, held_out)
        self.guidance = ClassifierFree(cfg.guidance_scale)
        check_image_size(self)
        self.old = OldPolicy(policy)
        draw = drawing_ends(policy, cfg, self.guidance)
        self.collector = Collector(policy, draw, reward, None, batch_size=cfg.sampling_batch_size, scoring=scoring)

    def train(self, run_config: TrainingConfig, *, notes: Mapping[str, Any] | None = None) -> NFTMetrics | None:
        """Trains, or goes on with an interrupted run; as `DDPOTrainer.train`."""
        return train(self, run_config, state={"old": self.old}, configs={"nft": self.config}, notes=notes)

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell.

        Raises:
            ValueError: Samples do not divide evenly among updates and processes.
        """
        cfg, parts = self.config, self.config.updates_per_round * run.num_processes
        if cfg.samples_per_round % parts:
            raise ValueError(
                f"NFTConfig.samples_per_round must be a multiple of updates_per_round times processes, {parts}, got "
                f"{cfg.samples_per_round}"
            )

    def step(self, run: TrainingRun) -> NFTMetrics:
        """Does one round: the old policy draws, the reward judges, the policy is trained, and the old one follows."""
        cfg = self.config
        with requested_again_on_failure(run):
            request = draw_requests(
                run, self.prompts, cfg.samples_per_round, updates=cfg.updates_per_round,
                images_per_prompt=cfg.images_per_prompt,
            )  # fmt: skip
            with self.old.in_place():
                scored = self.collector.collect(run, [request])
        rewards = request.gathered(run, scored.rewards)
        advantages = BASELINES[cfg.baseline](rewards, request.prompts)[request.mine].float()

        start = time.perf_counter()
        updates = []
        for update in range(cfg.updates_per_round):
            pairs = pairs_of_update(
                run, [request], update, updates=cfg.updates_per_round,
                possible_steps=range(cfg.steps - 1), trained_steps=cfg.levels_per_sample,
            )  # fmt: skip
            updates.append(self._update(run, pairs, scored.trajectory, advantages, request.my_seeds))
        loss, plus, minus, kl, norm = (fmean(values) for values in zip(*updates, strict=True))
        return NFTMetrics(
            reward=float(rewards.mean()),
            reward_std=float(rewards.std(correction=0)),
            loss=loss,
            plus=plus,
            minus=minus,
            kl=kl,
            kept=self.old.follow(cfg.updates_per_round, cfg.forgetting),
            grad_norm=norm,
            retries=scored.retries,
            seconds_sampling=scored.seconds_sampling,
            seconds_reward=scored.seconds_reward,
            seconds_update=time.perf_counter() - start,
        )

    def resize(self, sizes: Mapping[str, Count]) -> None:
        """Takes other sizes of its parts; see `overpaint.training.memory`."""
        self.config = replace(self.config, **sizes)
        self.collector.batch_size = self.config.sampling_batch_size

    def tagged(self, metrics: NFTMetrics, run: TrainingRun) -> dict[str, float]:
        """Returns what was measured under the tags that docs/nft.md defines."""
        values = tagged(metrics, (run.iteration + 1) * self.config.samples_per_round)
        values |= {f"train/{name}": getattr(metrics, name) for name in ("plus", "minus", "kept")}
        if self.config.kl_weight:
            values["policy/kl"] = metrics.kl
        return values

    def evaluate(self, run: TrainingRun) -> None:
        """Evaluates the held-out prompts, drawn as in a round, by the trained policy."""
        evaluate_held_out(run, self, eta=self.config.eta)

    # The parts of a round.

    def _update(
        self, run: TrainingRun, pairs: Pairs, drawn: Trajectory, advantages: PerSample, seeds: Sequence[int]
    ) -> tuple[float, float, float, float, float]:
        """Takes one gradient step; returns loss, its two parts, the distance from the reference, and the norm."""
        total = torch.zeros(4, device=run.device)
        parts, count = pairs.minibatches(self.config.minibatch_size), len(pairs.samples)
        for number, part in enumerate(parts):
            with run.autocast():
                found = self._losses(part, drawn, advantages, seeds)
            run.backward(found[0].sum() / count, sync=number == len(parts) - 1)
            total += found.detach().sum(dim=1) / count
        loss, plus, minus, kl = (run.mean(value) for value in total)
        return loss, plus, minus, kl, run.update()

    def _losses(
        self, pairs: Pairs, drawn: Trajectory, advantages: PerSample, seeds: Sequence[int]
    ) -> Float[Tensor, "4 pairs"]:
        """Returns the loss of each pair, the errors of both predictions, and the distance from the reference."""
        cfg, policy = self.config, self.policy
        plan = policy.plan(cfg.steps, cfg.height, cfg.width)
        samples = pairs.samples.cpu()
        clean = drawn.latents[samples.to(drawn.latents.device), -1].to(policy.device)
        conditioning = drawn.conditioning[samples].to(policy.device)
        noise = self._noise(clean, [seeds[sample] for sample in samples.tolist()], pairs.steps.tolist())
        levels, timesteps = plan.levels[pairs.steps], plan.timesteps[pairs.steps]
        noised = add_noise(policy.process, clean, noise, levels)
        with torch.no_grad(), self.old.in_place():
            old = policy.predict(noised, timesteps, conditioning)
        reference = None
        if cfg.kl_weight:
            with policy.reference():
                reference = policy.predict(noised, timesteps, conditioning)
        prediction = policy.predict(noised, timesteps, conditioning)

        def error(of: Latents) -> Latents:
            if self._space == "clean":
                return policy.process.clean(noised, of, levels) - clean
            return of - policy.process.target(clean, noise, levels)

        found = nft_loss(
            prediction, old, advantages[samples].to(policy.device), error, beta=cfg.beta,
            max_advantage=cfg.max_advantage,
        )  # fmt: skip
        distance = torch.zeros_like(found.loss)
        if reference is not None:
            distance = (prediction - reference).square().flatten(1).mean(dim=1)
        return torch.stack([found.loss + cfg.kl_weight * distance, found.plus, found.minus, distance])

    def _noise(self, clean: Latents, seeds: Sequence[int], steps: Sequence[int]) -> Latents:
        """Returns the noise of each pair, which belongs to the sample's seed and the level."""
        generators = [
            torch.Generator().manual_seed((seed + 1) * self.config.steps + step)
            for seed, step in zip(seeds, steps, strict=True)
        ]
        return draw_noise(generators, clean.shape[1:], self.policy.device)

    @property
    def _space(self) -> Literal["clean", "network"]:
        if self.config.space is not None:
            return self.config.space
        return "clean" if self.policy.process.prediction_type == "velocity" else "network"
