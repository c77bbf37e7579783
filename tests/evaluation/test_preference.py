"""Preference accuracy against ImageReward's own count, and by hand."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from golden_case import GoldenCase, Record, Tensors
from PIL import Image
from torch import Tensor

from overpaint.evaluation.prompts import IMAGE_REWARD_TEST
from overpaint.evaluation.scoring.pair_scores import (
    PreferenceAccuracy,
    RankedImages,
    preference_accuracy,
    read_ranked,
    score_ranked,
)
from rewards.public_files import fetch

CASE = GoldenCase(
    "preference",
    left_out={
        "score_formula/hash_*": "words; what they describe is compared",
        "score_formula/hash": "words; the example's scores are computed from them",
    },
)
ENTRY = {"id": "a", "prompt": "a cat", "generations": ["1.png", "2.png"], "ranking": [2, 1]}
RANKED = (
    RankedImages("a", "a cat", ("a/0.png", "a/1.webp", "a/2.png"), (1, 2, 3)),
    RankedImages("b", "a red dog", ("b/0.png", "b/1.png"), (2, 1)),
)


class Brightness:
    """The mean of an image plus the length of its prompt; notes the sizes of its batches."""

    differentiable = True

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(len(images))
        return images.mean(dim=(1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.fixture(scope="module")
def golden() -> Tensors:
    return CASE.tensors


@pytest.fixture(scope="module")
def rankings(golden: Tensors) -> list[list[int]]:
    return per_prompt(golden, "ranking")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The images of `RANKED`: grey, in two sizes, each 20 levels brighter than the one before."""
    level = 0
    for images in RANKED:
        (tmp_path / images.id).mkdir()
        for place, name in enumerate(images.images):
            size = (8, 6) if place == 1 else (10, 12)
            Image.new("RGB", size, (level, level, level)).save(tmp_path / name, lossless=True)
            level += 20
    return tmp_path


def per_prompt(golden: Tensors, name: str) -> list[list[Any]]:
    sizes = golden["offsets"].diff().tolist()
    return [part.tolist() for part in golden[name].split(sizes)]


def written(content: object, tmp_path: Path) -> Path:
    path = tmp_path / "ranked.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("expected", CASE.record["results"], ids=lambda result: result["score"])
def test_golden_scores_get_the_official_accuracy(golden: Tensors, rankings: list[list[int]], expected: Record) -> None:
    found = preference_accuracy(per_prompt(golden, f"{expected['score']}/score"), rankings)
    assert (found.correct, found.pairs) == (expected["correct_pairs"], expected["pairs"])
    pairs, tied = CASE.record["untied_human_pairs"], CASE.record["tied_human_pairs_skipped"]
    assert (found.pairs, found.tied_pairs_skipped) == (pairs, tied)
    assert found.prompts_with_pairs == expected["prompts_with_pairs"]
    (atol,) = CASE.tolerance()
    assert found.micro == pytest.approx(expected["accuracy_micro"], rel=0, abs=atol)
    assert found.macro == pytest.approx(expected["accuracy_macro_per_prompt"], rel=0, abs=atol)


def test_golden_scores_are_made_as_the_file_says(golden: Tensors, rankings: list[list[int]]) -> None:
    example = CASE.record["example_first_prompt"]
    assert rankings[0] == example["ranking"]
    digests = [hashlib.sha256(name.encode()).digest() for name in example["generations"]]
    hashed = [int.from_bytes(digest[:4], "big") / 2**32 for digest in digests]
    assert hashed == per_prompt(golden, "hash/score")[0] == example["hash_score"]


def test_scores_in_the_order_of_the_ranks_are_always_right(rankings: list[list[int]]) -> None:
    found = preference_accuracy([[-float(rank) for rank in ranks] for ranks in rankings], rankings)
    assert (found.micro, found.macro, found.correct) == (1.0, 1.0, CASE.record["untied_human_pairs"])


def test_constant_scores_are_always_wrong(rankings: list[list[int]]) -> None:
    found = preference_accuracy([[0.5] * len(ranks) for ranks in rankings], rankings)
    assert (found.micro, found.macro, found.correct) == (0.0, 0.0, 0)


def test_small_example_is_counted_as_by_hand() -> None:
    scores = [[0.9, 0.5, 0.5], [1.0, 2.0], [3.0, 1.0], [4.0]]
    rankings = [[1, 2, 3], [1, 2], [4, 4], [1]]
    # First prompt: 0.9 is above both, and the two equal scores are wrong. Second: the wrong way round. The third is a
    # tie of people, and the fourth has no pair.
    found = preference_accuracy(scores, rankings)
    expected = PreferenceAccuracy(
        correct=2,
        pairs=4,
        micro=2 / 4,
        # Residuals 2 - 3/2 and 0 - 1/2 of two prompts: sqrt(2 / 1 * (1/4 + 1/4)) / 4.
        micro_error=1 / 4,
        macro=(2 / 3 + 0) / 2,
        macro_error=1 / 3,
        tied_pairs_skipped=1,
        prompts_with_pairs=2,
    )
    assert found == pytest.approx(expected)


def test_standard_errors_are_those_of_a_bootstrap_over_prompts(golden: Tensors, rankings: list[list[int]]) -> None:
    scores = per_prompt(golden, "hash_minus_rank/score")
    found = preference_accuracy(scores, rankings)
    alone = [preference_accuracy([own], [ranks]) for own, ranks in zip(scores, rankings, strict=True)]
    drawn = numpy.random.default_rng(0).integers(len(alone), size=(2000, len(alone)))
    correct, pairs = numpy.array([each.correct for each in alone])[drawn], numpy.array([e.pairs for e in alone])[drawn]
    # 2,000 draws know a standard deviation to 1.6 %; the linearisation is off by less than that.
    assert found.micro_error == pytest.approx((correct.sum(1) / pairs.sum(1)).std(), rel=0.06)
    assert found.macro_error == pytest.approx((correct / pairs).mean(1).std(), rel=0.06)


def test_one_prompt_has_no_standard_error() -> None:
    found = preference_accuracy([[2.0, 1.0]], [[1, 2]])
    assert found.micro == found.macro == 1.0
    assert math.isnan(found.micro_error)
    assert math.isnan(found.macro_error)


@pytest.mark.parametrize(
    ("scores", "rankings", "message"),
    [
        ([[1.0, 2.0]], [[1, 2], [1, 2]], "scores must be of as many prompts as rankings, got 1 and 2"),
        ([[1.0, 2.0], [1.0]], [[1, 2], [1, 2]], "scores[1] must hold one for each of 2 images, got 1"),
        ([[1.0, math.nan]], [[1, 2]], "scores[0] must be finite, got [1.0, nan]"),
        ([[1.0, 2.0]], [[3, 3]], "rankings must hold at least one pair"),
        ([], [], "rankings must hold at least one pair"),
    ],
)
def test_scores_that_do_not_fit_are_an_error(
    scores: list[list[float]], rankings: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        preference_accuracy(scores, rankings)


def test_ranked_images_are_read(tmp_path: Path) -> None:
    ranked = read_ranked(written([ENTRY, {**ENTRY, "id": "b", "more": 1}], tmp_path))
    assert ranked[0] == RankedImages("a", "a cat", ("1.png", "2.png"), (2, 1))
    assert [images.id for images in ranked] == ["a", "b"]


def test_published_file_holds_the_golden_rankings(shared: Path, rankings: list[list[int]]) -> None:
    ranked = read_ranked(fetch(IMAGE_REWARD_TEST, shared / "data"))
    assert [list(images.ranking) for images in ranked] == rankings
    example = CASE.record["example_first_prompt"]
    assert (ranked[0].id, list(ranked[0].images)) == (example["id"], example["generations"])


def test_published_file_is_read_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "overpaint.evaluation.scoring.pair_scores.fetch", lambda file: asked.append(file) or written([ENTRY], tmp_path)
    )
    assert [images.id for images in read_ranked()] == ["a"]
    assert asked == [IMAGE_REWARD_TEST]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "must be JSON"),
        ({}, "must hold a list, got dict"),
        ([1], "entry 0 of .* must be an object, got int"),
        ([{**ENTRY, "id": 7}], "id of entry 0 of .* must be a string, got 7"),
        ([{"id": "a"}], "prompt of entry 0 of .* must be a string, got None"),
        ([ENTRY, ENTRY], "id must be unique in .*, got 'a' again in entry 1"),
        ([{**ENTRY, "generations": []}], r"generations of 'a', entry 0 .* must be a list of paths, got \[\]"),
        ([{**ENTRY, "generations": ["1.png", 2]}], "generations of 'a', .* must be a list of paths"),
        ([{**ENTRY, "ranking": [1]}], r"ranking of 'a', .* one rank for each of 2 images, got \[1\]"),
        ([{**ENTRY, "ranking": [1, 6]}], "ranking of 'a', .* must hold whole numbers from 1 to 5, got 6"),
        ([{**ENTRY, "ranking": [0, 1]}], "must hold whole numbers from 1 to 5, got 0"),
        ([{**ENTRY, "ranking": [1, 1.5]}], "must hold whole numbers from 1 to 5, got 1.5"),
        ([{**ENTRY, "ranking": [1, True]}], "must hold whole numbers from 1 to 5, got True"),
    ],
)
def test_file_of_another_form_is_an_error(content: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_ranked(written(content, tmp_path))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_each_image_file_is_scored_for_its_prompt(folder: Path, tmp_path: Path, batch_size: int) -> None:
    scores = score_ranked(Brightness(), RANKED, folder, tmp_path / "kept", batch_size=batch_size, progress=False)
    expected = [[5.0, 5 + 20 / 255, 5 + 40 / 255], [9 + 60 / 255, 9 + 80 / 255]]
    # Means of float32 images, and a sum of about 10.
    assert scores == [pytest.approx(own, rel=0, abs=2e-6) for own in expected]
    assert preference_accuracy(scores, [images.ranking for images in RANKED]).correct == 1


def test_images_of_one_size_are_scored_together(folder: Path, tmp_path: Path) -> None:
    reward = Brightness()
    score_ranked(reward, RANKED, folder, tmp_path / "kept", progress=False)
    assert sorted(reward.batches) == [2, 3]


def test_progress_is_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score_ranked(Brightness(), RANKED, folder, tmp_path / "kept")
    assert "5/5" in capsys.readouterr().err


def test_interrupted_scoring_goes_on_and_gives_the_same_scores(folder: Path, tmp_path: Path) -> None:
    class Interrupted(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            if len(self.batches) == 2:
                raise KeyboardInterrupt
            return super().__call__(images, prompts)

    def scores_by(reward: Brightness, journal: str) -> list[list[float]]:
        return score_ranked(reward, RANKED, folder, tmp_path / journal, batch_size=1, progress=False)

    with pytest.raises(KeyboardInterrupt):
        scores_by(Interrupted(), "kept")
    second = Brightness()
    assert scores_by(second, "kept") == scores_by(Brightness(), "whole")
    assert second.batches == [1, 1, 1]
    third = Brightness()
    scores_by(third, "kept")
    assert not third.batches


def test_scores_of_another_reward_are_not_taken_for_those_of_this(folder: Path, tmp_path: Path) -> None:
    score_ranked(Brightness(), RANKED, folder, tmp_path / "kept", name="brightness", progress=False)
    with pytest.raises(ValueError, match=r"was begun with rewards \['brightness'\], got \['clip'\]"):
        score_ranked(Brightness(), RANKED, folder, tmp_path / "kept", name="clip", progress=False)


def test_missing_image_is_an_error_before_anything_is_scored(folder: Path, tmp_path: Path) -> None:
    (folder / "b" / "0.png").unlink()
    reward = Brightness()
    with pytest.raises(ValueError, match=r"got 1 of 5 that are not: .*b/0.png: .*there is no image"):
        score_ranked(reward, RANKED, folder, tmp_path / "kept", progress=False)
    assert not reward.batches


@pytest.mark.parametrize("keep", [0, 12, 45])
def test_damaged_image_is_an_error_that_names_it(folder: Path, tmp_path: Path, keep: int) -> None:
    path = folder / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"b/1.png: it cannot be read"):
        score_ranked(Brightness(), RANKED, folder, tmp_path / "kept", progress=False)


def test_score_that_is_not_finite_is_an_error_that_names_the_image(folder: Path, tmp_path: Path) -> None:
    class Broken(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            scores = super().__call__(images, prompts)
            return torch.where(scores > 9, torch.inf, scores)

    with pytest.raises(ValueError, match=r"b/0.png: brightness gives it inf"):
        score_ranked(Broken(), RANKED, folder, tmp_path / "kept", name="brightness", progress=False)


def test_batch_of_no_images_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_ranked(Brightness(), RANKED, folder, tmp_path / "kept", batch_size=0, progress=False)
