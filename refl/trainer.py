"""The ReFL trainer.

Algorithm 1 of Xu et al. (2023), https://arxiv.org/abs/2304.05977, with three additions: a constraint that keeps an
erased concept erased, or an erasure that keeps a floor of the reward, and early stopping by a second, held-out reward.
What is not here: the engine and the loop (`training`), the denoising (`policy`), the constraints' arithmetic
(`erasure`), the terms of the loss (`terms`). See docs/refl.md for each departure from the authors' code, and for
results.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from erasure import (
    ErasureConstraint,
    ImageConstraint,
    ObjectiveConstraint,
    QualityConstraint,
    ReferenceDivergence,
    RewardFloor,
    WeightController,
)
from erasure.constraint import check_sharded
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.prompts import check_prompts
from overpaint.settings import AnyFloat, Count, Index
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
from overpaint.training.record import prompts_record
from rewards import RewardLike, as_reward

from .config import ReFLConfig
from .distance import distance_to_reference
from .gradient_check import check_gradient, not_differentiable, trial_images
from .pretraining import PretrainingPairs, own_pairs, pretraining_term
from .terms import (
    Term,
    accumulate,
    captions_of,
    divergence_term,
    erasure_term,
    floor_term,
    join_gradients,
    reward_term,
    take_gradient,
)


class ReFLMetrics(NamedTuple):
    """What one iteration measured: means over the batch of all processes, before the update."""

    reward: AnyFloat
    """0 where no reward is computed: before it has its say, and under a ceiling of the divergence."""
    reward_loss: AnyFloat
    """Of the hinge; 0 before the reward has its say, and where there is a floor in its place."""
    pretraining_loss: AnyFloat
    erasure_violation: AnyFloat
    erasure_weight: AnyFloat
    floor_violation: AnyFloat
    floor_weight: AnyFloat
    gradient_cosine: AnyFloat
    grad_norm: AnyFloat
    reward_step: Index


class ReFLTrainer:
    """Tunes a policy by backpropagating a reward through one late denoising step.

        trainer = ReFLTrainer(policy, reward, prompts, ReFLConfig(batch_size=8))
        trainer.train(TrainingConfig(output_dir="run", iterations=100))

    With an erasure, the reward is raised subject to the erasure's ceiling. With a floor besides, it is the other way
    round: the erasure's loss is lowered subject to the floor.

    Args:
        policy: What is tuned, in place; needs a LoRA or `train=`.
        reward: What is raised, on the policy's device; a reward or a plain function of images and prompts. Must be
            differentiable in the images.
        prompts: What images are drawn for; with a floor, those whose pictures are to stay good.
        config: Settings; those of the authors' code by default.
        erasure: What is kept erased: a cost on images of the concept, or an objective on noise predictions. With a
            floor, what is minimised; its weight should then be a `FixedWeight`, unless its ceiling is to be enough.
        floor: What is kept good while the concept is erased: the reward, or the nearness to the reference policy, which
            leaves the reward out.
        pretraining: Pairs of the pretraining term, or captions for which the frozen policy draws them, which takes them
            in turn; None is the prompts.
        held_out: Prompts and a reward that are not trained on, for early stopping; the best weights by it remain.

    Raises:
        ValueError: The reward says that it has no gradient, there are no prompts or no pairs, the policy has nothing to
            train, there is patience without anything held out, the VAE's factor does not divide a side of the images,
            a floor comes without an erasure, or a divergence is to be measured between steps without noise.
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
        floor: QualityConstraint | None = None,
        pretraining: PretrainingPairs | Sequence[str] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.policy = policy
        self.reward = as_reward(reward)
        self.prompts = check_prompts(prompts)
        self.config = config or ReFLConfig()
        self.erasure = erasure
        self.floor = floor
        given = isinstance(pretraining, PretrainingPairs)
        self.pretraining = pretraining if given else None
        self._captions = self.prompts if given or pretraining is None else check_prompts(pretraining)
        if self._rewarded and not self.reward.differentiable:
            raise not_differentiable("reward", reward)
        check_trainable(policy)
        if floor is not None and erasure is None:
            raise ValueError("floor must come with an erasure, which is lowered subject to it, got none")
        if self.config.reward_from and (erasure is None or floor is not None):
            found = "no erasure" if erasure is None else "a floor"
            raise ValueError(
                f"ReFLConfig.reward_from must be 0 but with an erasure and no floor, got {self.config.reward_from} "
                f"with {found}"
            )
        if isinstance(floor, ReferenceDivergence) and self.config.eta == 0:
            raise ValueError("ReFLConfig.eta must be above 0 with a ReferenceDivergence, got 0")
        pairs = self.pretraining
        if pairs is not None and not 0 < len(pairs.captions) == len(pairs.latents):
            raise ValueError(
                "pretraining must hold at least one pair and a caption for each of its latents, got "
                f"{len(pairs.latents)} latents and {len(pairs.captions)} captions"
            )
        self.early_stopping = EarlyStopping.of(self.config, held_out, constrained=erasure is not None)
        self.guidance = ClassifierFree(self.config.guidance_scale)
        check_image_size(self)

    def train(self, run_config: TrainingConfig, *, notes: Mapping[str, Any] | None = None) -> ReFLMetrics | None:
        """Trains, or goes on with an interrupted run, as `overpaint.training.train` says.

        Args:
            run_config: Settings of the run.
            notes: What only the program knows, for the record of the run.

        Raises:
            ValueError: The reward would never have its say, or as `overpaint.training.train` says.
        """
        if (first := self.config.reward_from) >= run_config.iterations:
            raise ValueError(f"ReFLConfig.reward_from must be below iterations={run_config.iterations}, got {first}")
        constraints = {"erasure": self.erasure, "floor": self.floor}
        state: dict[str, Stateful] = {} if self.erasure is None else self.erasure.state()
        if self.floor is not None:
            state["floor"] = self.floor.lagrangian
        about = {name: one.description() for name, one in constraints.items() if one is not None}
        if self._captions is not self.prompts:
            about["pretraining"] = prompts_record(self._captions)
        return train(self, run_config, state=state, configs={"refl": self.config}, about=about, notes=notes)

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell, draws pairs where none were given, and readies an erasure objective.

        Raises:
            ValueError: The reward, the erasure cost or an attack's score has no gradient to the images, a batch does
                not divide evenly among the processes, the objective cannot work with this policy, or an attack finds no
                room behind a prompt.
        """
        cfg = self.config
        batches = {"batch_size": cfg.batch_size}
        if cfg.pretraining_weight:
            batches["pretraining_batch_size"] = cfg.pretraining_batch_size
            if self.pretraining is None:
                batches["pretraining_pairs"] = cfg.pool
        if self.erasure is not None:
            batches["erasure_batch_size"] = cfg.erasure_batch_size
        check_batches(run, "", batches)
        check_sharded(run, self.erasure)

        size = self.policy.image_size
        noise = trial_images(cfg.height or size, cfg.width or size, self.policy.device)
        if self._rewarded:
            check_gradient("reward", self.reward, noise, self.prompts)
        if isinstance(self.erasure, ImageConstraint):
            check_gradient("erasure cost", self.erasure.cost, noise, self.erasure.prompts)
            if self.erasure.attack is not None and self.erasure.attack.score is not None:
                check_gradient("attack score", self.erasure.attack.score, noise, self.erasure.prompts)
        if self.erasure is not None:
            self.erasure.check(self.policy)

        if cfg.pretraining_weight and self.pretraining is None:
            self.pretraining = own_pairs(run, self.policy, self._captions, cfg)
        if isinstance(self.erasure, ObjectiveConstraint):
            self.erasure.prepare(self.policy)

    def step(self, run: TrainingRun) -> ReFLMetrics:
        """Samples a batch, scores it and takes one gradient step.

        Raises:
            ValueError: The reward or the erasure cost gave not one number for each image.
        """
        cfg, erasure, floor, pairs = self.config, self.erasure, self.floor, self.pretraining
        parameters, size = self.policy.trainable_parameters(), cfg.micro_batch_size
        weight, erasure_weight = self._weights()
        reward_step = int(torch.randint(cfg.first_reward_step, cfg.last_reward_step + 1, (), generator=run.generator))

        rewarded = None
        if self._heard(run):
            batch = draw_batch(run, self.prompts, cfg.batch_size)
            rewarded = accumulate(
                run, batch, self._first_term(reward_step), weight=cfg.reward_scale * weight, size=size
            )
        erased, cosine = None, 0.0
        if erasure is not None:
            gradient = take_gradient(run, parameters)
            batch = erasure.prompts.draw(run, cfg.erasure_batch_size)
            term = erasure_term(self.policy, erasure, cfg, reward_step, run.iteration)
            erased = accumulate(run, batch, term, weight=cfg.reward_scale * erasure_weight, size=size)
            told = [prompt for prompt, _ in batch]
            images = isinstance(erasure, ImageConstraint)  # of which a prompt may have several
            erasure.prompts.note(run, captions_of(told, cfg) if images else told, erased.losses)
            other = take_gradient(run, parameters)
            cosine = join_gradients(parameters, gradient, other, project=cfg.project_conflicts)
        denoised = None
        if cfg.pretraining_weight and pairs is not None:
            chosen = draw_batch(run, range(len(pairs.captions)), cfg.pretraining_batch_size)
            term = pretraining_term(self.policy, pairs, cfg)
            denoised = accumulate(run, chosen, term, weight=cfg.pretraining_weight, size=size)

        # The terms have added up in each process; a last backward, of nothing, averages over the processes.
        run.backward(torch.stack([0.0 * p.sum() for p in parameters]).sum(), sync=True)
        grad_norm = run.update()
        if isinstance(erasure, ObjectiveConstraint):
            erasure.learn(run)

        metrics = ReFLMetrics(
            reward=0.0 if rewarded is None or not self._rewarded else run.mean(rewarded.values),
            reward_loss=0.0 if rewarded is None or floor is not None else run.mean(rewarded.losses),
            pretraining_loss=0.0 if denoised is None else run.mean(denoised.losses),
            erasure_violation=0.0 if erased is None else run.mean(erased.losses),
            erasure_weight=0.0 if erasure is None else erasure.lagrangian.weight,
            floor_violation=0.0 if rewarded is None or floor is None else run.mean(rewarded.losses),
            floor_weight=0.0 if floor is None else floor.lagrangian.weight,
            gradient_cosine=cosine,
            grad_norm=grad_norm,
            reward_step=reward_step,
        )
        self._answer(metrics)
        return metrics

    def evaluate(self, run: TrainingRun) -> None:
        """Measures the distance from the reference, and evaluates the held-out prompts, or logs some pictures."""
        with run.averaged():
            run.log({"train/distance": distance_to_reference(self.policy)})
        if self.early_stopping is None:
            log_pictures(run, self)
        else:
            evaluate_held_out(run, self)

    # What belongs to the constraints.

    @property
    def _rewarded(self) -> bool:
        """Whether rewards are computed."""
        return not isinstance(self.floor, ReferenceDivergence)

    def _heard(self, run: TrainingRun) -> bool:
        """Whether the reward has its say in this iteration."""
        return run.iteration >= self.config.reward_from

    def _first_term(self, reward_step: int) -> Term[str]:
        """Returns the term of the prompts: of the reward, or of what is to be kept while the concept is erased."""
        if isinstance(self.floor, ReferenceDivergence):
            return divergence_term(self.policy, self.config, self.floor)
        if isinstance(self.floor, RewardFloor):
            return floor_term(self.policy, self.reward, self.config, reward_step, self.floor)
        return reward_term(self.policy, self.reward, self.config, reward_step)

    def _weights(self) -> tuple[float, float]:
        """Returns what the term of the prompts and that of the erasure are multiplied by, as their controllers say."""
        floor, erasure = (None if one is None else one.lagrangian for one in (self.floor, self.erasure))
        return _weight(floor, erasure), _weight(erasure, floor)

    def _answer(self, metrics: ReFLMetrics) -> None:
        """Moves the weights by what was measured; what is not finite has skipped the update, and is not answered."""
        violations = []
        for constraint, violation in (
            (self.erasure, metrics.erasure_violation),
            (self.floor, metrics.floor_violation),
        ):
            if constraint is not None and math.isfinite(violation):
                constraint.lagrangian.update(violation)
                violations.append(violation)
        if self.early_stopping is not None and violations:
            self.early_stopping.note_cost(max(violations))

    def resize(self, sizes: Mapping[str, Count]) -> None:
        """Takes other sizes of its parts; see `overpaint.training.memory`."""
        self.config = replace(self.config, **sizes)

    def tagged(self, metrics: ReFLMetrics, run: TrainingRun) -> dict[str, float]:
        """Returns what was measured under the tags that docs/refl.md defines, without what was switched off."""
        values: dict[str, float] = {"train/grad_norm": metrics.grad_norm, "train/reward_step": metrics.reward_step}
        heard = self._heard(run)
        if self._rewarded and heard:
            values["reward/mean"] = metrics.reward
        if self.floor is None and heard:
            values["train/reward_loss"] = metrics.reward_loss
        if self.floor is not None:
            values["floor/violation"] = metrics.floor_violation
            values["floor/weight"] = metrics.floor_weight
        if self.config.pretraining_weight:
            values["train/pretraining_loss"] = metrics.pretraining_loss
        if self.erasure is not None:
            values["erasure/violation"] = metrics.erasure_violation
            values["erasure/weight"] = metrics.erasure_weight
            if heard:
                values["erasure/gradient_cosine"] = metrics.gradient_cosine
            values |= self.erasure.measured(run)
        return values


def _weight(own: WeightController | None, other: WeightController | None) -> float:
    """Returns a term's weight: its own controller's, times what the other term's controller leaves it."""
    return (1.0 if own is None else own.weight) * (1.0 if other is None else other.other_weight)
