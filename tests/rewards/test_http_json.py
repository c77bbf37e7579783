"""Questions over HTTP: what is tried again, what is refused, and what no message shows."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pytest
import stamina
import torch

from rewards.http_json import HttpConfig, HttpError, is_loopback, request_json

TOKEN = "c0ffee-and-more"


class Answer(NamedTuple):
    status: int = 200
    body: bytes = b'{"ok": true}'
    headers: Mapping[str, str] = MappingProxyType({})
    act: Callable[[Any], None] | None = None
    """Does something with the handler in place of answering."""


class Scripted(ThreadingHTTPServer):
    """A server that answers as it is told, the last answer for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = [Answer()]
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hung up


class Handler(BaseHTTPRequestHandler):
    server: Any  # a Scripted

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.asked.append((self.command, self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if answer.act is not None:
            answer.act(self)
            return
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


server = pytest.fixture(scripted, name="server")
other = pytest.fixture(scripted, name="other")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("rewards.http_json.time.sleep", slept.append)
    return slept


def config(**changes: Any) -> HttpConfig:
    settings: dict[str, Any] = {"timeout": 5.0, "attempts": 3, "backoff": 0.0}
    return HttpConfig(**settings | changes)


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def hang_up_midway(handler: Handler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"ok":')
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """Keeps every single wait short and never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1000):
        handler.wfile.write(b" ")
        threading.Event().wait(0.02)


def drip_head(handler: Handler) -> None:
    """Drips before there is anything to read of the answer itself."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(1000):
        handler.wfile.write(b"x")
        threading.Event().wait(0.02)


def hurry_up_and_wait(handler: Handler) -> None:
    """Announces an answer again and again."""
    for _ in range(1000):
        handler.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        threading.Event().wait(0.02)


def flood(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b" " * 65536)


def doze(handler: Handler) -> None:
    threading.Event().wait(0.5)


def test_question_and_answer_are_json(server: Scripted) -> None:
    content = {"text": "größer\ud800", "numbers": [0.1, 2]}
    assert request_json("POST", server.url + "/x?y=1", content, config(), token=TOKEN) == {"ok": True}
    method, path, headers, body = server.asked[0]
    assert (method, path, json.loads(body)) == ("POST", "/x?y=1", content)
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == f"Bearer {TOKEN}"

    assert request_json("GET", server.url, None, config()) == {"ok": True}
    method, _, headers, body = server.asked[1]
    assert (method, body) == ("GET", b"")
    assert "Authorization" not in headers


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_status_that_may_pass_is_asked_again(status: int, server: Scripted) -> None:
    server.answers = [Answer(status), Answer(status), Answer()]
    assert request_json("GET", server.url, None, config()) == {"ok": True}
    assert len(server.asked) == 3


@pytest.mark.parametrize("act", [hang_up, hang_up_midway])
def test_broken_connection_is_asked_again(act: Callable[[Any], None], server: Scripted) -> None:
    server.answers = [Answer(act=act), Answer()]
    assert request_json("GET", server.url, None, config()) == {"ok": True}


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_other_status_is_final(status: int, server: Scripted) -> None:
    server.answers = [Answer(status, b'{"error": "no"}', {"Location": f"{server.url}/elsewhere"})]
    with pytest.raises(HttpError, match=f"POST {server.url}/x got status {status}.*no") as caught:
        request_json("POST", server.url + "/x", [], config(), token=TOKEN)
    assert caught.value.status == status
    assert len(server.asked) == 1


@pytest.mark.proof
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_takes_the_token_elsewhere(
    status: int, server: Scripted, other: Scripted, record_property: Callable[[str, int], None]
) -> None:
    server.answers = [Answer(status, headers={"Location": other.url})]
    methods: tuple[Literal["GET", "POST"], ...] = ("GET", "POST")
    for method in methods:
        with pytest.raises(HttpError, match=f"got status {status}"):
            request_json(method, server.url, None if method == "GET" else [], config(), token=TOKEN)
    assert (len(server.asked), other.asked) == (2, [])
    record_property("client: redirects not followed", 2)


def test_last_failure_is_told_with_the_number_of_tries(server: Scripted) -> None:
    server.answers = [Answer(act=hang_up), Answer(502, b"bad gateway " * 100)]
    with pytest.raises(HttpError, match=r"failed 3 times, at last with status 502: 'bad gateway") as caught:
        request_json("GET", server.url, None, config())
    assert caught.value.status == 502
    assert len(str(caught.value)) < 300
    assert len(server.asked) == 3


def test_server_that_is_not_there_is_told_of() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(HttpError, match=rf"GET {url} failed 2 times, at last with ConnectError") as caught:
        request_json("GET", url, None, config(attempts=2))
    assert caught.value.status is None


def test_pauses_double_up_to_the_longest_and_differ(server: Scripted, pauses: list[float]) -> None:
    server.answers = [Answer(500)]
    with pytest.raises(HttpError, match="5 times"):
        request_json("GET", server.url, None, config(attempts=5, backoff=1.0, max_pause=3.0))
    assert len(pauses) == 4
    for pause, longest in zip(pauses, (1.0, 2.0, 3.0, 3.0), strict=True):
        assert longest / 2 <= pause <= longest
    assert pauses[2] != pauses[3]


def test_random_generators_of_the_program_are_left_alone(server: Scripted, pauses: list[float]) -> None:
    import random

    random.seed(3)
    before = random.getstate(), torch.get_rng_state()
    server.answers = [Answer(500), Answer()]
    request_json("GET", server.url, None, config(backoff=1.0))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("header", "pause"),
    [
        ("7", 7.0),
        ("999999999999999999999999", 60.0),
        (lambda: formatdate(time.time() + 20), 20.0),
        (lambda: formatdate(time.time() - 20), 0.0),
        ("Fri, 31 Dec 9999 23:59:59 -0000", 60.0),
        ("soon", 0.0),
        ("-5", 0.0),
        ("²", 0.0),
    ],
)
def test_retry_after_is_honoured_within_bounds(
    header: Any, pause: float, server: Scripted, pauses: list[float]
) -> None:
    value = header if isinstance(header, str) else header()
    server.answers = [Answer(429, headers={"Retry-After": value}), Answer()]
    request_json("GET", server.url, None, config())
    assert pauses == [pytest.approx(pause, abs=1.5)]


@pytest.mark.parametrize("act", [drip, drip_head, hurry_up_and_wait])
def test_late_answer_is_a_timeout_even_when_it_drips(act: Callable[[Any], None], server: Scripted) -> None:
    server.answers = [Answer(act=act)]
    begin = time.monotonic()
    with pytest.raises(HttpError, match=r"ReadTimeout: no whole answer within 0.2 s"):
        request_json("GET", server.url, None, config(timeout=0.2, attempts=2))
    server.answers = [Answer(act=doze)]
    with pytest.raises(HttpError, match="ReadTimeout"):
        request_json("GET", server.url, None, config(timeout=0.2, attempts=1))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"ok": tru', b'{"score": NaN}', b"[Infinity]", b"\xff\xfe\xff", b"[" * 100_000]
)
def test_answer_that_is_not_json_is_refused(body: bytes, server: Scripted) -> None:
    server.answers = [Answer(body=body)]
    with pytest.raises(HttpError, match="not JSON") as caught:
        request_json("GET", server.url, None, config())
    assert caught.value.status == 200


def test_answer_is_not_read_beyond_its_limit(server: Scripted) -> None:
    server.answers = [Answer(body=json.dumps("x" * 98).encode())]
    assert request_json("GET", server.url, None, config(max_answer_bytes=100)) == "x" * 98
    with pytest.raises(HttpError, match="got more than 99 bytes"):
        request_json("GET", server.url, None, config(max_answer_bytes=99))
    assert len(server.asked) == 2


def test_endless_answer_is_left_at_its_limit(server: Scripted) -> None:
    server.answers = [Answer(act=flood)]
    with pytest.raises(HttpError, match="got more than 1000 bytes"):
        request_json("GET", server.url, None, config(max_answer_bytes=1000, attempts=1))


def test_compressed_answer_is_not_unfolded(server: Scripted) -> None:
    server.answers = [Answer(body=gzip.compress(b" " * 10_000_000 + b"1"), headers={"Content-Encoding": "gzip"})]
    with pytest.raises(HttpError, match="encoded as 'gzip'"):
        request_json("GET", server.url, None, config())


def test_no_message_shows_the_token_or_obeys_the_server(server: Scripted) -> None:
    echo = f"\x1b[2J you sent {TOKEN}".encode()
    for answer in (Answer(400, echo), Answer(500, echo), Answer(200, echo)):
        server.answers = [answer]
        with pytest.raises(HttpError, match=r"you sent \[token\]") as caught:
            request_json("GET", server.url, None, config(attempts=1), token=TOKEN)
        error: BaseException | None = caught.value
        while error is not None:
            assert TOKEN not in str(error)
            assert "\x1b" not in str(error)
            error = error.__cause__ or error.__context__


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "tökén", "\x00"])
def test_token_that_no_header_can_hold_is_refused_unseen(token: str, server: Scripted) -> None:
    with pytest.raises(ValueError, match="token must be") as caught:
        request_json("GET", server.url, None, config(), token=token)
    assert not token or token not in str(caught.value)
    assert server.asked == []


@pytest.mark.parametrize(
    "url", ["ftp://host", "file:///etc/passwd", "host:80", "http://", "http://host:port", "http://a\nb", "http://[::1"]
)
def test_url_that_cannot_be_asked_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  some come from the standard library's own parser
        request_json("GET", url, None, config())


def test_url_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ValueError, match="no password") as caught:
        request_json("GET", "http://user:hunter2@127.0.0.1", None, config())
    assert "hunter2" not in str(caught.value)


def test_content_that_json_lacks_is_refused(server: Scripted) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        request_json("POST", server.url, [float("nan")], config())
    assert server.asked == []


def test_proxy_of_the_environment_is_not_asked_for_this_machine(
    server: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert request_json("GET", server.url, None, config(attempts=1)) == {"ok": True}


def test_retries_are_not_logged_and_those_of_others_are(server: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    server.answers = [Answer(500), Answer()]
    request_json("GET", server.url, None, config())
    assert caplog.records == []

    @stamina.retry(on=KeyError, attempts=2, wait_initial=0.0, wait_jitter=0.0)
    def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert [record.message for record in caplog.records] == ["stamina.retry_scheduled"]


def test_loopback_is_told_by_name_and_number() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "")] == [False] * 5


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("timeout", 0.0, "be above 0"),
        ("timeout", float("inf"), "be a finite number"),
        ("attempts", 0, "be at least 1"),
        ("max_answer_bytes", 0, "be at least 1"),
        ("backoff", -1.0, "be at least 0"),
        ("max_pause", float("nan"), "be a finite number"),
    ],
)
def test_http_setting_out_of_bounds_is_refused(name: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must {rule}, got"):
        config(**{name: value})
