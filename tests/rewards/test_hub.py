"""Checkpoints of the hub: one revision, checked files, and what to do without a network."""

import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from rewards.checkpoint import HubFiles, check_folder

REVISION = "0123456789" * 4
CONTENT = {"config.json": b"{}\n", "model.safetensors": b"weights"}


def files(**hashes: str | None) -> HubFiles:
    """Returns the two files, whose right hashes can be replaced."""
    right: dict[str, str | None] = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    return HubFiles(repository="somebody/model", revision=REVISION, files=right | hashes)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """A hub that has the files; what it was asked for is noted."""
    calls: list[tuple[str, str, str]] = []

    def download(repository: str, name: str, *, revision: str) -> str:
        calls.append((repository, name, revision))
        (tmp_path / name).write_bytes(CONTENT[name])
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return calls


def test_every_file_is_asked_for_at_the_revision(asked: list[tuple[str, str, str]], tmp_path: Path) -> None:
    assert files().fetch() == tmp_path
    assert asked == [("somebody/model", name, REVISION) for name in CONTENT]


def test_a_file_of_other_content_is_refused(asked: list[tuple[str, str, str]]) -> None:
    wrong = files(**{"model.safetensors": "0" * 64})
    with pytest.raises(ValueError, match=r"has other content than model\.safetensors of somebody/model"):
        wrong.fetch()


def test_a_file_without_a_known_hash_is_vouched_for_by_the_revision(
    asked: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    assert files(**{"model.safetensors": None}).fetch() == tmp_path
    assert len(asked) == 2


def test_without_a_network_the_error_says_how_to_get_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"could not get config\.json of somebody/model") as caught:
        files().fetch()
    assert f"hf download somebody/model config.json model.safetensors --revision {REVISION}" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "main"}, r"revision must match pattern '\^\[0-9a-f\]\{40\}\$', got 'main'"),
        ({"files": {"a": "abc"}}, r"files must match pattern '\^\[0-9a-f\]\{64\}\$', got 'abc'"),
    ],
)
def test_what_is_not_pinned_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"repository": "somebody/model", "revision": REVISION, "files": {}} | changes
    with pytest.raises(ValueError, match=message):
        HubFiles(**settings)


def test_a_folder_that_lacks_a_file_is_named_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    check_folder(tmp_path, {"config.json": None}, "a model")
    with pytest.raises(FileNotFoundError, match=r"a folder of a model must hold model\.safetensors, and .* does not"):
        check_folder(tmp_path, CONTENT, "a model")
