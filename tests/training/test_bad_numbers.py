"""Numbers that go bad: what is not finite skips the update and is counted, what lasts ends the run with a word."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, NFTConfig, NFTTrainer, RewardError, RWRConfig, RWRTrainer, ScoringConfig
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import NonFiniteError, TrainingConfig, load_checkpoint, read_metrics
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer

pytestmark = pytest.mark.proof("bad numbers borne")

PROMPTS = ["a red circle", "a blue square"]
ITERATIONS = 4


class Broken:
    """The mean of red, of which something is wrong at the calls that are named."""

    differentiable = True

    def __init__(self, wrong: Callable[[Tensor], Tensor], calls: Callable[[int], bool]) -> None:
        self.wrong = wrong
        self.calls = calls
        self.count = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.count += 1
        values = images[:, 0].mean(dim=(1, 2))
        return self.wrong(values) if self.calls(self.count) else values


def one_sample(value: float) -> Callable[[Tensor], Tensor]:
    return lambda values: torch.cat([values[:-1], values[-1:] * 0 + value])


def all_samples(value: float) -> Callable[[Tensor], Tensor]:
    return lambda values: values * 0 + value


def steep(values: Tensor) -> Tensor:
    """Finite, with a gradient that is not."""
    return (values - values.detach()).sqrt() + values.detach()


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one NaN": one_sample(math.nan),
    "one infinity": one_sample(math.inf),
    "all NaN": all_samples(math.nan),
    "all minus infinity": all_samples(-math.inf),
    "a gradient that is not finite": steep,
}
TAME: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": all_samples(0.5),
    "one of 1e30": one_sample(1e30),
    "all of 1e30": all_samples(1e30),
    "all of -1e30": all_samples(-1e30),
}


def refl(policy: DiffusionPolicy, reward: Any) -> ReFLTrainer:
    config = ReFLConfig(
        batch_size=4, micro_batch_size=4, steps=3, first_reward_step=1, last_reward_step=2, pretraining_batch_size=2,
        guidance_scale=1.0, evaluate_every=100,
    )  # fmt: skip
    pairs = PretrainingPairs(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), PROMPTS)
    return ReFLTrainer(policy, reward, PROMPTS, config, pretraining=pairs)


def ddpo(policy: DiffusionPolicy, reward: Any) -> DDPOTrainer:
    config = DDPOConfig(
        samples_per_round=4, updates_per_round=1, sampling_batch_size=4, minibatch_size=4, steps=2, guidance_scale=1.0,
        min_count=2, buffer_size=4,
    )  # fmt: skip
    return DDPOTrainer(policy, reward, PROMPTS, config, scoring=ScoringConfig(attempts=1))


def rwr(policy: DiffusionPolicy, reward: Any) -> RWRTrainer:
    config = RWRConfig(samples_per_round=4, sampling_batch_size=4, minibatch_size=4, steps=2, guidance_scale=1.0)
    return RWRTrainer(policy, reward, PROMPTS, config, scoring=ScoringConfig(attempts=1))


def nft(policy: DiffusionPolicy, reward: Any) -> NFTTrainer:
    config = NFTConfig(
        samples_per_round=4, images_per_prompt=2, sampling_batch_size=4, minibatch_size=4, steps=3, updates_per_round=1
    )
    return NFTTrainer(policy, reward, PROMPTS, config, scoring=ScoringConfig(attempts=1))


SAMPLING: dict[str, Callable[[DiffusionPolicy, Any], Any]] = {"ddpo": ddpo, "rwr": rwr, "nft": nft}


@pytest.fixture
def start(policy: DiffusionPolicy, tmp_path: Path) -> Callable[..., DiffusionPolicy]:
    """Trains the tiny policy, whose weights have to be finite however that ends."""

    def run(make: Callable[[DiffusionPolicy, Any], Any], reward: Any, **settings: Any) -> DiffusionPolicy:
        shared: dict[str, Any] = {"iterations": ITERATIONS, "learning_rate": 1e-3, "checkpoint_every": 1}
        trainer = make(policy, reward)
        try:
            trainer.train(TrainingConfig(output_dir=tmp_path, progress=False, **shared | settings))
        finally:
            assert all(value.isfinite().all() for value in policy.trainable_state().values())
            for folder in (tmp_path / "checkpoints").glob("iteration-*"):
                assert all(value.isfinite().all() for value in load_checkpoint(folder).weights.values())
        return policy

    return run


@pytest.mark.parametrize("wrong", WRONG)
def test_refl_skips_and_counts_an_update_that_is_not_finite(
    wrong: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    start(refl, Broken(WRONG[wrong], lambda call: call == 4))  # the first tries the gradient, the second draws pictures
    skipped = [row.get("train/skipped", 0) for row in read_metrics(tmp_path / "metrics.jsonl") if "reward/mean" in row]
    assert skipped == [0, 1, 1, 1]


@pytest.mark.parametrize("wrong", WRONG)
def test_refl_ends_with_a_word_where_it_lasts(wrong: str, start: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"2 updates in a row had a loss or a gradient that is not finite.*reward"):
        start(refl, Broken(WRONG[wrong], lambda call: call >= 4), max_skipped=1)
    assert (tmp_path / "checkpoints" / "iteration-00000002").is_dir()


@pytest.mark.parametrize("wrong", [name for name in WRONG if "gradient" not in name])
@pytest.mark.parametrize("name", SAMPLING)
def test_samples_of_a_reward_that_is_not_finite_are_kept_and_scored_again(
    name: str,
    wrong: str,
    policy: DiffusionPolicy,
    start: Callable[..., Any],
    tmp_path: Path,
) -> None:
    first = policy.trainable_state()
    with pytest.raises(RewardError, match=r"finite"):
        start(SAMPLING[name], Broken(WRONG[wrong], lambda call: call == 2))
    policy.load_trainable_state(first)
    start(SAMPLING[name], Broken(WRONG[wrong], lambda call: False), resume=True)
    assert len([row for row in read_metrics(tmp_path / "metrics.jsonl") if "reward/mean" in row]) == ITERATIONS


@pytest.mark.parametrize("tame", TAME)
@pytest.mark.parametrize("name", ["refl", *SAMPLING])
def test_rewards_that_say_nothing_or_too_much_leave_finite_weights(
    name: str, tame: str, start: Callable[..., Any], tmp_path: Path
) -> None:
    start({"refl": refl, **SAMPLING}[name], Broken(TAME[tame], lambda call: True))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "reward/mean" in row]
    assert len(rows) == ITERATIONS
    assert all(math.isfinite(value) for row in rows for value in row.values()), rows


@pytest.mark.parametrize("name", ["refl", *SAMPLING])
def test_a_network_that_gives_nan_now_and_then_does_not_reach_the_weights(
    name: str, policy: DiffusionPolicy, start: Callable[..., Any]
) -> None:
    forward, calls = policy.model.forward, []

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        (output,) = forward(*arguments, **options)
        return (output * math.nan,) if sum(calls) == 2 and calls[-1] else (output,)

    policy.model.forward = broken
    start({"refl": refl, **SAMPLING}[name], Broken(WRONG["one NaN"], lambda call: False))
    assert sum(calls) > 2
