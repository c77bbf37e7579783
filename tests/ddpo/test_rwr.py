"""Reward-weighted regression on a tiny policy: what is weighed, what changes, and what an interruption leaves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpo import RewardError, RWRConfig, RWRTrainer, ScoringConfig, sparse_weights
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Trajectory
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig, TrainingRun, read_metrics


class KilledError(Exception):
    """Stands for a process that dies: the run saves nothing when it sees an exception."""


class Constant:
    """The same score for everything."""

    differentiable = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return torch.full((len(images),), 0.3)


class Failing:
    """The mean of red, spread out, which cannot be had at some of its calls."""

    differentiable = False

    def __init__(self, *fails_at: int) -> None:
        self.fails_at = fails_at
        self.calls = 0

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.calls += 1
        if self.calls - 1 in self.fails_at:
            raise ConnectionError("the server is away")
        return images[:, 0].mean(dim=(1, 2)) * 100


def small_config(**changes: Any) -> RWRConfig:
    """Settings of two updates on a few denoising steps."""
    settings: dict[str, Any] = {
        "samples_per_round": 8,
        "sampling_batch_size": 4,
        "epochs_per_round": 1,
        "batch_size": 4,
        "minibatch_size": 4,
        "steps": 3,
        "guidance_scale": 2.0,
        "inverse_temperature": 1.0,
    }
    return RWRConfig(**settings | changes)


def snapshot(policy: DiffusionPolicy) -> dict[str, Tensor]:
    parts = {"unet": policy.unet, "vae": policy.vae, "text_encoder": policy.text_encoder}
    return {
        f"{part}.{name}": value.clone()
        for part, network in parts.items()
        for name, value in network.state_dict().items()
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


# What is trained, and on what.


def test_only_the_lora_changes_and_all_of_it_does(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    before = snapshot(policy)
    RWRTrainer(policy, redness, prompts, small_config()).train(run_config(iterations=1))
    changed = {name for name, value in snapshot(policy).items() if not torch.equal(value, before[name])}
    assert changed == {f"unet.{name}" for name in policy.trainable_state()}


def test_loss_of_an_update_by_hand(
    policy: DiffusionPolicy, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    """The pretraining loss of the guided prediction on own images, spelled out with the random numbers of the run."""
    samples, config = 4, small_config(samples_per_round=4)
    with TrainingRun(policy, run_config(seed=5)) as run:
        metrics = RWRTrainer(policy, Failing(), prompts, config).step(run)

    generator = torch.Generator().manual_seed(5)
    picks = torch.randint(len(prompts), (samples,), generator=generator).tolist()
    seeds = torch.randint(2**31 - 1, (samples,), generator=generator).tolist()
    order = torch.randperm(samples, generator=generator)
    times = torch.randint(1000, (samples,), generator=generator)
    noise = torch.randn(samples, 4, 8, 8, generator=generator)

    # The LoRA of a new policy is without effect, but the update has been taken: back to the start.
    policy.load_trainable_state({n: torch.zeros_like(v) for n, v in policy.trainable_state().items()})
    texts = [prompts[pick] for pick in picks]
    drawing: dict[str, Any] = {"seeds": seeds, "steps": 3, "guidance": ClassifierFree(2.0), "eta": 1.0}
    rewards = Failing()(policy.draw(texts, **drawing), texts)
    weights = samples * rewards.exp() / rewards.exp().sum()
    clean = policy.sample(policy.encode(texts), **drawing)[order]
    alphas = policy.process.levels(times).view(-1, 1, 1, 1)
    noised = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    conditional, unconditional = (
        policy.unet(noised, times, encoder_hidden_states=conditioning.tokens).sample
        for conditioning in (policy.encode([texts[k] for k in order.tolist()]), policy.encode([""] * samples))
    )
    predicted = unconditional + 2.0 * (conditional - unconditional)
    losses = ((predicted - noise) ** 2).mean(dim=(1, 2, 3))
    assert weights.std() > 0.01
    assert metrics.loss == pytest.approx((weights[order] * losses).mean().item(), rel=1e-4)
    assert metrics.reward == pytest.approx(float(rewards.mean()), rel=1e-4)
    assert metrics.reward_std == pytest.approx(float(rewards.std(correction=0)), rel=1e-3)
    assert metrics.effective_samples == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()), rel=1e-4)
    assert metrics.updates == 1


def test_equal_rewards_make_it_plain_regression(
    make_policy: Callable[..., DiffusionPolicy], prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    """Softmax weights of equal rewards, of all samples or of each prompt's, are those that keep all and weigh none."""
    outcomes = []
    for name, settings in {
        "plain": {"weighting": "sparse", "percentile": 0.0},
        "softmax": {},
        "prompts": {"per_prompt": True},
        "cold": {"inverse_temperature": 0.0},
    }.items():
        policy = make_policy(train="xattn-kv")
        reward = Failing() if name == "cold" else Constant()
        metrics = RWRTrainer(policy, reward, prompts, small_config(**settings)).train(run_config(name, iterations=1))
        assert metrics is not None
        assert metrics.effective_samples == pytest.approx(8.0)
        outcomes.append(policy.trainable_state())
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0], tolerance=1e-6)


@pytest.mark.parametrize(("percentile", "kept"), [(75.0, 2), (50.0, 4), (99.0, 1)])
def test_sparse_regression_trains_on_exactly_the_best(
    percentile: float,
    kept: int,
    policy: DiffusionPolicy,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores, trained = [], []

    class Kept(Failing):
        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            scores.append(super().__call__(images, prompts))
            return scores[-1]

    config = small_config(weighting="sparse", percentile=percentile, batch_size=2, epochs_per_round=6)
    trainer = RWRTrainer(policy, Kept(), prompts, config)

    def look(_: TrainingRun, samples: Tensor, texts: Sequence[str], clean: Tensor, weights: Tensor) -> tuple:
        trained.append((samples, weights))
        return 0.0, 0.0

    monkeypatch.setattr(trainer, "_update", look)
    with TrainingRun(policy, run_config()) as run:
        metrics = trainer.step(run)
    best = torch.cat(scores).topk(kept).indices.sort().values
    weights = trained[0][1]
    assert torch.equal(weights.nonzero().flatten(), best)
    assert weights.sum() == metrics.effective_samples == kept
    assert metrics.updates == len(trained) == 6 * kept // 2
    # Each of the best once in an epoch.
    epochs = torch.cat([samples for samples, _ in trained]).view(6, kept).sort(dim=1).values
    assert torch.equal(epochs, best.expand(6, kept))


@pytest.mark.parametrize(
    ("rewards", "percentile", "kept"),
    [
        (range(11), 90.0, [9, 10]),  # the percentile is the tenth of eleven rewards, which is kept
        (range(11), 89.0, [9, 10]),
        (range(11), 91.0, [10]),
        ([2, 1, 2], 50.0, [0, 2]),
        ([0.1] * 7, 99.0, list(range(7))),
    ],
)
def test_sample_at_the_percentile_is_kept(rewards: Sequence[float], percentile: float, kept: list[int]) -> None:
    weights = sparse_weights(torch.tensor([float(reward) for reward in rewards]), percentile=percentile)
    assert weights.nonzero().flatten().tolist() == kept
    assert set(weights.tolist()) <= {0.0, 1.0}


def test_last_batch_of_epochs_that_do_not_divide_is_as_large_as_the_others(
    policy: DiffusionPolicy,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    trainer = RWRTrainer(policy, Constant(), prompts, small_config(batch_size=3, epochs_per_round=2))
    monkeypatch.setattr(trainer, "_update", lambda _, samples, *rest: (sizes.append(len(samples)), (0.0, 0.0))[1])
    with TrainingRun(policy, run_config()) as run:
        assert trainer.step(run).updates == 5  # 16 samples by 3
    assert sizes == [3] * 5


@pytest.mark.parametrize("minibatch_size", [1, 3])
def test_minibatch_size_does_not_change_the_update(
    minibatch_size: int,
    make_policy: Callable[..., DiffusionPolicy],
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    outcomes = []
    for size in (8, minibatch_size):
        policy = make_policy(train="xattn-kv")
        trainer = RWRTrainer(policy, Failing(), prompts, small_config(batch_size=8, minibatch_size=size))
        # With a large epsilon Adam's step is proportional to the gradient, so that rounding is not blown up.
        config = run_config(str(size), iterations=1, adam_epsilon=1.0, learning_rate=1.0, max_grad_norm=1e6)
        metrics = trainer.train(config)
        assert metrics is not None
        assert metrics.updates == 1
        outcomes.append((policy.trainable_state(), metrics.loss))
    (whole, loss), (parts, loss_of_parts) = outcomes
    start = make_policy(train="xattn-kv").trainable_state()
    assert max(float((value - start[name]).abs().max()) for name, value in whole.items()) > 1e-3
    assert_same(parts, whole, tolerance=1e-6)
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)


def test_loss_falls(
    make_policy: Callable[..., DiffusionPolicy], prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    """A network that knows nothing is off by 1; one that was trained sees some of the noise."""
    config = run_config(iterations=2, learning_rate=5e-3)
    settings = {"epochs_per_round": 20, "batch_size": 8, "minibatch_size": 8, "guidance_scale": 1.0}
    RWRTrainer(make_policy(train="full"), Failing(), prompts, small_config(**settings)).train(config)
    first, second = [line["train/loss"] for line in read_metrics(config.output_dir / "metrics.jsonl")]
    assert second < 0.9 * first
    assert second < 0.8


# Interruptions.


class Opposite:
    """Falls while the mean of red grows."""

    differentiable = False

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return -images[:, 0].mean(dim=(1, 2))


class Outcome(NamedTuple):
    """What a training leaves."""

    weights: dict[str, Tensor]
    logged: list[dict[str, Any]]
    """All that was logged, but for what another try may change."""
    draws: int
    """Batches that were drawn."""
    apart: int
    """Evaluations in a row with the two rewards apart."""


@pytest.fixture
def train(
    make_policy: Callable[..., DiffusionPolicy], prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> Callable[..., Outcome]:
    """Trains a new policy for three rounds of two batches."""

    def run(name: str, reward: Failing, *, dies_at: int = -1, patience: int = 0, **settings: Any) -> Outcome:
        policy = make_policy(train="xattn-kv")
        held_out = HeldOut(prompts[:2], Opposite()) if patience else None
        trainer = RWRTrainer(
            policy,
            reward,
            prompts,
            small_config(patience=patience),
            held_out=held_out,
            scoring=ScoringConfig(attempts=1),
        )
        draw, draws = trainer.collector.draw, []

        def mortal(conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
            if len(draws) == dies_at:
                raise KilledError
            draws.append(seeds)
            return draw(conditioning, seeds)

        trainer.collector.draw = mortal
        config = run_config(name, iterations=3, **settings)
        trainer.train(config)
        lines = read_metrics(config.output_dir / "metrics.jsonl")
        logged = [{tag: value for tag, value in line.items() if not tag.startswith("seconds/")} for line in lines]
        parted = 0 if trainer.early_stopping is None else trainer.early_stopping.apart
        return Outcome(policy.trainable_state(), logged, len(draws), parted)

    return run


def test_resumed_equals_uninterrupted(train: Callable[..., Outcome]) -> None:
    whole = train("whole", Failing())
    assert (len(whole.logged), whole.draws) == (3, 6)
    with pytest.raises(KilledError):
        train("run", Failing(), checkpoint_every=1, dies_at=3)  # in the middle of the second round
    torch.manual_seed(12345)  # a new process has other generators
    resumed = train("run", Failing(), checkpoint_every=1, resume=True)
    assert resumed.draws == 4
    assert_same(resumed.weights, whole.weights)
    assert resumed.logged == whole.logged


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_round_whose_reward_failed_is_graded_again_and_not_drawn_again(
    fails_at: int, train: Callable[..., Outcome], run_config: Callable[..., TrainingConfig]
) -> None:
    whole = train("whole", Failing())
    with pytest.raises(RewardError, match="the server is away"):
        train("run", Failing(fails_at))
    folder = run_config("run").output_dir / "ungraded"
    assert len(list(folder.iterdir())) == 1

    torch.manual_seed(12345)
    resumed = train("run", Failing(), resume=True)
    assert_same(resumed.weights, whole.weights)
    assert resumed.logged == whole.logged
    assert list(folder.iterdir()) == []
    # Of the two batches of the failed round at least those up to the failed one were kept.
    batches_left = 6 - 2 * (fails_at // 2)
    assert resumed.draws <= batches_left - 1 - fails_at % 2


def test_look_before_a_round_whose_reward_failed_counts_once(train: Callable[..., Outcome]) -> None:
    """When the run is resumed the look before the failed round is taken again, and must not count twice."""
    whole = train("whole", Failing(), patience=9)
    first, second, *_ = [line["reward/validation"] for line in whole.logged if "reward/validation" in line]
    assert second > first, "the rewards have to part at the second look for this test to tell anything"
    # The reward is called once for a look and twice for a round: this is the first call of the second round.
    with pytest.raises(RewardError):
        train("run", Failing(4), patience=9)
    resumed = train("run", Failing(), patience=9, resume=True)
    assert resumed.logged == whole.logged
    assert_same(resumed.weights, whole.weights)
    assert resumed.apart == whole.apart
