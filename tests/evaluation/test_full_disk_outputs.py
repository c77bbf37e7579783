"""What is written when the disk is full: an error that names the file, and the earlier file stays as it was."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.evaluation.images.files import write_png
from overpaint.evaluation.report.page import Report
from overpaint.evaluation.scoring.pair_scores import Journal
from overpaint.evaluation.tables import write_table
from overpaint.policy import DiffusionPolicy, WeightDelta

ROWS = [{"prompt": f"prompt {index} " * 20} for index in range(200)]
PIXELS = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def table(path: Path) -> None:
    write_table(ROWS, {"reward": torch.rand(len(ROWS)).tolist()}, path)


WRITERS: dict[str, Callable[[Path, DiffusionPolicy], Any]] = {
    "table.csv": lambda path, policy: table(path),
    "table.parquet": lambda path, policy: table(path),
    "report.html": lambda path, policy: Report(title="t", lead="l" * 10_000).save(path),
    "picture.png": lambda path, policy: write_png(PIXELS, path),
    "weight_delta.safetensors": lambda path, policy: WeightDelta({"w": torch.rand(5000)}).save(path.parent),
    "lora.safetensors": lambda path, policy: policy.save_lora(path),
    "pipeline": lambda path, policy: policy.save_pipeline(path),
}


@pytest.mark.proof
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_told_with_the_file_and_spoils_nothing(
    name: str, policy: DiffusionPolicy, small_disk: Any, record_property: Callable[[str, int], None]
) -> None:
    path, write = small_disk.path / "out" / name, WRITERS[name]
    small_disk.path.joinpath("out").mkdir()
    if name != "pipeline":
        path.write_bytes(b"earlier")
    small_disk.fill(leave=4096)
    with pytest.raises(OSError, match=f"No space left on device: '.*{name}'") as caught:
        write(path, policy)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    if name != "pipeline":
        assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [(name, b"earlier")]
    small_disk.clear()
    write(path, policy)
    record_property("disk full: outputs refused with their name, earlier ones kept", 1)


@pytest.mark.proof
def test_a_journal_keeps_what_it_has_and_goes_on(small_disk: Any, record_property: Callable[[str, int], None]) -> None:
    path, record = small_disk.path / "journal.jsonl", {"text": "x" * 3000}
    with Journal(path, {"job": "one"}) as journal:
        journal.append(record)
        small_disk.fill(leave=0)
        journal.append({"text": "fits in the page"})
        with pytest.raises(OSError, match=r"No space left on device: '.*journal\.jsonl'"):
            journal.append(record)
        small_disk.clear()
        journal.append(record)  # and the torn part of the one before is not in its way
    with Journal(path, {"job": "one"}) as journal:
        assert journal.records == [record, {"text": "fits in the page"}, record]
    record_property("disk full: journals that kept what they had", 1)
