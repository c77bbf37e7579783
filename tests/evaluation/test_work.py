"""Pieces of work that several processes share."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from overpaint.evaluation.experiments.work import work_through


class Piece(NamedTuple):
    name: str
    needs: str = ""

    @property
    def label(self) -> str:
        return self.name


def make(piece: Piece, folder: Path) -> None:
    assert torch.get_num_threads() == 1
    if piece.name == "broken":
        raise ValueError("this one is broken")
    if piece.needs:
        assert (folder / piece.needs).read_text() == "made"
    (folder / piece.name).write_text("made")


def test_each_stage_waits_for_the_one_before_and_nothing_is_done_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("made")
    touched = (tmp_path / "a").stat().st_mtime_ns
    stages = [[Piece("a"), Piece("b")], [Piece("c", needs="b"), Piece("d", needs="a")], [Piece("e", needs="d")]]
    work_through(stages, lambda p: (tmp_path / p.name).is_file(), partial(make, folder=tmp_path), workers=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c", "d", "e"]
    assert (tmp_path / "a").stat().st_mtime_ns == touched


def test_error_of_a_piece_ends_the_work_and_keeps_what_is_done(tmp_path: Path) -> None:
    stages = [[Piece("first"), Piece("broken")], [Piece("later")]]
    with pytest.raises(ValueError, match="this one is broken"):
        work_through(stages, lambda p: (tmp_path / p.name).is_file(), partial(make, folder=tmp_path), workers=1)
    assert [file.name for file in tmp_path.iterdir()] == ["first"]
