"""Whatever fails in the main process alone ends all processes, with the same error, and none waits for another."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from overpaint.training import from_main


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., str]) -> list[dict[str, str]]:
    """What each of two processes was told, by what failed."""
    folder = tmp_path_factory.mktemp("failing")
    torchrun(Path(__file__).with_name("failing_main_program.py"), folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("what", ["error", "checkpoint", "metrics"])
def test_disk_that_is_full_in_the_main_process_is_an_error_in_both(what: str, told: list[dict[str, str]]) -> None:
    assert [process[what] for process in told] == ["OSError: [Errno 28] no space left"] * 2


def test_folder_that_cannot_be_made_is_an_error_in_both(told: list[dict[str, str]]) -> None:
    assert all(process["folder"].startswith("NotADirectoryError: ") for process in told)


def test_error_that_cannot_be_sent_is_told_of(told: list[dict[str, str]]) -> None:
    assert told[0]["unsendable"] == "UnsendableError: this and that"
    assert told[1]["unsendable"] == "RuntimeError: the main process failed with UnsendableError: this and that"


def test_result_is_the_main_processs_and_processes_go_on_together(told: list[dict[str, str]]) -> None:
    assert [process["result"] for process in told] == ["0", "0"]
    assert [process["afterwards"] for process in told] == ["none", "none"]


def test_one_process_works_by_itself() -> None:
    assert from_main(lambda: 7) == 7
    with pytest.raises(KeyError, match="gone"):
        from_main(lambda: {}["gone"])
