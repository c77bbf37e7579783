"""JSON over HTTP: one request, one checked answer, and retries where the network or the server fails for a moment."""

import email.utils
import ipaddress
import json
import logging
import random
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from overpaint.settings import Field, Index, settings

if TYPE_CHECKING:
    import httpx2

RETRIED = frozenset({408, 425, 429}) | frozenset(range(500, 600))
"""HTTP statuses after which the same request may get an answer later."""
EXCERPT = 200
"""Characters of an answer that an error message shows."""
HEADERS = frozenset({"accept", "connection", "content-length", "content-type", "host", "user-agent"})
"""Headers that are sent besides our own; what else other libraries add, from the environment too, is left out."""
PIECE = 2**16
"""Bytes of a request that are sent before the time is looked at again."""
RAW_MARK = "x-stainless-raw-response"
"""A header by which openai knows requests whose answers it shall not parse; it must stay in the request."""
_JITTER = random.Random()  # of its own, so that a reproducible program's random numbers stay as they are


@settings
class HttpConfig:
    """Timeouts and retries of a request."""

    timeout: float = Field(120.0, gt=0)
    """Seconds that a try may take, from its beginning to the end of the answer."""
    attempts: int = Field(5, ge=1)
    """Tries that a request has."""
    backoff: float = Field(1.0, ge=0)
    """Seconds between the first try and the second, doubled for each further one; a random half of it is left out."""
    max_pause: float = Field(60.0, ge=0)
    """Longest pause between two tries, in seconds, even where the server's Retry-After asks for a longer one."""
    max_answer_bytes: int = Field(1_000_000, ge=1)
    """Size of the largest answer that is read."""


class HttpError(RuntimeError):
    """A request that got no answer of use; the message names the URL and the reason and never the token."""

    def __init__(self, message: str, *, status: Index | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the last answer; None where there was none."""


class _RetriedError(HttpError):
    """One try that failed in a way that may pass."""

    retry_after: float = 0.0
    """Seconds that the server asks to wait."""


def request_json(
    method: Literal["GET", "POST"], url: str, content: object | None, config: HttpConfig, *, token: str | None = None
) -> Any:
    """Returns what a server answers, parsed from JSON; retries as `json_of` does.

    Args:
        method: "GET" or "POST".
        url: Where to ask; it holds no password.
        content: What to send as JSON; nothing where it is None.
        config: Settings.
        token: Sent as `Authorization: Bearer`; without TLS it travels in the clear.

    Raises:
        HttpError: No try got an answer of use, or the answer is not JSON.
        ValueError: The URL or the token cannot be used, or the content is not JSON.
    """
    check_url(url)
    headers, body = {"Accept": "application/json"}, None
    if content is not None:
        body = json.dumps(content, allow_nan=False).encode()
        headers["Content-Type"] = "application/json"
    with http_client(url, config, token) as client:
        return json_of(
            f"{method} {url}", lambda: client.request(method, url, content=body, headers=headers), config, token
        )


def http_client(url: str, config: HttpConfig, token: str | None) -> "httpx2.Client":
    """Returns a client that sends the token and no other credentials, and reads bounded answers as they were sent.

    Redirects are not followed, so that the token goes nowhere else. Proxies of the environment are used, but not for
    this machine's own addresses. An answer is cut one byte after `config.max_answer_bytes`. A request and its answer,
    head and all, take `config.timeout` together, however short each wait for the server is.

    Raises:
        ValueError: The token cannot be sent.
    """
    import httpx2

    check_token(token)

    def prepare(request: httpx2.Request) -> None:
        request.extensions["trace"] = _hurrying(config.timeout)
        for name in set(request.headers) - HEADERS - {RAW_MARK}:
            del request.headers[name]
        request.headers["Accept-Encoding"] = "identity"
        if token is not None:
            request.headers["Authorization"] = f"Bearer {token}"

    def bound(response: httpx2.Response) -> None:
        # A compressed answer could unfold to any size: it stays as it was sent.
        response.extensions["encoding"] = response.headers.pop("Content-Encoding", "identity")
        response.stream = _bounded(response.stream, config.max_answer_bytes)

    return httpx2.Client(
        timeout=config.timeout,
        trust_env=not is_loopback(urlsplit(url).hostname or ""),
        follow_redirects=False,
        limits=httpx2.Limits(max_keepalive_connections=0),  # a connection's time is that of its one request
        verify=_tls(),
        event_hooks={"request": [prepare], "response": [bound]},
    )


def json_of(what: str, ask: Callable[[], "httpx2.Response"], config: HttpConfig, token: str | None) -> Any:
    """Returns the JSON of an answer.

    Another try is made after a failed connection, a timeout, and statuses 408, 425, 429 and 5xx.

    Args:
        what: Method and address, for messages.
        ask: Makes one try with a client of `http_client`.
        config: Settings.
        token: What no message may show.

    Raises:
        HttpError: No try got an answer of use, or the answer is not JSON.
    """
    import httpx2
    import stamina

    _quiet()
    backoff = config.backoff

    def pause(error: Exception) -> float | bool:
        nonlocal backoff
        if not isinstance(error, _RetriedError):
            return False
        drawn = backoff * _JITTER.uniform(0.5, 1.0)
        backoff = min(2 * backoff, config.max_pause)
        return min(max(drawn, error.retry_after), config.max_pause)

    @stamina.retry(on=pause, attempts=config.attempts, timeout=None)
    def once() -> httpx2.Response:
        try:
            response = ask()
        except httpx2.TimeoutException as error:
            raise _RetriedError(f"{type(error).__name__}: no whole answer within {config.timeout:g} s") from error
        except httpx2.TransportError as error:
            raise _RetriedError(f"{type(error).__name__}: {error}") from error
        if response.status_code in RETRIED:
            status = response.status_code
            failed = _RetriedError(f"status {status}: {_excerpt(response, token)}", status=status)
            failed.retry_after = _seconds(response.headers.get("Retry-After", ""))
            raise failed
        return response

    try:
        response = once()
    except _RetriedError as last:
        raise HttpError(f"{what} failed {config.attempts} times, at last with {last}", status=last.status) from last
    return _parsed(response, what, config, token)


def check_url(url: str) -> None:
    """Checks that a URL is of HTTP and holds no password, which an error message would show.

    Raises:
        ValueError: It is not so.
    """
    import httpx2

    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("url must hold no user name and no password; give a token instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url must begin with http:// or https:// and name a host, got {url!r}")
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"url must be one, got {url!r}: {error}") from error


def check_token(token: str | None) -> None:
    """Checks that a token, if there is one, can be sent in a header; the message of the error does not show it.

    Raises:
        ValueError: It cannot.
    """
    if token is not None and not (token and all("!" <= character <= "~" for character in token)):
        raise ValueError("token must be one or more printable ASCII characters without spaces")


def is_loopback(host: str) -> bool:
    """Returns whether a host is this machine itself, as far as its name tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@cache
def _tls() -> ssl.SSLContext:
    """Returns what certificates are checked with; reading them takes 30 ms, so it is done once."""
    import httpx2

    return httpx2.create_ssl_context()


def _hurrying(seconds: float) -> Callable[[str, Mapping[str, Any]], None]:
    """Returns what hurries the connection of a request that begins now, as httpcore's extension `trace` calls it."""
    import httpx2

    end = time.monotonic() + seconds

    def left() -> float:
        if time.monotonic() > end:
            raise httpx2.ReadTimeout("its time is up")
        return max(end - time.monotonic(), 0.001)

    def hurry(event: str, about: Mapping[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            stream = about["return_value"]
            read, write = stream.read, stream.write

            def write_pieces(content: bytes, timeout: float | None = None) -> None:
                for first in range(0, len(content), PIECE):
                    write(content[first : first + PIECE], left())

            stream.read = lambda size, timeout=None: read(size, left())
            stream.write = write_pieces

    return hurry


def _bounded(stream: Any, max_bytes: int) -> "httpx2.SyncByteStream":
    """Returns an answer that is cut where it is too large."""
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            left = max_bytes + 1
            for piece in stream:
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return

        def close(self) -> None:
            stream.close()

    return Bounded()


@cache
def _quiet() -> None:
    """Keeps stamina from logging our retries, which end in an answer or in an `HttpError`; other retries are logged."""
    log = logging.getLogger("stamina")
    log.addFilter(lambda record: not str(getattr(record, "stamina.callable", "")).startswith(__name__))


def _parsed(response: "httpx2.Response", what: str, config: HttpConfig, token: str | None) -> Any:
    """Returns the JSON of a successful answer."""
    status, encoding = response.status_code, response.extensions["encoding"]
    if not 200 <= status < 300:
        raise HttpError(f"{what} got status {status}: {_excerpt(response, token)}", status=status)
    if len(response.content) > config.max_answer_bytes:
        raise HttpError(f"{what} got more than {config.max_answer_bytes} bytes", status=status)
    if encoding.lower() != "identity":
        raise HttpError(f"{what} got an answer encoded as {encoding[:EXCERPT]!r}", status=status)
    try:
        return json.loads(response.content, parse_constant=_refused)
    except (ValueError, RecursionError):
        reason = f"{what} got an answer that is not JSON: {_excerpt(response, token)}"
    # Outside the block: the parser's error holds the whole answer, and so may show what a server echoes.
    raise HttpError(reason, status=status)


def _refused(constant: str) -> float:
    """Refuses what Python's parser takes beyond JSON: NaN and the infinities."""
    raise ValueError(f"{constant} is not JSON")


def _excerpt(response: "httpx2.Response", token: str | None) -> str:
    """Returns the beginning of an answer with nothing in it that a terminal would obey, and without the token."""
    text = response.content.decode("utf-8", "replace")
    if token is not None:
        text = text.replace(token, "[token]")
    return ascii(text[:EXCERPT])


def _seconds(retry_after: str) -> float:
    """Returns how long a Retry-After header asks to wait: a number of seconds, or until a date."""
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
