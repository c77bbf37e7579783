"""Erase a concept from a text-to-image model, then win back its ImageReward while the concept stays gone.

    accelerate launch examples/refl_erase_nudity.py
    accelerate launch examples/refl_erase_nudity.py --method esd
    accelerate launch examples/refl_erase_nudity.py --method esd --form A --floor 0.05
    accelerate launch examples/refl_erase_nudity.py --policy CompVis/stable-diffusion-v1-4

By default this runs on the tiny world, whose harmful concept is stripes, in minutes on a CPU and without a download.
With ``--policy`` it is the same program on a Stable Diffusion: nudity, the official ImageReward, NudeNet. Three
states of the model are compared on the same prompts and seeds: ``before``, ``erased`` (by UCE, or any other method) and
``recovered`` (by ReFL under the constraint).

There are three forms. ``--form plain`` erases, and no more. ``--form A`` erases subject to a floor of the reward: no
more than ``--floor`` below the original model's. ``--form B``, which is the default, erases and then recovers subject
to the concept staying gone; ``A+B`` does both. An erased model that is there already is recovered by
``examples/refl_recover.py``, too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from erasure import Erasure, ErasureMethod, StrengthSearch, erase, method_named
from erasure.registry import MethodName
from overpaint.evaluation.experiments.experiment import Experiment
from overpaint.evaluation.experiments.options import TINY_WORLD, EraserSettings, usual_eraser
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.evaluation.experiments.recovery import UNKNOWN, Made, compare_states, first_policy, given_erasure, write
from overpaint.evaluation.experiments.recovery_constraint import check_constraint, kept_method
from overpaint.evaluation.experiments.recovery_options import RecoveryOptions, about_of, check_model, completed
from overpaint.evaluation.experiments.reward_floor import FOLDER, check_floor, erase_above_floor, floor_section
from overpaint.policy import DiffusionPolicy
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import check_output_dir, process_state


@settings
class Config(RecoveryOptions):
    """What is erased from what, and how the reward is kept or won back."""

    output_dir: AnyPath = Path("runs/refl_erase_nudity")
    """Where everything is written."""

    method: MethodName | Literal["none"] = "uce"
    """What erases; "none" is for a model that is erased already."""

    eraser: EraserSettings | None = None
    """Settings of the method; None is those that were found for the tiny world, and else its authors'."""

    strength: float = Field(1.0, ge=0)
    """Strength of the erasure, for methods that have one; 1 is the method's own setting. The largest that the form A
    tries."""

    form: Literal["plain", "A", "B", "A+B"] = "B"
    """What is optimised: "plain", the erasure alone; "A", the erasure subject to a floor of the reward, by training the
    method's loss and the reward together, or, of a method that has a strength, by the strongest setting that keeps the
    floor; "B", the reward subject to the erasure, after a plain one; "A+B", one after the other."""

    iterations: int = Field(200, ge=1)
    """ReFL iterations of the recovery; under the constraint destruction the reward joins after a third of them."""

    floor: float = Field(0.05, ge=0)
    """How much mean reward the form A may lose against the original model, in units of the reward."""

    @property
    def there(self) -> bool:
        """Whether the erasure is there already."""
        return self.method == "none" or self.erasure is not None

    @property
    def floored(self) -> bool:
        """Whether the erasure is subject to a floor of the reward."""
        return self.form.startswith("A")

    @property
    def recovers(self) -> bool:
        """Whether the reward is won back in the end."""
        return self.form.endswith("B")


def complete(config: Config) -> Config:
    """Fills in what depends on the model, the method and the concept."""
    eraser = config.eraser
    if eraser is None and config.method != "none":
        eraser = usual_eraser(
            config.method, config.own_concept(tiny=config.tiny), policy=config.policy, seed=config.seed
        )
    if config.constraint is None and config.policy == TINY_WORLD and config.recovers and config.method != "none":
        config = replace(config, constraint="destruction")
    return replace(completed(config), eraser=eraser)


WITHOUT_WEIGHTS = ("sld", "safree", "receler")
"""Methods that do not change the UNet's own weights."""


def check(config: Config) -> None:
    """Checks what joins several options, before any work.

    Raises:
        ValueError: The model is said to be erased already, and an erasure is given, or it is the tiny world's; or an
            original is given to a model that is not.
    """
    if config.train is not None and config.erasure is None and config.method in WITHOUT_WEIGHTS:
        raise ValueError(f"train must be None with {config.method}, which no pipeline's folder holds; train a LoRA")
    if config.method != "none":
        if config.original is not None:
            raise ValueError(f"original must come with the method none, got {config.original!r} with {config.method}")
    elif config.erasure is not None:
        raise ValueError(f"erasure must be None with the method none, got {config.erasure}")
    elif config.tiny:
        raise ValueError("policy must be an erased model with the method none, got the tiny world's original")
    check_form(config)
    check_model(config)


def check_form(config: Config) -> None:
    """Checks what the form makes of the other options.

    Raises:
        ValueError: It leaves one without a meaning, the method cannot erase above a floor, or the folder holds an
            erasure.
    """
    if config.form != "B" and config.there:
        raise ValueError(f"form must be B for a model that is erased already, got {config.form}")
    if config.floored:
        check_floor(method_named(config.method, config.eraser), config.strength)
    if config.recovers:
        return
    for name in ("train", "lora_file", "constraint", "ceiling", "attacked"):
        if (value := getattr(config, name)) not in (None, False):
            raise ValueError(
                f"{name} must be left out with the form {config.form}, which recovers nothing, got {value}"
            )
    if not config.resume and (config.output_dir / "erasure").exists():
        raise ValueError(f"output_dir must not hold another erasure, got {config.output_dir}; choose another folder")


def erased(
    config: Config, method: ErasureMethod, policy: DiffusionPolicy, about: Experiment
) -> tuple[Erasure, StrengthSearch | None]:
    """Erases by a method, with a floor of the reward or without; also returns what strengths were tried."""
    if config.floored:
        return erase_above_floor(method, policy, about, config, slack=config.floor, strongest=config.strength)
    folder = config.output_dir / FOLDER
    return (
        erase(method, policy, about.concept, strength=config.strength, output_dir=folder, resume=config.resume),
        None,
    )


def main(config: Config) -> None:
    """Runs the whole job."""
    config = complete(config)
    check_output_dir(config.training)
    check(config)
    about = about_of(config)
    named = None if config.there else config.method
    method = kept_method(config.erasure, named, config.eraser)
    if config.recovers:
        check_constraint(config, about, method, original=config.method != "none" or config.original is not None)
    policy = first_policy(config, about, trained=config.recovers)
    if config.there or method is None:
        erasure, search = given_erasure(config, about, policy), None
    else:
        erasure, search = erased(config, method, policy, about)
    evaluations = compare_states(config, policy, about, erasure, method=method, recovers=config.recovers)
    if not process_state().is_main_process:
        return
    eraser = UNKNOWN if erasure is None else erasure.method
    made = Made(policy, about, erasure, eraser, recovered=config.recovers)
    if config.floored:
        told = floor_section(config, about, search)
        made = made._replace(eraser=f"{eraser} above a floor of the reward", sections=[told])
    print(write(config, made, evaluations, program="refl_erase_nudity.py", complete=complete))


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
    process_state().destroy_process_group()
