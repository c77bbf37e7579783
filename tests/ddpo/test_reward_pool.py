"""Rewards in worker threads: order, bounds, failures that pass and failures that stay."""

import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo.scoring import RewardError, RewardPool, ScoringConfig
from overpaint.policy.types import Images, PerSample

PATIENCE = 30.0
"""Seconds after which something that should have happened counts as a hang."""


def batch(value: float, size: int = 2) -> tuple[Images, list[str]]:
    """Images of one value, and prompts that tell it."""
    return torch.full((size, 3, 2, 2), value), [f"{value:g}-{index}" for index in range(size)]


def mean(images: Images, prompts: Sequence[str]) -> PerSample:
    return images.mean(dim=(1, 2, 3))


def pool_of(judge: Callable[..., Tensor], **changes: Any) -> RewardPool:
    """A pool that tries again at once and never waits long."""
    settings: dict[str, Any] = {"backoff": 0.0, "timeout": PATIENCE}
    return RewardPool("reward", judge, ScoringConfig(**settings | changes))


class Failing:
    """Does something else in its first calls, and then gives the mean."""

    def __init__(self, *first: Callable[..., Tensor]) -> None:
        self.first = first
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.calls += 1
        judge = self.first[self.calls - 1] if self.calls <= len(self.first) else mean
        return judge(images, prompts)


def offline(images: Images, prompts: Sequence[str]) -> PerSample:
    raise ConnectionError("the server is away")


def always_offline() -> Failing:
    return Failing(*[offline] * 100)


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set at the end of the test, so that no thread outlives it for long."""
    event = threading.Event()
    yield event
    event.set()


def test_scores_come_in_the_order_of_submission() -> None:
    last_is_done = threading.Event()

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        if prompts[0] == "3-0":
            last_is_done.set()
        elif prompts[0] == "0-0":
            assert last_is_done.wait(PATIENCE)  # the first batch is scored last
        return mean(images, prompts)

    with pool_of(judge, workers=2) as pool:
        for value in range(4):
            pool.submit(*batch(float(value)))
        scores = pool.results()
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert pool.retries == 0


def test_each_worker_scores_a_batch_at_the_same_time() -> None:
    meeting = threading.Barrier(3)

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        meeting.wait(PATIENCE)  # passes once three threads are here
        return mean(images, prompts)

    with pool_of(judge, workers=3, attempts=1) as pool:
        for value in range(3):
            pool.submit(*batch(float(value), 1))
        assert pool.results().tolist() == [0.0, 1.0, 2.0]


def test_the_caller_works_while_the_reward_does() -> None:
    started, worked = threading.Event(), threading.Event()

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        started.set()
        assert worked.wait(PATIENCE)  # comes only if the main thread goes on during this call
        return mean(images, prompts)

    with pool_of(judge, attempts=1) as pool:
        pool.submit(*batch(1.0))
        assert started.wait(PATIENCE)
        worked.set()
        assert pool.results().tolist() == [1.0, 1.0]


def test_submit_waits_while_too_many_batches_wait(release: threading.Event) -> None:
    started = threading.Event()
    submitted: list[float] = []

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        started.set()
        release.wait(PATIENCE)
        return mean(images, prompts)

    def sample(pool: RewardPool) -> None:
        for value in (0.0, 1.0, 2.0, 3.0):
            pool.submit(*batch(value, 1))
            submitted.append(value)

    with pool_of(judge, max_waiting=2) as pool:
        sampling = threading.Thread(target=sample, args=(pool,), daemon=True)
        sampling.start()
        assert started.wait(PATIENCE)
        sampling.join(0.2)  # one batch at the worker, two waiting, and no room for the fourth
        assert submitted == [0.0, 1.0, 2.0]
        release.set()
        sampling.join(PATIENCE)
        assert pool.results().tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_reward_that_recovers_is_tried_again_and_counted() -> None:
    def unreadable(images: Images, prompts: Sequence[str]) -> PerSample:
        return torch.tensor([float(word) for word in ["oops", *prompts]])  # a ValueError, but not of the shape

    with pool_of(Failing(offline, unreadable)) as pool:
        pool.submit(*batch(1.0))
        pool.submit(*batch(2.0))
        assert pool.results().tolist() == [1.0, 1.0, 2.0, 2.0]
        assert pool.retries == 2


def test_a_reward_that_keeps_failing_ends_with_what_went_wrong() -> None:
    judge = always_offline()
    with pool_of(judge, attempts=3) as pool:
        pool.submit(*batch(1.0))
        with pytest.raises(RewardError) as caught:
            pool.results()
    assert str(caught.value) == (
        "reward failed on a batch of 2 images, at try 3 of 3, with ConnectionError: the server is away; "
        "its first prompt is '1-0'"
    )
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert judge.calls == pool.retries == 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_tried_again_and_then_named(value: float) -> None:
    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        return torch.tensor([0.5, value])

    with pool_of(Failing(judge)) as pool:
        pool.submit(*batch(1.0))
        assert pool.results().tolist() == [1.0, 1.0]
    with pool_of(judge, attempts=2) as pool:
        pool.submit(*batch(1.0))
        with pytest.raises(RewardError, match=rf"must be finite, got {value} for '1-1'"):
            pool.results()
        assert pool.retries == 2


def test_a_wrong_number_of_scores_is_not_tried_again() -> None:
    judge = Failing(lambda images, prompts: torch.zeros(3))
    with pool_of(judge) as pool:
        pool.submit(*batch(1.0))
        with pytest.raises(RewardError, match=r"at try 1 of 3, with ScoresError: .* each of 2 images, got \(3,\)"):
            pool.results()
    assert judge.calls == 1


def test_a_reward_that_hangs_is_left_behind_and_its_late_scores_ignored(release: threading.Event) -> None:
    late = threading.Event()

    def hang(images: Images, prompts: Sequence[str]) -> PerSample:
        release.wait(PATIENCE)
        late.set()
        return torch.full((len(images),), 99.0)

    with pool_of(Failing(hang), timeout=0.5) as pool:
        pool.submit(*batch(1.0))
        assert pool.results().tolist() == [1.0, 1.0]
        assert pool.retries == 1
        pool.submit(*batch(2.0))
        release.set()
        assert late.wait(PATIENCE)
        assert pool.results().tolist() == [2.0, 2.0]


def test_a_reward_that_always_hangs_ends_with_a_timeout(release: threading.Event) -> None:
    def hang(images: Images, prompts: Sequence[str]) -> PerSample:
        release.wait(PATIENCE)
        return mean(images, prompts)

    with pool_of(hang, timeout=0.1, attempts=2) as pool:
        pool.submit(*batch(1.0))
        with pytest.raises(RewardError, match=r"with TimeoutError: no scores within 0\.1 s") as caught:
            pool.results()
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_a_timeout_of_infinity_waits() -> None:
    with pool_of(mean, timeout=math.inf) as pool:
        pool.submit(*batch(1.0))
        assert pool.results().tolist() == [1.0, 1.0]


def test_a_failure_does_not_wait_for_the_other_batches(release: threading.Event) -> None:
    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        if prompts[0] == "0-0":
            release.wait()
        return offline(images, prompts)

    with pool_of(judge, workers=2, timeout=math.inf) as pool:
        for value in range(3):
            pool.submit(*batch(float(value)))
        with pytest.raises(RewardError, match=r"'[12]-0'"):
            pool.results()


def test_submit_raises_once_the_reward_has_failed() -> None:
    judge = always_offline()

    def sample(pool: RewardPool) -> None:
        for value in range(1000):
            pool.submit(*batch(float(value), 1))

    with pool_of(judge, max_waiting=1) as pool:
        with pytest.raises(RewardError, match="'0-0'"):
            sample(pool)
        assert len(pool.results()) == 0
    assert judge.calls == 3


def test_the_pool_takes_another_round_after_an_error(release: threading.Event) -> None:
    meeting = threading.Barrier(2)

    def hang(images: Images, prompts: Sequence[str]) -> PerSample:
        release.wait()
        return torch.full((len(images),), 99.0)

    def meet(images: Images, prompts: Sequence[str]) -> PerSample:
        meeting.wait(PATIENCE)  # passes once both workers are here
        return mean(images, prompts)

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        return {"1-0": hang, "2-0": offline}.get(prompts[0], meet)(images, prompts)

    with pool_of(judge, workers=2, timeout=math.inf) as pool:
        for value in (1.0, 2.0, 3.0, 4.0):
            pool.submit(*batch(value))
        with pytest.raises(RewardError):
            pool.results()
        # Both workers are free again, also the one whose reward of the old round still hangs.
        pool.submit(*batch(5.0))
        pool.submit(*batch(6.0))
        assert pool.results().tolist() == [5.0, 5.0, 6.0, 6.0]
    assert pool.retries == 3


def test_results_are_of_the_batches_since_the_last_results() -> None:
    with pool_of(mean) as pool:
        for value in (1.0, 2.0):
            pool.submit(*batch(value, 1))
            assert pool.results().tolist() == [value]
        assert pool.results().shape == (0,)


def test_busy_seconds_are_those_of_the_last_round_with_its_failed_tries(release: threading.Event) -> None:
    def hang(images: Images, prompts: Sequence[str]) -> PerSample:
        release.wait(PATIENCE)
        return mean(images, prompts)

    with pool_of(Failing(hang), timeout=0.5) as pool:
        pool.submit(*batch(1.0))
        pool.results()
        assert 0.5 <= pool.busy_seconds < PATIENCE
        pool.results()
        assert pool.busy_seconds == 0.0


def test_the_wait_between_tries_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    wait_for = threading.Condition.wait_for

    def note(self: threading.Condition, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        if timeout is not None and timeout < 1.0:
            waits.append(timeout)
        return wait_for(self, predicate, timeout)

    monkeypatch.setattr(threading.Condition, "wait_for", note)
    with pool_of(always_offline(), attempts=4, backoff=0.01) as pool:
        pool.submit(*batch(1.0))
        with pytest.raises(RewardError):
            pool.results()
    assert waits == [0.01, 0.02, 0.04]


def test_leaving_the_block_waits_neither_for_a_reward_nor_for_the_next_try(release: threading.Event) -> None:
    started = threading.Event()

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        if prompts[0] == "1-0":
            started.set()
            release.wait()
            return mean(images, prompts)
        return offline(images, prompts)

    def leave_in_a_hurry() -> None:
        with pool_of(judge, workers=3, timeout=math.inf, backoff=1e6) as pool:  # the third worker has nothing to do
            pool.submit(*batch(1.0))
            pool.submit(*batch(2.0))
            assert started.wait(PATIENCE)
            while pool.retries == 0:
                time.sleep(0.001)
            raise ZeroDivisionError

    others = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        leave_in_a_hurry()
    left = set(threading.enumerate()) - others
    assert all(thread.daemon for thread in left)
    release.set()
    for thread in left:
        thread.join(PATIENCE)
        assert not thread.is_alive()


PROGRAM = """
import threading, time, torch
from ddpo.scoring import RewardPool, ScoringConfig

started = threading.Event()

def judge(images, prompts):
    started.set()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        scores = images.mean(dim=(1, 2, 3))
    return scores

with RewardPool("reward", judge, ScoringConfig()) as pool:
    pool.submit(torch.zeros(2, 3, 8, 8), ["one", "two"])
    started.wait()
"""
"""Ends while its reward is at work."""


def test_a_program_that_ends_during_a_try_ends_well() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_ends_the_wait_for_results(release: threading.Event) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        signal.pthread_kill(main, signal.SIGINT)
        release.wait()
        return mean(images, prompts)

    def score() -> None:
        with pool_of(judge, timeout=math.inf) as pool:
            pool.submit(*batch(1.0))
            pool.results()

    # Programs that run in the background of a shell have it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            score()
    finally:
        signal.signal(signal.SIGINT, before)


def test_scores_have_no_graph_and_the_reward_no_autocast() -> None:
    weight = torch.ones(3, 1, requires_grad=True)
    with_gradients: list[bool] = []

    def judge(images: Images, prompts: Sequence[str]) -> PerSample:
        scores = images.mean(dim=(2, 3)) @ weight
        with_gradients.append(scores.requires_grad)
        assert scores.dtype == torch.float32
        return scores[:, 0].double()

    images, prompts = batch(1.0)
    with torch.autocast("cpu", torch.bfloat16), pool_of(judge, attempts=1) as pool:
        pool.submit(images.requires_grad_(), prompts)
        scores = pool.results()
    assert scores.tolist() == [3.0, 3.0]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert with_gradients == [False]


def test_a_pool_works_only_inside_its_block() -> None:
    pool = pool_of(mean)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        pool.submit(*batch(1.0))
    with pool:
        pool.submit(*batch(1.0))
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        pool.results()
    with pool:
        assert pool.results().shape == (0,)


def test_a_prompt_too_few_is_refused_at_once() -> None:
    images, prompts = batch(1.0)
    with pool_of(mean) as pool, pytest.raises(ValueError, match="got 1 for 2 images"):
        pool.submit(images, prompts[:1])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("workers", 0, "be at least 1"),
        ("max_waiting", 0, "be at least 1"),
        ("attempts", 0, "be at least 1"),
        ("timeout", 0.0, "be above 0"),
        ("timeout", math.nan, "be above 0"),
        ("backoff", -1.0, "be at least 0"),
        ("backoff", math.inf, "be a finite number"),
    ],
)
def test_error_names_field_rule_and_value(name: str, value: float, rule: str) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^ScoringConfig\.{name} must {rule}, got {value!r}$"):
        ScoringConfig(**settings)
