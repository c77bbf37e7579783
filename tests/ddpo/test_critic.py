"""The critic: advantages by hand, what it learns, and that no advantage comes from its own round."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo import CriticConfig, DDPOConfig, DDPOTrainer, generalised_advantages, round_advantages
from ddpo.baseline import Advantages, Baseline
from ddpo.critic import Critic, explained_variances
from overpaint.policy import DiffusionPolicy, Trajectory
from overpaint.training import TrainingConfig, TrainingRun


@pytest.fixture
def run(policy: DiffusionPolicy, run_config: Callable[..., TrainingConfig]) -> Iterator[TrainingRun]:
    with TrainingRun(policy, run_config(seed=3)) as run:
        yield run


def started(run: TrainingRun, policy: DiffusionPolicy, *, scores: int = 1, **settings: Any) -> Critic:
    critic = Critic(policy, CriticConfig(**settings), scores=scores)
    critic.start(run)
    return critic


def noisy_round(policy: DiffusionPolicy, seed: int, samples: int = 64, steps: int = 6) -> tuple[Trajectory, Tensor]:
    """Makes states that get clearer from noise to picture, and a score of each picture: how bright one channel is."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(samples, generator=generator)
    pictures = torch.randn(samples, 4, 8, 8, generator=generator) * 0.2
    pictures[:, 1] += signs[:, None, None]
    timesteps = torch.linspace(900, 1, steps).long()
    alphas = policy.process.levels(timesteps)[None, :, None, None, None]
    noises = torch.randn(samples, steps, 4, 8, 8, generator=generator)
    states = alphas.sqrt() * pictures[:, None] + (1 - alphas).sqrt() * noises
    conditioning = policy.encode(["a cat"] * samples)
    latents = torch.cat([states, pictures[:, None]], dim=1)
    return Trajectory(latents, torch.zeros(samples, steps), timesteps, conditioning), 5 + 100 * signs


# By hand.


@pytest.mark.parametrize(
    ("gae_lambda", "expected"),
    [
        (1.0, [[9.0, 8.0, 6.0], [-1.0, 1.0, 0.0]]),  # the score less what was expected
        (0.5, [[1 + 0.5 * (2 + 0.5 * 6), 2 + 0.5 * 6, 6.0], [-2 + 0.5 * 1, 1.0, 0.0]]),
        (0.0, [[1.0, 2.0, 6.0], [-2.0, 1.0, 0.0]]),  # what is expected next, less what was
    ],
)
def test_generalised_advantages_by_hand(gae_lambda: float, expected: list[list[float]]) -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0]])
    advantages = generalised_advantages(values, torch.tensor([10.0, 2.0]), gae_lambda=gae_lambda)
    assert advantages.tolist() == expected


def test_explained_variance_of_thirds_by_hand() -> None:
    scores = torch.tensor([0.0, 2.0, 4.0])
    blind, wise, half = torch.zeros(3), scores + 7, scores / 2
    values = torch.stack([blind, blind, half, half, wise, wise], dim=1)
    assert explained_variances(values, scores) == pytest.approx([0.0, 0.75, 1.0])
    # Of four steps the middle third is two, and each of the others two as well.
    first, last = ((scores - torch.stack(pair)).var(correction=0) / (8 / 3) for pair in ((blind, half), (half, wise)))
    expected = [1 - float(first), 0.75, 1 - float(last)]
    assert explained_variances(values[:, [0, 2, 2, 4]], scores) == pytest.approx(expected)


# What it learns.


def test_critic_learns_what_latents_show_the_more_the_clearer_they_are(
    run: TrainingRun, policy: DiffusionPolicy
) -> None:
    critic = started(run, policy, learning_rate=3e-3)
    for number in range(5):
        trajectory, scores = noisy_round(policy, number)
        critic.fit(run, trajectory, torch.arange(64), scores[:, None])
    trajectory, scores = noisy_round(policy, 100)
    first, middle, last = explained_variances(critic.values(trajectory)[:, :, 0], scores)
    assert last > 0.9
    assert first < middle < last


def test_score_that_is_unknown_teaches_nothing(run: TrainingRun, policy: DiffusionPolicy) -> None:
    trajectory, scores = noisy_round(policy, 0)
    unknown = torch.full_like(scores, float("nan"))
    moved = []
    for other in (unknown, torch.cat([unknown[:32], scores[32:]])):
        critic = started(run, policy, scores=2)
        with torch.no_grad():
            critic.network.last.bias.fill_(0.5)
        loss = critic.fit(run, trajectory, torch.arange(64), torch.stack([scores, other], dim=1))
        assert 0 < loss < 2
        moved.append((critic.network.last.bias != 0.5).tolist())
        assert critic.values(trajectory).isfinite().all()
    assert moved == [[True, False], [True, True]]


def test_new_scale_of_the_scores_changes_no_expectation(run: TrainingRun, policy: DiffusionPolicy) -> None:
    critic = started(run, policy)
    trajectory, scores = noisy_round(policy, 0)
    critic.fit(run, trajectory, torch.arange(64), scores[:, None])
    before = critic.values(trajectory)
    critic._note(1000 * scores[:, None] - 300)
    torch.testing.assert_close(critic.values(trajectory), before, rtol=1e-4, atol=1e-2)
    both = torch.cat([scores, 1000 * scores - 300]).double()
    assert float(critic.means) == pytest.approx(float(both.mean()))
    assert float(critic.deviations) == pytest.approx(float(both.std(correction=0)))


def test_scores_that_never_vary_are_expected(run: TrainingRun, policy: DiffusionPolicy) -> None:
    critic = started(run, policy)
    trajectory, scores = noisy_round(policy, 0)
    critic.fit(run, trajectory, torch.arange(64), torch.full_like(scores, 0.25)[:, None])
    assert critic.values(trajectory).unique().tolist() == [0.25]


def test_seed_of_the_run_decides_the_critic(policy: DiffusionPolicy, run_config: Callable[..., TrainingConfig]) -> None:
    trajectory, scores = noisy_round(policy, 0)
    starts, ends = [], []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        with TrainingRun(policy, run_config(f"run-{number}", seed=seed)) as run:
            critic = started(run, policy)
            starts.append(critic.network.state_dict()["convolutions.0.weight"].clone())
            critic.fit(run, trajectory, torch.arange(64), scores[:, None])
            ends.append(critic.network.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not any(torch.equal(value, ends[2][name]) for name, value in ends[0].items())
    assert not torch.equal(starts[0], starts[2])


# In the trainer.


def test_no_advantage_comes_from_a_critic_that_has_seen_its_round(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[tuple[Advantages, Tensor]] = []
    judge, learn = Baseline.advantages, Baseline.learn

    def remember(baseline: Baseline, run: Any, requests: Any, scored: Any, *rest: Any) -> Advantages:
        assert baseline.critic is not None
        values = baseline.critic.values(scored.trajectory)
        judged.append((judge(baseline, run, requests, scored, *rest), values))
        return judged[-1][0]

    moved: list[bool] = []

    def learn_afterwards(baseline: Baseline, run: Any, *rest: Any) -> dict[str, float]:
        moved.append(
            any(float(value.abs().max()) > 0 for name, value in policy.trainable_state().items() if "_B" in name)
        )
        return learn(baseline, run, *rest)

    monkeypatch.setattr(Baseline, "advantages", remember)
    monkeypatch.setattr(Baseline, "learn", learn_afterwards)
    config = DDPOConfig(
        samples_per_round=8,
        updates_per_round=1,
        steps=3,
        guidance_scale=1.0,
        baseline="critic",
        critic=CriticConfig(gae_lambda=0.5),
    )
    DDPOTrainer(policy, redness, prompts, config).train(run_config())
    assert moved == [True, True]  # the policy has been updated before the critic learns
    (first, blind), (second, taught) = judged
    # At first it knows nothing: with equal expectations only the score itself is left, and that at the last step.
    assert blind.unique().tolist() == [0.0]
    raw = first.rewards.double()[:, None] * torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    expected = round_advantages(raw.flatten()).view(8, 3).clamp(-5, 5)
    torch.testing.assert_close(first.advantages, expected.float(), rtol=1e-4, atol=1e-5)
    # Then it has seen the first round alone.
    assert len(taught.unique()) > 1
    raw = generalised_advantages(taught[:, :, 0], second.rewards.double(), gae_lambda=0.5)
    expected = round_advantages(raw.flatten()).view(8, 3).clamp(-5, 5)
    torch.testing.assert_close(second.advantages, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"gae_lambda": 1.5}, "gae_lambda must be at most 1, got 1.5"),
        ({"gae_lambda": -0.5}, "gae_lambda must be at least 0, got -0.5"),
    ],
)
def test_setting_that_breaks_its_rule_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^CriticConfig\\.{message}$"):
        CriticConfig(**changes)
