"""Checkpoints of the hub: one revision, checked files, and what to do without a network."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
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
    assert "HF_HUB_OFFLINE is set, and the hub's cache does not have it" in str(caught.value)
    assert f"hf download somebody/model config.json model.safetensors --revision {REVISION}" in str(caught.value)


class Hub:
    """Ends every request with an error or with an answer, and counts them."""

    def __init__(self) -> None:
        self.end: Exception | tuple[int, dict[str, str]] = (404, {})
        self.requests = 0

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests += 1
        if isinstance(self.end, Exception):
            raise self.end
        status, headers = self.end
        return httpx2.Response(status, headers=headers, request=request)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty cache, and the hub's own client, whose requests end as the test says instead of leaving this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = Hub()
    huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(hub.answer)))
    yield hub
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


BY_HAND = (
    f"Where there is a network, run `hf download somebody/model config.json model.safetensors --revision {REVISION}"
)


@pytest.mark.parametrize(
    ("end", "message", "by_hand"),
    [
        (httpx2.ConnectError("Name or service not known"), r"no connection to https://huggingface.co \(Name or", True),
        (httpx2.ConnectTimeout("timed out"), r"there is no connection to https://huggingface.co \(timed out", True),
        (httpx2.ProxyError("403 Forbidden"), r"there is no connection to https://huggingface.co \(403 Forbidden", True),
        (
            (404, {"X-Error-Code": "RepoNotFound"}),
            "there is no repository https://huggingface.co/somebody/model,",
            False,
        ),
        ((401, {}), "there is no repository .*, or it is private and `hf auth login` has not been run", False),
        (
            (403, {"X-Error-Code": "GatedRepo"}),
            "it is gated: accept its terms at https://huggingface.co/somebody",
            False,
        ),
        ((404, {"X-Error-Code": "EntryNotFound"}), f"has no file config.json at revision {REVISION}", False),
        ((404, {"X-Error-Code": "RevisionNotFound"}), f"the repository has no revision {REVISION}", False),
        ((403, {}), "403 Forbidden", True),
    ],
)
def test_why_there_is_no_file_is_told_at_once(end: Any, message: str, by_hand: bool, hub: Hub) -> None:
    hub.end = end
    with pytest.raises(OSError, match=rf"could not get config.json of somebody/model .*{message}") as caught:
        files().fetch()
    assert (BY_HAND in str(caught.value)) == by_hand
    assert hub.requests == 1  # and no retries, which would take 23 s


def test_a_busy_hub_is_asked_again(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for end in ((503, {}), httpx2.ReadTimeout("silence")):
        hub.end, hub.requests = end, 0
        with pytest.raises(OSError, match=r"could not get config\.json"):
            files().fetch()
        assert hub.requests > 2


def test_what_the_cache_has_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    for name, content in CONTENT.items():
        (snapshot / name).write_bytes(content)
    assert files().fetch() == snapshot
    assert hub.requests == 0


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
