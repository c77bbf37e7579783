"""What holds an erased concept while a reward is raised: a detector, the loss of the method, or the erased model."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import cycle, islice

from erasure import (
    ConceptBatch,
    ConceptPrompts,
    Destruction,
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
from erasure.erased import is_saved
from erasure.generated import for_run
from erasure.phrases import holds
from erasure.protocols import TrainedMethod
from erasure.registry import METHODS, ErasureMethod, method_named
from overpaint.policy import DiffusionPolicy
from overpaint.settings import AnyPath

from .experiment import Detector, Experiment
from .options import EraserSettings
from .program import updated
from .recovery_options import ConstraintName, RecoveryOptions, refl_config

DETECTOR_WEIGHT = 0.1
"""Weight of a detector's violation before the first update, which a reward is not drowned by."""
NEAR_REFERENCE = 1e-3
"""Squared distance of noise predictions from the erased model's that counts as erased."""
DESTROYED = 0.08
"""Squared error of noise predictions in pictures of the concept that counts as erased."""
UNNAMED = 5
"""Every so manyth of these pictures is of a prompt that brings the concept by another of its phrases."""
DESTRUCTION = LagrangianConfig(
    initial_weight=0.75, min_weight=0.06, max_weight=0.75, learning_rate=0.3, proportional_gain=0.0
)
"""How that constraint is weighed: from the first update on, and not so hard that the pictures of other prompts, which
the pretraining term holds, cannot come back."""
LOSS_SAMPLES, LOSS_SEED, LOSS_MARGIN = 64, 5_000_000, 0.1
"""The erased model's own loss, which the method's loss may exceed by that margin: of how many samples, from which seed
on."""


ABOUT_ORIGINAL: tuple[ConstraintName, ...] = ("objective", "destruction")
"""Constraints that ask the model before the erasure."""


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
        detector_of(about)
    if name == "objective":
        _loss_of(method)
    if name in ABOUT_ORIGINAL and not original:
        raise ValueError(f"constraint {name} must come with the original, which the loss is about, got none")
    if name == "none" and config.ceiling is not None:
        raise ValueError(f"ceiling must be None with the constraint none, got {config.ceiling}")
    if name == "none" and config.attacked:
        raise ValueError("attacked must be off with the constraint none, which has no prompts, got it on")


def detector_of(about: Experiment) -> Detector:
    """Returns the detector with a gradient; a `ValueError` where there is none."""
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
    name = constraint_name(config, about)
    if name == "objective":
        explicit, implicit = list(about.concept.phrases), []
    else:
        explicit, implicit = (list(dict.fromkeys(about.prompts(kind, 200, 7))) for kind in ("explicit", "implicit"))
        implicit = [prompt for prompt in implicit if prompt not in explicit]
    hard = config.attacked or name == "destruction"
    return ConceptPrompts(explicit, implicit) if hard else [*explicit, *implicit]


def constraint_of(
    config: RecoveryOptions,
    about: Experiment,
    policy: DiffusionPolicy,
    method: ErasureMethod | None,
    *,
    original: DiffusionPolicy | None = None,
    progress: bool,
) -> ErasureConstraint | None:
    """Returns what keeps the concept gone, for an erased policy; None where nothing does.

    The original is asked for where the policy's reference is not it. The loss of a method has a level of its own, which
    no UNet falls below: its ceiling is measured on the policy.
    """
    name = constraint_name(config, about)
    refl = config.refl or refl_config(config)
    if name == "none":
        return None
    prompts = concept_prompts(config, about)
    if name == "detector":
        detector = detector_of(about)
        attack = SoftAttack(score=detector.slope) if config.attacked else None
        weight = Lagrangian(LagrangianConfig(initial_weight=DETECTOR_WEIGHT))
        return ImageConstraint(
            detector.score, prompts, weight, ceiling=config.ceiling or detector.ceiling, attack=attack
        )
    if name == "destruction":
        return destruction_of(config, about, prompts, original, progress=progress)
    if name == "objective":
        objective: Objective = for_run(_loss_of(method), config.output_dir / "constraint", progress=progress)
        ceiling = config.ceiling or (1 + LOSS_MARGIN) * mean_loss(objective, policy, about, refl.micro_batch_size)
    else:
        objective = ReferenceDistance(ReferenceDistanceConfig(steps=refl.steps, guidance_scale=refl.guidance_scale))
        ceiling = config.ceiling or NEAR_REFERENCE
    attack = SoftAttack() if config.attacked else None
    return ObjectiveConstraint(objective, about.concept, prompts, ceiling=ceiling, attack=attack)


def destruction_of(
    config: RecoveryOptions,
    about: Experiment,
    prompts: Sequence[str],
    original: DiffusionPolicy | None,
    *,
    progress: bool,
) -> ErasureConstraint:
    """Returns the constraint that pictures of the concept are seen as something else, whatever words are learned."""
    explicit, implicit = (list(dict.fromkeys(about.prompts(kind, 400, 11))) for kind in ("explicit", "implicit"))
    named = [text for text in implicit if any(holds(text, phrase) for phrase in about.concept.phrases)]
    others = cycle(named or explicit)
    captions = [next(others) if k % UNNAMED == 0 else text for k, text in enumerate(explicit, 1)]
    objective = Destruction(config.destruction, captions, original)
    objective = for_run(objective, config.output_dir / "constraint", progress=progress)
    return ObjectiveConstraint(
        objective, about.concept, prompts, Lagrangian(DESTRUCTION), ceiling=config.ceiling or DESTROYED
    )


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
