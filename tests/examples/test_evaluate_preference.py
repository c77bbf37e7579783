"""The program for preference accuracy: on ImageReward's own test with stand-in images, and in the tiny world."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples import evaluate_preference
from examples.evaluate_preference import Config, main
from overpaint.evaluation.prompts import IMAGE_REWARD_TEST
from overpaint.evaluation.scoring.pair_scores import read_ranked

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = ROOT / "tests" / "golden" / "preference.json"
HASH, MINUS_RANK, QUANTISED, NOT_FINITE = (
    f"stand_in_rewards:{name}" for name in ("HashScore", "HashMinusRank", "HashQuantised", "NotFinite")
)
SMALL = [
    {"id": "a", "prompt": "a cat", "generations": ["a/0.png", "a/1.png", "a/2.png"], "ranking": [2, 1, 2]},
    {"id": "b", "prompt": "a dog", "generations": ["b/0.png", "b/1.png"], "ranking": [1, 2]},
]


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes the rewards of this folder known by name; returns the file where they note what they score."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    return tmp_path / "noted"


def draw_stand_ins(test: Path, folder: Path) -> Path:
    from stand_in_rewards import write_stand_in

    for images in read_ranked(test):
        for name, rank in zip(images.images, images.ranking, strict=True):
            write_stand_in(folder / name, name, rank)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Config:
    """A test of two prompts, whose images hold the numbers 0.14, 0.52, 0.26 and 0.06, 0.78."""
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL), encoding="utf-8")
    images = draw_stand_ins(file, tmp_path / "images")
    return Config(images=images, test=file, rewards=(HASH,), output_dir=tmp_path / "run", device="cpu")


def written(config: Config) -> dict[str, Any]:
    return json.loads((config.output_dir / "preference.json").read_text(encoding="utf-8"))


def page(config: Config) -> str:
    return (config.output_dir / "report.html").read_text(encoding="utf-8")


def test_stand_ins_for_the_published_test_get_the_golden_accuracy(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = shared / "data" / IMAGE_REWARD_TEST.name
    # That the reward under ImageReward's name is a stand-in is what makes its published row fill up.
    monkeypatch.setattr(evaluate_preference, "PUBLISHED_AS", {HASH: "ImageReward"})
    config = Config(
        images=draw_stand_ins(test, tmp_path / "images"),
        test=test,
        rewards=(HASH, MINUS_RANK, QUANTISED),
        output_dir=tmp_path / "run",
        batch_size=256,
    )
    found = main(config)
    results = json.loads(GOLDEN.read_text(encoding="utf-8"))["results"]
    for name, expected in zip((HASH, MINUS_RANK, QUANTISED), results, strict=True):
        assert (found[name].correct, found[name].pairs) == (expected["correct_pairs"], expected["pairs"])
        assert found[name].micro == pytest.approx(expected["accuracy_micro"], rel=0, abs=1e-12)
        assert found[name].macro == pytest.approx(expected["accuracy_macro_per_prompt"], rel=0, abs=1e-12)
        assert written(config)["accuracies"][name]["correct"] == expected["correct_pairs"]
    lines = capsys.readouterr().out.split("\n")
    (ours,) = (line for line in lines if line.startswith("| ImageReward") and "50.27" in line)
    cells = [cell.strip() for cell in ours.split("|")]
    # 50.27 less 65.15 of the study, and less 65.14 of the paper.
    assert {"65.15", "65.14", "\u221214.88", "\u221214.87"} <= set(cells)
    (clip,) = (line for line in lines if line.startswith("| CLIP score"))
    assert "not run" in clip
    assert page(config).count("not run") >= 3


def test_a_small_test_is_counted_as_by_hand(small: Config, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(small)[HASH]
    # The second image of a is above the two others, which tie for people; those of b are the wrong way round.
    assert (found.correct, found.pairs, found.tied_pairs_skipped) == (2, 3, 1)
    out = capsys.readouterr().out
    assert "66.67 %  2 of 3 pairs of 2 prompts, 1 ties of people left out" in out
    assert written(small)["test"] == "small.json"


def test_accuracy_on_another_test_stands_in_a_row_of_its_own(
    small: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate_preference, "PUBLISHED_AS", {HASH: "ImageReward"})
    main(small)
    rows = [line for line in capsys.readouterr().out.split("\n") if line.startswith("| ImageReward |")]
    published, ours, _ = rows
    assert "not run" in published
    assert "small.json" in ours
    assert "66.67" in ours
    assert "65.14" not in ours


def test_what_is_scored_is_not_scored_again(small: Config, noted: Path) -> None:
    first = main(small)
    assert noted.read_text() == "HashScore 5\n"
    assert main(replace(small, rewards=(MINUS_RANK, HASH)))[HASH] == first[HASH]
    assert noted.read_text() == "HashScore 5\nHashMinusRank 5\n"


def test_a_run_that_fails_keeps_what_other_rewards_scored(small: Config, noted: Path) -> None:
    with pytest.raises(ValueError, match=r"NotFinite gives it nan"):
        main(replace(small, rewards=(HASH, NOT_FINITE)))
    assert not (small.output_dir / "report.html").exists()
    main(small)
    assert noted.read_text().count("HashScore") == 1


def test_two_processes_share_the_rewards_and_find_the_same(
    small: Config, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    both = replace(small, rewards=(HASH, MINUS_RANK))
    alone = {name: accuracy._asdict() for name, accuracy in main(both).items()}
    options = ["--images", small.images, "--test", small.test, "--output-dir", tmp_path / "two"]
    program, variables = ROOT / "examples" / "evaluate_preference.py", {"PYTHONPATH": f"{ROOT}:{HERE}"}
    printed = torchrun(program, *options, "--rewards", HASH, MINUS_RANK, NOTED=str(tmp_path / "both"), **variables)
    assert written(replace(small, output_dir=tmp_path / "two"))["accuracies"] == alone
    assert sorted((tmp_path / "both").read_text().split()) == ["5", "5", "HashMinusRank", "HashScore"]
    assert printed.count("The report: ") == 1
    assert "still connected" not in printed


def test_by_default_a_test_is_made_in_the_tiny_world(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], look_at: Callable[[Path], Any]
) -> None:
    config = Config(output_dir=tmp_path / "run", device="cpu", tiny_prompts=4, tiny_images=3, tiny_steps=2)
    found = main(config)
    assert list(found) == ["tiny-image-reward", "compressibility", "tinyworld:Utility"]
    # Pictures are ranked by their worth, so that the worth itself is always right.
    assert found["tinyworld:Utility"].micro == 1.0
    assert found["tinyworld:Utility"].pairs == 12
    assert 0 <= found["compressibility"].micro <= 1
    ranked = read_ranked(config.output_dir / "test.json")
    assert [sorted(images.ranking) for images in ranked] == [[1, 2, 3]] * 4
    out = capsys.readouterr().out
    assert "tiny world" in out
    assert out.count("not run") == 4
    html = page(config)
    for word in ("tiny-image-reward", "65.14", "not run", "Xu et al.", "evaluate_preference.py --output-dir"):
        assert word in html
    seen = look_at(config.output_dir / "report.html")
    assert seen.tables >= 3  # both accuracies, settings
    assert seen.pictures == 6


# What is refused


def test_a_missing_image_is_named_before_any_work(small: Config, noted: Path) -> None:
    assert small.images is not None
    (small.images / "b" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"got 1 of 5 that are not: .*b/1\.png: .*there is no image at"):
        main(small)
    assert not noted.exists()


def test_contradictions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rewards must hold each once, got \('a', 'b', 'a'\)"):
        Config(rewards=("a", "b", "a"))
    with pytest.raises(ValueError, match="test must come with images, the folder of its images, got "):
        Config(test=tmp_path)
    with pytest.raises(ValueError, match="tiny_images must be at most 5, got 6"):
        Config(tiny_images=6)
    with pytest.raises(ValueError, match="tiny_prompts must be at least 1, got 0"):
        Config(tiny_prompts=0)
