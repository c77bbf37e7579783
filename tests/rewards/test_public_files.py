"""Fetching from a server on this machine, with everything that can come back from one."""

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from rewards.public_files import PublicFile, cached_path, fetch

CONTENT = b"cat\ndog\nhorse\n"


class Server(ThreadingHTTPServer):
    """Answers /list.txt as it is told, anything else with 404, and counts what it was asked."""

    daemon_threads = False  # closing the server waits for its last answer

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.announced = len(CONTENT)
        self.asked = 0

    def file(self, path: str = "list.txt") -> PublicFile:
        return PublicFile(
            name="list.txt",
            url=f"http://127.0.0.1:{self.server_port}/{path}",
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            licence="CC0",
            source="this test",
        )


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.asked += 1
        if self.path != "/list.txt":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(server.announced))
        self.end_headers()
        self.wfile.write(server.content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("no_proxy", "*")  # a developer's proxy does not know this machine
    monkeypatch.setenv("OVERPAINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_is_fetched_into_the_cache_and_nothing_else_is_left_there(
    server: Server, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = fetch(server.file())
    assert path.name == "list.txt"
    assert path.read_bytes() == CONTENT
    assert files_in(cache) == [path]
    assert path.stat().st_mode & 0o777 == 0o644
    assert capsys.readouterr() == ("", "")


def test_a_file_in_the_cache_is_not_asked_for_again(server: Server) -> None:
    assert fetch(server.file()) == fetch(server.file())
    assert server.asked == 1


def test_a_damaged_file_in_the_cache_is_fetched_again(server: Server) -> None:
    path = fetch(server.file())
    path.write_bytes(CONTENT[:-1])
    assert fetch(server.file()).read_bytes() == CONTENT
    assert server.asked == 2


def test_two_versions_of_one_name_are_kept_beside_each_other(server: Server) -> None:
    first = fetch(server.file())
    server.content = b"cat\ndog\nmouse\n"
    second = fetch(replace(server.file(), sha256=hashlib.sha256(server.content).hexdigest()))
    assert first.read_bytes() == CONTENT
    assert second.read_bytes() == server.content


@pytest.mark.parametrize("content", [b"cat\ndog\nHORSE\n", b""])
def test_altered_content_is_refused_and_not_kept(server: Server, cache: Path, content: bytes) -> None:
    server.content, server.announced = content, len(content)
    found = hashlib.sha256(content).hexdigest()
    message = f"fetched as list.txt has other content than expected: .*{found}"
    with pytest.raises(OSError, match=message):
        fetch(server.file())
    assert files_in(cache) == []


def test_truncated_content_is_refused_and_not_kept(server: Server, cache: Path) -> None:
    server.content = CONTENT[:5]  # fewer bytes than announced
    with pytest.raises(OSError, match=r"list\.txt"):
        fetch(server.file())
    assert files_in(cache) == []


def test_a_network_that_is_down_is_told_from_an_address_without_the_file(server: Server, cache: Path) -> None:
    file = server.file()
    server.server_close()  # nobody listens there any more
    with pytest.raises(
        OSError, match=rf"there is no connection to 127\.0\.0\.1:{server.server_port} \(ConnectionError"
    ):
        fetch(file)


def test_an_address_without_the_file_is_told_with_all_that_is_needed_to_get_it_by_hand(
    server: Server, cache: Path
) -> None:
    file = server.file("gone.txt")
    with pytest.raises(
        OSError, match=r"could not fetch list\.txt: there is nothing at its address any more \(404\)"
    ) as caught:
        fetch(file)
    message = str(caught.value)
    assert file.url in message
    assert file.sha256 in message
    assert str(cached_path(file)) in message
    assert files_in(cache) == []
    cause = caught.value.__cause__
    assert isinstance(cause, requests.HTTPError)
    assert cause.response is not None
    assert cause.response.raw.closed  # one that is left open holds its connection


def test_a_server_that_cannot_be_reached_is_an_error_of_the_same_kind() -> None:
    closed = Server()
    closed.server_close()
    with pytest.raises(OSError, match=r"could not fetch list\.txt: .* To get it by hand, save http"):
        fetch(closed.file())


def test_a_file_saved_by_hand_where_the_message_says_is_used(server: Server) -> None:
    path = cached_path(server.file())
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    assert fetch(server.file()) == path
    assert server.asked == 0


def test_a_file_in_an_offline_folder_is_used_without_network_and_without_cache(
    server: Server, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_bytes(CONTENT)
    assert fetch(server.file(), tmp_path) == tmp_path / "list.txt"
    assert server.asked == 0
    assert not cache.exists()


def test_a_file_with_other_content_in_an_offline_folder_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"other")
    found = hashlib.sha256(b"other").hexdigest()
    message = f"{tmp_path / 'list.txt'} has other content than expected: its SHA-256 is {found}. To get it by hand"
    with pytest.raises(ValueError, match=re.escape(message)):
        fetch(server.file(), tmp_path)
    assert server.asked == 0


def test_an_offline_folder_without_the_file_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"folder must hold list\.txt, got {re.escape(str(tmp_path))}"):
        fetch(server.file(), tmp_path)
    assert server.asked == 0


def test_cache_is_in_the_home_folder_unless_the_environment_says_otherwise(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", None):
        monkeypatch.delenv("OVERPAINT_CACHE", raising=False)
        if unset is not None:
            monkeypatch.setenv("OVERPAINT_CACHE", unset)
        assert cached_path(server.file()).is_relative_to(tmp_path / ".cache" / "overpaint")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "../list.txt", r"name must match pattern .*, got '\.\./list\.txt'"),
        ("url", "file:///etc/hosts", r"url must match pattern '\^https\?://', got 'file:///etc/hosts'"),
        ("sha256", "abc", r"sha256 must match pattern '\^\[0-9a-f\]\{64\}\$', got 'abc'"),
    ],
)
def test_a_file_that_is_described_wrongly_is_refused(server: Server, field: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(server.file(), **{field: value})
