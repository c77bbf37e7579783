"""What work leaves for later work shows when it was damaged."""

from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.policy.sealed import DamagedFileError, read_tensors, sealed, unsealed, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(True), "c": torch.zeros(0)}
ABOUT = {"record": '{"seed": 0}'}
RECORD: dict[str, Any] = {"batch": 0, "scores": [0.1, None, -1e-9], "why": {"3": "ein Kätzchen\u2028"}}


def test_tensors_and_records_come_back_as_they_were(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", TENSORS, ABOUT)
    tensors, about = read_tensors(tmp_path / "t.safetensors")
    assert about == ABOUT
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in TENSORS.items())
    assert unsealed(sealed(RECORD), "a line") == RECORD


@pytest.mark.proof
def test_a_flipped_bit_or_a_cut_shows_wherever_it_is(tmp_path: Path, record_property: Any) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, ABOUT)
    content, line = path.read_bytes(), sealed(RECORD)
    shown = 0
    for whole in (content, line):
        for place in range(len(whole)):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << (place % 8)
            for damaged in (bytes(flipped), whole[:place]):
                path.write_bytes(damaged)
                try:
                    unchanged = same(read_tensors(path)) if whole is content else unsealed(damaged, "a line") == RECORD
                except DamagedFileError:
                    unchanged = True
                    shown += 1
                assert unchanged, place  # as where blanks between JSON's words became others
    assert shown > len(content) + len(line)
    record_property("damaged caches told", shown)


def same(found: tuple[dict[str, torch.Tensor], dict[str, str]]) -> bool:
    """Tells whether what was read is what was written."""
    tensors, about = found
    equal = all(torch.equal(value, TENSORS[name]) for name, value in tensors.items())
    return equal and about == ABOUT and tensors.keys() == TENSORS.keys()
