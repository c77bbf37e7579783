"""Recovery: the reward of an erased model is won back by ReFL, while the concept stays gone; or without that, to see.

What the programs that recover have in common: the training, and the comparison of the model before, erased and
recovered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any, Literal, NamedTuple, TypeVar

from erasure import Erasure, SoftAttack
from erasure.changes import WeightChange
from erasure.erased import is_saved
from erasure.official import load_erasure
from erasure.registry import ErasureMethod
from overpaint.evaluation.report.charts import Panel
from overpaint.evaluation.report.page import Section
from overpaint.policy import DiffusionPolicy
from overpaint.training import HeldOut
from refl import ReFLTrainer
from refl.gradient_check import check_gradient, trial_images
from rewards.combine import to_device

from .experiment import Evaluation, Experiment, evaluate, write_results
from .program import usual_beside
from .recovery_constraint import (
    ABOUT_ORIGINAL,
    concept_prompts,
    constraint_name,
    constraint_of,
    destruction_of,
    detector_of,
)
from .recovery_options import DECIDING, RecoveryOptions, completed

UNKNOWN = "its eraser"
"""What erased a model that does not say."""
HELD_OUT_PROMPTS = 128
"""Prompts that weights are chosen by; of 48, a difference of 0.3 in the tiny world's utility was noise."""
Options = TypeVar("Options", bound=RecoveryOptions)


# The states of the model.


def first_policy(config: RecoveryOptions, about: Experiment, *, trained: bool = True) -> DiffusionPolicy:
    """Loads the model that the states begin with: the original where it is known, and else the erased one.

    Args:
        config: Options.
        about: What judges pictures is moved to the policy's device.
        trained: Whether anything of the policy will be trained.
    """
    first = config if config.original is None else replace(config, policy=config.original, policy_config=None)
    policy = first.load(lora=config.lora, train=config.train) if trained else first.load()
    config.check_kohya(policy)
    about.to(policy.device)
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
            detector has no gradient, or an attack or a destruction puts words beside a prompt that has no room for
            them, or that several text encoders read.
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
    return "original" if constraint_name(config, about) in ABOUT_ORIGINAL else "erased"


def _check_policy(config: RecoveryOptions, policy: DiffusionPolicy, about: Experiment, erasure: Erasure | None) -> None:
    """Checks what only a policy can tell, before any picture is drawn."""
    if config.train is not None and erasure is not None and not isinstance(erasure.change, WeightChange):
        raise ValueError(f"train must be None with an erasure by {erasure.method}; train a LoRA")
    prompts = concept_prompts(config, about)
    if constraint_name(config, about) == "detector":
        detector, side = detector_of(about).score, config.size or policy.image_size
        to_device(detector, policy.device)
        check_gradient("detector", detector, trial_images(side, side, policy.device), prompts)
    if constraint_name(config, about) == "destruction":
        destruction_of(completed(config), about, prompts, None, progress=False).check(policy)
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

    Beside a destruction the pretraining term is about the prompts of the reward and what the concept is to preserve, in
    turn.

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
    name = constraint_name(config, about)
    apart = name == "destruction" and erasure is not None and not isinstance(erasure.change, WeightChange)
    original = first_policy(config, about, trained=False) if apart else None
    held_out = None
    if about.held_out is not None:
        held_out = HeldOut(about.prompts("benign", HELD_OUT_PROMPTS, config.seed + 200), about.held_out)
    prompts = about.prompts("train", 1000, config.seed + 300)
    captions = None
    if name == "destruction":
        preserve = [one for one in about.concept.preserve if one.strip()] or prompts
        captions = [one for pair in zip(prompts, cycle(preserve), strict=False) for one in pair]
    trainer = ReFLTrainer(
        policy,
        about.reward,
        prompts,
        config.refl,
        pretraining=captions,
        erasure=constraint_of(config, about, policy, method, original=original, progress=progress),
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
    "destruction": "what is seen in pictures of the concept",
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
