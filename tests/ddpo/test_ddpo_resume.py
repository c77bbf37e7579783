"""DDPO that was interrupted, by its death or by its reward, ends like DDPO that was not."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, RewardError, ScoringConfig
from ddpo.collect import Collector
from ddpo.requests import SampleRequest
from erasure import ImageConstraint, Lagrangian, LagrangianConfig, RewardFloor
from overpaint.policy import Conditioning, DiffusionPolicy, Trajectory
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig, TrainingRun, read_metrics
from rewards import as_reward


class KilledError(Exception):
    """Stands for a process that dies: the run saves nothing when it sees an exception."""


class Colour:
    """The mean of a colour, which does something else at its n-th call and at all later ones."""

    differentiable = False

    def __init__(
        self, channel: int, from_call: int | None = None, instead: Callable[..., Tensor] | None = None
    ) -> None:
        self.channel = channel
        self.from_call = from_call
        self.instead = instead
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.calls += 1
        if self.from_call is not None and self.calls >= self.from_call:
            assert self.instead is not None
            return self.instead(images, prompts)
        return images[:, self.channel].mean(dim=(1, 2))


def raising(images: Images, prompts: Sequence[str]) -> PerSample:
    raise ConnectionError("the server is away")


def not_a_number(images: Images, prompts: Sequence[str]) -> PerSample:
    return torch.tensor([0.5] * (len(images) - 1) + [math.nan])


def one_too_many(images: Images, prompts: Sequence[str]) -> Tensor:
    return torch.zeros(len(images) + 1)


class Outcome(NamedTuple):
    weights: dict[str, Tensor]
    statistics: dict[str, Any]
    lagrangian: dict[str, Any]
    early_stopping: dict[str, Any]
    metrics: list[dict[str, Any]]
    drawn: list[int]
    """Size of each batch that was drawn."""


@pytest.fixture
def train(
    policy: DiffusionPolicy, prompts: list[str], run_config: Callable[..., TrainingConfig], tmp_path: Path
) -> Callable[..., Outcome]:
    """Trains from the same weights with everything that has a state: four batches a round, the last of the concept."""
    start = policy.trainable_state()
    rollout = policy.rollout
    drawn: list[int] = []

    def run(
        name: str,
        *,
        reward: Colour | None = None,
        cost: Colour | None = None,
        floored: bool = False,
        dies_at: int | None = None,
        iterations: int = 2,
        resume: bool = False,
        drawn_at_a_time: int | None = None,
        **changes: Any,
    ) -> Outcome:
        """Trains; the process dies when it draws a certain batch, and draws smaller ones where memory ran out."""
        drawn.clear()

        def draw(conditioning: Conditioning, **options: Any) -> Trajectory:
            if len(drawn) == dies_at:
                raise KilledError
            drawn.append(len(conditioning))
            return rollout(conditioning, **options)

        settings: dict[str, Any] = {
            "samples_per_round": 12,
            "updates_per_round": 2,
            "sampling_batch_size": 4,
            "minibatch_size": 4,
            "steps": 2,
            "guidance_scale": 1.0,
            "min_count": 3,
            "buffer_size": 8,
            "erasure_samples_per_round": 4,
            "evaluate_every": 2,
            "pictures_every": 100,
        }
        torch.manual_seed(len(list(tmp_path.iterdir())) + 12345)  # a new process has other generators
        policy.load_trainable_state(start)
        policy.rollout = draw
        constraint = ImageConstraint(
            cost or Colour(1),
            ["a plain circle"],
            Lagrangian(LagrangianConfig(learning_rate=1.0, derivative_gain=1.0)),
            ceiling=0.3,
        )
        config = run_config(
            name, iterations=iterations, checkpoint_every=2, ema_decay=0.5, learning_rate=3e-3, resume=resume
        )
        trainer = DDPOTrainer(
            policy,
            reward or Colour(0),
            prompts,
            DDPOConfig(**settings | changes),
            erasure=constraint,
            floor=RewardFloor(scale=0.01) if floored else None,
            held_out=HeldOut(prompts[:2], Colour(2)),
            scoring=ScoringConfig(attempts=2, backoff=0.0),
        )
        if drawn_at_a_time is not None:
            trainer.collector.batch_size = drawn_at_a_time
        trainer.train(config)
        assert trainer.early_stopping is not None
        lines = read_metrics(config.output_dir / "metrics.jsonl")
        return Outcome(
            policy.trainable_state(),
            trainer.baseline.statistics.state_dict(),
            constraint.lagrangian.state_dict(),
            {**trainer.early_stopping.state_dict(), "weights": None},
            [{tag: value for tag, value in line.items() if not tag.startswith("seconds/")} for line in lines],
            list(drawn),
        )

    return run


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert ours.metrics == theirs.metrics
    assert ours.statistics == theirs.statistics
    assert ours.lagrangian == theirs.lagrangian
    assert ours.early_stopping == theirs.early_stopping
    assert all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())


def kept_files(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "ungraded").glob("*"))


@pytest.mark.parametrize(
    ("floored", "changes"),
    [(False, {}), (True, {}), (False, {"baseline": "critic"})],
    ids=["plain", "floor", "critic"],
)
def test_resumed_equals_uninterrupted(floored: bool, changes: dict[str, Any], train: Callable[..., Outcome]) -> None:
    train = partial(train, floored=floored, **changes)
    batches = 7 if floored else 4
    whole = train("whole", iterations=4)
    assert len({line["iteration"] for line in whole.metrics}) == 5
    assert whole.drawn == [4] * 4 * batches
    if floored:
        weights = [line["floor/weight"] for line in whole.metrics if "floor/weight" in line]
        assert len(set(weights)) == 3  # at first policy and reference are one, and nothing is violated
    assert changes or max(len(rewards) for rewards in whole.statistics["buffers"].values()) == 8

    # In the fourth round, after the checkpoint of two; then once more at the same place.
    for resume in (False, True):
        with pytest.raises(KilledError):
            train("run", iterations=4, dies_at=batches + 1 if resume else 3 * batches + 1, resume=resume)
    resumed = train("run", iterations=4, resume=True)
    assert_same(resumed, whole)
    assert resumed.drawn == [4] * 2 * batches

    # What had ended is prolonged.
    train("short", iterations=3)
    assert_same(train("short", iterations=4, resume=True), whole)


def test_samples_outlive_a_failing_reward_and_are_graded_again(train: Callable[..., Outcome], tmp_path: Path) -> None:
    whole = train("whole")

    # The reward is called for a look, and then for each of the four batches of a round.
    with pytest.raises(RewardError):
        train("late", reward=Colour(0, 1 + 4 + 2, raising))
    assert kept_files(tmp_path / "late") == ["round-000001-process-0.safetensors"]
    assert_same(train("late", resume=True), whole)
    assert kept_files(tmp_path / "late") == []

    # The cost is called for the last batch of a round only, so that everything was drawn; it fails in two runs.
    for resume in (False, True):
        with pytest.raises(RewardError):
            train("cost", cost=Colour(1, 1, not_a_number), resume=resume)
        assert kept_files(tmp_path / "cost") == ["round-000000-process-0.safetensors"]
    resumed = train("cost", resume=True)
    assert_same(resumed, whole)
    assert resumed.drawn == [4] * 4  # of the second round: nothing is drawn again
    assert kept_files(tmp_path / "cost") == []


def test_samples_that_were_drawn_in_other_batches_are_graded_too(train: Callable[..., Outcome], tmp_path: Path) -> None:
    whole = train("whole", iterations=1)
    for name, first, second in (("halved", 2, None), ("whole again", None, 2)):
        with pytest.raises(RewardError):
            train(name, iterations=1, reward=Colour(0, 1 + 2, raising), drawn_at_a_time=first)
        assert kept_files(tmp_path / name) == ["round-000000-process-0.safetensors"]
        resumed = train(name, iterations=1, resume=True, drawn_at_a_time=second)
        assert set(resumed.drawn) <= {1, 2, second or 4}
        assert sum(resumed.drawn) < 16
        for key, value in resumed.weights.items():
            torch.testing.assert_close(value, whole.weights[key], rtol=0, atol=1e-5)


def test_a_sharded_round_is_drawn_before_any_reward_can_fail(
    policy: DiffusionPolicy, run_config: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes have to call a sharded network equally often, whichever of them has a reward that fails."""
    order: list[str] = []

    def draw(conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
        order.append("drawn")
        return policy.rollout(conditioning, steps=2, seeds=seeds)

    def failing(images: Images, prompts: Sequence[str]) -> PerSample:
        order.append("scored")
        raise ConnectionError("the server is away")

    scoring = ScoringConfig(attempts=1, backoff=0.0)
    collector = Collector(policy, draw, as_reward(failing), None, batch_size=1, scoring=scoring)
    request = SampleRequest(["a", "b", "c"], [1, 2, 3], torch.arange(3))

    def collect() -> list[str]:
        order.clear()
        with pytest.raises(RewardError):
            collector.collect(run, [request])
        return order

    with TrainingRun(policy, run_config(iterations=1)) as run:
        run.config = replace(run.config, shard=True)
        assert collect()[:4] == ["drawn"] * 3 + ["scored"]
        assert collect()[0] == "scored"  # what was drawn is kept
        monkeypatch.setattr(run, "in_any", lambda flag: True)  # another process lacks some: all draw
        assert collect()[:3] == ["drawn"] * 3


def test_samples_of_the_reference_wait_for_their_reward_too(train: Callable[..., Outcome], tmp_path: Path) -> None:
    whole = train("whole", floored=True)
    # After a look come the three batches of the reference, and four of the policy.
    with pytest.raises(RewardError):
        train("run", floored=True, reward=Colour(0, 1 + 7 + 2, raising))
    assert kept_files(tmp_path / "run") == ["round-000001-process-0-reference.safetensors"]
    assert_same(train("run", floored=True, resume=True), whole)
    assert kept_files(tmp_path / "run") == []


def test_samples_that_were_kept_for_other_prompts_are_drawn_anew(train: Callable[..., Outcome], tmp_path: Path) -> None:
    with pytest.raises(RewardError):
        train("other", cost=Colour(1, 1, raising), samples_per_round=8)
    (tmp_path / "run").mkdir()
    (tmp_path / "other" / "ungraded").rename(tmp_path / "run" / "ungraded")
    assert train("run", iterations=1).drawn == [4] * 4
    assert kept_files(tmp_path / "run") == []


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        (raising, r"reward failed on a batch of 4 images, at try 2 of 2, with ConnectionError: the server is away"),
        (not_a_number, r"at try 2 of 2, with FloatingPointError: reward must be finite, got nan for 'a"),
        (
            one_too_many,
            r"at try 1 of 2, with ScoresError: reward must give one number .* of 4 images, got \(5,\)",
        ),
    ],
)
def test_failing_reward_is_told_of(failing: Callable[..., Tensor], message: str, train: Callable[..., Outcome]) -> None:
    with pytest.raises(RewardError, match=message):
        train("run", reward=Colour(0, 2, failing))  # the first call is the look


def test_reward_that_recovers_is_counted_and_changes_nothing(train: Callable[..., Outcome]) -> None:
    class Stumbling(Colour):
        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            if self.calls == 2:
                self.calls += 1
                raise ConnectionError("the server is away")
            return super().__call__(images, prompts)

    whole, stumbled = train("whole", iterations=1), train("stumbled", iterations=1, reward=Stumbling(0))
    retries = [[line["reward/retries"] for line in o.metrics if "reward/retries" in line] for o in (whole, stumbled)]
    assert retries == [[0.0], [1.0]]
    assert all(torch.equal(value, stumbled.weights[name]) for name, value in whole.weights.items())
    assert whole.statistics == stumbled.statistics


class Moved:
    """For the held-out prompts, a number for weights as they were and another for weights that have moved."""

    differentiable = False

    def __init__(self, policy: DiffusionPolicy, start: float, moved: float, fails_at: int | None = None) -> None:
        self.policy = policy
        self.scores = (start, moved)
        self.fails_at = fails_at
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        if prompts[0] == "two cats":
            moved = any(value.abs().max() > 0 for name, value in self.policy.trainable_state().items() if "_B" in name)
            return torch.full((len(images),), self.scores[moved])
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("the server is away")
        return images[:, 0].mean(dim=(1, 2))


def test_look_before_a_round_that_failed_counts_once(
    policy: DiffusionPolicy, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    start, parted = policy.trainable_state(), []
    for name, fails_at in (("whole", None), ("run", 2)):
        policy.load_trainable_state(start)
        for resume in (False, True) if fails_at else (False,):
            trainer = DDPOTrainer(
                policy,
                Moved(policy, 0.0, 1.0, None if resume else fails_at),
                prompts,
                DDPOConfig(samples_per_round=8, updates_per_round=1, steps=2, evaluate_every=1, patience=9),
                held_out=HeldOut(["two cats"], Moved(policy, 1.0, 0.0)),
                scoring=ScoringConfig(attempts=1),
            )
            config = run_config(name, iterations=2, resume=resume)
            if fails_at and not resume:
                with pytest.raises(RewardError):
                    trainer.train(config)
            else:
                trainer.train(config)
        assert trainer.early_stopping is not None
        parted.append(trainer.early_stopping.apart)
    assert parted == [2, 2]
