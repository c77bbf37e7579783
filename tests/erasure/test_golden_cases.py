"""The golden cases of erasure: all that there are, unchanged, and each compared in full."""

import filecmp
from pathlib import Path

import pytest
import torch
from golden_case import GOLDEN

from tests.erasure.erasure_case import TINY_SD, ErasureCase


@pytest.fixture
def stored(shared: Path) -> Path:
    return shared / "golden" / "erasure"


def test_every_stored_case_is_here(stored: Path) -> None:
    cases = {path.stem for path in stored.glob("*.json")}
    for name in sorted(cases):
        for ending in ("json", "safetensors"):
            path = GOLDEN / f"{name}.{ending}"
            assert filecmp.cmp(path, stored / path.name, shallow=False), path.name
        assert Path(__file__).with_name(f"test_{name}_golden.py").is_file(), name


def test_the_stored_pipeline_is_unchanged(stored: Path) -> None:
    theirs = {path.relative_to(stored / TINY_SD.name) for path in (stored / TINY_SD.name).rglob("*") if path.is_file()}
    ours = {path.relative_to(TINY_SD) for path in TINY_SD.rglob("*") if path.is_file()}
    assert ours == theirs
    for path in sorted(ours):
        assert filecmp.cmp(TINY_SD / path, stored / TINY_SD.name / path, shallow=False), path


@pytest.fixture
def case() -> ErasureCase:
    return ErasureCase("ant", {"hyper/*": "none of this test's", "saliency/*": "neither", "emb_*": "nor this"})


def test_an_expected_tensor_that_was_only_read_is_a_complaint(case: ErasureCase) -> None:
    for tensor in case.tensors.values():
        assert tensor.isfinite().all()
    missed = case.complaints()
    assert "ant: loss/total is expected, and was compared with nothing" in missed
    assert not [complaint for complaint in missed if "saliency/high0" in complaint or "x_t" in complaint]

    case.check("loss/total", case.tensors["loss/total"])
    assert set(missed) - set(case.complaints()) == {"ant: loss/total is expected, and was compared with nothing"}


def test_a_number_beyond_the_stated_tolerance_fails(case: ErasureCase) -> None:
    expected = case.tensors["early/eps_cond"].double()
    allowed = case.allowed("early/eps_cond")
    case.check("early/eps_cond", expected + 0.99 * allowed)
    with pytest.raises(AssertionError, match=r"early/eps_cond: off by"):
        case.check("early/eps_cond", expected + 1.01 * allowed)
    with pytest.raises(AssertionError, match=r"early/eps_cond: off by nan"):
        case.check("early/eps_cond", expected * torch.nan)
    with pytest.raises(AssertionError, match=r"shape \(4, 8, 8\), expected \(1, 4, 8, 8\)"):
        case.check("early/eps_cond", expected[0])
