"""The DDPO trainer.

Algorithm of Black et al. (2023), https://arxiv.org/abs/2305.13301: denoising is a decision process, whose steps are
made likelier or less likely by how much better than expected the finished image is. With options of later work: a
divergence penalty (DPOK), advantages within a group (GRPO) or by a critic, a constraint that keeps an erased concept
erased, and erasure under a floor of the reward. What is not here: the engine (`training`), the denoising and its
densities (`policy`), the arithmetic (`loss`, `advantage`, `critic`, `baseline`), the weights of the two forms
(`constraints`), the scoring (`collect`). See docs/ddpo.md for each departure from the authors' code, and for results.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

from erasure import ErasureConstraint, ImageConstraint, ObjectiveConstraint, QualityConstraint, RewardFloor
from erasure.constraint import check_sharded
from erasure.floor import ReferenceDivergence
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Trajectory
from overpaint.policy.prompts import check_prompts
from overpaint.settings import AnyFloat, Count
from overpaint.training import (
    EarlyStopping,
    HeldOut,
    Stateful,
    TrainingConfig,
    TrainingRun,
    check_trainable,
    evaluate_held_out,
    train,
)
from overpaint.training.loop import check_image_size
from rewards import RewardLike, as_reward

from .baseline import Advantages, Baseline
from .collect import Collector, ScoredSamples, requested_again_on_failure, tagged
from .config import DDPOConfig
from .constraints import add_objective, weights_of
from .gradient import PolicyGradient, Term, Update, measured_by
from .requests import Pairs, SampleRequest, draw_requests, pairs_of_update
from .scoring import ScoringConfig
from .steps import step_plan


class DDPOMetrics(NamedTuple):
    """What one round measured: means over all processes, but where it says otherwise."""

    reward: AnyFloat
    reward_std: AnyFloat
    erasure_reward: AnyFloat
    """Reward of the samples of the concept."""
    erasure_violation: AnyFloat
    erasure_weight: AnyFloat
    floor_violation: AnyFloat
    floor_weight: AnyFloat
    gradient_cosine: AnyFloat
    """Between the gradient of the prompts' samples and that of the erasure, mean over the updates."""
    critic: dict[str, float]
    """What the critic measured, by tag; empty without one."""
    loss: AnyFloat
    grad_norm: AnyFloat
    kl: AnyFloat
    approx_kl_k1: AnyFloat
    approx_kl_k3: AnyFloat
    clip_fraction: AnyFloat
    ratio_max: AnyFloat
    """Largest |ratio - 1| of the round."""
    ratio_start: AnyFloat
    """Largest |ratio - 1| before the first update of the round, when nothing has changed yet."""
    retries: AnyFloat
    """Tries of the reward that failed, in a process."""
    seconds_sampling: AnyFloat
    seconds_reward: AnyFloat
    seconds_update: AnyFloat


class Taken(NamedTuple):
    """An update that was taken, and the relative violations that were measured in it."""

    update: Update
    violation: float
    floor_violation: float


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
        floor: Turns the two around: the erasure is what is to be had, and its weight usually fixed; the reward of the
            prompts is not to fall below a floor, or the steps not to part from the reference policy's.
        held_out: Prompts and a reward that are not trained on, for early stopping; the best weights by it remain.
        scoring: How the reward is run beside the sampling.

    Raises:
        ValueError: There are no prompts, the policy has nothing to train, there is patience without anything held out,
            or a floor without an erasure, or the divergence has both a ceiling and a weight; images are to be attacked,
            which have no gradient to their prompts; or the VAE's factor does not divide a side of the images.
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
        floor: QualityConstraint | None = None,
        held_out: HeldOut | None = None,
        scoring: ScoringConfig | None = None,
    ) -> None:
        check_trainable(policy)
        self.policy = policy
        self.reward = reward = as_reward(reward)
        self.prompts = check_prompts(prompts)
        self.config = cfg = config or DDPOConfig()
        self.erasure = erasure
        self.floor = floor
        if floor is not None and erasure is None:
            raise ValueError("floor must come with an erasure, which is lowered subject to it, got none")
        if isinstance(erasure, ImageConstraint) and erasure.attack is not None:
            raise ValueError(
                "ImageConstraint.attack must be None for DDPO, whose images have no gradient to their prompts, got "
                f"{erasure.attack!r}; use ReFL, attack an ObjectiveConstraint, or mine hard prompts alone"
            )
        if isinstance(floor, ReferenceDivergence) and cfg.kl_weight:
            raise ValueError(
                f"DDPOConfig.kl_weight must be 0 where floor is a ReferenceDivergence, got {cfg.kl_weight}"
            )
        self.early_stopping = EarlyStopping.of(cfg, held_out, constrained=erasure is not None)
        self.guidance = ClassifierFree(cfg.guidance_scale)
        check_image_size(self)
        self.steps = step_plan(policy, cfg)
        self.window: tuple[int, ...] | None = None
        """The steps that are stochastic in this round; None is all that can be."""
        self.gradient = PolicyGradient(policy, cfg, self.guidance, self.steps.weights)
        images = erasure if isinstance(erasure, ImageConstraint) else None
        self.baseline = Baseline(policy, cfg, with_violations=images is not None)
        cost = None if images is None else images.cost
        size = cfg.sampling_batch_size
        self.collector = Collector(policy, self._rollout, reward, cost, batch_size=size, scoring=scoring)
        self.references = Collector(
            policy, self._finished, reward, None, batch_size=size, scoring=scoring, kind="reference"
        )

    def train(self, run_config: TrainingConfig, *, notes: Mapping[str, Any] | None = None) -> DDPOMetrics | None:
        """Trains, or goes on with an interrupted run, as `overpaint.training.train` says.

        Args:
            run_config: Settings of the run.
            notes: What only the program knows, for the record of the run.

        Raises:
            RewardError: The reward failed for good. The samples are kept, and scored when the run is resumed.
        """
        constraints = {"erasure": self.erasure, "floor": self.floor}
        about = {name: one.description() for name, one in constraints.items() if one is not None}
        state: dict[str, Stateful] = dict(self.baseline.state)
        if self.erasure is not None:
            state |= self.erasure.state()
        if self.floor is not None:
            state["floor"] = self.floor.lagrangian
        return train(self, run_config, state=state, configs={"ddpo": self.config}, about=about, notes=notes)

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell, and readies an erasure objective.

        Raises:
            ValueError: A round does not divide evenly among processes, updates and batches, the erasure objective
                cannot work with this policy, or an attack finds no room behind a prompt.
        """
        self.config.check_shares(
            run.num_processes,
            trained_steps=self.steps.trained,
            concept_images=self._of_concept,
            with_erasure=self.erasure is not None,
        )
        check_sharded(run, self.erasure)
        self.baseline.start(run)
        if isinstance(self.erasure, ObjectiveConstraint):
            self.erasure.prepare(self.policy)

    def step(self, run: TrainingRun) -> DDPOMetrics:
        """Does one round: draws and scores samples, takes its updates, and answers what the round has measured."""
        cfg, weights = self.config, weights_of(self.erasure, self.floor)
        floor_weight = 0.0 if self.floor is None else self.floor.lagrangian.weight
        with requested_again_on_failure(run):
            self.window = self.steps.window(cfg, run.generator)
            requests = self._requests(run)
            references = self._references(run, requests[0])
            scored = self.collector.collect(run, requests)
        violations = self.erasure.relative(scored.costs) if isinstance(self.erasure, ImageConstraint) else scored.costs
        advantages = self.baseline.advantages(run, requests, scored, violations, weights)

        start = time.perf_counter()
        numbers = [update for _ in range(cfg.inner_epochs) for update in range(cfg.updates_per_round)]
        parts = [self._pairs(run, requests, update) for update in numbers]
        trajectory = self.gradient.with_old_log_probs(run, scored.trajectory, [kind for part in parts for kind in part])
        taken = [
            self._update(
                run, part, trajectory, advantages, measure_kl=number == 0 and run.iteration % cfg.kl_every == 0
            )
            for number, part in enumerate(parts)
        ]
        critic = {**advantages.explained, **self.baseline.learn(run, requests, trajectory, advantages)}
        measured = measured_by(run, [one.update for one in taken], kl_in_loss=cfg.kl_weight + weights.divergence > 0)
        seconds_update = time.perf_counter() - start

        violation, floor_violation = fmean(one.violation for one in taken), fmean(one.floor_violation for one in taken)
        if isinstance(self.erasure, ImageConstraint):
            violation = float(advantages.violations.mean())
            self.erasure.lagrangian.update(violation)
            self.erasure.prompts.note(run, requests[1].my_prompts, violations)
        if isinstance(self.floor, RewardFloor):
            own = scored.rewards[: len(requests[0].mine)]
            floor_violation = run.mean(self.floor.violation(own, None if references is None else references.rewards))
            self.floor.lagrangian.update(floor_violation)
        if self.early_stopping is not None and self.erasure is not None:
            self.early_stopping.note_cost(violation if self.floor is None else max(violation, floor_violation))
        if run.iteration % cfg.pictures_every == 0:
            prompts = [prompt for part in requests for prompt in part.my_prompts]
            shown = slice(len(scored.pictures))
            run.log_images("round", scored.pictures, prompts[shown], rewards=scored.rewards[shown])
        drawn = [one for one in (scored, references) if one is not None]
        return DDPOMetrics(
            reward=float(advantages.rewards.mean()),
            reward_std=float(advantages.rewards.std(correction=0)),
            erasure_reward=float(advantages.concept_rewards.mean()),
            erasure_violation=violation,
            erasure_weight=weights.violation,
            floor_violation=floor_violation,
            floor_weight=floor_weight,
            critic=critic,
            **measured,
            retries=sum(one.retries for one in drawn),
            seconds_sampling=sum(one.seconds_sampling for one in drawn),
            seconds_reward=sum(one.seconds_reward for one in drawn),
            seconds_update=seconds_update,
        )

    def resize(self, sizes: Mapping[str, Count]) -> None:
        """Takes other sizes of its parts; see `overpaint.training.memory`."""
        self.config = replace(self.config, **sizes)
        self.gradient.config = self.config
        self.collector.batch_size = self.references.batch_size = self.config.sampling_batch_size

    def tagged(self, metrics: DDPOMetrics, run: TrainingRun) -> dict[str, float]:
        """Returns what was measured under the tags that docs/ddpo.md defines, without what was switched off."""
        per_round = self.config.samples_per_round * (1 + self._paired) + self._of_concept
        values = tagged(metrics, (run.iteration + 1) * per_round) | metrics.critic
        values["policy/ratio_start"] = metrics.ratio_start
        if self.config.kl_weight or run.iteration % self.config.kl_every == 0:
            values["policy/kl"] = metrics.kl
        if self.config.estimator == "importance":
            for name in ("ratio_max", "clip_fraction", "approx_kl_k1", "approx_kl_k3"):
                values[f"policy/{name}"] = getattr(metrics, name)
        if self.erasure is not None:
            values["erasure/violation"] = metrics.erasure_violation
            values["erasure/weight"] = metrics.erasure_weight
            values["erasure/gradient_cosine"] = metrics.gradient_cosine
            if self._of_concept:
                values["erasure/reward"] = metrics.erasure_reward
            values |= self.erasure.measured(run)
        if self.floor is not None:
            values["floor/violation"] = metrics.floor_violation
            values["floor/weight"] = metrics.floor_weight
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
            stochastic=self.window,
            keep_means=cfg.ratio == "guard",
        )

    def _finished(self, conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
        """Draws as in a round, and keeps of the trajectory the end only."""
        whole = self._rollout(conditioning, seeds)
        return whole._replace(
            latents=whole.latents[:, -1:], log_probs=whole.log_probs[:, :0], timesteps=whole.timesteps[:0], means=None
        )

    def _requests(self, run: TrainingRun) -> list[SampleRequest]:
        """Draws what the round requests: samples of the prompts, then those of the concept."""
        cfg = self.config
        wanted = [(self.prompts, cfg.samples_per_round)]
        if isinstance(self.erasure, ImageConstraint):
            wanted.append((self.erasure.prompts, cfg.erasure_samples_per_round))
        return [
            draw_requests(
                run, population, count, updates=cfg.updates_per_round, images_per_prompt=cfg.images_per_prompt
            )
            for population, count in wanted
        ]

    def _references(self, run: TrainingRun, request: SampleRequest) -> ScoredSamples | None:
        """Draws and scores the reference policy's samples of the same prompts and seeds, where a floor needs them."""
        if not self._paired:
            return None
        with self.policy.reference():
            return self.references.collect(run, [request])

    def _pairs(self, run: TrainingRun, requests: Sequence[SampleRequest], update: int) -> list[Pairs]:
        """Returns what an update is taken on, of the prompts' samples and of the concept's."""
        cfg, count = self.config, len(requests[0].mine)
        pairs = pairs_of_update(
            run,
            requests,
            update,
            updates=cfg.updates_per_round,
            possible_steps=self.steps.possible if self.window is None else self.window,
            trained_steps=self.steps.trained,
            chosen_steps=self.steps.chosen,
        )
        ends = [0, count, count + self._of_concept // run.num_processes]
        return [pairs.between(first, end) for first, end in pairwise(ends[: len(requests) + 1])]

    def _update(
        self, run: TrainingRun, kinds: Sequence[Pairs], trajectory: Trajectory, judged: Advantages, *, measure_kl: bool
    ) -> Taken:
        """Takes one update with the present weights of the terms, and answers the violations known by then."""
        cfg, weights, violation = self.config, weights_of(self.erasure, self.floor), 0.0
        if isinstance(self.erasure, ObjectiveConstraint):
            violation = add_objective(
                run,
                self.policy,
                self.erasure,
                cfg.erasure_samples_per_round // cfg.updates_per_round,
                weight=weights.violation,
                size=cfg.minibatch_size,
            )
        unweighed = None
        if isinstance(self.floor, ReferenceDivergence) and not weights.divergence:
            unweighed = self.gradient.divergence(run, kinds[0], trajectory)
        prompts = concept = None
        if weights.reward or weights.divergence:
            prompts = Term(kinds[0], weights.reward, cfg.kl_weight + weights.divergence)
        if len(kinds) > 1 and weights.violation:
            # Where their reward counts too, their advantages have the weights in them.
            concept = Term(kinds[1], 1.0 if weights.concept_reward else weights.violation, cfg.kl_weight)
        update = self.gradient.update(
            run,
            prompts,
            trajectory,
            judged.advantages,
            concept=concept,
            measure_kl=measure_kl,
            compare=self.erasure is not None,
        )
        if isinstance(self.erasure, ObjectiveConstraint):
            self.erasure.learn(run)
        floor_violation = 0.0
        if isinstance(self.floor, ReferenceDivergence):
            floor_violation = run.mean(self.floor.violation(update.means[4:] if unweighed is None else unweighed[None]))
            if math.isfinite(floor_violation):
                self.floor.lagrangian.update(floor_violation)
        return Taken(update, violation, floor_violation)

    @property
    def _paired(self) -> bool:
        """Whether the floor compares with samples of the reference policy."""
        return isinstance(self.floor, RewardFloor) and self.floor.paired

    @property
    def _of_concept(self) -> int:
        """Samples of the concept that a round draws, over all processes."""
        return self.config.erasure_samples_per_round if isinstance(self.erasure, ImageConstraint) else 0
