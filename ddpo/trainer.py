"""The DDPO trainer.

Algorithm of Black et al. (2023), https://arxiv.org/abs/2305.13301: denoising is a decision process, whose steps are
made likelier or less likely by how much better than expected the finished image is. With options of later work: a
divergence penalty (DPOK), advantages within a group (GRPO), and a constraint that keeps an erased concept erased. What
is not here: the engine (`training`), the denoising and its densities (`policy`), the arithmetic (`loss`, `advantage`),
the scoring (`collect`). See docs/ddpo.md for each departure from the authors' code, and for results.
"""

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from erasure import ErasureConstraint, ImageConstraint, ObjectiveConstraint
from erasure.protocols import ConceptBatch
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Trajectory
from overpaint.policy.prompts import check_prompts
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
from overpaint.training.loop import check_image_size
from rewards import RewardLike, as_reward

from .advantage import EPSILON, PromptStatistics, centred, centred_advantages, group_advantages, round_advantages
from .collect import Collector, ScoredSamples, requested_again_on_failure, tagged
from .config import DDPOConfig
from .gradient import PolicyGradient, measured_by
from .requests import SampleRequest, draw_requests, pairs_of_update
from .scoring import ScoringConfig
from .steps import step_plan


class DDPOMetrics(NamedTuple):
    """What one round measured: means over all processes, but where it says otherwise."""

    reward: float
    reward_std: float
    erasure_reward: float
    """Reward of the samples of the concept."""
    erasure_violation: float
    erasure_weight: float
    loss: float
    grad_norm: float
    kl: float
    approx_kl_k1: float
    approx_kl_k3: float
    clip_fraction: float
    ratio_max: float
    """Largest |ratio - 1| of the round."""
    ratio_start: float
    """Largest |ratio - 1| before the first update of the round, when nothing has changed yet."""
    retries: float
    """Tries of the reward that failed, in a process."""
    seconds_sampling: float
    seconds_reward: float
    seconds_update: float


class Advantages(NamedTuple):
    """By how much the samples of a round are better than expected, and what that was computed from."""

    rewards: Float[Tensor, " samples"]
    """Of the samples of all processes, on the CPU; as the next two."""
    concept_rewards: Float[Tensor, " concept_samples"]
    violations: Float[Tensor, " concept_samples"]
    advantages: Float[Tensor, " mine"]
    """Of this process's samples, clipped; on the device."""


class DDPOTrainer:
    """Tunes a policy by policy gradients over whole trajectories; the reward needs no gradient.

        trainer = DDPOTrainer(policy, reward, prompts, DDPOConfig(samples_per_round=64))
        trainer.train(TrainingConfig(output_dir="run", iterations=100, learning_rate=3e-4))

    An iteration of the run is a round: samples are drawn and scored, and trained on in one or more updates.

    Args:
        policy: What is tuned, in place; needs a LoRA or `train=`.
        reward: What is raised, differentiable or not; a reward or a plain function of images and prompts.
        prompts: What images are drawn for, with repetition; there may be fewer of them than processes.
        config: Settings; those of the authors' code by default.
        erasure: What is kept erased: a cost on images of the concept, or an objective on noise predictions.
        held_out: Prompts and a reward that are not trained on, for early stopping; the best weights by it remain.
        scoring: How the reward is run beside the sampling.

    Raises:
        ValueError: There are no prompts, the policy has nothing to train, or there is patience without anything held
            out; or the VAE's factor does not divide a side of the images.
    """

    name: str = "DDPO"

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardLike,
        prompts: Sequence[str],
        config: DDPOConfig | None = None,
        *,
        erasure: ErasureConstraint | None = None,
        held_out: HeldOut | None = None,
        scoring: ScoringConfig | None = None,
    ) -> None:
        check_trainable(policy)
        self.policy = policy
        self.reward = reward = as_reward(reward)
        self.prompts = check_prompts(prompts)
        self.config = cfg = config or DDPOConfig()
        self.erasure = erasure
        self.early_stopping = EarlyStopping.of(cfg, held_out, constrained=erasure is not None)
        self.guidance = ClassifierFree(cfg.guidance_scale)
        self.statistics = PromptStatistics(cfg.buffer_size, cfg.min_count)
        check_image_size(self)
        step_weights, self.chosen_steps = step_plan(policy, cfg)
        self.gradient = PolicyGradient(policy, cfg, self.guidance, step_weights)
        self.collector = Collector(
            policy,
            self._rollout,
            reward,
            erasure.cost if isinstance(erasure, ImageConstraint) else None,
            batch_size=cfg.sampling_batch_size,
            scoring=scoring,
        )

    def train(self, run_config: TrainingConfig, *, notes: Mapping[str, Any] | None = None) -> DDPOMetrics | None:
        """Trains, or goes on with an interrupted run, as `overpaint.training.train` says.

        Args:
            run_config: Settings of the run.
            notes: What only the program knows, for the record of the run.

        Raises:
            RewardError: The reward failed for good. The samples are kept, and scored when the run is resumed.
        """
        state: dict[str, Stateful] = {"statistics": self.statistics}
        if self.erasure is not None:
            state["lagrangian"] = self.erasure.lagrangian
        about = {} if self.erasure is None else {"erasure": self.erasure.description()}
        return train(self, run_config, state=state, configs={"ddpo": self.config}, about=about, notes=notes)

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell, and readies an erasure objective.

        Raises:
            ValueError: A round does not divide evenly among processes, updates and batches, or the erasure objective
                cannot work with this policy.
        """
        cfg, processes = self.config, run.num_processes
        counts = {"samples_per_round": cfg.samples_per_round}
        if self.erasure is not None:
            counts["erasure_samples_per_round"] = cfg.erasure_samples_per_round
        for name, count in counts.items():
            if count % (cfg.updates_per_round * processes):
                raise ValueError(
                    f"DDPOConfig.{name} must divide evenly among updates_per_round={cfg.updates_per_round} times "
                    f"{processes} processes, got {count}"
                )
            if count % cfg.images_per_prompt:
                raise ValueError(
                    f"DDPOConfig.{name} must divide by images_per_prompt={cfg.images_per_prompt}, got {count}"
                )
        samples = (cfg.samples_per_round + self._of_concept) // processes
        pairs = samples // cfg.updates_per_round * cfg.trained_steps
        if samples % cfg.sampling_batch_size:
            raise ValueError(
                f"DDPOConfig.sampling_batch_size must divide the {samples} samples that a process draws in a round, "
                f"got {cfg.sampling_batch_size}"
            )
        if pairs % cfg.minibatch_size:
            raise ValueError(
                f"DDPOConfig.minibatch_size must divide the {pairs} pairs of sample and step that a process trains on "
                f"in an update, got {cfg.minibatch_size}"
            )
        if isinstance(self.erasure, ObjectiveConstraint):
            self.erasure.prepare(self.policy)

    def step(self, run: TrainingRun) -> DDPOMetrics:
        """Does one round: draws and scores samples, and takes its updates."""
        cfg = self.config
        weight = 0.0 if self.erasure is None else self.erasure.lagrangian.weight
        with requested_again_on_failure(run):
            requests, scored = self._sample(run)
        advantages = self.compute_advantages(run, requests, scored, weight)

        start = time.perf_counter()
        parts = [
            pairs_of_update(
                run,
                requests,
                k,
                updates=cfg.updates_per_round,
                steps=cfg.steps,
                trained_steps=cfg.trained_steps,
                chosen_steps=self.chosen_steps,
            )
            for k in range(cfg.updates_per_round)
        ]
        trajectory = self.gradient.with_old_log_probs(run, scored.trajectory, parts)
        objective, updates = [], []
        for number, pairs in enumerate(parts):
            objective.append(self._objective(run))
            measure_kl = number == 0 and run.iteration % cfg.kl_every == 0
            updates.append(self.gradient.update(run, pairs, trajectory, advantages.advantages, measure_kl=measure_kl))
        measured = measured_by(run, updates, kl_in_loss=cfg.kl_weight > 0)
        seconds_update = time.perf_counter() - start

        violation = fmean(objective)
        if isinstance(self.erasure, ImageConstraint):
            violation = float(advantages.violations.mean())
            self.erasure.lagrangian.update(violation)
        if self.early_stopping is not None and self.erasure is not None:
            self.early_stopping.note_cost(violation)
        if run.iteration % cfg.pictures_every == 0:
            prompts = [prompt for part in requests for prompt in part.my_prompts]
            shown = slice(len(scored.pictures))
            run.log_images("round", scored.pictures, prompts[shown], rewards=scored.rewards[shown])
        return DDPOMetrics(
            reward=float(advantages.rewards.mean()),
            reward_std=float(advantages.rewards.std(correction=0)),
            erasure_reward=float(advantages.concept_rewards.mean()),
            erasure_violation=violation,
            erasure_weight=weight,
            **measured,
            retries=scored.retries,
            seconds_sampling=scored.seconds_sampling,
            seconds_reward=scored.seconds_reward,
            seconds_update=seconds_update,
        )

    def tagged(self, metrics: DDPOMetrics, run: TrainingRun) -> dict[str, float]:
        """Returns what was measured under the tags that docs/ddpo.md defines, without what was switched off."""
        values = tagged(metrics, (run.iteration + 1) * (self.config.samples_per_round + self._of_concept))
        values["policy/ratio_start"] = metrics.ratio_start
        if self.config.kl_weight or run.iteration % self.config.kl_every == 0:
            values["policy/kl"] = metrics.kl
        if self.config.estimator == "importance":
            for name in ("ratio_max", "clip_fraction", "approx_kl_k1", "approx_kl_k3"):
                values[f"policy/{name}"] = getattr(metrics, name)
        if self.erasure is not None:
            values["erasure/violation"] = metrics.erasure_violation
            values["erasure/weight"] = metrics.erasure_weight
            if self._of_concept:
                values["erasure/reward"] = metrics.erasure_reward
        return values

    def evaluate(self, run: TrainingRun) -> None:
        """Evaluates the held-out prompts, drawn as in a round."""
        evaluate_held_out(run, self, eta=self.config.eta)

    # The parts of a round.

    def _rollout(self, conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
        cfg = self.config
        return self.policy.rollout(
            conditioning,
            steps=cfg.steps,
            guidance=self.guidance,
            eta=cfg.eta,
            seeds=seeds,
            height=cfg.height,
            width=cfg.width,
        )

    def _sample(self, run: TrainingRun) -> tuple[list[SampleRequest], ScoredSamples]:
        """Draws this process's samples and has them scored: those of the prompts, then those of the concept."""
        cfg = self.config
        wanted = [(self.prompts, cfg.samples_per_round)]
        if isinstance(self.erasure, ImageConstraint):
            wanted.append((self.erasure.prompts, cfg.erasure_samples_per_round))
        requests = [
            draw_requests(
                run, population, count, updates=cfg.updates_per_round, images_per_prompt=cfg.images_per_prompt
            )
            for population, count in wanted
        ]
        return requests, self.collector.collect(run, requests)

    def compute_advantages(
        self, run: TrainingRun, requests: list[SampleRequest], scored: ScoredSamples, weight: float
    ) -> Advantages:
        """Computes advantages from rewards and violations.

        Samples of the concept are worth reward - weight * violation. They are compared with each other, or with the
        others of their prompt, and never with earlier rounds, where the weight was another. Their advantages have the
        unit of the others', one standard deviation of the reward: were they normalised by their own, no weight could
        make the constraint count for more than the reward does.
        """
        cfg, mine = self.config, len(requests[0].mine)
        compare = {
            "prompt": self.statistics.advantages,
            "group": group_advantages,
            "centred": centred_advantages,
            "round": round_advantages,
        }[cfg.baseline]
        rewards = requests[0].gathered(run, scored.rewards[:mine])
        parts = [compare(rewards, requests[0].prompts)[requests[0].mine]]
        concept_rewards = violations = torch.zeros(1)
        if isinstance(self.erasure, ImageConstraint):
            concept_rewards = requests[1].gathered(run, scored.rewards[mine:])
            violations = self.erasure.relative(requests[1].gathered(run, scored.costs))
            worth = centred(concept_rewards - weight * violations, self._compared(requests[1]))
            unit = centred(rewards, self._compared(requests[0])).square().mean().sqrt()
            parts.append((worth / (unit + EPSILON))[requests[1].mine])
        clamped = torch.cat(parts).clamp(-cfg.max_advantage, cfg.max_advantage)
        return Advantages(rewards, concept_rewards, violations, clamped.to(run.device, torch.float32))

    def _objective(self, run: TrainingRun) -> float:
        """Adds the gradient of an erasure objective, if there is one, moves its weight, and returns its violation."""
        erasure = self.erasure
        if not isinstance(erasure, ObjectiveConstraint):
            return 0.0
        batch = draw_batch(run, erasure.prompts, self.config.erasure_samples_per_round // self.config.updates_per_round)
        total = torch.zeros((), device=run.device)
        for first in range(0, len(batch), self.config.minibatch_size):
            prompts, seeds = zip(*batch[first : first + self.config.minibatch_size], strict=True)
            with run.autocast():
                cost = erasure.violation(self.policy, ConceptBatch(list(prompts), list(seeds))).sum() / len(batch)
            run.backward(erasure.lagrangian.weight * cost, sync=False)
            total += cost.detach()
        mean = run.mean(total)
        if math.isfinite(mean):  # otherwise the update is skipped, and there is nothing to answer
            erasure.lagrangian.update(mean)
        return mean

    # Small things.

    def _compared(self, requests: SampleRequest) -> list[str]:
        """Returns a name for each sample of those that it is compared with: those of its prompt, or all."""
        return requests.prompts if self.config.images_per_prompt > 1 else [""] * len(requests.prompts)

    @property
    def _of_concept(self) -> int:
        """Samples of the concept that a round draws, over all processes."""
        return self.config.erasure_samples_per_round if isinstance(self.erasure, ImageConstraint) else 0
