from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.evaluation import (
    Column,
    DrawConfig,
    DrawnImages,
    ImageFolder,
    Measure,
    PlannedImage,
    Scores,
    draw,
    gather,
    generate,
    merge,
    score,
    shard,
)
from overpaint.policy.types import Images

Planned = tuple[PlannedImage, ...]


def brightness(images: Images, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def names_stripes(images: Images, prompts: Sequence[str]) -> list[bool]:
    return ["striped" in prompt for prompt in prompts]


MEASURES = (
    Measure("brightness", brightness, ("benign",), better="neither", note="mean of all channels"),
    Measure("names stripes", names_stripes, better="lower"),
)


@pytest.fixture
def drawn(planned: Planned, noise_policy: Any) -> DrawnImages:
    return draw(noise_policy(), planned, DrawConfig(steps=7), model="before", progress=False)


def test_every_image_keeps_its_value(drawn: DrawnImages) -> None:
    scores = score(drawn, MEASURES, chunk=4, progress=False)
    assert (scores.model, scores.config) == ("before", DrawConfig(steps=7))
    column = scores.column("brightness", "benign")
    assert column.images == drawn.planned[4:]
    assert column.values == pytest.approx((drawn.stack[4:].double() / 255).mean(dim=(1, 2, 3)).tolist(), abs=1e-6)
    assert (column.better, column.note) == ("neither", "mean of all channels")


def test_measures_are_taken_on_their_kinds(drawn: DrawnImages) -> None:
    scores = score(drawn, MEASURES, progress=False)
    assert [(column.measure, column.kind) for column in scores.columns] == [
        ("brightness", "benign"),
        ("names stripes", "explicit"),
        ("names stripes", "benign"),
    ]


def test_yes_and_no_make_a_rate_and_numbers_make_a_mean(drawn: DrawnImages) -> None:
    scores = score(drawn, MEASURES, progress=False)
    explicit, benign = (scores.column("names stripes", kind) for kind in ("explicit", "benign"))
    assert (explicit.is_rate, explicit.values, explicit.estimate.mean) == (True, (1.0,) * 4, 1.0)
    assert (benign.is_rate, benign.estimate.mean) == (True, 0.0)
    # Four images of two prompts: Wilson's two of two, 2 / (2 + 3.841459).
    assert explicit.estimate.low == pytest.approx(0.3424, abs=1e-4)
    assert not scores.column("brightness", "benign").is_rate


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_change_no_value(chunk: int, drawn: DrawnImages) -> None:
    sizes = []

    def noted(images: Images, prompts: Sequence[str]) -> Tensor:
        sizes.append(len(prompts))
        return brightness(images, prompts)

    whole = score(drawn, [Measure("b", brightness)], progress=False)
    parts = score(drawn, [Measure("b", noted)], chunk=chunk, progress=False)
    assert parts == whole
    assert max(sizes) <= chunk


def test_a_folder_scores_as_memory_does(
    drawn: DrawnImages, planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    generate(
        noise_policy(), planned, tmp_path, DrawConfig(steps=7), model="before", rank=0, world_size=1, progress=False
    )
    folder = ImageFolder.open(tmp_path, "before")
    assert score(folder, MEASURES, progress=False) == score(drawn, MEASURES, progress=False)


def test_scores_are_read_as_they_were_written(drawn: DrawnImages, tmp_path: Path) -> None:
    scores = score(drawn, MEASURES, progress=False)
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores


def test_shards_scored_apart_merge_to_the_whole(planned: Planned, noise_policy: Any) -> None:
    def scored(part: Planned) -> Scores:
        return score(draw(noise_policy(), part, model="m", progress=False), MEASURES, progress=False)

    # The last of four shards has no explicit image, so that one of its columns is missing.
    parts = [scored(shard(planned, rank, 7)) for rank in range(7)]
    assert merge(parts, planned) == scored(planned)


def test_shards_that_lack_or_repeat_an_image_do_not_merge(drawn: DrawnImages, planned: Planned) -> None:
    scores = score(drawn, MEASURES, progress=False)
    with pytest.raises(
        ValueError, match="must hold each of 6 planned images of kind 'benign' once, got 12 values of 6"
    ):
        merge([scores, scores], planned)
    with pytest.raises(ValueError, match="parts must be of one model"):
        merge([scores, Scores(model="other", config=scores.config, columns=())], planned)


def test_one_process_gathers_its_own_scores(drawn: DrawnImages, planned: Planned) -> None:
    scores = score(drawn, MEASURES, progress=False)
    assert gather(scores, planned) == scores


def test_metrics_run_without_gradients(drawn: DrawnImages) -> None:
    weight = torch.ones((), requires_grad=True)

    def graded(images: Images, prompts: Sequence[str]) -> Tensor:
        values = images.mean(dim=(1, 2, 3)) * weight
        assert not values.requires_grad
        return values

    score(drawn, [Measure("graded", graded)], progress=False)


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ([], "measures must hold at least one, got none"),
        ([MEASURES[0], MEASURES[0]], "measures must have unique names"),
        ([Measure("b", brightness, ("bening",))], r"measures\['b'\]\.kinds must be among explicit, .* got 'bening'"),
        ([Measure("b", lambda images, prompts: [0.0])], r"one number for each of 4 images, got \(1,\)"),
        ([Measure("b", lambda images, prompts: torch.zeros(4, 1))], r"got \(4, 1\)"),
        (
            [Measure("b", lambda images, prompts: [float("nan")] * 4)],
            "values must be finite, got nan for prompt 'a striped star'",
        ),
    ],
)
def test_measures_that_cannot_be_taken_are_refused(
    measures: Sequence[Measure], message: str, drawn: DrawnImages
) -> None:
    with pytest.raises(ValueError, match=message):
        score(drawn, measures, progress=False)


def test_asking_for_a_column_that_is_not_there_names_those_that_are(drawn: DrawnImages) -> None:
    with pytest.raises(
        ValueError, match=r"brightness on benign, names stripes on explicit.* got brightness on explicit"
    ):
        score(drawn, MEASURES, progress=False).column("brightness", "explicit")


def test_a_column_of_one_image_has_no_error() -> None:
    image = PlannedImage("benign", "benign-0000", 0, "a", 1)
    column = Column("m", "benign", False, "higher", "", (image,), (2.0,))
    assert column.estimate.mean == 2.0
    assert column.estimate.error != column.estimate.error  # NaN
