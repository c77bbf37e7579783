"""What programs share: where judges are, what is refused before any work, and commands that can be typed again."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from examples import ddpo_finetune, refl_erase_nudity, refl_finetune
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import Detector, draw_and_score, experiment
from overpaint.evaluation.experiments.options import OWNED, TunedOptions
from overpaint.evaluation.experiments.program import (
    command_line,
    settings_from_command_line,
    settings_yaml,
    usual_beside,
)
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.scoring.score import Measure
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.types import Images


class Judge:
    """A reward with a network somewhere."""

    differentiable = True

    def __init__(self) -> None:
        self.device = "nowhere"

    def to(self, device: torch.device | str) -> None:
        self.device = str(device)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        assert self.device == str(images.device)
        return torch.zeros(len(images), device=images.device)


def test_whatever_judges_pictures_is_moved_to_where_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    judges = [Judge() for _ in range(4)]
    monkeypatch.setattr(
        "overpaint.evaluation.experiments.experiment.concept_measure", lambda *arguments, **options: judges[3]
    )
    named = experiment("tinyworld", tinyworld.STRIPES, measure="clip")
    about = replace(named, reward=judges[0], held_out=judges[1], detector=Detector(judges[2], 0.1, measures=True))
    about.to(torch.device("meta"))
    assert [judge.device for judge in judges] == ["meta"] * 4

    measure = next(measure for measure in about.measures if measure.name == "concept rate")
    shown = torch.as_tensor(measure.metric(torch.zeros(2, 3, 8, 8, device="meta"), ["a", "b"]))
    assert shown.dtype == torch.bool


def test_an_evaluation_moves_what_it_measures_by() -> None:
    judge = Judge()
    draw_and_score(
        tinyworld.load_policy(), [Measure("own", judge)], {"benign": ["a red circle"]}, DrawConfig(steps=1),
        model="m", seed=0, progress=False,
    )  # fmt: skip
    assert judge.device == "cpu"


@pytest.mark.parametrize(
    ("options", "folder", "lora", "message"),
    [
        ({}, "tiny-sdxl", LoRAConfig(), "got 'kohya', for Stable Diffusion v1 and v2 alone"),
        ({}, "tiny-sd3", LoRAConfig(), "got 'kohya', for Stable Diffusion v1 and v2 alone"),
        ({}, None, LoRAConfig(dora=True), "a LoRA with DoRA must be saved in format 'diffusers'"),
    ],
)
def test_a_format_that_the_lora_cannot_have_is_refused_at_the_start(
    options: Any, folder: str | None, lora: LoRAConfig, message: str
) -> None:
    if folder is None:
        policy = tinyworld.load_policy(lora=lora)
    else:
        policy = DiffusionPolicy.from_pretrained(GOLDEN / "flow" / folder, device="cpu", lora=lora)
    with pytest.raises(ValueError, match=message):
        TunedOptions(kohya=True).start(policy)
    TunedOptions().start(policy)


def test_kohyas_format_is_refused_where_no_lora_is_trained() -> None:
    with pytest.raises(ValueError, match="kohya must be left out with train, which trains no LoRA, got train 'xattn'"):
        TunedOptions(kohya=True, train="xattn").tuned(LoRAConfig())


def test_the_command_of_a_run_without_a_lora_is_read_back() -> None:
    words = ["--train", "xattn", "--iterations", "7"]
    config = settings_from_command_line(refl_finetune.Config, refl_finetune.complete, words)
    assert config.lora is None
    usual = usual_beside(config, refl_finetune.complete, ["policy"])
    program, *options = shlex.split(command_line("it", config, usual, OWNED))
    assert program == "it"
    assert "None" not in options
    assert settings_from_command_line(refl_finetune.Config, refl_finetune.complete, options) == config


def test_options_win_over_what_a_run_has_written(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    nft = settings_from_command_line(ddpo_finetune.Config, ddpo_finetune.complete, ["--algorithm", "nft"])
    path.write_text(settings_yaml(nft, OWNED))
    words = ["--settings", str(path), "--guidance-scale", "3", "--size", "32"]
    again = settings_from_command_line(ddpo_finetune.Config, ddpo_finetune.complete, words)
    assert again.nft is not None
    assert (again.nft.guidance_scale, again.nft.height) == (3.0, 32)

    complete = refl_erase_nudity.complete
    words = ["--method", "esd", "--seed", "1", "--guidance-scale", "4"]
    path.write_text(settings_yaml(settings_from_command_line(refl_erase_nudity.Config, complete, words), OWNED))
    words = ["--settings", str(path), "--seed", "2", "--guidance-scale", "5"]
    other: Any = settings_from_command_line(refl_erase_nudity.Config, complete, words)
    assert (other.eraser.descent.seed, other.destruction.guidance_scale, other.refl.guidance_scale) == (2, 5.0, 5.0)
