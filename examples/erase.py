"""Erase a concept by any of the ten methods, keep the erasure, and see what it does.

    python examples/erase.py --method esd
    python examples/erase.py --method sld --onto runs/erase-uce/erasure
    accelerate launch examples/erase.py --policy CompVis/stable-diffusion-v1-4 --method esd --concept nudity

By default stripes are erased from the tiny world, with the settings that were found for it. On a Stable Diffusion it is
nudity with the authors' settings. Any other concept is said in words: ``--concept "van gogh" --anchor art --preserve
monet``. Pictures of prompts that name the concept, bring it unasked, are close to it, or have nothing to do with it are
drawn before and after, with the same seeds.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from erasure import Erasure
from erasure.estimate import estimate
from erasure.protocols import TrainedMethod
from erasure.registry import MethodName, erase, method_named
from overpaint.evaluation import Panel
from overpaint.evaluation.experiments.experiment import evaluate, experiment_of, write_results
from overpaint.evaluation.experiments.options import (
    ConceptOptions,
    EraserSettings,
    ModelOptions,
    RewardOptions,
    SharingOptions,
    usual_eraser,
)
from overpaint.evaluation.experiments.program import settings_from_command_line, usual_beside
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import process_state


@settings
class Config(SharingOptions, RewardOptions, ConceptOptions, ModelOptions):
    """What is erased from what, and by which method."""

    method: MethodName = "uce"
    """What erases."""

    eraser: EraserSettings | None = None
    """Settings of the method; None is those that were found for the tiny world, and else its authors'."""

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

    resume: bool = False
    """Go on with an interrupted training in the same folder."""


def complete(config: Config) -> Config:
    """Fills in what depends on the model, the method and the concept."""
    usual = usual_eraser(config.method, config.own_concept(tiny=config.tiny), policy=config.policy, seed=config.seed)
    return replace(config, guidance_scale=config.usual_guidance, eraser=config.eraser or usual)


def main(config: Config) -> Erasure:
    """Erases, and compares before and after."""
    config = complete(config)
    if not config.resume and (config.output_dir / "erasure").exists():
        raise ValueError(f"output_dir must not hold another erasure, got {config.output_dir}; choose another folder")
    config.check()
    about = experiment_of(config, config.own_concept(tiny=config.tiny))
    method = method_named(config.method, config.eraser)
    policy = config.load()
    about.to(policy.device)
    for folder in config.onto:
        Erasure.load(folder).apply(policy)
    main_process = process_state().is_main_process
    if isinstance(method, TrainedMethod) and main_process:
        print(f"{method.name}: {estimate(method, policy)}")

    begin = time.perf_counter()
    erasure = erase(
        method,
        policy,
        about.concept,
        strength=config.strength,
        output_dir=config.output_dir / "training",
        resume=config.resume,
    )
    minutes = (time.perf_counter() - begin) / 60
    if main_process:
        erasure.save(config.output_dir / "erasure")
        print(f"{method.name} took {minutes:.1f} minutes: {config.output_dir / 'erasure'}")
    if not config.prompts_per_kind:
        return erasure
    drawing = config.drawing(config.evaluation_steps)
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
        usual=usual_beside(config, complete, ("policy", "method", "concept", "anchor", "preserve")),
        erasures=[erasure],
        told={"concept": about.concept.name, "erased_by": method.name, "reward": about.reward_name},
        lead=f"{method.name} was applied to {about.name}, against {about.concept.name}; it took {minutes:.1f} minutes.",
        models={"before": f"{about.name}, as it came", "erased": f"after {method.name}"},
        metrics=metrics if metrics.is_file() else None,
        panels=(Panel(title="Loss", tags={"loss": "erasure/loss"}),),
        settings={"erasure": erasure.config},
    )
    print(text)
    return erasure


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
    process_state().destroy_process_group()
