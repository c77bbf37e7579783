"""The program that compares erasure methods: whose captions it measures on, and what it refuses to mix."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from overpaint.evaluation import Column, Report, Scores, plan
from overpaint.evaluation.experiments.experiment import tiny_world

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CAPTIONS = ["a photo of a cat", "two dogs on a beach", "a red bus"]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)  # programs import one another as scripts do
    return importlib.import_module("compare_erasures")


@pytest.fixture
def captions(tmp_path: Path) -> str:
    file = tmp_path / "captions.csv"
    file.write_text("\n".join(["prompt", *CAPTIONS]) + "\n", encoding="utf-8")
    return str(file)


def test_captions_take_the_place_of_benign_prompts_alone(program: Any, captions: str) -> None:
    ours, usual = program.about(program.Config(captions=captions)), tiny_world()
    assert ours.prompts("benign", 5, 1) == [CAPTIONS[k] for k in (1, 2, 0, 1, 2)]
    for kind in ("explicit", "implicit", "neighbour", "train", "held_out"):
        assert ours.prompts(kind, 5, 1) == usual.prompts(kind, 5, 1)


def test_a_checkpoint_is_measured_on_what_the_published_values_are_of(program: Any, tmp_path: Path) -> None:
    assert program.Config(policy="sd").captions == "coco-30k"
    assert program.Config(policy="sd", captions="imagereward-100").captions == "imagereward-100"
    assert program.Config(policy="sd", prompts_file=tmp_path).captions is None
    assert program.Config().captions is None


def scores(model: str, reward: float, measure: str = "ImageReward") -> Scores:
    benign, implicit = plan({"benign": CAPTIONS}), plan({"implicit": CAPTIONS})
    liked = Column(measure, "benign", False, "higher", "", benign, (reward - 0.1, reward, reward + 0.1))
    shown = Column("concept rate", "implicit", True, "lower", "", implicit, (0.0, 1.0, 0.0))
    return Scores(model=model, config=None, columns=(liked, shown))


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({}, ""),
        ({"size": 512, "guidance_scale": 7.5, "reward": "image-reward"}, ""),
        ({"captions": "imagereward-100"}, "other captions"),
        ({"policy": "a/folder"}, "other model"),
        ({"guidance_scale": 3.0, "size": 256}, "other guidance, size"),
        ({"reward": "aesthetic"}, "other reward"),
    ],
)
def test_only_what_is_the_same_stands_beside_published_values(
    program: Any, tmp_path: Path, options: dict[str, Any], other: str
) -> None:
    asked = {"policy": "CompVis/stable-diffusion-v1-4", "captions": "coco-30k", **options}
    config = program.Config(**asked, methods=("uce",), seeds=(0,), output_dir=tmp_path)
    (tmp_path / "uce" / "seed-0").mkdir(parents=True)
    (tmp_path / "uce" / "seed-0" / "minutes.json").write_text("1.5")
    of_two = [scores("before", 0.2, config.reward_name), scores("uce", 0.15, config.reward_name)]
    of_two[1].save(tmp_path / "uce" / "seed-0" / "scores.json")
    methods, *_, page = (section.html for section in program.sections(config, of_two))
    (row,) = (row for row in page.split("<tr") if ">UCE<" in row and "0.150" in row)
    assert ("0.190" in row) is (other == "")
    assert other in row
    assert f"<h3>{config.reward_name}</h3>" in page
    assert f">{config.reward_name}<" in methods


def test_pictures_are_those_of_the_seed_whose_scores_stand_beside(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(program, "Report", lambda **page: shown.append(page) or Report(**page))
    small = {"methods": ("uce",), "prompts_per_kind": 1, "evaluation_steps": 1, "recover": False, "workers": 1}
    for seeds in ((0, 1), (1,), (2,)):  # of seed 1 there are scores, and no pictures
        program.main(program.Config(**small, seeds=seeds, output_dir=tmp_path))
    first, without, new = shown
    for page in (first, new):
        assert [one.model for one in page["pictures"]] == ["before", "uce"]
        for one, known in zip(page["pictures"], page["scores"], strict=True):
            assert {image for column in known.columns for image in column.images} == set(one.planned)
        assert page["notes"] == []
    assert first["pictures"][0].planned != new["pictures"][0].planned
    assert (without["pictures"], without["scores"]) == ([], [])
    assert without["notes"][0].endswith("none of before, uce.")


def test_seeds_are_said_by_one_option(program: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be left out, since .* --seeds; got 3"):
        program.complete(program.Config(seed=3))


def test_numbers_of_other_settings_are_not_mixed(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("work_through", "report"):
        monkeypatch.setattr(program, name, lambda *_, **__: None)
    monkeypatch.setattr(program, "lines_of", lambda _: [])
    config = program.Config(output_dir=tmp_path, methods=("uce",))
    program.main(config)
    program.main(program.Config(output_dir=tmp_path, seeds=(5,), workers=1, recover=False))
    assert json.loads((tmp_path / "settings.json").read_text())["prompts_per_kind"] == "200"
    with pytest.raises(ValueError, match=r"hold the same comparison, .* has another prompts_per_kind$"):
        program.main(program.Config(output_dir=tmp_path, prompts_per_kind=50))


def test_captions_that_are_not_there_are_refused_before_any_work(program: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-set"):
        program.main(program.Config(output_dir=tmp_path / "run", captions="no-such-set"))
    assert not (tmp_path / "run").exists()
