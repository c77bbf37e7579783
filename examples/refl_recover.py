"""Win back the reward of an erased model, whoever erased it, while the concept stays gone.

    accelerate launch examples/refl_recover.py --erasure runs/erase/erasure
    accelerate launch examples/refl_recover.py --erasure runs/erase/erasure --constraint none
    accelerate launch examples/refl_recover.py --policy CompVis/stable-diffusion-v1-4 --erasure esd-nudity.pt
    accelerate launch examples/refl_recover.py --policy my/erased --original CompVis/stable-diffusion-v1-4

An erased model is an erasure and the model that it is of, with ``--policy`` the original: a folder that ``erase.py``
wrote, or a file or folder of weights as the methods' authors release them. Or it is a whole model, with ``--policy``
itself and the original beside it, where there is one, to compare with. What is not of weights stays at work: the
sampling guards of SLD and SAFREE, and Receler's networks. The concept is that of the saved erasure, or said in words.

Up to three states are compared on the same prompts and seeds: ``before``, ``erased`` and ``recovered`` (by ReFL, under
a constraint of choice). With ``--constraint none`` it is the unconstrained twin, which shows how much of the concept
comes back when an erased model is tuned on harmless prompts.
"""

from dataclasses import replace
from pathlib import Path

from erasure.registry import MethodName
from overpaint.evaluation.experiments.options import EraserSettings, usual_eraser
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.evaluation.experiments.recovery import UNKNOWN, Made, compare_states, first_policy, given_erasure, write
from overpaint.evaluation.experiments.recovery_constraint import check_constraint, kept_method
from overpaint.evaluation.experiments.recovery_options import RecoveryOptions, about_of, check_model, completed
from overpaint.settings import AnyPath, settings
from overpaint.training import check_output_dir, process_state


@settings
class Config(RecoveryOptions):
    """Which erased model is recovered, and what holds the concept."""

    output_dir: AnyPath = Path("runs/refl_recover")
    """Where everything is written."""

    method: MethodName | None = None
    """What erased, for the constraint "objective" and for tables; None is what a saved erasure says."""

    eraser: EraserSettings | None = None
    """Settings of a method that is named; None is those found for the tiny world, and else its authors'."""


def complete(config: Config) -> Config:
    """Fills in what depends on the model, the method and the concept."""
    eraser = config.eraser
    if eraser is None and config.method is not None:
        eraser = usual_eraser(
            config.method, config.own_concept(tiny=config.tiny), policy=config.policy, seed=config.seed
        )
    return replace(completed(config), eraser=eraser)


def check(config: Config) -> None:
    """Checks what joins several options, before any work.

    Raises:
        ValueError: There is no erased model, or settings of a method that is not named.
    """
    check_model(config)
    if config.tiny and config.erasure is None:
        raise ValueError("policy must be an erased model, or come with an erasure, got the tiny world's original")
    if config.eraser is not None and config.method is None:
        raise ValueError(f"eraser must come with its method, got {type(config.eraser).__name__} alone")


def main(config: Config) -> None:
    """Compares, recovers, and compares again."""
    config = complete(config)
    check(config)
    check_output_dir(config.training)
    about, method = about_of(config), kept_method(config.erasure, config.method, config.eraser)
    check_constraint(config, about, method, original=config.erasure is not None or config.original is not None)
    policy = first_policy(config, about)
    erasure = given_erasure(config, about, policy, None if method is None else method.name)
    evaluations = compare_states(config, policy, about, erasure, method=method)
    made = Made(policy, about, erasure, UNKNOWN if erasure is None else erasure.method, recovered=True)
    if process_state().is_main_process:
        print(write(config, made, evaluations, program="refl_recover.py", complete=complete))


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
    process_state().destroy_process_group()
