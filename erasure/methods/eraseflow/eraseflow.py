"""EraseFlow: the denoising steps of an anchor's pictures become as likely under the concept's prompts.

A trajectory x_T … x_0 is drawn under the anchor prompt a. For the concept's prompt c, over some of its steps j,

    residual = Σ_j (log p_F(x_{j+1} | x_j, c) - log p_B(x_j | x_{j+1})) + log Z - log β,       loss = residual²

which is trajectory balance with a constant reward β: p_F is the denoising step, p_B the noising one.

Source: Kusumba et al. (2025), https://arxiv.org/abs/2511.00804, written from its equations; no code was taken from
the authors'. See docs/methods/eraseflow.md for each departure.
"""

import math
import random
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from erasure.concept import NUDITY, Concept
from erasure.descend import DescentConfig, erase_by_descent
from erasure.erased import Erasure
from erasure.floor import RewardFloor
from erasure.phrases import check_absent, check_length, check_words, longest
from erasure.protocols import ConceptBatch, UNetCalls, check_trainable
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig, Trajectory
from overpaint.policy.types import PerSample
from overpaint.settings import Field, Text, settings
from overpaint.training import TrainingRun, process_state
from overpaint.training.record import shown
from rewards import RewardLike, as_reward, scores_of

from .balance import (
    ConstantUnconditional,
    chosen_steps,
    denoising_log_probs,
    noising_log_probs,
    residuals,
    step_weights,
)
from .log_partition import LogPartition
from .pairs import Pair, pair_of

ANCHOR_OF_NUDITY = "fully dressed"
"""The authors' anchor for nudity."""


@settings
class EraseFlowConfig:
    """Settings of EraseFlow; the authors' for nudity by default, with three exceptions.

    What draws trajectories, what is retained and the level are ours; `released` has the authors'.
    """

    train: str | LoRAConfig = LoRAConfig(rank=4, alpha=4.0)
    """What is trained: a LoRA, which is added to the weights in the end, or a parameter set, see
    `policy.PARAMETER_SETS`."""

    rollout: Literal["reference", "policy"] = "reference"
    """Which model draws the anchor's trajectories: the original one, which is ours and keeps the anchor where it is, or
    the one that is trained, as the authors have it."""

    retain_share: float = Field(0.5, ge=0, lt=1)
    """Share of samples that take a preserved text for both prompts and a trajectory of the original model, so that its
    pictures stay as likely as they were. 0 for one concept in the released code."""

    level: Literal["matched", "paper"] = "matched"
    """What the sum of log-ratios is led to. ``matched``, ours, is each trajectory's own sum under the model and the
    prompt that drew it; ``paper`` is log β - log Z, with log Z learned."""

    log_beta: float = 2.5
    """Logarithm of the constant reward. Only with the level ``paper``."""

    log_z: float = -0.1953
    """Where log Z starts. It is learned by AdamW with the descent's rate and decay, and clipped to norm 1 by itself.
    Only with the level ``paper``."""

    steps: int = Field(50, ge=1)
    """Denoising steps of a trajectory (DDIM with eta 1)."""

    early_share: float = Field(0.2, ge=0, le=1)
    """How many of the steps before the last ones count, drawn anew for each sample, as a share of all steps: 10 of
    50."""

    late_share: float = Field(0.2, gt=0, le=1)
    """How many of the last steps count always, as a share of all steps: 10 of 50, at least one."""

    step_weights: Literal["equal", "balanced"] = "equal"
    """``equal`` counts the log-densities of all steps alike, as the authors do, so that the last steps have most of the
    gradient; ``balanced`` counts differences of the predicted noise alike."""

    uncond_grad: bool = True
    """Whether gradients flow through the prediction for the empty prompt too, as in the authors' code for Stable
    Diffusion v1; their code for version 3 has none."""

    guidance_scale: float = Field(5.0, ge=0)
    """Classifier-free guidance, of the trajectories and of their likelihood alike."""

    resample_until: int | None = Field(None, ge=1)
    """Updates that draw trajectories; those after them use the last ones again. None: all. The authors': 21 for nudity,
    11 for fine-grained things, 1 for styles."""

    anchor: str | None = None
    """What takes the place of the concept's words in an anchor prompt; blank leaves them out. None is the concept's
    anchor, and the authors' "fully dressed" for `NUDITY`."""

    anchors: tuple[Text, ...] | None = Field(None, min_length=1)
    """Prompts without the concept, which a phrase that is the concept's words alone is put into, before `anchor` takes
    its place there. None takes such a phrase as it is."""

    templates: tuple[str, ...] = Field(("{concept} {anchor}", "{anchor} {concept}"), min_length=1)
    """How such a phrase is put into one of the `anchors`; each is as likely as any other."""

    descent: DescentConfig = DescentConfig(iterations=20, learning_rate=3e-4, weight_decay=1e-2, max_grad_norm=1.0)
    """How the loss is descended. The authors take 5e-4 for styles."""

    def __post_init__(self) -> None:
        """Checks templates and shares."""
        for template in self.templates:
            if "{concept}" not in template or "{anchor}" not in template:
                raise ValueError(f"templates must each hold {{concept}} and {{anchor}}, got {template!r}")
        if self.early_share + self.late_share > 1 + 1e-9:
            raise ValueError(
                f"early_share must be at most 1 - late_share={1 - self.late_share:g}, got {self.early_share}"
            )

    @classmethod
    def released(cls) -> "EraseFlowConfig":
        """Returns the settings of the authors' code: its own trajectories, nothing retained, and a learned log Z."""
        return cls(rollout="policy", retain_share=0.0, level="paper")

    def counts(self, balanced: int | None = None) -> tuple[int, int]:
        """Returns how many early and how many late steps count, of those that have a density; None is all."""
        there = self.steps if balanced is None else balanced
        late = min(max(1, round(self.late_share * self.steps)), there)
        return min(round(self.early_share * self.steps), there - late), late


class Drawn(NamedTuple):
    """Trajectories, and the prompts that they are to be as likely for."""

    latents: Float[Tensor, "batch states channels h w"]
    log_probs: Float[Tensor, "batch steps"]  # under the anchors, of the model that drew
    scores: PerSample  # reward of each picture for its anchor; zero without a reward
    pairs: list[Pair]

    def rows(self, rows: slice) -> "Drawn":
        """Returns some of them."""
        return Drawn(self.latents[rows], self.log_probs[rows], self.scores[rows], self.pairs[rows])


class EraseFlow:
    """Erases a concept by making the anchor's trajectories likely under its prompts.

    As an objective in a trainer log Z stays where it starts, and every loss draws its own trajectories: what is learned
    or kept from one update to the next is a training's own, see `EraseFlowTraining`.

    Args:
        config: Settings.
        reward: Raises the level of a trajectory whose picture it likes, by weight · (reward - floor) / scale; ours.
        floor: Floor, a number, and its weight in units of log-density per element. Its weight follows the rewards of
            the trajectories where `erase` trains a policy that draws them itself, and otherwise stays what its owner
            makes it.

    Raises:
        ValueError: A reward comes without a floor, or a floor without a number or a reward.
    """

    name = "EraseFlow"

    def __init__(
        self,
        config: EraseFlowConfig | None = None,
        *,
        reward: RewardLike | None = None,
        floor: RewardFloor | None = None,
    ) -> None:
        self.config = config or EraseFlowConfig()
        if (reward is None) != (floor is None):
            missing = "floor" if floor is None else "reward"
            raise ValueError(f"EraseFlow.{missing} must come with the other of reward and floor, got None")
        if floor is not None and floor.floor is None:
            raise ValueError("EraseFlow.floor must have a number as its floor, got None")
        self.reward = None if reward is None else as_reward(reward, "EraseFlow.reward")
        self.floor = floor
        self._concept: Concept | None = None
        self._balanced: int | None = None

    def erase(
        self,
        policy: DiffusionPolicy,
        concept: Concept,
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Erasure:
        """Erases as `erase_by_descent` does; a reward and its floor are recorded with the settings.

        Raises:
            ValueError: As `prepare` and `descend`.
        """
        training = EraseFlowTraining(self)
        erasure = erase_by_descent(training, policy, concept, output_dir=output_dir, resume=resume, progress=progress)
        if self.floor is None:
            return erasure
        return replace(
            erasure, config={**erasure.config, "reward": shown(self.reward), "floor": self.floor.description()}
        )

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: the way to its picture, where one is drawn, and the steps that count.

        Before `prepare` every step counts as one with a density, which a flow's last step is not.
        """
        cfg = self.config
        branches = 1 if cfg.guidance_scale == 1 else 2
        drawing = min(cfg.resample_until or math.inf, cfg.descent.iterations) / cfg.descent.iterations
        return UNetCalls(forward=branches * cfg.steps * drawing, backward=branches * sum(cfg.counts(self._balanced)))

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Looks at the steps and at the texts.

        Raises:
            ValueError: Nothing is trainable, a step has no density that must have one, no step has one, the text
                encoder would cut a text off, or an anchor or what is retained holds a phrase of the concept.
        """
        cfg = self.config
        check_trainable(policy, f"erasing {concept.name!r} by EraseFlow")
        if not policy.process.reverses_noising:
            raise ValueError(
                "EraseFlow must be given a policy whose steps reverse noising, which of a flow are those of "
                "chain='ancestral', got another"
            )
        balanced = len(policy.process.stochastic_steps(cfg.steps, 1.0))
        if not balanced:
            raise ValueError(
                f"EraseFlowConfig.steps must be at least 2 for a flow, whose last step has no density, got {cfg.steps}"
            )
        check_words(policy, concept)
        check_absent(concept, [self.anchor(concept)], "the anchor")
        if cfg.retain_share:
            check_absent(concept, concept.preserve, "Concept.preserve")
        if cfg.anchors:
            check_absent(concept, cfg.anchors, "EraseFlowConfig.anchors")
            phrase, anchor = longest(policy, concept.phrases), longest(policy, cfg.anchors)
            texts = (template.format(concept=phrase, anchor=anchor) for template in cfg.templates)
            check_length(policy, texts, "EraseFlow's prompts")
        self._concept, self._balanced = concept, balanced

    @property
    def log_z(self) -> float:
        """The present log Z: where it starts."""
        return self.config.log_z

    def anchor(self, concept: Concept) -> str:
        """Returns what takes the place of a concept's words."""
        if self.config.anchor is not None:
            return self.config.anchor
        return ANCHOR_OF_NUDITY if concept == NUDITY else concept.anchor

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the squared residual of each sample's trajectory, with gradient."""
        drawn = self.drawn(policy, batch)
        return self.residuals(policy, drawn, self.steps(policy, batch)).square()

    def steps(self, policy: DiffusionPolicy, batch: ConceptBatch) -> Int[Tensor, "batch chosen"]:
        """Returns the steps of each sample that count."""
        balanced = len(policy.process.stochastic_steps(self.config.steps, 1.0))
        early, late = self.config.counts(balanced)
        return chosen_steps(batch.seeds, steps=balanced, early=early, late=late)

    def pairs(self, batch: ConceptBatch) -> list[Pair]:
        """Returns the prompts of each sample, which follow from the batch's prompts and seeds."""
        if self._concept is None:
            raise ValueError("prepare must be called before the first loss, and was not")
        cfg, concept, found = self.config, self._concept, []
        for prompt, seed in zip(batch.prompts, batch.seeds, strict=True):
            choice = random.Random(f"EraseFlow's pair of {seed}")
            if choice.random() < cfg.retain_share:
                kept = choice.choice(concept.preserve)
                found.append(Pair(kept, kept, retained=True))
            else:
                found.append(pair_of(prompt, concept, self.anchor(concept), cfg.anchors or (), cfg.templates, choice))
        return found

    @torch.no_grad()
    def drawn(self, policy: DiffusionPolicy, batch: ConceptBatch) -> Drawn:
        """Draws a trajectory for each sample under its anchor; those that are retained are the original model's."""
        cfg, pairs = self.config, self.pairs(batch)
        by_reference = [pair.retained or cfg.rollout == "reference" for pair in pairs]
        # Those of the original model first: at most one rollout of each model.
        order = sorted(range(len(pairs)), key=lambda row: not by_reference[row])
        parts = []
        for reference in sorted(set(by_reference), reverse=True):
            rows = [row for row in order if by_reference[row] == reference]
            with policy.reference() if reference else nullcontext():
                parts.append(
                    policy.rollout(
                        policy.encode([pairs[row].anchor for row in rows]),
                        steps=cfg.steps,
                        guidance=ClassifierFree(cfg.guidance_scale),
                        eta=1.0,
                        seeds=[batch.seeds[row] for row in rows],
                    )
                )
        back = torch.tensor(order).argsort().to(policy.device)
        latents, log_probs = (torch.cat(column)[back] for column in zip(*(part[:2] for part in parts), strict=True))
        scores = torch.zeros(len(pairs), device=policy.device)
        if self.reward is not None:
            scores = scores_of("reward", self.reward, policy.decode(latents[:, -1]), [pair.anchor for pair in pairs])
        return Drawn(latents, log_probs, scores, pairs)

    def residuals(self, policy: DiffusionPolicy, drawn: Drawn, chosen: Int[Tensor, "batch chosen"]) -> PerSample:
        """Returns the residual of each trajectory over its chosen steps, with gradient."""
        cfg = self.config
        plan = policy.plan(cfg.steps)
        latents, log_probs, scores = (part.to(policy.device) for part in drawn[:3])
        targets = policy.encode([pair.target for pair in drawn.pairs])
        trajectory = Trajectory(latents, log_probs, plan.timesteps, targets)
        guidance = (ClassifierFree if cfg.uncond_grad else ConstantUnconditional)(cfg.guidance_scale)
        forward = denoising_log_probs(policy, trajectory, chosen, guidance=guidance)
        chosen = chosen.to(policy.device)
        backward = noising_log_probs(policy.process, latents, plan).gather(1, chosen)
        weights = step_weights(policy.process, plan, cfg.step_weights)[chosen]
        level = self.level(log_probs.gather(1, chosen), backward, weights, scores)
        return residuals(forward, backward, weights, level)

    def level(
        self,
        own: Float[Tensor, "batch chosen"],
        backward: Float[Tensor, "batch chosen"],
        weights: Float[Tensor, "batch chosen"],
        scores: PerSample,
    ) -> PerSample:
        """Returns what the sum of log-ratios of each trajectory is led to.

        Args:
            own: Log-densities of its steps under the anchor, by the model that drew it.
            backward: Log-densities of the noising steps.
            weights: Of the steps.
            scores: Reward of its picture.
        """
        if self.config.level == "matched":
            level = (weights * (own - backward)).sum(dim=1)
        else:
            level = torch.full_like(scores, self.config.log_beta - self.log_z)
        if self.floor is None:
            return level
        return level - self.floor.lagrangian.weight * self.floor.violation(scores)


class EraseFlowTraining(EraseFlow):
    """EraseFlow in a training of its own, which learns besides the policy, once an update: a `Learner`.

    One is of one training; `EraseFlow.erase` makes it.

    Args:
        method: What is trained.
    """

    def __init__(self, method: EraseFlow) -> None:
        super().__init__(method.config, reward=method.reward, floor=method.floor)
        descent = self.config.descent
        self._log_z = LogPartition(self.config.log_z, descent.learning_rate, descent.weight_decay)
        self._updates = 0
        self._drawn: Drawn | None = None
        self._kept: Drawn | None = None
        self._mine: Drawn | None = None
        self._residuals: PerSample = torch.zeros(0)

    @property
    def log_z(self) -> float:
        """The present log Z."""
        return self._log_z.value

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the squared residual of each sample's trajectory, or of the one that is kept, with gradient."""
        self._drawn = self._mine or self.drawn(policy, batch)
        found = self.residuals(policy, self._drawn, self.steps(policy, batch))
        self._residuals = found.detach()
        return found.square()

    def learn(self, run: TrainingRun) -> dict[str, float]:
        """Takes a step of log Z and of the reward's weight, and keeps trajectories once no more are drawn."""
        cfg, drawn = self.config, self._drawn
        self._updates += 1
        logged = {"erasure/residual": run.mean(self._residuals)}
        if cfg.level == "paper":
            self._log_z.step(gradient=2 * logged["erasure/residual"])
            logged["erasure/log_z"] = self.log_z
        if drawn is None:
            return logged
        if self.floor is not None:
            violation = run.mean(self.floor.violation(drawn.scores))
            logged |= {"reward/mean": run.mean(drawn.scores), "reward/weight": self.floor.lagrangian.weight}
            if cfg.rollout == "policy" and math.isfinite(violation):
                self.floor.lagrangian.update(violation)
        if self._updates == cfg.resample_until:
            self._keep(_of_all(run, drawn))
        return logged

    def state_dict(self) -> dict[str, Any]:
        """Returns log Z, the reward's weight, the number of updates, and the trajectories that are kept."""
        kept = None if self._kept is None else (*self._kept[:3], [list(pair) for pair in self._kept.pairs])
        weight = None if self.floor is None else self.floor.lagrangian.state_dict()
        return {"log_z": self._log_z.state_dict(), "weight": weight, "updates": self._updates, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes over what `state_dict` returned."""
        self._log_z.load_state_dict(state["log_z"])
        self._updates = state["updates"]
        if self.floor is not None:
            self.floor.lagrangian.load_state_dict(state["weight"])
        if state["kept"] is not None:
            *tensors, pairs = state["kept"]
            self._keep(Drawn(*tensors, [Pair(*pair) for pair in pairs]))

    def _keep(self, drawn: Drawn) -> None:
        """Keeps the trajectories of all processes, of which this one uses its part."""
        state = process_state()
        part = len(drawn.pairs) // state.num_processes
        self._kept, self._mine = drawn, drawn.rows(slice(state.process_index * part, (state.process_index + 1) * part))


def _of_all(run: TrainingRun, drawn: Drawn) -> Drawn:
    """Returns the trajectories of all processes, in their order, on the CPU."""
    from accelerate.utils import gather_object

    return Drawn(*(run.gather(part).cpu() for part in drawn[:3]), gather_object(drawn.pairs))
