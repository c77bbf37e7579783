"""The ReFL trainer.

Algorithm 1 of Xu et al. (2023), https://arxiv.org/abs/2304.05977, with two additions: an optional constraint that keeps
an erased concept erased, and early stopping by a second, held-out reward. What is not here: the engine and the loop
(`training`), the denoising (`policy`), the constraint's arithmetic (`erasure`). See docs/refl.md for each departure
from the authors' code, and for results.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from erasure import ErasureConstraint, ImageConstraint, ObjectiveConstraint
from erasure.protocols import ConceptBatch
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import PerSample
from overpaint.training import (
    EarlyStopping,
    HeldOut,
    Stateful,
    TrainingConfig,
    TrainingRun,
    check_trainable,
    draw_batch,
    evaluate_held_out,
    train,
)
from overpaint.training.loop import check_batches, check_image_size, log_pictures
from rewards import RewardLike, as_reward, scores_of

from .config import ReFLConfig
from .distance import distance_to_reference
from .gradient_check import check_gradient, not_differentiable, trial_images
from .loss import hinge
from .one_step import one_step_images
from .pretraining import PretrainingPairs, denoising_loss, pairs_from_policy

Item = TypeVar("Item", str, int)

POOL_BATCHES, POOL = 4, 64
"""Size of the pool of pairs that is drawn where none are given: in batches of the pretraining term, and at most."""


class ReFLMetrics(NamedTuple):
    """What one iteration measured: means over the batch of all processes, before the update."""

    reward: float
    reward_loss: float
    pretraining_loss: float
    erasure_violation: float
    erasure_weight: float
    gradient_cosine: float
    grad_norm: float
    reward_step: int


class ReFLTrainer:
    """Tunes a policy by backpropagating a reward through one late denoising step.

        trainer = ReFLTrainer(policy, reward, prompts, ReFLConfig(batch_size=8))
        trainer.train(TrainingConfig(output_dir="run", iterations=100))

    Args:
        policy: What is tuned, in place; needs a LoRA or `train=`.
        reward: What is raised, on the policy's device; a reward or a plain function of images and prompts. Must be
            differentiable in the images.
        prompts: What images are drawn for.
        config: Settings; those of the authors' code by default.
        erasure: What is kept erased: a cost on images of the concept, or an objective on noise predictions.
        pretraining: Pairs of the pretraining term; drawn from the frozen policy itself where none are given.
        held_out: Prompts and a reward that are not trained on, for early stopping; the best weights by it remain.

    Raises:
        ValueError: The reward says that it has no gradient, there are no prompts or no pairs, the policy has nothing to
            train, there is patience without anything held out, or the VAE's factor does not divide a side of the
            images.
    """

    name: str = "ReFL"

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardLike,
        prompts: Sequence[str],
        config: ReFLConfig | None = None,
        *,
        erasure: ErasureConstraint | None = None,
        pretraining: PretrainingPairs | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.reward = as_reward(reward)
        if not self.reward.differentiable:
            raise not_differentiable("reward", reward)
        check_trainable(policy)
        self.policy = policy
        self.prompts = check_prompts(prompts)
        self.config = config or ReFLConfig()
        self.erasure = erasure
        self.pretraining = pretraining
        if pretraining is not None and not 0 < len(pretraining.captions) == len(pretraining.latents):
            raise ValueError(
                "pretraining must hold at least one pair and a caption for each of its latents, got "
                f"{len(pretraining.latents)} latents and {len(pretraining.captions)} captions"
            )
        self.early_stopping = EarlyStopping.of(self.config, held_out, constrained=erasure is not None)
        self.guidance = ClassifierFree(self.config.guidance_scale)
        check_image_size(self)

    def train(self, run_config: TrainingConfig, *, notes: Mapping[str, Any] | None = None) -> ReFLMetrics | None:
        """Trains, or goes on with an interrupted run, as `overpaint.training.train` says.

        Args:
            run_config: Settings of the run.
            notes: What only the program knows, for the record of the run.
        """
        state: dict[str, Stateful] = {} if self.erasure is None else {"lagrangian": self.erasure.lagrangian}
        about = {} if self.erasure is None else {"erasure": self.erasure.description()}
        return train(self, run_config, state=state, configs={"refl": self.config}, about=about, notes=notes)

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell, draws pairs where none were given, and readies an erasure objective.

        Raises:
            ValueError: The reward or the erasure cost has no gradient to the images, a batch does not divide evenly
                among the processes, or the objective cannot work with this policy.
        """
        cfg = self.config
        batches = {"batch_size": cfg.batch_size}
        if cfg.pretraining_weight:
            batches["pretraining_batch_size"] = cfg.pretraining_batch_size
            if self.pretraining is None:
                batches["pretraining_pairs"] = self._pool
        if self.erasure is not None:
            batches["erasure_batch_size"] = cfg.erasure_batch_size
        check_batches(run, "", batches)

        size = self.policy.image_size
        noise = trial_images(cfg.height or size, cfg.width or size, self.policy.device)
        check_gradient("reward", self.reward, noise, self.prompts)
        if isinstance(self.erasure, ImageConstraint):
            check_gradient("erasure cost", self.erasure.cost, noise, self.erasure.prompts)

        if cfg.pretraining_weight and self.pretraining is None:
            self.pretraining = self._own_pairs(run)
        if isinstance(self.erasure, ObjectiveConstraint):
            self.erasure.prepare(self.policy)

    def step(self, run: TrainingRun) -> ReFLMetrics:
        """Samples a batch, scores it and takes one gradient step.

        Raises:
            ValueError: The reward or the erasure cost gave not one number for each image.
        """
        cfg, erasure, pairs = self.config, self.erasure, self.pretraining
        reward_step = int(torch.randint(cfg.first_reward_step, cfg.last_reward_step + 1, (), generator=run.generator))

        batch = draw_batch(run, self.prompts, cfg.batch_size)
        rewards = self._accumulate(run, batch, lambda *part: self._reward_term(*part, reward_step))
        costs, cosine = None, 0.0
        if erasure is not None:
            before = [gradient.clone() for gradient in self._gradients()]
            batch = draw_batch(run, erasure.prompts, cfg.erasure_batch_size)
            costs = self._accumulate(run, batch, lambda *part: self._erasure_term(*part, erasure, reward_step))
            cosine = _cosine(before, self._gradients())
        losses = None
        if cfg.pretraining_weight and pairs is not None:
            chosen = draw_batch(run, range(len(pairs.captions)), cfg.pretraining_batch_size)
            losses = self._accumulate(run, chosen, lambda *part: self._pretraining_term(*part, pairs))

        # The terms have added up in each process; a last backward, of nothing, averages over the processes.
        run.backward(torch.stack([0.0 * p.sum() for p in self.policy.trainable_parameters()]).sum(), sync=True)
        grad_norm = run.update()

        cost, weight = 0.0, 0.0
        if erasure is not None and costs is not None:
            cost, weight = run.mean(costs), erasure.lagrangian.weight
            if math.isfinite(cost):  # otherwise the update was skipped, and there is nothing to answer
                erasure.lagrangian.update(cost)
                if self.early_stopping is not None:
                    self.early_stopping.note_cost(cost)
        return ReFLMetrics(
            reward=run.mean(rewards),
            reward_loss=run.mean(hinge(rewards, margin=cfg.reward_margin)),
            pretraining_loss=0.0 if losses is None else run.mean(losses),
            erasure_violation=cost,
            erasure_weight=weight,
            gradient_cosine=run.mean(cosine),
            grad_norm=grad_norm,
            reward_step=reward_step,
        )

    def evaluate(self, run: TrainingRun) -> None:
        """Measures the distance from the reference, and evaluates the held-out prompts, or logs some pictures."""
        with run.averaged():
            run.log({"train/distance": distance_to_reference(self.policy)})
        if self.early_stopping is None:
            log_pictures(run, self)
        else:
            evaluate_held_out(run, self)

    # The three terms of the loss: each gives its mean over some samples, and what it measured of each.

    def _reward_term(self, prompts: list[str], seeds: list[int], reward_step: int) -> tuple[Tensor, PerSample]:
        cfg = self.config
        images = one_step_images(self.policy, prompts, seeds, cfg, reward_step=reward_step)
        rewards = scores_of("reward", self.reward, images, self._captions(prompts))
        return cfg.reward_scale * hinge(rewards, margin=cfg.reward_margin).mean(), rewards

    def _erasure_term(
        self, prompts: list[str], seeds: list[int], erasure: ErasureConstraint, reward_step: int
    ) -> tuple[Tensor, PerSample]:
        cfg = self.config
        if isinstance(erasure, ImageConstraint):
            images = one_step_images(self.policy, prompts, seeds, cfg, reward_step=reward_step)
            cost = erasure.violation(images, self._captions(prompts))
        else:
            cost = erasure.violation(self.policy, ConceptBatch(prompts, seeds))
        return cfg.reward_scale * erasure.lagrangian.weight * cost.mean(), cost

    def _pretraining_term(
        self, indices: list[int], seeds: list[int], pairs: PretrainingPairs
    ) -> tuple[Tensor, PerSample]:
        conditioning = self.policy.encode([pairs.captions[k] for k in indices])
        latents = pairs.latents[indices].to(self.policy.device)
        loss = denoising_loss(self.policy, latents, conditioning, seeds=seeds)
        return self.config.pretraining_weight * loss.mean(), loss

    # Small things.

    def _accumulate(
        self,
        run: TrainingRun,
        batch: Sequence[tuple[Item, int]],
        term: Callable[[list[Item], list[int]], tuple[Tensor, PerSample]],
    ) -> PerSample:
        """Adds the gradient of a term's mean over a batch, some samples at a time, and returns what it measured."""
        measured = []
        for start in range(0, len(batch), self.config.micro_batch_size):
            items, seeds = zip(*batch[start : start + self.config.micro_batch_size], strict=True)
            with run.autocast():
                loss, values = term(list(items), list(seeds))
            run.backward(loss * (len(items) / len(batch)), sync=False)
            measured.append(values.detach().float())
        return torch.cat(measured)

    def _gradients(self) -> list[Tensor]:
        """Returns the gradient of each trained weight as it has been added up so far."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.policy.trainable_parameters()]

    def _captions(self, prompts: list[str]) -> list[str]:
        """Repeats each prompt for the images that it stands for."""
        return [prompt for prompt in prompts for _ in range(max(1, self.config.low_variance_noises))]

    @property
    def _pool(self) -> int:
        """Number of pairs that are drawn where none are given."""
        batch = self.config.pretraining_batch_size
        return self.config.pretraining_pairs or max(batch, min(POOL_BATCHES * batch, POOL))

    def _own_pairs(self, run: TrainingRun) -> PretrainingPairs:
        """Draws the pairs of the pretraining term from the frozen policy, each process its part."""
        cfg, count = self.config, self._pool
        captions = [self.prompts[k % len(self.prompts)] for k in range(count)]
        mine = run.shard(range(count))
        part = pairs_from_policy(
            self.policy,
            captions[mine.start : mine.stop],
            count=len(mine),
            steps=cfg.steps,
            guidance=ClassifierFree(max(cfg.guidance_scale, 1.0)),
            seed=2_000_000 + run.config.seed + mine.start,
            height=cfg.height,
            width=cfg.width,
            progress=run.is_main and run.config.progress,
        )
        return PretrainingPairs(run.gather(part.latents), captions)

    def tagged(self, metrics: ReFLMetrics, run: TrainingRun) -> dict[str, float]:
        """Returns what was measured under the tags that docs/refl.md defines, without what was switched off."""
        values = {
            "reward/mean": metrics.reward,
            "train/reward_loss": metrics.reward_loss,
            "train/grad_norm": metrics.grad_norm,
            "train/reward_step": metrics.reward_step,
        }
        if self.config.pretraining_weight:
            values["train/pretraining_loss"] = metrics.pretraining_loss
        if self.erasure is not None:
            values["erasure/violation"] = metrics.erasure_violation
            values["erasure/weight"] = metrics.erasure_weight
            values["erasure/gradient_cosine"] = metrics.gradient_cosine
        return values


def _cosine(first: Sequence[Tensor], both: Sequence[Tensor]) -> float:
    """Returns the cosine between a gradient and what was then added to it; 0 where either is zero."""
    sums = torch.zeros(3, device=first[0].device)
    for one, total in zip(first, both, strict=True):
        a, b = one.flatten().float(), (total - one).flatten().float()
        sums += torch.stack([a @ b, a @ a, b @ b])
    product, squared, added = sums.tolist()
    return product / math.sqrt(squared) / math.sqrt(added) if squared and added else 0.0
