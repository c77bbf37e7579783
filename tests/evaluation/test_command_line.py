"""The command that a report gives does the same again."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tyro

from examples import (
    ddpo_finetune,
    erase,
    evaluate_models,
    evaluate_preference,
    refl_erase_nudity,
    refl_finetune,
)
from overpaint.evaluation.experiments.program import command_line


@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str = "a"
    sizes: tuple[int, ...] = ()
    keep: bool = True
    resume: bool = False
    folder: Path | None = None


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (Settings(), ""),
        (Settings(name="two words", sizes=(1, 2)), " --name 'two words' --sizes 1 2"),
        (Settings(keep=False, resume=True, folder=Path("it's")), " --no-keep --resume --folder 'it'\"'\"'s'"),
    ],
)
def test_only_what_is_unusual_is_said_as_a_shell_reads_it(config: Settings, options: str) -> None:
    assert command_line("python it.py", config) == f"python it.py{options}"
    assert tyro.cli(Settings, args=shlex.split(options)) == config


def test_what_is_usual_can_be_told() -> None:
    usual = {**vars(Settings()), "sizes": (1,)}
    assert command_line("it", Settings(sizes=(1,)), usual) == "it"
    assert command_line("it", Settings(), usual) == "it --sizes"


@pytest.mark.parametrize(
    "config",
    [
        ddpo_finetune.Config(task="compressibility", reward="clip"),
        erase.Config(method="sld", concept=("a", "b c"), onto=(Path("x"), Path("y")), anchor=" "),
        evaluate_models.Config(experiment="prompts", models=("sd1.4", "dalle2=a b"), own_scheduler=True),
        evaluate_models.Config(limit=7, sizes=(32,), guidance_scales=(1.5, 2.0)),
        evaluate_preference.Config(rewards=("clip", "blip"), images=Path("i"), device="cpu"),
        refl_erase_nudity.Config(method="esd", learning_rate=1e-5, resume=True),
        refl_finetune.Config(policy="sd1.4", seed=3),
    ],
)
def test_the_commands_of_examples_are_read_back_as_the_same_settings(config: Any) -> None:
    usual = evaluate_models.usual_settings(config) if isinstance(config, evaluate_models.Config) else None
    program, *options = shlex.split(command_line("it", config, usual))
    assert program == "it"
    assert tyro.cli(type(config), args=options) == config
