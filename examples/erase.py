"""Erase a concept by any of the nine methods, keep the erasure, and see what it does.

    python examples/erase.py --method esd
    python examples/erase.py --method sld --onto runs/erase-uce/erasure
    accelerate launch examples/erase.py --policy CompVis/stable-diffusion-v1-4 --method esd --concept nudity

By default stripes are erased from the tiny world, with the settings that were found for it. On a Stable Diffusion it is
nudity with the authors' settings, or any other concept in words: ``--concept "van gogh" --anchor art``. Pictures of
prompts that name the concept, bring it unasked, are close to it, or have nothing to do with it are drawn before and
after, with the same seeds.
"""

import time
from functools import partial
from pathlib import Path

import tyro

from erasure import Concept, Erasure
from erasure.estimate import estimate
from erasure.protocols import TrainedMethod
from erasure.registry import MethodName, erase, method_named
from overpaint.evaluation import DrawConfig, Panel
from overpaint.evaluation.experiments.experiment import TINY_WORLD, Experiment, evaluate, experiment, write_results
from overpaint.policy import DiffusionPolicy
from overpaint.settings import AnyPath, Field, settings
from overpaint.tinyworld.presets import PRESETS
from overpaint.training import process_state
from rewards.combine import to_device


@settings
class Config:
    """What is erased from what, and by which method."""

    method: MethodName = "uce"
    """What erases."""

    policy: str = TINY_WORLD
    """The tiny world, or a folder or hub id of a Stable Diffusion."""

    concept: tuple[str, ...] = ()
    """Phrases that bring the concept; none is stripes in the tiny world, and else nudity."""

    anchor: str = " "
    """What takes its place, with a concept of yours; a single space is nothing in particular."""

    strength: float = Field(1.0, ge=0)
    """For methods that have one; 1 is the method's own setting."""

    onto: tuple[AnyPath, ...] = ()
    """Saved erasures (`Erasure.save`) that are applied before, in this order; this one is computed on top of them."""

    output_dir: AnyPath = Path("runs/erase")
    """Where everything is written."""

    prompts_per_kind: int = Field(200, ge=0)
    """Prompts of each kind in the comparison; 0 draws nothing."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures that are compared."""

    guidance_scale: float = 3.0
    """Their classifier-free guidance."""

    prompts_file: AnyPath | None = None
    """JSON with a list of prompts for each kind (explicit, implicit, neighbour, benign, train); None: built in."""

    seed: int = 0
    """Seed of everything."""

    resume: bool = False
    """Go on with an interrupted training in the same folder."""


def concept_of(config: Config, about: Experiment) -> Concept:
    """Returns the concept that was said, or the experiment's own."""
    if not config.concept:
        return about.concept
    return Concept(name=config.concept[0], phrases=config.concept, anchor=config.anchor)


def main(config: Config) -> Erasure:
    """Erases, and compares before and after."""
    if not config.resume and (config.output_dir / "erasure").exists():
        raise ValueError(f"output_dir must not hold another erasure, got {config.output_dir}; choose another folder")
    about = experiment(config.policy, prompts_file=config.prompts_file)
    policy: DiffusionPolicy = about.load(None)
    to_device(about.reward, policy.device)
    for folder in config.onto:
        Erasure.load(folder).apply(policy)
    concept = concept_of(config, about)
    preset = PRESETS.get(config.method) if config.policy == TINY_WORLD else None
    method = method_named(config.method, preset, seed=config.seed)
    main_process = process_state().is_main_process
    if isinstance(method, TrainedMethod) and main_process:
        print(f"{method.name}: {estimate(method, policy)}")

    begin = time.perf_counter()
    erasure = erase(
        method,
        policy,
        concept,
        strength=config.strength,
        output_dir=config.output_dir / "training",
        resume=config.resume,
    )
    minutes = (time.perf_counter() - begin) / 60
    if main_process:
        erasure.save(config.output_dir / "erasure")
        print(f"{concept.name} erased by {method.name} in {minutes:.1f} minutes: {config.output_dir / 'erasure'}")
    if not config.prompts_per_kind:
        return erasure
    drawing = DrawConfig(steps=config.evaluation_steps, guidance_scale=config.guidance_scale)
    evaluated = partial(evaluate, policy, about, drawing, prompts_per_kind=config.prompts_per_kind, seed=config.seed)
    evaluations = [evaluated(model="before")]
    erasure.apply(policy)
    evaluations.append(evaluated(model="erased"))
    if not main_process:
        return erasure
    metrics = config.output_dir / "training" / "metrics.jsonl"
    text = write_results(
        config.output_dir,
        evaluations,
        config,
        program="python examples/erase.py",
        title=f"{concept.name.capitalize()} erased by {method.name}",
        lead=f"{method.name} took {concept.name} out of {about.name} in {minutes:.1f} minutes.",
        models={"before": f"{about.name}, as it came", "erased": f"after {method.name}"},
        metrics=metrics if metrics.is_file() else None,
        panels=(Panel(title="Loss", tags={"loss": "erasure/loss"}),),
        settings={"erasure": erasure.config},
    )
    print(text)
    return erasure


if __name__ == "__main__":
    main(tyro.cli(Config))
    process_state().destroy_process_group()
