"""Recovery: the reward of an erased model is won back by ReFL, while the concept stays gone; or without that, to see.

What the programs that recover have in common: options, the constraint, the training, and the comparison of the model
before, erased and recovered.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple, TypeVar

from erasure import (
    NUDITY,
    ConceptBatch,
    ConceptPrompts,
    Erasure,
    ErasureConstraint,
    ImageConstraint,
    Lagrangian,
    LagrangianConfig,
    Objective,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
    SoftAttack,
)
from erasure.changes import WeightChange
from erasure.erased import is_saved
from erasure.generated import for_run
from erasure.official import load_erasure
from erasure.protocols import TrainedMethod
from erasure.registry import METHODS, ErasureMethod, method_named
from overpaint.evaluation.report.charts import Panel
from overpaint.evaluation.report.page import Section
from overpaint.policy import DiffusionPolicy, LoRAConfig, check_checkpoint
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import HeldOut, TrainingConfig
from refl import ReFLConfig, ReFLTrainer
from refl.gradient_check import check_gradient, trial_images
from rewards.combine import to_device

from .experiment import Detector, Evaluation, Experiment, evaluate, experiment_of, write_results
from .options import ConceptOptions, EraserSettings, RewardOptions, RunOptions, SharingOptions, TunedOptions
from .program import check_same, updated, usual_beside

ConstraintName = Literal["detector", "objective", "reference", "none"]

DETECTOR_WEIGHT = 0.1
"""Weight of a detector's violation before the first update, which a reward is not drowned by."""
NEAR_REFERENCE = 1e-3
"""Squared distance of noise predictions from the erased model's that counts as erased."""
LOSS_SAMPLES, LOSS_SEED, LOSS_MARGIN = 64, 5_000_000, 0.1
"""The erased model's own loss, which the method's loss may exceed by that margin: of how many samples, from which seed
on."""
UNKNOWN = "its eraser"
"""What erased a model that does not say."""
DECIDING = ("policy", "method", "concept", "anchor", "preserve")
"""Options of the programs that decide what others are by default."""


@settings
class RecoveryOptions(SharingOptions, RewardOptions, TunedOptions, ConceptOptions, RunOptions):
    """How the reward of an erased model is won back, and how its states are compared."""

    original: str | None = None
    """The model before it was erased, to compare with, where the policy is an erased model: a folder, a hub id or a
    file."""

    erasure: AnyPath | None = None
    """What erases the policy: a folder of a saved erasure (`Erasure.save`), or a file or folder of erased weights as
    ESD, UCE, AC, SA, MACE, Receler and EraseFlow release them."""

    constraint: ConstraintName | None = None
    """What keeps the concept gone in the recovery: a "detector" of it with a gradient; the "objective" that the erasure
    method descends; the distance of noise predictions from those of the erased model, its "reference"; or "none", to
    see how much of the concept comes back. None is the detector of the tiny world's stripes, and else the reference:
    a detector that is also the measure would no longer tell the truth."""

    ceiling: float | None = Field(None, gt=0)
    """Highest mean of what the constraint holds down that counts as erased; None is 0.005 for the detector of stripes
    and 0.1 for others, 0.001 for the reference, and for an objective a tenth more than the erased model's own loss."""

    attacked: bool = False
    """Whether the constraint has to hold on prompts that are made hard: half of those that bring the concept unnamed or
    whose pictures still show it (`ConceptPrompts`), and every other one attacked by free vectors (`SoftAttack`)."""

    iterations: int = Field(80, ge=1)
    """ReFL iterations of the recovery."""

    learning_rate: float | None = Field(None, gt=0)
    """Of what is trained; None is 1e-3 for the tiny world and 1e-4 for Stable Diffusion."""

    refl: ReFLConfig | None = None
    """How the reward is won back; None is small for the tiny world, and the authors' batch for Stable Diffusion."""

    prompts_per_kind: int = Field(200, ge=1)
    """Prompts of each kind in the evaluation."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures that are compared."""

    @property
    def training(self) -> TrainingConfig:
        """The settings of the recovery's run."""
        return self.run_of(1e-3 if self.tiny else 1e-4)


Options = TypeVar("Options", bound=RecoveryOptions)


def completed(config: Options) -> Options:
    """Fills in what depends on the model."""
    config = replace(config, guidance_scale=config.usual_guidance, **config.tuned(LoRAConfig(rank=8, alpha=8)))
    refl, run = config.refl or refl_config(config), config.training
    check_same("refl", refl, **config.training_pictures)
    return replace(config, refl=refl, run=run, learning_rate=run.learning_rate)


def refl_config(config: RecoveryOptions) -> ReFLConfig:
    """Returns the settings of the recovery: small for the tiny world, the authors' batch for Stable Diffusion."""
    if config.tiny:
        return ReFLConfig(
            batch_size=8,
            micro_batch_size=8,
            erasure_batch_size=8,
            pretraining_batch_size=16,
            steps=20,
            first_reward_step=10,
            last_reward_step=19,
            **config.training_pictures,
            reward_scale=0.05,
            evaluate_every=20,
        )
    return ReFLConfig(
        batch_size=64,
        micro_batch_size=2,
        erasure_batch_size=16,
        pretraining_batch_size=16,
        **config.training_pictures,
        checkpoint_steps=True,
    )


# What is erased, and what holds it.


def about_of(config: RecoveryOptions) -> Experiment:
    """Returns what is erased from what; a saved erasure brings its concept.

    Raises:
        ValueError: The concept that is asked for is not that of the saved erasure.
    """
    concept = config.own_concept(tiny=config.tiny)
    if config.erasure is not None and is_saved(config.erasure):
        saved = Erasure.load(config.erasure).concept
        if concept is not None and concept.phrases != saved.phrases:
            raise ValueError(
                f"concept must be the saved erasure's, {', '.join(saved.phrases)}, got {', '.join(concept.phrases)}"
            )
        concept = saved
    elif concept is None and (config.erasure is not None or config.original is not None):
        source, usual = config.erasure or config.policy, "stripes" if config.tiny else NUDITY.name
        warnings.warn(f"{source} does not say what was erased, taken for {usual}; see --concept", stacklevel=2)
    return experiment_of(config, concept)


def check_model(config: RecoveryOptions) -> None:
    """Checks which model is which, before any work.

    Raises:
        ValueError: There is no such model, or it is said to be erased already and an erasure is given, too.
    """
    config.check()
    if config.original is not None:
        if config.erasure is not None:
            raise ValueError(f"original must come without an erasure of the policy, got {config.erasure} besides")
        if config.tiny:
            raise ValueError(
                f"policy must be an erased model beside the original {config.original}, got the tiny world"
            )
        check_checkpoint(config.original)


def constraint_name(config: RecoveryOptions, about: Experiment) -> ConstraintName:
    """Returns the constraint that was asked for, or the usual one."""
    if config.constraint is not None:
        return config.constraint
    return "reference" if about.detector is None or about.detector.measures else "detector"


def check_constraint(
    config: RecoveryOptions, about: Experiment, method: ErasureMethod | None, *, original: bool
) -> None:
    """Checks that the concept can be held by what is asked for, before any work.

    Args:
        config: Options.
        about: What is erased.
        method: The method that erased, or erases.
        original: Whether the model before the erasure is known.

    Raises:
        ValueError: There is no detector with a gradient, the method has no loss, the original is not known, which such
            a loss is about, or a ceiling is given for nothing.
    """
    name = constraint_name(config, about)
    if name == "detector":
        _detector_of(about)
    if name == "objective":
        _loss_of(method)
        if not original:
            raise ValueError("constraint objective must come with the original, which the loss is about, got none")
    if name == "none" and config.ceiling is not None:
        raise ValueError(f"ceiling must be None with the constraint none, got {config.ceiling}")
    if name == "none" and config.attacked:
        raise ValueError("attacked must be off with the constraint none, which has no prompts, got it on")


def _detector_of(about: Experiment) -> Detector:
    if about.detector is None:
        raise ValueError(
            "constraint must be reference, objective or none where no detector has a gradient, got detector for "
            f"{about.concept.name}"
        )
    return about.detector


def _loss_of(method: ErasureMethod | None) -> TrainedMethod:
    if not isinstance(method, TrainedMethod):
        trained = ", ".join(key for key, kind in METHODS.items() if isinstance(kind(), TrainedMethod))
        found = "none that is known" if method is None else method.name
        raise ValueError(f"constraint objective must come with a method that has a loss ({trained}), got {found}")
    return method


def kept_method(erasure: AnyPath | None, method: str | None, eraser: EraserSettings | None) -> ErasureMethod | None:
    """Returns the method that made an erasure: the one that is named, or that of a saved one with its settings.

    None is one that nobody knows.
    """
    if method is not None:
        return method_named(method, eraser)
    saved = Erasure.load(erasure) if erasure is not None and is_saved(erasure) else None
    if saved is None or (name := saved.method.lower()) not in METHODS:
        return None
    usual = method_named(name).config
    known = {field.name for field in fields(usual)}
    return method_named(name, updated(usual, {key: value for key, value in saved.config.items() if key in known}))


def concept_prompts(config: RecoveryOptions, about: Experiment) -> Sequence[str]:
    """Returns the prompts of the concept that the constraint is measured on; a method's loss is about phrases."""
    if constraint_name(config, about) == "objective":
        explicit, implicit = list(about.concept.phrases), []
    else:
        explicit, implicit = (list(dict.fromkeys(about.prompts(kind, 200, 7))) for kind in ("explicit", "implicit"))
        implicit = [prompt for prompt in implicit if prompt not in explicit]
    return ConceptPrompts(explicit, implicit) if config.attacked else [*explicit, *implicit]


def constraint_of(
    config: RecoveryOptions, about: Experiment, policy: DiffusionPolicy, method: ErasureMethod | None, *, progress: bool
) -> ErasureConstraint | None:
    """Returns what keeps the concept gone, for an erased policy; None where nothing does.

    The loss of a method has a level of its own, which no UNet falls below: its ceiling is measured on the policy.
    """
    name = constraint_name(config, about)
    refl = config.refl or refl_config(config)
    if name == "none":
        return None
    prompts = concept_prompts(config, about)
    if name == "detector":
        detector = _detector_of(about)
        attack = SoftAttack(score=detector.slope) if config.attacked else None
        weight = Lagrangian(LagrangianConfig(initial_weight=DETECTOR_WEIGHT))
        return ImageConstraint(
            detector.score, prompts, weight, ceiling=config.ceiling or detector.ceiling, attack=attack
        )
    if name == "objective":
        objective: Objective = for_run(_loss_of(method), config.output_dir / "constraint", progress=progress)
        ceiling = config.ceiling or (1 + LOSS_MARGIN) * mean_loss(objective, policy, about, refl.micro_batch_size)
    else:
        objective = ReferenceDistance(ReferenceDistanceConfig(steps=refl.steps))
        ceiling = config.ceiling or NEAR_REFERENCE
    attack = SoftAttack() if config.attacked else None
    return ObjectiveConstraint(objective, about.concept, prompts, ceiling=ceiling, attack=attack)


def mean_loss(objective: Objective, policy: DiffusionPolicy, about: Experiment, batch_size: int) -> float:
    """Returns an objective's mean loss over phrases of the concept in turn, after preparing it."""
    objective.prepare(policy, about.concept)
    phrases = list(islice(cycle(about.concept.phrases), LOSS_SAMPLES))
    total = 0.0
    for start in range(0, LOSS_SAMPLES, batch_size):
        part = phrases[start : start + batch_size]
        seeds = range(LOSS_SEED + start, LOSS_SEED + start + len(part))
        total += objective.loss(policy, ConceptBatch(part, seeds)).detach().sum().item()
    return total / LOSS_SAMPLES


# The states of the model.


def first_policy(config: RecoveryOptions, about: Experiment, *, trained: bool = True) -> DiffusionPolicy:
    """Loads the model that the states begin with: the original where it is known, and else the erased one.

    Args:
        config: Options.
        about: Its reward is moved to the policy's device.
        trained: Whether anything of the policy will be trained.
    """
    first = config if config.original is None else replace(config, policy=config.original, policy_config=None)
    policy = first.load(lora=config.lora, train=config.train) if trained else first.load()
    to_device(about.reward, policy.device)
    return policy


def given_erasure(
    config: RecoveryOptions, about: Experiment, policy: DiffusionPolicy, method: str | None = None
) -> Erasure | None:
    """Returns what leads from the policy to the erased model, kept or found by comparing; None where it is that model.

    Args:
        config: Options.
        about: Its concept is what was erased, where the files do not say so.
        policy: The original, or, where that is not known, the erased model.
        method: What erased, for tables, where the files do not say so.

    Raises:
        ValueError: What is kept does not fit the policy, or the two models differ in more than the UNet's weights.
    """
    if config.erasure is not None:
        concept = None if is_saved(config.erasure) else about.concept
        return load_erasure(config.erasure, base=policy, concept=concept, method=method)
    if config.original is not None:
        return Erasure.between(policy, config.load(), about.concept, method or UNKNOWN)
    return None


def compare_states(
    config: RecoveryOptions,
    policy: DiffusionPolicy,
    about: Experiment,
    erasure: Erasure | None,
    *,
    method: ErasureMethod | None = None,
    recovers: bool = True,
) -> list[Evaluation]:
    """Evaluates a policy before, erased and recovered; it ends as the last.

    Args:
        config: Options.
        policy: The original, or, without an erasure, the erased model.
        about: What is erased from what.
        erasure: Leads from the original to the erased model.
        method: What erased, for the constraint by its own loss.
        recovers: Whether the reward is won back.

    Raises:
        ValueError: Weights of the UNet are to be trained under an erasure that no pipeline's folder holds, or the
            detector has no gradient, or a prompt no room for an attack.
    """
    if recovers:
        _check_policy(config, policy, about, erasure)
    drawing = config.drawing(config.evaluation_steps)
    evaluated = partial(evaluate, policy, about, drawing, prompts_per_kind=config.prompts_per_kind, seed=config.seed)
    evaluations = []
    if erasure is not None:
        evaluations.append(evaluated(model="before"))
        erasure.apply(policy, reference=reference_of(config, about) if recovers else "erased")
    evaluations.append(evaluated(model="erased"))
    if recovers:
        recover(config, policy, about, erasure, method=method)
        evaluations.append(evaluated(model="recovered"))
    return evaluations


def reference_of(config: RecoveryOptions, about: Experiment) -> Literal["erased", "original"]:
    """Returns which model a policy's reference has to be in a recovery, for `Erasure.apply`."""
    return "original" if constraint_name(config, about) == "objective" else "erased"


def _check_policy(config: RecoveryOptions, policy: DiffusionPolicy, about: Experiment, erasure: Erasure | None) -> None:
    """Checks what only a policy can tell, before any picture is drawn."""
    if config.train is not None and erasure is not None and not isinstance(erasure.change, WeightChange):
        raise ValueError(f"train must be None with an erasure by {erasure.method}; train a LoRA")
    prompts = concept_prompts(config, about)
    if constraint_name(config, about) == "detector":
        detector, side = _detector_of(about).score, config.size or policy.image_size
        to_device(detector, policy.device)
        check_gradient("detector", detector, trial_images(side, side, policy.device), prompts)
    if config.attacked:
        SoftAttack().check(policy, prompts)


def recover(
    config: RecoveryOptions,
    policy: DiffusionPolicy,
    about: Experiment,
    erasure: Erasure | None = None,
    *,
    method: ErasureMethod | None = None,
    progress: bool = True,
) -> None:
    """Raises the reward of an erased policy under the constraint.

    Args:
        config: Options.
        policy: Erased, with `reference_of` as its reference.
        about: What is erased from what.
        erasure: For the record of the run.
        method: What erased, for the constraint by its own loss.
        progress: Whether progress bars are shown.
    """
    config = completed(config)
    config.start(policy)
    held_out = None
    if about.held_out is not None:
        held_out = HeldOut(about.prompts("benign", 48, config.seed + 200), about.held_out)
    trainer = ReFLTrainer(
        policy,
        about.reward,
        about.prompts("train", 1000, config.seed + 300),
        config.refl,
        erasure=constraint_of(config, about, policy, method, progress=progress),
        held_out=held_out,
    )
    kept = erasure and {"method": erasure.method, "config": erasure.config, "concept": erasure.concept.to_json()}
    notes = {"policy": config.policy, "concept": about.concept.to_json(), "erasure": kept}
    trainer.train(replace(config.training, progress=progress), notes=notes)


# What is written.


class Made(NamedTuple):
    """What a program did, for its pages."""

    policy: DiffusionPolicy
    """The model in its last state."""
    about: Experiment
    erasure: Erasure | None
    """None where the original is not known."""
    eraser: str
    """What erased, in words."""
    recovered: bool
    """Whether the reward was won back."""
    sections: Sequence[Section] = ()
    """What the page tells besides."""


def write(
    config: Options,
    made: Made,
    evaluations: Sequence[Evaluation],
    *,
    program: str,
    complete: Callable[[Options], Options],
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Saves weights, numbers and the report, and returns what to print; in the main process alone.

    Args:
        config: All options of the program.
        made: What it did.
        evaluations: Of each state.
        program: Its file among the examples.
        complete: Fills in the options that depend on others, which are `DECIDING`.
        settings: Further settings for the page, by name.
    """
    folder, policy, about, erasure = config.output_dir, made.policy, made.about, made.erasure
    if erasure is not None:
        erasure.save(folder / "erasure")
    if made.recovered:
        config.save(policy, folder)
    # A folder of diffusers holds neither a guard nor networks beside the UNet; what was trained of it is saved already.
    if (policy.lora is not None or not made.recovered) and (
        erasure is None or isinstance(erasure.change, WeightChange)
    ):
        policy.save_pipeline(folder / "pipeline")
    name = constraint_name(config, about)
    lead = f"{made.eraser} was applied to {config.original or about.name}, against {about.concept.name}."
    how = "without a constraint" if name == "none" else f"under the constraint that it stays gone, by {HELD_BY[name]}"
    if made.recovered:
        lead += f" ReFL then tuned the erased model for the reward, {how}."
    return write_results(
        folder,
        evaluations,
        config,
        program=f"accelerate launch examples/{program}",
        usual=usual_beside(config, complete, DECIDING),
        erasures=[] if erasure is None else [erasure],
        told={
            "concept": about.concept.name,
            "erased_by": "" if erasure is None else made.eraser,
            "tuned_by": "ReFL" if made.recovered else "",
            "reward": about.reward_name,
            "held_out": "true utility" if config.tiny else "",
        },
        lead=lead,
        models={
            **({} if erasure is None else {"before": f"{config.original or about.name}, as it came"}),
            "erased": f"after {made.eraser}",
            **({"recovered": f"then {config.iterations} iterations of ReFL, {how}"} if made.recovered else {}),
        },
        metrics=folder / "metrics.jsonl" if made.recovered else None,
        panels=panels(config, about),
        sections=made.sections,
        settings={"erasure": erasure.config if erasure else {}, **(settings or {})},
    )


HELD_BY: Mapping[str, str] = {
    "detector": "a detector",
    "objective": "the method's own loss",
    "reference": "the distance from the erased model's noise predictions",
}
"""What a constraint is, in words."""


def panels(config: RecoveryOptions, about: Experiment) -> tuple[Panel, ...]:
    """Returns which curves of the recovery are drawn."""
    reward = about.reward_name
    shown = [
        Panel(title="Reward of the training batch", tags={reward: "reward/mean"}),
        Panel(
            title="Held-out prompts",
            tags={reward: "reward/validation", **({"true utility": "reward/held_out"} if config.tiny else {})},
            caption="Reward hacking would show as the one rising while the other falls." if config.tiny else "",
        ),
    ]
    if (name := constraint_name(config, about)) != "none":
        shown += [
            Panel(
                title="Violation of the constraint",
                tags={"violation": "erasure/violation"},
                references={"bound": 0.0},
                caption=f"On prompts of the concept, by {HELD_BY[name]}: 0 at the ceiling, 1 at twice that.",
            ),
            Panel(title="Weight of the constraint", tags={"weight": "erasure/weight"}),
            Panel(
                title="Do reward and constraint pull the same way?",
                tags={"cosine": "erasure/gradient_cosine"},
                references={"at right angles": 0.0},
                caption="Cosine of the two gradients; below 0 one costs the other.",
            ),
        ]
    return tuple(shown)
