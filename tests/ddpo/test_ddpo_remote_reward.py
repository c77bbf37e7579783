"""DDPO whose reward is in another process: what happens to the server changes no number, and loses no sample."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, RewardError, ScoringConfig
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, read_metrics
from rewards import Compressibility, Reward
from rewards.http_json import HttpConfig
from rewards.remote import RemoteConfig, RemoteReward
from rewards.serve import ServeConfig, scores_for

ROOT = Path(__file__).resolve().parents[2]
BATCHES = 2
"""Batches in a round, each one request."""


class Outcome(NamedTuple):
    weights: dict[str, Tensor]
    statistics: dict[str, Any]
    metrics: list[dict[str, Any]]
    retries: float


@pytest.fixture
def train(
    policy: DiffusionPolicy, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> Callable[..., Outcome]:
    """Trains two rounds from the same weights."""
    start = policy.trainable_state()

    def run(name: str, reward: Reward, *, resume: bool = False) -> Outcome:
        policy.load_trainable_state(start)
        config = run_config(name, learning_rate=3e-3, resume=resume)
        settings: dict[str, Any] = {
            "samples_per_round": 4 * BATCHES,
            "updates_per_round": 1,
            "sampling_batch_size": 4,
            "minibatch_size": 8,
            "steps": 2,
            "guidance_scale": 1.0,
            "pictures_every": 100,
        }
        scoring = ScoringConfig(attempts=2, backoff=0.0)
        trainer = DDPOTrainer(policy, reward, prompts, DDPOConfig(**settings), scoring=scoring)
        trainer.train(config)
        lines = read_metrics(config.output_dir / "metrics.jsonl")
        return Outcome(
            policy.trainable_state(),
            trainer.baseline.statistics.state_dict(),
            [
                {
                    tag: value
                    for tag, value in line.items()
                    if not tag.startswith("seconds/") and tag != "reward/retries"
                }
                for line in lines
            ],
            sum(line.get("reward/retries", 0.0) for line in lines),
        )

    return run


@pytest.fixture
def undisturbed(train: Callable[..., Outcome]) -> Outcome:
    """What becomes of the policy when the reward is here."""
    return train("undisturbed", Compressibility())


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.metrics == theirs.metrics
    assert len(ours.metrics) >= 2
    assert ours.statistics == theirs.statistics
    assert all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())


def kept_files(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "ungraded").glob("*"))


def remote(url: str, **changes: Any) -> RemoteReward:
    settings: dict[str, Any] = {"timeout": 20.0, "attempts": 1, "backoff": 0.0}
    return RemoteReward(RemoteConfig(url=url, http=HttpConfig(**settings | changes)))


class Program:
    """`python -m rewards.serve`, which can be killed and started again at the same address."""

    def __init__(self) -> None:
        self.starts = 0
        self.start("0")

    def start(self, port: str) -> None:
        command = [sys.executable, "-m", "rewards.serve", "--reward", "compressibility", "--port", port]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip().partition(" at ")[2]
        self.starts += 1

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        self.kill()
        self.start(self.url.rpartition(":")[2])


class Disturbed:
    """A reward, and something that happens just before its n-th call."""

    differentiable = False

    def __init__(self, reward: Reward, at_call: int, happens: Callable[[], None]) -> None:
        self.reward = reward
        self.at_call = at_call
        self.happens = happens
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.calls += 1
        if self.calls == self.at_call:
            self.happens()
        return self.reward(images, prompts)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGSTOP to hold a request with")
def test_served_reward_trains_as_the_reward_here_even_when_its_server_is_killed(
    train: Callable[..., Outcome], undisturbed: Outcome
) -> None:
    program = Program()
    killers: list[threading.Timer] = []

    def kill_while_it_is_asked() -> None:
        program.process.send_signal(signal.SIGSTOP)  # takes the request, and does not get to answer it
        killers.append(threading.Timer(0.3, program.restart))
        killers[0].start()

    try:
        served = train("served", remote(program.url))
        assert_same(served, undisturbed)
        assert served.retries == 0

        patient = remote(program.url, attempts=50, backoff=0.1, max_pause=0.5)
        survived = train("survived", Disturbed(patient, BATCHES + 1, kill_while_it_is_asked))
        assert program.starts == 2
        assert_same(survived, undisturbed)
        assert survived.retries == 0  # the client had asked again by itself
    finally:
        for killer in killers:
            killer.join()
        program.kill()


class Hostile(ThreadingHTTPServer):
    """A server that scores as it should, and misbehaves from one request to another."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.released = threading.Event()
        self.misbehaviour = ""
        self.from_request = self.to_request = 0
        self.requests = 0

    def misbehave(self, how: str, from_request: int, to_request: int) -> None:
        self.misbehaviour, self.from_request, self.to_request = how, from_request, to_request
        self.requests = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hung up


CONTENT = {
    "status 500": "the graphics card has gone",
    "HTML": "<html>",
    "infinite": '{"scores": [Infinity, 1, 1, 1]}',
    "too large": '{"scores": [1e39, 1, 1, 1]}',
    "strings": '{"scores": ["1", "1", "1", "1"]}',
    "another shape": "[1, 1, 1, 1]",
    "empty": "",
    "no Unicode": b'{"scores": "\xff\xfe"}',
    "deep": "[" * 100_000,
    "long number": '{"scores": [' + "1" * 100_000 + "]}",
    "huge": " " * 2_000_000,
    "compressed": gzip.compress(b" " * 10_000_000),
}
"""Answers by what is wrong with them."""

WITHOUT_END = {"late": b"", "drips": b"HTTP/1.1 200 OK\r\n\r\n", "drips its head": b"HTTP/1.1 200 OK\r\nX: "}
"""Beginnings of answers that do not end."""


class Handler(BaseHTTPRequestHandler):
    server: Any  # a Hostile

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        scores = scores_for(body, Compressibility(), ServeConfig(reward="compressibility"))
        self.server.requests += 1
        bad = self.server.from_request <= self.server.requests < self.server.to_request
        misbehaviour = self.server.misbehaviour if bad else ""
        if misbehaviour in WITHOUT_END:
            self.wfile.write(WITHOUT_END[misbehaviour])
            while not self.server.released.wait(0.05):
                self.wfile.write(b" " * (misbehaviour != "late"))
            return
        if misbehaviour == "hangs up":
            self.close_connection = True
            return
        content = {
            "": json.dumps({"scores": scores}),
            "wrong count": json.dumps({"scores": scores[1:]}),
            "not a number": json.dumps({"scores": [float("nan"), *scores[1:]]}),
            **CONTENT,
        }.get(misbehaviour, "")
        self.send_response({"status 500": 500, "redirects": 307}.get(misbehaviour, 200))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Encoding", "gzip" if misbehaviour == "compressed" else "identity")
        self.send_header("Location", f"{self.server.url}/elsewhere")
        self.end_headers()
        self.wfile.write(content if isinstance(content, bytes) else content.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    with Hostile() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.mark.proof
@pytest.mark.parametrize(
    ("misbehaviour", "message"),
    [
        ("status 500", r"failed 1 times, at last with status 500: 'the graphics card has gone'"),
        ("HTML", r"got an answer that is not JSON: '<html>"),
        ("wrong count", r"got an answer that cannot be used: scores must be a list of 4, got a list of 3"),
        ("not a number", r"got an answer that is not JSON: .*NaN"),
        ("hangs up", r"failed 1 times, at last with RemoteProtocolError"),
        ("late", r"failed 1 times, at last with ReadTimeout: no whole answer within 1.5 s"),
        ("drips", r"failed 1 times, at last with ReadTimeout: no whole answer within 1.5 s"),
        ("drips its head", r"failed 1 times, at last with ReadTimeout: no whole answer within 1.5 s"),
        ("redirects", r"got status 307"),
        *(
            pytest.param(misbehaviour, message, marks=pytest.mark.slow)  # what reads them has tests of its own
            for misbehaviour, message in (
                ("compressed", r"got an answer encoded as 'gzip'"),
                ("infinite", r"got an answer that is not JSON"),
                ("too large", r"got an answer that cannot be used: scores\[0\] must be a finite number, got 1e\+39"),
                ("strings", r"got an answer that cannot be used: scores\[0\] must be a finite number, got str"),
                ("another shape", r"got an answer that cannot be used: it must be an object with the one key scores"),
                ("empty", r"got an answer that is not JSON: ''"),
                ("no Unicode", r"got an answer that is not JSON"),
                ("deep", r"got an answer that is not JSON"),
                ("long number", r"got an answer that is not JSON"),
                ("huge", r"got more than 1000000 bytes"),
            )
        ),
    ],
)
def test_misbehaving_server_changes_no_number_and_loses_no_sample(
    misbehaviour: str,
    message: str,
    train: Callable[..., Outcome],
    undisturbed: Outcome,
    hostile: Hostile,
    tmp_path: Path,
    record_property: Callable[[str, int], None],
) -> None:
    reward = remote(hostile.url, timeout=1.5 if "1.5 s" in message else 20.0)
    hostile.misbehave(misbehaviour, 2, 3)  # a request of the first round
    recovered = train("recovered", reward)
    assert_same(recovered, undisturbed)
    assert recovered.retries == 1

    hostile.misbehave(misbehaviour, BATCHES + 2, 1000)  # the second batch of the second round, for good
    with pytest.raises(RewardError, match=f"at try 2 of 2, with HttpError: POST {hostile.url}/score {message}"):
        train("ended", reward)
    assert kept_files(tmp_path / "ended") == ["round-000001-process-0.safetensors"]

    hostile.misbehave("", 0, 0)
    assert_same(train("ended", reward, resume=True), undisturbed)
    assert kept_files(tmp_path / "ended") == []
    assert hostile.requests == BATCHES  # of the second round only
    record_property("client: hostile answers borne by DDPO, no sample lost", 2)
