"""Bad input is refused by what reads it, in words, as users run it: in a process without the tests' type checker."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.proof
@pytest.mark.slow
@pytest.mark.timeout(3600)  # programs read their command lines thousands of times
@pytest.mark.parametrize("kind", ["setting", "argument", "option"])
def test_bad_input_is_refused_in_words(kind: str, record_property: Callable[[str, object], None]) -> None:
    child = subprocess.run(
        [sys.executable, "tests/bad_input.py", kind],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(child.stdout)
    assert found["failures"] == []
    refused = sum(found["counts"].values())
    assert refused > 500
    record_property("bad inputs refused", refused)
