"""Scoring that goes on after a kill, images of other systems, and the table of all images."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.evaluation import DrawConfig, DrawnImages, ImageFolder, Measure, Scores, draw, plan, score, write_folder
from overpaint.evaluation.images.files import write_png
from overpaint.evaluation.images.pairs import OtherImages
from overpaint.evaluation.scoring.score import score_rows, write_scores
from overpaint.evaluation.tables import read_table
from overpaint.policy.types import Images

ROOT = Path(__file__).parents[2]


class Brightness:
    """The mean of an image; counts the images that it sees, and stops after some."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen = 0
        self.stop_after = stop_after

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        if self.stop_after is not None and self.seen >= self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(images)
        return images.mean(dim=(1, 2, 3))


def bright(images: Images, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3)) > 0.4


def measures(brightness: Brightness) -> list[Measure]:
    return [Measure("brightness", brightness), Measure("bright", bright, ("benign",))]


@pytest.fixture
def folder(planned: Any, noise_policy: Any, tmp_path: Path) -> ImageFolder:
    return write_folder(draw(noise_policy(), planned, model="before", progress=False), tmp_path / "images")


@pytest.mark.parametrize("stop_after", [0, 2, 4, 8])
def test_an_interrupted_scoring_goes_on_with_what_is_missing(
    stop_after: int, folder: ImageFolder, tmp_path: Path
) -> None:
    whole = score(folder, measures(Brightness()), chunk=2, progress=False)
    with pytest.raises(KeyboardInterrupt):
        score(folder, measures(Brightness(stop_after)), chunk=2, journal=tmp_path / "journal", progress=False)
    rest = Brightness()
    assert score(folder, measures(rest), chunk=2, journal=tmp_path / "journal", progress=False) == whole
    assert rest.seen == 10 - stop_after
    again = Brightness(stop_after=0)
    assert score(folder, measures(again), chunk=2, journal=tmp_path / "journal", progress=False) == whole


PROGRAM = """
import sys, time
from overpaint.evaluation import ImageFolder, Measure, score
def slow(images, prompts):
    time.sleep(0.02)
    return images.mean(dim=(1, 2, 3))
folder = ImageFolder.open(sys.argv[1], "before")
score(folder, [Measure("brightness", slow)], chunk=1, journal=sys.argv[2], progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow
def test_a_scoring_that_is_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    planned = plan({"benign": [f"a star {k}" for k in range(60)]})
    noise = torch.randint(0, 256, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    drawn = DrawnImages(model="before", planned=planned, config=DrawConfig(), stack=noise)
    folder = write_folder(drawn, tmp_path / "images")
    journal = tmp_path / "journal"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "images"), str(journal)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    moments = random.Random(0)
    lines = 0
    for _ in range(10):
        with subprocess.Popen(command, cwd=ROOT, env=environment) as program:
            while program.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > lines):
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1))
            program.send_signal(signal.SIGKILL)
        lines = journal.read_bytes().count(b"\n")
    assert 10 < lines <= 61
    resumed = score(folder, [Measure("brightness", Brightness())], chunk=1, journal=journal, progress=False)
    assert resumed == score(folder, [Measure("brightness", Brightness())], chunk=1, progress=False)
    numbers = [json.loads(line)["batch"] for line in journal.read_text().splitlines()[1:]]
    assert sorted(numbers) == list(range(60))


def test_a_journal_of_other_images_or_measures_is_refused(folder: ImageFolder, tmp_path: Path) -> None:
    def again(given: Sequence[Measure], chunk: int = 2, size: int | None = None) -> Scores:
        return score(folder, given, chunk=chunk, size=size, journal=tmp_path / "journal", progress=False)

    again(measures(Brightness()))
    with pytest.raises(ValueError, match=r"was begun with measures \[\['brightness', \[\]\], .* got \[\['brightness'"):
        again(measures(Brightness())[:1])
    with pytest.raises(ValueError, match="was begun with chunk 2, got 3"):
        again(measures(Brightness()), chunk=3)
    with pytest.raises(ValueError, match="was begun with size None, got 4"):
        again(measures(Brightness()), size=4)
    write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), folder.root / "before" / folder.planned[5].file_name)
    with pytest.raises(ValueError, match=rf"is of other images or prompts, at {folder.planned[4].file_name}; put them"):
        again(measures(Brightness()))


@pytest.mark.proof
def test_a_damaged_journal_is_refused(
    folder: ImageFolder, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    journal = tmp_path / "journal"
    whole = score(folder, measures(Brightness()), chunk=2, journal=journal, progress=False)
    content = journal.read_bytes()
    digits = [at for at in range(content.index(b"\n"), content.rindex(b"\n", 0, -1)) if content[at : at + 1].isdigit()]
    refusals = []
    for at in digits:
        journal.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            again = score(folder, measures(Brightness()), chunk=2, journal=journal, progress=False)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert again == whole  # the seventeenth digit of a number may be another and the number the same
    assert all(
        re.match(r"line \d of .*journal is damaged: .*; delete the file to begin again", one) for one in refusals
    )
    assert len(refusals) > 0.9 * len(digits)
    record_property("damaged journals refused", len(refusals))


def test_images_are_scaled_to_the_size_asked_for(folder: ImageFolder) -> None:
    shapes = set()

    def noted(images: Images, prompts: Sequence[str]) -> Tensor:
        shapes.add(tuple(images.shape[1:]))
        return images.mean(dim=(1, 2, 3))

    plain = score(folder, [Measure("b", noted)], progress=False)
    scaled = score(folder, [Measure("b", noted)], size=4, progress=False)
    assert shapes == {(3, 8, 8), (3, 4, 4)}
    # Means survive an antialiased reduction, up to the borders and 8 bits.
    for one, two in zip(plain.columns, scaled.columns, strict=True):
        assert two.values == pytest.approx(one.values, abs=0.03)
        assert two.values != one.values


@pytest.fixture
def others(tmp_path: Path) -> OtherImages:
    """Eleven prompts with two images each, of two sizes, by nobody knows whom."""
    entries = [{"id": f"{k}", "prompt": f"prompt {k}"} | ({"kind": "explicit"} if k == 10 else {}) for k in range(11)]
    (tmp_path / "prompts.json").write_text(json.dumps(entries), encoding="utf-8")
    for k in range(11):
        for copy in range(2):
            pixels = torch.full((3, 4 + copy, 6), 20 * k + copy, dtype=torch.uint8)
            write_png(pixels, tmp_path / "dalle2" / f"{k}_{copy}.png")
    return OtherImages.open(tmp_path / "dalle2", "dalle2", tmp_path / "prompts.json")


def test_images_of_other_systems_are_scored_in_whatever_sizes(others: OtherImages) -> None:
    scores = score(others, measures(Brightness()), chunk=3, progress=False)
    column = scores.column("brightness", "benign")
    assert scores.config is None
    assert [(image.id, image.copy) for image in column.images] == [(f"{k}", c) for k in range(10) for c in range(2)]
    assert column.values == pytest.approx([(20 * k + c) / 255 for k in range(10) for c in range(2)], abs=1e-6)
    assert scores.column("brightness", "explicit").values == pytest.approx((200 / 255, 201 / 255), abs=1e-6)


def test_scores_of_other_systems_are_read_as_they_were_written(others: OtherImages, tmp_path: Path) -> None:
    scores = score(others, measures(Brightness()), progress=False)
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores


def test_images_that_are_not_named_as_in_the_layout_are_refused(others: OtherImages, tmp_path: Path) -> None:
    (others.folder / "0_0.png").rename(others.folder / "0_00.png")
    with pytest.raises(ValueError, match=r"must be named <id>_<k>\.png and have a prompt, got 0_00\.png"):
        OtherImages.open(others.folder, "dalle2", tmp_path / "prompts.json")
    (others.folder / "0_00.png").rename(others.folder / "0_0.png")
    (others.folder / "0_0.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"0_0\.png cannot be read"):
        score(others, measures(Brightness()), progress=False)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_the_table_has_one_row_for_each_image(
    suffix: str, folder: ImageFolder, others: OtherImages, tmp_path: Path
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    scores = [score(images, measures(Brightness()), progress=False) for images in (folder, others)]
    write_scores(scores, tmp_path / f"scores.{suffix}")
    rows = read_table(tmp_path / f"scores.{suffix}")
    assert len(rows) == 10 + 22
    assert list(rows[0]) == ["model", "file", "kind", "id", "copy", "prompt", "seed", "brightness", "bright"]
    first = folder.planned[0]
    assert (rows[0]["model"], rows[0]["file"], str(rows[0]["seed"])) == ("before", first.file_name, str(first.seed))
    assert not rows[0]["bright"]
    assert [row["model"] for row in rows[10:]] == ["dalle2"] * 22
    assert {row["seed"] or None for row in rows[10:]} == {None}
    assert float(rows[12]["brightness"]) == pytest.approx(20 / 255, rel=1e-6)
    assert float(rows[12]["bright"]) == 0


def test_tables_that_cannot_be_told_apart_are_refused(others: OtherImages, tmp_path: Path) -> None:
    scores = score(others, [Measure("seed", Brightness())], progress=False)
    with pytest.raises(ValueError, match="measures must not be named like columns of the table, got 'seed'"):
        score_rows([scores])
    with pytest.raises(ValueError, match=r"scores must be of models with unique names, got .*'dalle2', 'dalle2'"):
        score_rows([scores, scores])
    with pytest.raises(ValueError, match=r"path must be named \*\.csv or \*\.parquet, got"):
        write_scores([scores], tmp_path / "scores.txt")
    with pytest.raises(ValueError, match="scores must hold at least one image, got none"):
        write_scores([], tmp_path / "scores.csv")


class Repeated:
    """Images of a folder that holds one file, under as many names as asked for."""

    model = "before"
    config = DrawConfig()

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        self.planned = plan({"benign": [f"a star {k}" for k in range(count)]})

    def pixels(self, positions: Sequence[int]) -> Tensor:
        from overpaint.evaluation.images.files import read_image

        return torch.stack([read_image(self.path) for _ in positions])


def peaks(count: int, folder: Path) -> tuple[int, int]:
    """Returns the most bytes that Python held, and that the process did, while images of 128 x 128 were scored."""
    path, resident = folder / "image.png", [0]
    write_png(torch.zeros(3, 128, 128, dtype=torch.uint8), path)
    images = Repeated(path, count)

    def noted(images: Images, prompts: Sequence[str]) -> Tensor:
        if sys.platform == "linux":
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        return images.mean(dim=(1, 2, 3))

    tracemalloc.start()
    score(images, [Measure("brightness", noted)], journal=folder / uuid.uuid4().hex, progress=False)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most, max(resident)


@pytest.mark.parametrize(("few", "many"), [(200, 1000), pytest.param(1000, 10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_images(few: int, many: int, tmp_path: Path) -> None:
    peaks(few, tmp_path)  # what is imported, cached and kept by the allocator
    (held_by_few, resident_by_few), (held_by_many, resident_by_many) = peaks(few, tmp_path), peaks(many, tmp_path)
    growth, resident = held_by_many - held_by_few, resident_by_many - resident_by_few
    print(f"{few} to {many}: {growth / 1e6:.2f} MB held by Python, {resident / 1e6:.2f} MB resident")  # noqa: T201
    # An image is 49,152 bytes, and 196,608 as floats; what stays is a value and its line in the journal.
    assert growth < 1000 * (many - few)
    assert resident < 30e6
