"""Erase a concept from a text-to-image model, then win back its ImageReward while the concept stays gone.

    accelerate launch examples/refl_erase_nudity.py
    accelerate launch examples/refl_erase_nudity.py --method esd
    accelerate launch examples/refl_erase_nudity.py --policy CompVis/stable-diffusion-v1-4

By default this runs on the tiny world, whose harmful concept is stripes, in minutes on a CPU and without a download.
With ``--policy`` it is the same program on a Stable Diffusion: nudity, the official ImageReward, NudeNet. Three
states of the model are compared on the same prompts and seeds: ``before``, ``erased`` (by UCE, or any other method) and
``recovered`` (by ReFL under the constraint).
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from erasure import NUDITY, Erasure, ImageConstraint
from erasure.changes import WeightChange
from erasure.erased import is_saved
from erasure.official import load_erasure
from erasure.registry import MethodName, erase, method_named
from overpaint.evaluation import Panel
from overpaint.evaluation.experiments.experiment import Evaluation, Experiment, evaluate, experiment_of, write_results
from overpaint.evaluation.experiments.options import (
    ConceptOptions,
    EraserSettings,
    RewardOptions,
    RunOptions,
    SharingOptions,
    TunedOptions,
    usual_eraser,
)
from overpaint.evaluation.experiments.program import check_same, settings_from_command_line, usual_beside
from overpaint.policy import DiffusionPolicy, LoRAConfig, check_checkpoint
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import HeldOut, check_output_dir, process_state
from refl import ReFLConfig, ReFLTrainer
from rewards.combine import to_device


@settings
class Config(SharingOptions, RewardOptions, TunedOptions, ConceptOptions, RunOptions):
    """What is erased from what, and how the reward is won back."""

    output_dir: AnyPath = Path("runs/refl_erase_nudity")
    """Where everything is written."""

    method: MethodName | Literal["none"] = "uce"
    """What erases; "none" is for a model that is erased already."""

    original: str | None = None
    """With the method "none": the model before it was erased, to compare with; a folder, a hub id or a file."""

    eraser: EraserSettings | None = None
    """Settings of the method; None is those that were found for the tiny world, and else its authors'."""

    strength: float = Field(1.0, ge=0)
    """Strength of the erasure, for methods that have one; 1 is the method's own setting."""

    erasure: AnyPath | None = None
    """In place of computing one: a folder of a saved erasure (`Erasure.save`), or a file or folder of erased weights as
    ESD, UCE, AC, SA, MACE, Receler and EraseFlow release them."""

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


def complete(config: Config) -> Config:
    """Fills in what depends on the model, the method and the concept."""
    tiny, eraser = config.tiny, config.eraser
    if config.method != "none":
        eraser = eraser or usual_eraser(config.method, config.own_concept(tiny=tiny), tiny=tiny, seed=config.seed)
    config = replace(
        config,
        guidance_scale=config.usual_guidance,
        eraser=eraser,
        **config.tuned(LoRAConfig(rank=8, alpha=8)),
    )
    refl, run = config.refl or refl_config(config), config.run_of(usual_rate(config))
    check_same("refl", refl, **config.training_pictures)
    return replace(config, refl=refl, run=run, learning_rate=run.learning_rate)


def usual_rate(config: Config) -> float:
    """Returns the usual learning rate."""
    return 1e-3 if config.tiny else 1e-4


def refl_config(config: Config) -> ReFLConfig:
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


WITHOUT_WEIGHTS = ("sld", "safree", "receler")
"""Methods that do not change the UNet's own weights."""


def check(config: Config) -> None:
    """Checks what joins several options, before any work.

    Raises:
        ValueError: The model is said to be erased already, and an erasure is given, or it is the tiny world's; or an
            original is given to a model that is not.
    """
    config.check()
    if config.train is not None and config.erasure is None and config.method in WITHOUT_WEIGHTS:
        raise ValueError(f"train must be None with {config.method}, which no pipeline's folder holds; train a LoRA")
    if config.method != "none":
        if config.original is not None:
            raise ValueError(f"original must come with the method none, got {config.original!r} with {config.method}")
    elif config.erasure is not None:
        raise ValueError(f"erasure must be None with the method none, got {config.erasure}")
    elif config.tiny:
        raise ValueError("policy must be an erased model with the method none, got the tiny world's original")
    elif config.original is not None:
        check_checkpoint(config.original)


def about_of(config: Config) -> Experiment:
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
    elif config.erasure is not None and concept is None:
        usual = "stripes" if config.tiny else NUDITY.name
        warnings.warn(f"{config.erasure} does not say what it erased, taken for {usual}; see --concept", stacklevel=2)
    return experiment_of(config, concept)


def erasure_for(config: Config, policy: DiffusionPolicy, about: Experiment) -> Erasure:
    """Returns the erasure that is asked for: one that is kept, one that is computed now, or that of an erased model.

    Raises:
        ValueError: A strength is given to a method that has none, or what is kept does not fit the policy.
    """
    if config.erasure is not None:
        concept = None if is_saved(config.erasure) else about.concept
        return load_erasure(config.erasure, base=policy, concept=concept)
    if config.method == "none":
        return Erasure.between(policy, config.load(), about.concept)
    return erase(
        method_named(config.method, config.eraser),
        policy,
        about.concept,
        strength=config.strength,
        output_dir=config.output_dir / "erasing",
        resume=config.resume,
    )


def recover(
    config: Config,
    policy: DiffusionPolicy,
    about: Experiment,
    erasure: Erasure | None = None,
    *,
    progress: bool = True,
) -> None:
    """Raises the reward of an erased policy under the constraint; the erasure is for the record of the run."""
    config = complete(config)
    config.start(policy)
    held_out = None
    if about.held_out is not None:
        held_out = HeldOut(about.prompts("benign", 48, config.seed + 200), about.held_out)
    trainer = ReFLTrainer(
        policy,
        about.reward,
        about.prompts("train", 1000, config.seed + 300),
        config.refl,
        erasure=about.constraint,
        held_out=held_out,
    )
    kept = erasure and {"method": erasure.method, "config": erasure.config, "concept": erasure.concept.to_json()}
    notes = {"policy": config.policy, "concept": about.concept.to_json(), "erasure": kept}
    trainer.train(replace(config.run_of(usual_rate(config)), progress=progress), notes=notes)


def main(config: Config) -> None:
    """Runs the whole job."""
    config = complete(config)
    check_output_dir(config.run_of(usual_rate(config)))
    check(config)
    about = about_of(config)
    beginning = config if config.original is None else replace(config, policy=config.original, policy_config=None)
    policy = beginning.load(lora=config.lora, train=config.train)
    to_device(about.reward, policy.device)
    drawing = config.drawing(config.evaluation_steps)
    evaluated = partial(evaluate, policy, about, drawing, prompts_per_kind=config.prompts_per_kind, seed=config.seed)

    erasure, evaluations = None, []
    if config.method != "none" or config.original is not None:
        erasure = erasure_for(config, policy, about)  # changes nothing yet
        if config.train is not None and not isinstance(erasure.change, WeightChange):
            raise ValueError(f"train must be None with an erasure by {erasure.method}; train a LoRA")
        evaluations.append(evaluated(model="before"))
        erasure.apply(policy)
    evaluations.append(evaluated(model="erased"))
    recover(config, policy, about, erasure)
    evaluations.append(evaluated(model="recovered"))
    write(config, about, policy, erasure, evaluations)


def write(
    config: Config,
    about: Experiment,
    policy: DiffusionPolicy,
    erasure: Erasure | None,
    evaluations: Sequence[Evaluation],
) -> None:
    """Prints the table, and saves weights, numbers and the report."""
    if not process_state().is_main_process:
        return
    folder = config.output_dir
    reward = about.reward_name
    eraser = "its eraser" if erasure is None else erasure.method
    if erasure is not None:
        erasure.save(folder / "erasure")
    config.save(policy, folder)
    if policy.lora is not None and (erasure is None or isinstance(erasure.change, WeightChange)):
        policy.save_pipeline(folder / "pipeline")
    on_images = isinstance(about.constraint, ImageConstraint)
    cost = "The detector's score minus its ceiling" if on_images else "The loss over its ceiling, minus 1"
    text = write_results(
        folder,
        evaluations,
        config,
        program="accelerate launch examples/refl_erase_nudity.py",
        usual=usual_beside(config, complete, ("policy", "method", "concept", "anchor", "preserve")),
        erasures=[] if erasure is None else [erasure],
        told={
            "concept": about.concept.name,
            "erased_by": "" if erasure is None else eraser,
            "tuned_by": "ReFL",
            "reward": reward,
            "held_out": "true utility" if config.tiny else "",
        },
        lead=f"{eraser} was applied to {config.original or about.name}, against {about.concept.name}; ReFL then tuned "
        "it for the reward under the constraint that the concept stays gone.",
        models={
            **({} if erasure is None else {"before": f"{config.original or about.name}, as it came"}),
            "erased": f"after {eraser}",
            "recovered": f"then {config.iterations} iterations of ReFL, under the constraint",
        },
        metrics=folder / "metrics.jsonl",
        panels=(
            Panel(title="Reward of the training batch", tags={reward: "reward/mean"}),
            Panel(
                title="Held-out prompts",
                tags={reward: "reward/validation", **({"true utility": "reward/held_out"} if config.tiny else {})},
                caption="Reward hacking would show as the one rising while the other falls." if config.tiny else "",
            ),
            Panel(
                title="Cost of the constraint",
                tags={"cost": "erasure/violation"},
                references={"bound": 0.0},
                caption=f"{cost}, on prompts of the concept.",
            ),
            Panel(title="Weight of the constraint", tags={"weight": "erasure/weight"}),
        ),
        settings={"refl": asdict(config.refl or refl_config(config)), "erasure": erasure.config if erasure else {}},
    )
    print(text)


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
    process_state().destroy_process_group()
