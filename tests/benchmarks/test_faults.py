"""The table of proofs: counts of what passed, names of what failed."""

from pathlib import Path

import pytest

from benchmarks import faults

PROOFS = """
import pytest

@pytest.mark.proof
@pytest.mark.parametrize("times", [2, 3])
def test_holds(times, record_property):
    record_property("made-up faults borne", times)

@pytest.mark.proof
def test_fails(record_property):
    record_property("made-up faults borne", 100)
    assert {holds}

def test_is_no_proof(record_property):
    record_property("made-up faults borne", 1000)

@pytest.mark.proof("a promise kept")
@pytest.mark.parametrize("which", "ab")
def test_says_it_in_the_marker(which):
    pass
"""


def test_what_passed_is_counted_and_what_failed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_made_up.py").write_text(PROOFS.format(holds=False))
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["proof_marker"]')
    with pytest.raises(SystemExit) as end:
        faults.main(faults.Config(tests=tmp_path, workers=1))
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "| made-up faults borne | 5 |" in printed
    assert "| a promise kept | 2 |" in printed
    assert "test_fails" in printed.splitlines()[-1]


def test_all_that_passed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_made_up.py").write_text(PROOFS.format(holds=True))
    faults.main(faults.Config(tests=tmp_path, workers=1))
    assert capsys.readouterr().out.endswith("| made-up faults borne | 105 |\n\nfailed: none\n")


def test_a_folder_without_proofs_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text("def test_something(): pass")
    with pytest.raises(SystemExit):
        faults.main(faults.Config(tests=tmp_path, workers=1))
