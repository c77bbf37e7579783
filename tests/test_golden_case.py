"""A golden case knows what was read of it, and a module that leaves some of it unread fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_case import GOLDEN, GoldenCase, numbers

MODULE = """
import pytest
from golden_case import GoldenCase

CASE = GoldenCase("aesthetic_head", left_out={"affine_map/*": "why", "layers": "why", "weights": "why"})

def test_scores():
    CASE.tensors["embedding"], CASE.tensors["score"]
    CASE.tolerance()

def test_scores_in_float64():
    NAMES
"""
"""A module that reads the names put in at its end."""


@pytest.fixture
def case() -> GoldenCase:
    left_out = {"images/*": "why", "encoder/*": "why", "tolerance": "why", "[cgn]*/image*": "why"}
    return GoldenCase("jpeg", left_out=left_out)


def outcome(tmp_path: Path, *arguments: str, **modules: str) -> str:
    """What pytest says at the end about modules, each of which reads some names."""
    files = []
    for name, names in modules.items():
        files.append(tmp_path / f"test_{name}.py")
        files[-1].write_text(MODULE.replace("NAMES", names), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "golden_case",
        "-c",
        os.devnull,
        *map(str, files),
        *arguments,
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(GOLDEN), str(GOLDEN.parents[1])])}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    return done.stdout


def test_what_was_not_read_is_told(case: GoldenCase) -> None:
    assert case.complaints() == ["jpeg: sizes_kB was never read"]
    assert "sizes_kB" in case.tensors
    assert sorted(case.tensors.under("checker/")) == ["image", "image_float_perturbed"]
    assert case.complaints() == ["jpeg: sizes_kB was never read"]  # asking for names reads nothing
    assert case.tensors["sizes_kB"].shape == (3,)
    assert case.complaints() == []


def test_values_deep_in_a_record_are_noted_one_by_one(case: GoldenCase) -> None:
    case.left_out.pop("images/*")
    first, second, third = case.record["images"]
    for image in (first, third):
        dict(image)
    assert second["size_kB"] > 0
    unread = [complaint.split()[1] for complaint in case.complaints() if "images" in complaint]
    assert unread == [f"images/1/{name}" for name in sorted(second) if name != "size_kB"]


def test_leaving_out_what_is_read_is_a_complaint(case: GoldenCase) -> None:
    assert len(case.tensors["sizes_kB"]) == 3
    case.left_out["sizes_kB"] = "why"
    assert "jpeg: sizes_kB is left out, and everything that fits it was read" in case.complaints()


def test_numbers_of_a_tolerance_are_found_in_its_words() -> None:
    assert numbers("abs 1e-5 + rel 2.5e-06 (float32), the rest within 2 %") == [1e-5, 2.5e-6, 0.02]


def test_a_module_that_leaves_something_unread_fails(tmp_path: Path) -> None:
    # Of a module that was skipped in part, nothing is said.
    told = outcome(tmp_path, unread="pass", skipped="pytest.skip('not here')", whole="CASE.tensors['score_float64']")
    assert "5 passed, 1 skipped, 1 error" in told
    assert "aesthetic_head: score_float64 was never read" in told
    assert "test_unread.py" in told[told.index("ERROR at teardown") :]
    # Nor where a part was chosen.
    assert "never read" not in outcome(tmp_path, "-k", "float64", unread="pass")
