"""A reward in another process: the same scores, and nothing that either side should not do."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image

from overpaint.policy.types import Images, PerSample
from rewards import Compressibility, Reward, RewardLike
from rewards.encoded import encode_images
from rewards.http_json import HttpConfig, HttpError
from rewards.remote import RemoteConfig, RemoteReward
from rewards.serve import ServeConfig, application, serve

TOKEN = "a-long-and-secret-token"  # as conftest.py's servers have it in SERVE_TOKEN
ONCE = HttpConfig(timeout=20.0, attempts=1)
IMAGES = torch.rand(10, 3, 24, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"picture {index}" for index in range(10)]


class Brightness:
    """The mean of an image, and what happens at a prompt of a certain kind."""

    differentiable = False

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.inside = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.inside += 1
        assert self.inside == 1, "two requests are scored at the same time"
        assert not torch.is_grad_enabled()
        threading.Event().wait(0.01)
        self.inside -= 1
        self.batches.append(len(images))
        if "fails" in prompts:
            raise KeyError("a secret of the server")
        if "nan" in prompts:
            return torch.full((len(images),), torch.nan)
        if "miscounts" in prompts:
            return torch.zeros(len(images) + 1)  # the annotation says as much, but not where it is read
        return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def server_url(server: Callable[..., Any]) -> Iterator[str]:
    """A real server in another process; it takes little and wants a token."""
    with server("--token-variable", "SERVE_TOKEN", "--max-bytes", "100000", "--max-images", "8") as (_, url):
        yield url


def remote(url: str, *, token: str | None = TOKEN, **changes: Any) -> RemoteReward:
    settings: dict[str, Any] = {"url": url, "http": ONCE, "images_per_request": 4}
    return RemoteReward(RemoteConfig(**settings | changes), token=token)


def test_server_in_another_process_gives_the_same_scores(server_url: str) -> None:
    reward = remote(server_url)
    assert isinstance(reward, Reward)
    assert not reward.differentiable
    assert reward.check() == "compressibility"
    scores = reward(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, Compressibility()(IMAGES, PROMPTS))

    order = torch.randperm(10, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(reward(IMAGES[order], [PROMPTS[index] for index in order]), scores[order])
    assert torch.equal(remote(server_url, images_per_request=1)(IMAGES, PROMPTS), scores)
    assert reward(IMAGES[:0], []).shape == (0,)
    as_jpeg = remote(server_url, format="jpeg", quality=100)(IMAGES, PROMPTS)
    assert not torch.equal(as_jpeg, scores)
    torch.testing.assert_close(as_jpeg, scores, atol=0.3, rtol=0.0)


@pytest.mark.parametrize("token", ["wrong-token", None])
def test_wrong_token_is_refused_and_not_shown(token: str | None, server_url: str) -> None:
    reward = remote(server_url, token=token)
    for ask in (reward.check, lambda: reward(IMAGES, PROMPTS)):
        with pytest.raises(HttpError, match=f"{server_url}/.* got status 401: .*token is missing or wrong") as caught:
            ask()
        assert token is None or token not in str(caught.value)


def test_too_much_for_the_server_is_told_of(server_url: str) -> None:
    with pytest.raises(HttpError, match=r"status 413: .*may hold 8 images, got 10"):
        remote(server_url, images_per_request=10)(IMAGES, PROMPTS)
    large = torch.rand(1, 3, 200, 200)
    with pytest.raises(HttpError, match=r"status 413: .*may have 100000 bytes"):
        remote(server_url)(large, [""])
    with pytest.raises(ValueError, match=r"1 images take \d+ bytes, and max_request_bytes is 100000; lower"):
        remote(server_url, max_request_bytes=100_000)(large, [""])


def test_server_outlives_what_is_not_even_http(server_url: str) -> None:
    port = int(server_url.rpartition(":")[2])
    authorised = (
        f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer {TOKEN}\r\n"
    )
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET " + b"x" * 200_000,
        authorised.encode() + b"Content-Length: 100\r\n\r\n{",  # and gone
        authorised.encode() + b"Content-Length: -1\r\n\r\n",
        authorised.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            try:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1000)
            except OSError:
                pass  # it hung up before everything was sent
    assert torch.equal(remote(server_url)(IMAGES, PROMPTS), Compressibility()(IMAGES, PROMPTS))


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM to catch")
def test_terminated_server_ends_in_peace(server: Callable[..., Any]) -> None:
    with server() as (program, url):
        reward = remote(url, token=None)
        assert reward.check() == "compressibility"
        program.send_signal(signal.SIGTERM)
        _, log = program.communicate(timeout=30)
        assert program.returncode in (0, -signal.SIGTERM)
        assert "Finished server process" in log
        assert "Traceback" not in log
        with pytest.raises(HttpError, match="ConnectError"):
            reward(IMAGES, PROMPTS)


def test_a_function_of_a_file_in_the_working_directory_is_served_with_its_weights(
    server: Callable[..., Any], tmp_path: Path
) -> None:
    text = "from functools import partial\n\ndef scaled(factor, images, prompts):\n"
    text += "    return factor * images.mean((1, 2, 3))\n"
    text += "\ndef make(weights):\n    return partial(scaled, float(weights.read_text()))\n"
    text += "\nmake_default = lambda weights=None: make(weights)\n"
    (tmp_path / "my_reward.py").write_text(text)
    (tmp_path / "factor.txt").write_text("2.0")
    options = ("--reward-weights", str(tmp_path / "factor.txt"))
    with server(*options, reward="my_reward:make_default", folder=tmp_path) as (_, url):
        reward = remote(url, token=None)
        assert reward.check() == "my_reward:make_default"
        expected = 2 * ((IMAGES * 255).round() / 255).mean(dim=(1, 2, 3))
        torch.testing.assert_close(reward(IMAGES, PROMPTS), expected)


# What follows asks the application itself, without a socket.


def body_of(pictures: Images = IMAGES[:2], texts: Sequence[str] = ("one", "two"), /, **changes: Any) -> dict[str, Any]:
    encoded = [base64.b64encode(file).decode() for file in encode_images(pictures)]
    return {"images": encoded, "prompts": list(texts)} | changes


def served(
    *bodies: Any, reward: RewardLike | None = None, token: str | None = None, headers: Any = None, **changes: Any
) -> list[tuple[int, Any]]:
    """Sends each body at the same time and returns status and content of each answer."""

    async def ask() -> list[httpx2.Response]:
        settings: dict[str, Any] = {"reward": "brightness"}
        app: Any = application(reward or Brightness(), ServeConfig(**settings | changes), token)
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            sent = [body if isinstance(body, bytes | AsyncIterator) else json.dumps(body).encode() for body in bodies]
            typed = {"Content-Type": "application/json"} | (headers or {})
            return await asyncio.gather(*(client.post("/score", content=body, headers=typed) for body in sent))

    return [(response.status_code, response.json()) for response in asyncio.run(ask())]


def test_a_plain_function_is_served() -> None:
    assert served(body_of(), reward=lambda images, prompts: [0.25, 0.5]) == [(200, {"scores": [0.25, 0.5]})]
    with pytest.raises(TypeError, match=r"reward must be callable with \(images, prompts\)"):
        served(body_of(), reward=Brightness)  # ty: ignore[invalid-argument-type]


def test_requests_at_the_same_time_are_scored_one_after_the_other() -> None:
    reward = Brightness()
    answers = served(*(body_of(IMAGES[: index + 1], PROMPTS[: index + 1]) for index in range(6)), reward=reward)
    expected = ((IMAGES * 255).round() / 255).mean(dim=(1, 2, 3))
    for index, (status, content) in enumerate(answers):
        assert status == 200
        torch.testing.assert_close(torch.tensor(content["scores"]), expected[: index + 1])
    assert sorted(reward.batches) == [1, 2, 3, 4, 5, 6]


def bomb() -> str:
    """Returns a PNG that claims to be far larger than its data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")).decode()


def gif() -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, format="GIF")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "the body must be JSON"),
        (b"{", "the body must be JSON"),
        (b"\xff\xfe\x00", "the body must be JSON"),
        (b"[" * 50_000, "the body must be JSON"),
        (b"\x80\x04\x95.", "the body must be JSON"),  # a pickle
        (b"[]", "keys images and prompts and no other"),
        (b"7", "keys images and prompts and no other"),
        (body_of(reward="os:system"), "keys images and prompts and no other"),
        (body_of(images="x"), "images must be a list of strings"),
        (body_of(prompts=[1, 2]), "prompts must be a list of strings"),
        (body_of(prompts=["one"]), "one prompt for each image, got 1 for 2"),
        (body_of(images=["@@@", "@@@"]), r"images\[0\] must be base64 of an image"),
        (body_of(images=["é", "é"]), r"images\[0\] must be base64 of an image"),
        (body_of(images=["@" + image for image in body_of()["images"]]), r"images\[0\] must be base64 of an image"),
        (body_of(images=["", ""]), r"images\[0\] .* must be a PNG or a JPEG"),
        (body_of(images=[gif(), gif()]), r"images\[0\] .* must be a PNG or a JPEG"),
        (body_of(images=[bomb(), bomb()]), r"images\[0\] .*(DecompressionBomb|at most 2000 pixels)"),
        (body_of(torch.rand(1, 3, 50, 50), ["large"]), r"images\[0\] .* at most 2000 pixels, got 50 x 50"),
        (body_of(torch.rand(3, 3, 30, 30), ["one", "two", "three"]), r"images\[2\] .* at most 200 pixels"),
        (body_of(images=[body_of()["images"][0], body_of(IMAGES[:1, :, :9])["images"][0]]), "all have the same size"),
    ],
)
def test_malformed_request_is_told_why(body: Any, reason: str) -> None:
    reward = Brightness()
    [(status, content)] = served(body, reward=reward, max_pixels=2000)
    assert status == 400
    assert re.search(reason, content["error"])
    assert reward.batches == []


def test_request_without_images_has_no_scores() -> None:
    reward = Brightness()
    assert served(body_of(images=[], prompts=[]), reward=reward) == [(200, {"scores": []})]
    assert reward.batches == []


def test_body_is_measured_while_it_is_read() -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1000
            yield b" " * 1000

    [(status, content)] = served(endless(), max_bytes=20_000)
    assert (status, content) == (413, {"error": "a request may have 20000 bytes"})
    assert read < 50_000


def test_body_that_does_not_end_in_time_is_refused() -> None:
    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.02)

    [(status, content)] = served(slow(), max_seconds=0.1)
    assert (status, content) == (408, {"error": "a request may take 0.1 s to arrive"})


def test_failing_reward_is_told_of_without_its_secrets() -> None:
    for prompt, reason in (
        ("fails", "the reward failed with KeyError; see the log"),
        ("nan", "the reward gave a score that is not finite"),
        ("miscounts", "the reward failed with "),
    ):
        reward = Brightness()
        answers = served(body_of(prompts=["one", prompt]), body_of(), reward=reward)
        assert answers[0][0] == 500
        assert answers[0][1]["error"].startswith(reason)
        assert answers[1][0] == 200


def test_web_page_cannot_ask() -> None:
    assert served(body_of(), headers={"Content-Type": "text/plain"})[0][0] == 415


def test_nothing_but_health_and_score_is_served() -> None:
    async def statuses() -> list[int]:
        app: Any = application(Brightness(), ServeConfig(reward="brightness"))
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
            paths = ("/health", "/docs", "/redoc", "/openapi.json", "/")
            return [(await client.get(path)).status_code for path in paths]

    assert asyncio.run(statuses()) == [200, 404, 404, 404, 404]


def test_token_is_asked_for_before_anything_is_read() -> None:
    for sent in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}, {"Authorization": b"Bearer \xff"}):
        assert served(b"nonsense", token=TOKEN, headers=sent) == [(401, {"error": "the token is missing or wrong"})]
    assert served(body_of(), token=TOKEN, headers={"Authorization": f"Bearer {TOKEN}"})[0][0] == 200


def test_client_that_has_gone_is_not_scored_for() -> None:
    reward = Brightness()
    app: Any = application(reward, ServeConfig(reward="brightness"))
    messages = iter([{"type": "http.request", "body": json.dumps(body_of()).encode()}, {"type": "http.disconnect"}])
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/score",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        pass

    asyncio.run(app(scope, receive, send))
    assert reward.batches == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([], "must be an object with the one key scores"),
        ({"scores": [1.0, 2.0], "code": "import os"}, "must be an object with the one key scores"),
        ({"scores": "12"}, "scores must be a list of 2, got str"),
        ({"scores": [1.0]}, "scores must be a list of 2, got a list of 1"),
        ({"scores": [1.0, True]}, r"scores\[1\] must be a finite number, got bool"),
        ({"scores": [1.0, None]}, r"scores\[1\] must be a finite number, got NoneType"),
        ({"scores": ["1", 2.0]}, r"scores\[0\] must be a finite number, got str"),
        ({"scores": [1.0, [2.0]]}, r"scores\[1\] must be a finite number, got list"),
        ({"scores": [float("nan"), 2.0]}, r"scores\[0\] must be a finite number, got nan"),
        ({"scores": [1e39, 2.0]}, r"scores\[0\] must be a finite number, got 1e\+39"),
        ({"scores": [10**1000, 2.0]}, r"scores\[0\] must be a finite number, got 1000"),
    ],
)
def test_answer_that_is_no_scores_is_refused(answer: Any, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.remote.request_json", lambda *_, **__: answer)
    with pytest.raises(HttpError, match=f"POST http://server/score got an answer that cannot be used: .*{problem}"):
        remote("http://server/")(IMAGES[:2], PROMPTS[:2])


def test_whole_numbers_are_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.remote.request_json", lambda *_, **__: {"scores": [1, -2.5]})
    assert remote("http://server")(IMAGES[:2], PROMPTS[:2]).tolist() == [1.0, -2.5]


@pytest.mark.parametrize("answer", [None, {}, {"reward": 7}, ["reward"]])
def test_other_server_is_told_apart(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.remote.request_json", lambda *_, **__: answer)
    with pytest.raises(HttpError, match="GET http://server/health got an answer that names no reward"):
        remote("http://server").check()


def test_nothing_is_asked_before_the_first_call_and_no_secret_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTE_TOKEN", TOKEN)
    config = RemoteConfig(url="http://127.0.0.1:9", token_variable="REMOTE_TOKEN", http=ONCE)
    reward = RemoteReward(config)
    assert repr(reward) == "RemoteReward('http://127.0.0.1:9')"
    assert TOKEN not in str(asdict(config)) + repr(config)
    with pytest.raises(HttpError, match="ConnectError") as caught:
        reward(IMAGES, PROMPTS)
    assert TOKEN not in str(caught.value)


def test_prompts_must_fit_the_images() -> None:
    with pytest.raises(ValueError, match="one string for each image"):
        remote("http://server")(IMAGES, PROMPTS[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "server:80"}, "url must begin with http"),
        ({"quality": 0}, "quality must be at least 1, got 0"),
        ({"images_per_request": 0}, "images_per_request must be at least 1, got 0"),
        ({"max_request_bytes": 0}, "max_request_bytes must be at least 1, got 0"),
    ],
)
def test_remote_setting_out_of_bounds_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"url": "http://server"}
    with pytest.raises(ValueError, match=message):
        RemoteConfig(**settings | changes)


def test_token_that_is_not_there_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REMOTE_TOKEN", raising=False)
    with pytest.raises(ValueError, match=r"token_variable must name .* got 'REMOTE_TOKEN'"):
        RemoteReward(RemoteConfig(url="http://server", token_variable="REMOTE_TOKEN"))
    with pytest.raises(ValueError, match=r"token_variable must name .* got 'REMOTE_TOKEN'"):
        serve(ServeConfig(reward="compressibility", token_variable="REMOTE_TOKEN"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_server_that_others_reach_needs_a_token(host: str) -> None:
    with pytest.raises(ValueError, match="token_variable must be given where others can reach the server"):
        ServeConfig(reward="compressibility", host=host)
    ServeConfig(reward="compressibility", host=host, token_variable="SERVE_TOKEN")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 65536}, "port must be at most 65535, got 65536"),
        ({"max_images": 0}, "max_images must be at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"max_requests": 0}, "max_requests must be at least 1, got 0"),
        ({"max_connections": 0}, "max_connections must be at least 1, got 0"),
        ({"max_seconds": 0.0}, "max_seconds must be above 0, got 0.0"),
    ],
)
def test_serve_setting_out_of_bounds_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServeConfig(reward="compressibility", **changes)


def test_server_without_its_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ImportError, match=r"pip install overpaint\[server\]"):
        serve(ServeConfig(reward="compressibility"))


def test_served_network_is_moved_to_its_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import uvicorn

    class Network(torch.nn.Module):
        differentiable = True
        moved_to = ""

        def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
            return images.mean(dim=(1, 2, 3))

        def to(self, *place: Any, **options: Any) -> Any:
            self.moved_to = place[0]
            return self

    network = Network()
    monkeypatch.setattr("rewards.serve.reward_named", lambda name, **_: network)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [listener.close() for listener in sockets])
    serve(ServeConfig(reward="network", port=0, device="meta"))
    assert network.moved_to == "meta"
    assert re.fullmatch(r"network at http://127\.0\.0\.1:\d+\n", capsys.readouterr().out)
