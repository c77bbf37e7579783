"""JSON over HTTP: one question, one checked answer, and another try where the network or the server stumbles."""

import email.utils
import ipaddress
import json
import math
import random
import ssl
import time
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

RETRIED = frozenset({408, 425, 429}) | frozenset(range(500, 600))
"""HTTP statuses after which the same question may get an answer later."""
EXCERPT = 200
"""Characters of an answer that an error message shows."""
_JITTER = random.Random()  # of its own, so that a reproducible program's random numbers stay as they are


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """How long a server is waited for, and how often it is asked."""

    timeout: float = 120.0
    """Seconds that a server may take to connect, to begin its answer and to end it."""
    attempts: int = 5
    """Tries that a question has."""
    backoff: float = 1.0
    """Seconds between the first try and the second, doubled for each further one; a random half of it is left out."""
    max_pause: float = 60.0
    """Longest pause between two tries, in seconds, even where the server's Retry-After asks for a longer one."""
    max_answer_bytes: int = 1_000_000
    """Size of the largest answer that is read."""

    def __post_init__(self) -> None:
        """Checks every field."""
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be positive and finite, got {self.timeout!r}")
        for name in ("attempts", "max_answer_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        for name in ("backoff", "max_pause"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")


class HttpError(RuntimeError):
    """A question that got no answer of use; the message names the URL and the reason and never the token."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the last answer; None where there was none."""


class _Answer(NamedTuple):
    """What a server sent."""

    status: int
    content: bytes
    """Its first bytes, one more than are allowed where it is too large."""
    encoding: str
    retry_after: str


def request_json(
    method: Literal["GET", "POST"], url: str, content: object | None, config: HttpConfig, *, token: str | None = None
) -> Any:
    """Returns what a server answers, parsed from JSON.

    Another try is made after a failed connection, a timeout, and statuses 408, 425, 429 and 5xx. Redirects are not
    followed, so that the token goes nowhere else. Proxies of the environment are used, but not for this machine's own
    addresses.

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
    import httpx2

    check_url(url)
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if token is not None:
        check_token(token)
        headers["Authorization"] = f"Bearer {token}"
    body = None
    if content is not None:
        body = json.dumps(content, allow_nan=False).encode()
        headers["Content-Type"] = "application/json"

    host = urlsplit(url).hostname or ""
    backoff, reason, status = config.backoff, "", None
    with httpx2.Client(
        headers=headers,
        timeout=config.timeout,
        trust_env=not is_loopback(host),
        follow_redirects=False,
        verify=_tls(),
    ) as client:
        for attempt in range(1, config.attempts + 1):
            pause = min(backoff * _JITTER.uniform(0.5, 1.0), config.max_pause)
            backoff = min(2 * backoff, config.max_pause)
            try:
                answer = _ask(client, method, url, body, config)
            except httpx2.TransportError as error:
                reason, status = f"{type(error).__name__}: {error}", None
            else:
                if answer.status not in RETRIED:
                    return _parsed(answer, f"{method} {url}", config, token)
                reason, status = f"status {answer.status}: {_excerpt(answer, token)}", answer.status
                pause = min(max(pause, _seconds(answer.retry_after)), config.max_pause)
            if attempt < config.attempts:
                time.sleep(pause)
    raise HttpError(f"{method} {url} failed {config.attempts} times, at last with {reason}", status=status)


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


def check_token(token: str) -> None:
    """Checks that a token can be sent in a header; the message of the error does not show it.

    Raises:
        ValueError: It cannot.
    """
    if not token or not all("!" <= character <= "~" for character in token):
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


def _ask(client: Any, method: str, url: str, body: bytes | None, config: HttpConfig) -> _Answer:
    """Asks once, and reads no more than is allowed and for no longer."""
    import httpx2

    end = time.monotonic() + config.timeout
    content = bytearray()
    with client.stream(method, url, content=body) as response:
        for piece in response.iter_raw():  # as sent: a compressed answer could unfold to any size
            content += piece
            if len(content) > config.max_answer_bytes:
                break
            if time.monotonic() > end:
                raise httpx2.ReadTimeout(f"the answer did not end within {config.timeout:g} s")
        return _Answer(
            response.status_code,
            bytes(content[: config.max_answer_bytes + 1]),
            response.headers.get("Content-Encoding", "identity"),
            response.headers.get("Retry-After", ""),
        )


def _parsed(answer: _Answer, what: str, config: HttpConfig, token: str | None) -> Any:
    """Returns the JSON of a successful answer."""
    if not 200 <= answer.status < 300:
        raise HttpError(f"{what} got status {answer.status}: {_excerpt(answer, token)}", status=answer.status)
    if len(answer.content) > config.max_answer_bytes:
        raise HttpError(f"{what} got more than {config.max_answer_bytes} bytes", status=answer.status)
    if answer.encoding.lower() != "identity":
        raise HttpError(f"{what} got an answer encoded as {answer.encoding[:EXCERPT]!r}", status=answer.status)
    try:
        return json.loads(answer.content, parse_constant=_refused)
    except (ValueError, RecursionError):
        reason = f"{what} got an answer that is not JSON: {_excerpt(answer, token)}"
    # Outside the block: the parser's error holds the whole answer, and so may show what a server echoes.
    raise HttpError(reason, status=answer.status)


def _refused(constant: str) -> float:
    """Refuses what Python's parser takes beyond JSON: NaN and the infinities."""
    raise ValueError(f"{constant} is not JSON")


def _excerpt(answer: _Answer, token: str | None) -> str:
    """Returns the beginning of an answer with nothing in it that a terminal would obey, and without the token."""
    text = answer.content.decode("utf-8", "replace")
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
