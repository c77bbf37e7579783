"""Rewards run beside sampling: threads score batches of images while the trainer draws the next ones."""

import atexit
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from overpaint.policy.types import Images, PerSample
from overpaint.settings import AnyFloat, Field, settings
from rewards.types import ScoreFunction, ScoresError, check_pairs, scores_of

GRACE = 5.0
"""Seconds that the end of the program waits for a try that was under way when its pool closed or its round failed.
A thread that Python stops inside torch aborts the process."""


@settings
class ScoringConfig:
    """How many batches are scored at a time, and what happens when a reward fails."""

    workers: int = Field(1, ge=1)
    """Batches that are scored at a time."""

    max_waiting: int = Field(4, ge=1)
    """Batches that may wait for a worker. Sampling pauses when there are that many, so that memory stays bounded."""

    attempts: int = Field(3, ge=1)
    """Tries that a batch has before its reward counts as failed."""

    timeout: AnyFloat = Field(600.0, gt=0)
    """Seconds that one try may take; `math.inf` waits for ever."""

    backoff: float = Field(1.0, ge=0)
    """Seconds between the first try and the second; doubled for each further one."""


class RewardError(RuntimeError):
    """A reward failed for good on a batch; the error of the last try is the cause."""


@dataclass(eq=False)
class _Round:
    """What is known of the batches since the last `results`."""

    submitted: int = 0
    scores: dict[int, PerSample] = field(default_factory=dict)
    failure: RewardError | None = None
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images that wait for their scores, and their place in the round."""

    round: _Round
    index: int
    images: Images
    prompts: Sequence[str]


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What came of a try: scores or an error, and whether to leave it at that."""

    scores: PerSample | None = None
    error: BaseException | None = None
    final: bool = False


class RewardPool:
    """A reward in worker threads; a context manager, whose workers live as long as its block.

    A try fails when the reward raises, when a score is not finite, and when its time is up. It is made again, but for
    a wrong number of scores, which is a fault of the reward's code. A thread cannot be stopped, so a try whose time is
    up goes on unheeded beside the next one: with a timeout, as with several workers, the reward must bear being called
    by several threads at once. It should draw no random numbers from the global generators, which the main thread may
    be using.

    A `RewardError`, like `results`, leaves the pool empty and ready for another round.

    Args:
        kind: What to call the reward in a message, such as "reward".
        score: The reward. It runs without gradients.
        config: Settings.
    """

    retries = 0
    """Tries that have failed so far."""

    busy_seconds = 0.0
    """Seconds that all tries for the last round's batches took, added up over the workers."""

    def __init__(self, kind: str, score: ScoreFunction, config: ScoringConfig) -> None:
        self.kind = kind
        self.score = score
        self.config = config
        self._changed = threading.Condition()  # guards everything below and is notified of every change
        self._open = False
        self._round = _Round()
        self._waiting: deque[_Batch] = deque()
        self._workers: list[threading.Thread] = []

    def __enter__(self) -> "RewardPool":
        """Starts the workers."""
        self._open = True
        self._workers = [_start(self._work) for _ in range(self.config.workers)]
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the workers, and waits for no reward."""
        with self._changed:
            self._open = False
            self._end_round()
        for worker in self._workers:
            worker.join(1.0)  # comes at once, unless an interrupt hit the main thread just as it took the lock

    def submit(self, images: Images, prompts: Sequence[str]) -> None:
        """Hands over a batch as soon as there is room for it. Its images must not be changed afterwards.

        Raises:
            RewardError: The reward has failed on an earlier batch of the round.
            RuntimeError: The pool is outside its `with` block.
            TypeError: The images are not floating point, or a prompt is not a string.
            ValueError: The images are not a batch of RGB images, or there is not one prompt for each.
        """
        check_pairs(images, prompts)
        with self._changed:
            self._wait(lambda: len(self._waiting) < self.config.max_waiting)
            self._waiting.append(_Batch(self._round, self._round.submitted, images.detach(), tuple(prompts)))
            self._round.submitted += 1
            self._changed.notify_all()

    def results(self) -> PerSample:
        """Returns the scores of all batches since the last call, in the order of submission; float32, on the CPU.

        Raises:
            RewardError: The reward has failed on a batch. The others are not waited for.
            RuntimeError: The pool is outside its `with` block.
        """
        with self._changed:
            self._wait(lambda: len(self._round.scores) == self._round.submitted)
            done = self._end_round()
        return torch.cat([torch.empty(0), *(done.scores[index] for index in range(done.submitted))])

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Keeps the caller waiting until the pool is ready, or the round has failed, which it raises."""
        if not self._open:
            raise RuntimeError("a RewardPool works only inside its `with` block")
        self._changed.wait_for(lambda: self._round.failure or ready())
        failure = self._round.failure
        if failure is not None:
            self._end_round()
            raise failure

    def _end_round(self) -> _Round:
        """Begins a new round and returns the old one, whose unfinished batches nobody wants any more."""
        ended, self._round = self._round, _Round()
        self._waiting.clear()
        self.busy_seconds = ended.seconds
        self._changed.notify_all()
        return ended

    def _wanted(self, batch: _Batch) -> bool:
        """Returns whether the scores of a batch are still of use."""
        return batch.round is self._round and batch.round.failure is None

    def _work(self) -> None:
        """Scores one batch after another until the pool closes. Holds the lock, which every wait lets go."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or not self._open)
                if not self._open:
                    return
                self._score_batch(self._waiting.popleft())

    def _score_batch(self, batch: _Batch) -> None:
        """Tries a batch until it has scores, has failed for good, or is not wanted any more."""
        self._changed.notify_all()  # there is room for another one to wait
        backoff = self.config.backoff
        for attempt in range(1, self.config.attempts + 1):
            outcome = self._try(batch)
            if not self._wanted(batch):
                return
            if outcome.scores is not None:
                batch.round.scores[batch.index] = outcome.scores
                break
            self.retries += 1
            if outcome.final or attempt == self.config.attempts:
                error = outcome.error
                batch.round.failure = RewardError(
                    f"{self.kind} failed on a batch of {len(batch.images)} images, at try {attempt} of "
                    f"{self.config.attempts}, with {type(error).__name__}: {error}; its first prompt is "
                    f"{next(iter(batch.prompts), None)!r}"
                )
                batch.round.failure.__cause__ = error
                self._waiting.clear()
                break
            self._changed.wait_for(lambda: not self._wanted(batch), timeout=min(backoff, threading.TIMEOUT_MAX))
            if not self._wanted(batch):
                return
            backoff *= 2
        self._changed.notify_all()

    def _try(self, batch: _Batch) -> _Outcome:
        """Has a batch scored in a thread of its own, which is left behind when its time is up."""
        begin = time.perf_counter()
        outcomes: list[_Outcome] = []
        thread = _start(self._score_once, batch, outcomes)
        seconds = min(self.config.timeout, threading.TIMEOUT_MAX)
        self._changed.wait_for(lambda: outcomes or not self._wanted(batch), timeout=seconds)
        batch.round.seconds += time.perf_counter() - begin
        if not self._wanted(batch):
            atexit.register(thread.join, GRACE)
        # Popped, because an error in the list would hold itself and the images in memory through its own traceback.
        return outcomes.pop() if outcomes else _Outcome(error=TimeoutError(f"no scores within {seconds:g} s"))

    def _score_once(self, batch: _Batch, outcomes: list[_Outcome]) -> None:
        """Scores a batch and appends what came of it."""
        try:
            # A new thread starts with gradients, and on the first device whatever the main thread has chosen.
            with torch.no_grad(), torch.cuda.device_of(batch.images):
                scores = scores_of(self.kind, self.score, batch.images, batch.prompts).detach().float().cpu()
            for number, prompt in zip(scores.tolist(), batch.prompts, strict=True):
                if not math.isfinite(number):
                    raise FloatingPointError(f"{self.kind} must be finite, got {number} for {prompt!r}")
            outcome = _Outcome(scores=scores)
        except BaseException as error:  # whatever it is, somebody waits to be told
            outcome = _Outcome(error=error, final=isinstance(error, ScoresError))
        with self._changed:
            outcomes.append(outcome)
            self._changed.notify_all()
        del outcome


def _start(work: Callable[..., None], *arguments: object) -> threading.Thread:
    """Starts a thread that does not keep the program from ending."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    thread.start()
    return thread
