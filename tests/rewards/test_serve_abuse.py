"""The reward server among malformed, slow, greedy and many clients: it refuses, it goes on, it loses nothing."""

import asyncio
import base64
import hmac
import json
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psutil
import pytest
import torch

from rewards import Compressibility
from rewards.encoded import ImageFormat, encode_images
from rewards.http_json import HttpConfig, is_loopback
from rewards.remote import RemoteConfig, RemoteReward
from rewards.serve import ServeConfig, application

Record = Callable[[str, int], None]
JSON = {"Content-Type": "application/json"}
IMAGES = torch.rand(64, 3, 16, 24, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"picture {index}" for index in range(64)]


@pytest.fixture(scope="module")
def served(server: Callable[..., Any]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in another process, with its defaults but for the patience."""
    with server("--max-seconds", "1.0") as (program, url):
        yield program, url


def still_right(url: str) -> bool:
    """Returns whether a good request still gets the right scores."""
    reward = RemoteReward(RemoteConfig(url=url, http=HttpConfig(timeout=60.0, attempts=1)))
    return torch.equal(reward(IMAGES[:3], PROMPTS[:3]), Compressibility()(IMAGES[:3], PROMPTS[:3]))


def memory(program: subprocess.Popen[str]) -> float:
    """Returns the resident memory of a program in megabytes."""
    return psutil.Process(program.pid).memory_info().rss / 1e6


def malformed(count: int) -> Iterator[bytes]:
    """Derives requests from good ones, each broken in a way that no reading of it can forgive."""
    drawn = random.Random(0)
    for index in range(count):
        format: ImageFormat = ("png", "jpeg")[index % 2]
        files = encode_images(IMAGES[:2], format)
        good: dict[str, Any] = {
            "images": [base64.b64encode(file).decode() for file in files],
            "prompts": ["one", "two"],
        }
        body = json.dumps(good).encode()
        odd: Any = drawn.choice([None, 7, 1e400, True, {}, [[]], "x", [None], [7], {"0": "x"}])
        place = drawn.randrange(len(files[0]))
        breaks: list[Callable[[], bytes]] = [
            lambda: body[: drawn.randrange(len(body))],  # noqa: B023  called before the next turn
            lambda: body + bytes([drawn.choice(b'x{["\x00\xff')]),  # noqa: B023
            lambda: bytes([drawn.choice(b"\x00\xff\x80}]")]) + body,  # noqa: B023
            lambda: json.dumps(good | {drawn.choice(["images", "prompts"]): odd}).encode(),  # noqa: B023
            lambda: json.dumps(good | {f"key {drawn.random()}": odd}).encode(),  # noqa: B023
            lambda: json.dumps({key: good[key] for key in [drawn.choice(["images", "prompts"])]}).encode(),  # noqa: B023
            lambda: _with_image(good, base64.b64encode(files[0][:place]).decode()),  # noqa: B023
            lambda: _with_image(good, base64.b64encode(drawn.randbytes(200)).decode()),  # noqa: B023
            lambda: _with_image(good, good["images"][0][:-2] + drawn.choice(["=!", "é", "\n\n", "-_", "\ud800"])),  # noqa: B023
            lambda: json.dumps(drawn.choice([odd, [good], [], "x", None])).encode(),  # noqa: B023
            lambda: b"[" * drawn.randrange(1, 100_000),
            lambda: drawn.randbytes(drawn.randrange(1, 2000)),
        ]
        yield breaks[index // 2 % len(breaks)]()


def _with_image(good: dict[str, Any], text: str) -> bytes:
    return json.dumps(good | {"images": [text, good["images"][1]]}).encode()


@pytest.mark.proof
def test_malformed_requests_are_refused_and_never_end_the_server(
    served: tuple[subprocess.Popen[str], str], record_property: Record
) -> None:
    program, url = served
    bodies = list(malformed(360))
    with httpx2.Client(timeout=60.0, trust_env=False) as client:
        for body in bodies:
            answer = client.post(f"{url}/score", content=body, headers=JSON)
            assert 400 <= answer.status_code < 500, (body[:200], answer.text)
            assert answer.json().keys() == {"error"}
    assert program.poll() is None
    assert still_right(url)
    record_property("server: malformed requests refused", len(bodies))


@pytest.mark.proof
def test_a_flipped_bit_gets_scores_or_a_reason(
    served: tuple[subprocess.Popen[str], str], record_property: Record
) -> None:
    _, url = served
    drawn = random.Random(1)
    flips = 240
    with httpx2.Client(timeout=60.0, trust_env=False) as client:
        for index in range(flips):
            file = bytearray(encode_images(IMAGES[:1], ("png", "jpeg")[index % 2])[0])
            file[drawn.randrange(len(file))] ^= 1 << drawn.randrange(8)
            body = {"images": [base64.b64encode(file).decode()], "prompts": [""]}
            answer = client.post(f"{url}/score", json=body)
            assert answer.status_code in (200, 400, 413), answer.text
            assert answer.json().keys() == ({"scores"} if answer.status_code == 200 else {"error"})
    assert still_right(url)
    record_property("server: damaged images borne", flips)


HEAD = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
SLOW = {
    "says nothing": b"",
    "stops within the head": HEAD,
    "stops within the body": HEAD + b"\r\n{",
    "sends on after its answer": b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
    "stops within its second request": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + HEAD,
}


@pytest.mark.proof
@pytest.mark.parametrize("drips", [False, True])
def test_slow_clients_are_hung_up_on(
    drips: bool, served: tuple[subprocess.Popen[str], str], record_property: Record
) -> None:
    _, url = served
    port = int(url.rpartition(":")[2])

    def is_hung_up_on(sent: bytes) -> bool:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(sent)
            connection.settimeout(0.2)
            end = time.monotonic() + 30
            while time.monotonic() < end:
                try:
                    if drips and sent:
                        connection.sendall(b"x")
                    if not connection.recv(10_000):
                        return True
                except TimeoutError:
                    continue
                except OSError:
                    return True
        return False

    crowd = list(SLOW.values()) * 8
    with ThreadPoolExecutor(len(crowd)) as pool:
        assert all(pool.map(is_hung_up_on, crowd))
    assert still_right(url)
    record_property("server: slow clients hung up on", len(crowd))


def test_connections_that_say_nothing_keep_nobody_out_for_long(server: Callable[..., Any]) -> None:
    with server("--max-seconds", "2.0", "--max-connections", "4") as (_, url):
        port = int(url.rpartition(":")[2])
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
        patient = RemoteReward(RemoteConfig(url=url, http=HttpConfig(attempts=10, backoff=0.5)))
        assert patient(IMAGES[:1], PROMPTS[:1]).shape == (1,)
        for connection in idle:
            connection.close()


@pytest.mark.proof
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"images":[' + b"1," * 4_000_000 + b'1],"prompts":[]}', id="numbers"),
        pytest.param(b"{" + b",".join(b'"%x":1' % index for index in range(400_000)) + b"}", id="keys"),
        pytest.param(b'{"images":[' + b"[]," * 1_000_000 + b'[]],"prompts":[]}', id="lists"),
    ],
)
def test_nonsense_takes_no_more_memory_than_its_size_explains(
    body: bytes, served: tuple[subprocess.Popen[str], str], record_property: Record
) -> None:
    program, url = served
    before, most, done = memory(program), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, memory(program))

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = httpx2.post(f"{url}/score", content=body, headers=JSON, timeout=120.0, trust_env=False)
    done.set()
    watcher.join()
    assert answer.status_code == 400
    assert most - before < 40 * len(body) / 1e6  # a list of empty lists takes 24 bytes for each of its own
    record_property("server: memory bombs refused", 1)


def test_the_server_listens_to_this_machine_alone_unless_told_otherwise(
    served: tuple[subprocess.Popen[str], str],
) -> None:
    program, url = served
    listening = [at.laddr.ip for at in psutil.Process(program.pid).net_connections() if at.status == "LISTEN"]
    assert listening == ["127.0.0.1"]
    assert is_loopback(ServeConfig(reward="compressibility").host)
    assert url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("verdict", [True, False])
def test_tokens_are_compared_in_constant_time_and_by_nothing_else(
    verdict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []

    def decide(sent: bytes, expected: bytes) -> bool:
        compared.append(sent)
        assert expected == b"Bearer right"
        return verdict

    monkeypatch.setattr(hmac, "compare_digest", decide)

    async def ask() -> list[int]:
        app: Any = application(Compressibility(), ServeConfig(reward="compressibility"), "right")
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
            sent = ("Bearer right", "Bearer wrong", "")
            return [(await client.get("/health", headers={"Authorization": one})).status_code for one in sent]

    assert asyncio.run(ask()) == [200 if verdict else 401] * 3
    assert compared == [b"Bearer right", b"Bearer wrong", b""]


def load(url: str, *, clients: int, seconds: float) -> int:
    """Has clients ask without a pause, each with its own picture; returns how many answers they got, all right."""
    expected = Compressibility()(IMAGES, PROMPTS)
    end = time.monotonic() + seconds

    def ask(index: int) -> int:
        reward = RemoteReward(RemoteConfig(url=url, http=HttpConfig(timeout=120.0, attempts=1)))
        mine, answers = slice(index, index + 1), 0
        while answers == 0 or time.monotonic() < end:
            assert torch.equal(reward(IMAGES[mine], PROMPTS[mine]), expected[mine])
            answers += 1
        return answers

    with ThreadPoolExecutor(clients) as pool:
        return sum(pool.map(ask, range(clients)))


@pytest.mark.proof
@pytest.mark.parametrize("seconds", [2.0, pytest.param(300.0, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_64_clients_at_once_lose_nothing_and_take_no_memory(
    seconds: float, server: Callable[..., Any], record_property: Record
) -> None:
    with server() as (program, url):
        answers = load(url, clients=64, seconds=seconds / 4)  # until memory has what it needs
        before = memory(program)
        answers += load(url, clients=64, seconds=seconds)
        assert memory(program) - before < 16
    record_property("server: requests of 64 clients at once, none lost", answers)
