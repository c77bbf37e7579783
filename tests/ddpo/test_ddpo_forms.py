"""Erasure under a floor of the reward or a ceiling of the divergence, and the switch between erasing and retaining."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, round_advantages
from ddpo.constraints import RoundWeights, weights_of
from erasure import (
    NUDITY,
    ErasureConstraint,
    FixedWeight,
    ImageConstraint,
    ObjectiveConstraint,
    QualityConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
    ReferenceDivergence,
    RewardFloor,
    Switch,
    WeightController,
)
from erasure.protocols import ConceptBatch
from overpaint.policy import ClassifierFree, DiffusionPolicy, Trajectory
from overpaint.policy.ddim import gaussian_kl
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, TrainingRun, read_metrics

SAMPLES, STEPS = 4, 2
PLAIN = ClassifierFree(1.0)


class Colour:
    """The mean of a colour, times a factor; remembers what it gave."""

    differentiable = False

    def __init__(self, channel: int, factor: float = 1.0) -> None:
        self.channel = channel
        self.factor = factor
        self.given: list[Tensor] = []

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.given.append(self.factor * images[:, self.channel].mean(dim=(1, 2)))
        return self.given[-1]


def image_constraint(
    controller: WeightController, *, ceiling: float = 0.3, factor: float = 1.0
) -> tuple[ImageConstraint, Colour]:
    cost = Colour(1, factor)
    return ImageConstraint(cost, ["a plain circle"], controller, ceiling=ceiling), cost


def objective_constraint(controller: WeightController) -> ObjectiveConstraint:
    objective = ReferenceDistance(ReferenceDistanceConfig(steps=3))
    return ObjectiveConstraint(objective, NUDITY, ["nude"], controller, ceiling=1e-2)


def stir(policy: DiffusionPolicy) -> None:
    """Moves every trained weight away from the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


class Done(NamedTuple):
    """A round, without its updates: the policy is where it was."""

    gradient: list[Tensor]
    trajectory: Trajectory
    """The prompts' samples, then those of the concept."""
    rewards: Tensor
    batches: list[ConceptBatch]
    """What an objective was evaluated on."""
    log: dict[str, float]


@pytest.fixture
def round_of(
    policy: DiffusionPolicy,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Done]:
    """Does a round of one update with DDPO's score function, and looks at the gradient in place of the update."""
    number = iter(range(100))

    def do(
        erasure: ErasureConstraint, floor: QualityConstraint | None = None, reward: Colour | None = None, **changes: Any
    ) -> Done:
        reward = reward or Colour(0)
        drawn: list[Trajectory] = []
        batches: list[ConceptBatch] = []
        gradients: list[Tensor] = []
        rollout = policy.rollout

        def remember(*arguments: Any, **options: Any) -> Trajectory:
            drawn.append(rollout(*arguments, **options))
            return drawn[-1]

        if isinstance(erasure, ObjectiveConstraint):
            violation = erasure.violation

            def watched(policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
                batches.append(batch)
                return violation(policy, batch)

            monkeypatch.setattr(erasure, "violation", watched)
        size = SAMPLES * (2 if isinstance(erasure, ImageConstraint) else 1)
        settings: dict[str, Any] = {
            "samples_per_round": SAMPLES,
            "erasure_samples_per_round": SAMPLES,
            "updates_per_round": 1,
            "sampling_batch_size": size,
            "minibatch_size": size,
            "steps": STEPS,
            "guidance_scale": 1.0,
            "baseline": "round",
            "estimator": "score",
        }
        with monkeypatch.context() as patch:
            patch.setattr(policy, "rollout", remember)
            config = run_config(f"round-{next(number)}", iterations=1)
            trainer = DDPOTrainer(
                policy, reward, prompts, DDPOConfig(**settings | changes), erasure=erasure, floor=floor
            )
            with TrainingRun(policy, config) as run:
                trainer.prepare(run)

                def look() -> float:
                    for parameter in policy.trainable_parameters():
                        assert parameter.grad is not None
                        gradients.append(parameter.grad.clone())
                    policy.unet.zero_grad(set_to_none=True)
                    return 0.0

                patch.setattr(run, "update", look)
                log = trainer.tagged(trainer.step(run), run)
        return Done(gradients, drawn[-1], reward.given[-1], batches, log)

    return do


def gradient_of(policy: DiffusionPolicy, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, policy.trainable_parameters()))


def log_probs(policy: DiffusionPolicy, trajectory: Trajectory, samples: range) -> Tensor:
    """Returns the log-probabilities of all steps of some samples, with gradient: a row for each sample."""
    which = torch.tensor(samples).repeat_interleave(STEPS)
    steps = torch.arange(STEPS).repeat(len(samples))
    return policy.log_prob(trajectory, which, steps, guidance=PLAIN, eta=1.0).view(len(samples), STEPS)


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    largest = max(float(part.abs().max()) for part in theirs)
    assert largest > 1e-4
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * largest)


# The weights.


def test_each_term_has_its_own_weight_times_what_the_other_leaves_it() -> None:
    two, three = FixedWeight(2.0), FixedWeight(3.0)
    erasing, retaining = Switch(1), Switch(1)
    retaining.update(-1.0)
    assert weights_of(None, None) == RoundWeights(1.0, 0.0, 0.0, 0.0)
    of = objective_constraint
    assert weights_of(of(two), None) == RoundWeights(1.0, 2.0, concept_reward=1.0)
    assert weights_of(of(erasing), None) == RoundWeights(0.0, 1.0, concept_reward=0.0)
    assert weights_of(of(retaining), None) == RoundWeights(1.0, 0.0, concept_reward=1.0)
    assert weights_of(of(two), RewardFloor(lagrangian=three)) == RoundWeights(3.0, 2.0)
    assert weights_of(of(two), RewardFloor(lagrangian=erasing)) == RoundWeights(1.0, 0.0)
    assert weights_of(of(two), RewardFloor(lagrangian=retaining)) == RoundWeights(0.0, 2.0)
    assert weights_of(of(two), ReferenceDivergence(0.5, three)) == RoundWeights(0.0, 2.0, divergence=6.0)


# Erasure under a floor.


def test_objective_and_reward_are_weighed_by_hand(policy: DiffusionPolicy, round_of: Callable[..., Done]) -> None:
    stir(policy)
    erasure = objective_constraint(FixedWeight(0.02))
    done = round_of(erasure, RewardFloor(lagrangian=FixedWeight(3.0)))
    (batch,) = done.batches
    advantages = round_advantages(done.rewards).float()
    violation = erasure.violation(policy, batch).mean()
    policy_gradient = (-advantages[:, None] * log_probs(policy, done.trajectory, range(SAMPLES))).mean()
    assert_close(done.gradient, gradient_of(policy, 0.02 * violation + 3.0 * policy_gradient))
    parts = [
        torch.cat([g.flatten() for g in gradient_of(policy, part)])
        for part in (
            erasure.violation(policy, batch).mean(),
            (-advantages[:, None] * log_probs(policy, done.trajectory, range(SAMPLES))).mean(),
        )
    ]
    cosine = torch.nn.functional.cosine_similarity(*parts, dim=0)
    assert done.log["erasure/gradient_cosine"] == pytest.approx(float(cosine), abs=1e-3)
    assert done.log["erasure/weight"] == 0.02
    assert done.log["floor/weight"] == 3.0


def test_detector_alone_is_worth_its_violation(policy: DiffusionPolicy, round_of: Callable[..., Done]) -> None:
    stir(policy)
    erasure, cost = image_constraint(FixedWeight(2.0))
    done = round_of(erasure, RewardFloor(lagrangian=FixedWeight(3.0)))
    # Each kind in its own deviation; the concept's rewards count for nothing.
    retained, wanted = round_advantages(done.rewards[:SAMPLES]), -round_advantages(cost.given[-1])
    advantages = torch.cat([3.0 * retained, 2.0 * wanted]).float()
    loss = (-advantages[:, None] * log_probs(policy, done.trajectory, range(2 * SAMPLES))).mean()
    assert_close(done.gradient, gradient_of(policy, loss))
    assert done.log["erasure/violation"] == pytest.approx(float(cost.given[-1].mean()) / 0.3 - 1, abs=1e-5)


def test_floor_is_the_reference_reward_on_the_same_prompts_and_seeds(
    policy: DiffusionPolicy, round_of: Callable[..., Done]
) -> None:
    # The LoRA is new, so that policy and reference are one.
    erasure, _ = image_constraint(FixedWeight(1.0))
    done = round_of(erasure, RewardFloor(slack=0.02, scale=0.1, lagrangian=FixedWeight(1.0)))
    assert done.log["floor/violation"] == pytest.approx(-0.2, abs=1e-6)
    assert done.log["samples"] == 3 * SAMPLES  # those of the reference too

    stir(policy)
    reward = Colour(0)
    done = round_of(erasure, RewardFloor(slack=0.02, scale=0.1, lagrangian=FixedWeight(1.0)), reward)
    ours, theirs = reward.given[-1][:SAMPLES], reward.given[-2]
    assert (ours - theirs).abs().min() > 0
    assert done.log["floor/violation"] == pytest.approx(float((theirs - 0.02 - ours).mean()) / 0.1, abs=1e-5)

    done = round_of(erasure, RewardFloor(floor=0.7, scale=0.1, lagrangian=FixedWeight(1.0)), reward)
    ours = reward.given[-1][:SAMPLES]
    assert done.log["floor/violation"] == pytest.approx(float(0.7 - ours.mean()) / 0.1, abs=1e-4)
    assert done.log["samples"] == 2 * SAMPLES


def test_divergence_takes_the_place_of_the_reward(policy: DiffusionPolicy, round_of: Callable[..., Done]) -> None:
    stir(policy)
    erasure, cost = image_constraint(FixedWeight(2.0))
    done = round_of(erasure, ReferenceDivergence(0.05, FixedWeight(0.01)))
    assert_close(round_of(erasure, ReferenceDivergence(0.05, FixedWeight(0.01)), Colour(2)).gradient, done.gradient)

    pairs = torch.arange(SAMPLES).repeat_interleave(STEPS), torch.arange(STEPS).repeat(SAMPLES)
    with policy.reference(), torch.no_grad():
        _, reference, _ = policy.stored_steps(done.trajectory, *pairs, guidance=PLAIN)
    _, mean, std = policy.stored_steps(done.trajectory, *pairs, guidance=PLAIN)
    divergence = gaussian_kl(mean, reference, std)
    mean_divergence = float(divergence.detach().mean())
    wanted = -round_advantages(cost.given[-1]).float()
    concept = -wanted[:, None] * log_probs(policy, done.trajectory, range(SAMPLES, 2 * SAMPLES))
    # A mean over the pairs of both kinds.
    loss = (2.0 * concept.sum() + 0.01 / 0.05 * divergence.sum()) / (2 * SAMPLES * STEPS)
    assert_close(done.gradient, gradient_of(policy, loss))
    assert done.log["floor/violation"] == pytest.approx(mean_divergence / 0.05 - 1, abs=1e-4)
    assert done.log["policy/kl"] == pytest.approx(mean_divergence, rel=1e-4)


@pytest.mark.parametrize("kind", ["image", "objective"])
def test_divergence_is_measured_while_it_has_no_weight(
    kind: str, policy: DiffusionPolicy, round_of: Callable[..., Done]
) -> None:
    stir(policy)
    erasure = objective_constraint(FixedWeight(2.0)) if kind == "objective" else image_constraint(FixedWeight(2.0))[0]
    done = round_of(erasure, ReferenceDivergence(0.05, FixedWeight(0.0)), kl_every=100)
    pairs = torch.arange(SAMPLES).repeat_interleave(STEPS), torch.arange(STEPS).repeat(SAMPLES)
    with policy.reference(), torch.no_grad():
        _, reference, _ = policy.stored_steps(done.trajectory, *pairs, guidance=PLAIN)
    with torch.no_grad():
        _, mean, std = policy.stored_steps(done.trajectory, *pairs, guidance=PLAIN)
    divergence = gaussian_kl(mean, reference, std)
    lowest, highest = float(divergence.min()), float(divergence.max())  # on a few of the pairs
    assert lowest / 0.05 - 1 <= done.log["floor/violation"] <= highest / 0.05 - 1
    assert done.log["floor/violation"] > -1


def test_floor_follows_its_violation(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    for name, floor in (
        ("high", RewardFloor(floor=2.0)),
        ("low", RewardFloor(floor=-2.0)),
        ("loose", ReferenceDivergence(1e9)),
    ):
        config = run_config(name, iterations=2)
        settings = DDPOConfig(samples_per_round=8, updates_per_round=2, steps=2, erasure_samples_per_round=8)
        erasure, _ = image_constraint(FixedWeight(1.0))
        DDPOTrainer(policy, redness, prompts, settings, erasure=erasure, floor=floor).train(config)
        first, second = [line["floor/weight"] for line in read_metrics(config.output_dir / "metrics.jsonl")]
        assert first == 1.0
        assert second > 1.5 if name == "high" else second < 0.7
        assert (floor.lagrangian.weight > second) == (name == "high")


# The switch.


@pytest.mark.parametrize("kind", ["image", "objective"])
def test_switch_erases_or_retains(kind: str, policy: DiffusionPolicy, round_of: Callable[..., Done]) -> None:
    stir(policy)
    erasing, retaining = Switch(9), Switch(1)
    retaining.update(-1.0)

    def under(switch: Switch, channel: int, factor: float = 1.0) -> Done:
        erasure = image_constraint(switch, factor=factor)[0] if kind == "image" else objective_constraint(switch)
        return round_of(erasure, reward=Colour(channel))

    # While it erases no reward counts; while it retains no cost does.
    erased = under(erasing, 0)
    assert_close(under(erasing, 2).gradient, erased.gradient)
    assert (erased.log["erasure/weight"], erased.log["erasure/gradient_cosine"]) == (1.0, 0.0)
    if kind == "image":
        opposite = under(erasing, 0, factor=-1.0)
        assert_close([-part for part in opposite.gradient], erased.gradient)

    retained = under(retaining, 0)
    assert retained.log["erasure/weight"] == 0.0
    advantages = round_advantages(retained.rewards[:SAMPLES]).float()
    loss = (-advantages[:, None] * log_probs(policy, retained.trajectory, range(SAMPLES))).mean()
    assert_close(retained.gradient, gradient_of(policy, loss))


def test_switch_changes_its_phase_by_what_rounds_measure(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    settings = DDPOConfig(samples_per_round=8, updates_per_round=1, steps=2, erasure_samples_per_round=8)
    weights = []
    for name, ceiling in (("met", 3.0), ("missed", 1e-3)):
        switch = Switch(2)
        config = run_config(name, iterations=4)
        erasure, _ = image_constraint(switch, ceiling=ceiling)
        DDPOTrainer(policy, redness, prompts, settings, erasure=erasure).train(config)
        weights.append([line["erasure/weight"] for line in read_metrics(config.output_dir / "metrics.jsonl")])
    assert weights == [[1.0, 1.0, 0.0, 0.0], [1.0] * 4]


# What is refused.


def test_floor_without_an_erasure_is_refused(policy: DiffusionPolicy, redness: Any, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^floor must come with an erasure, .*, got none$"):
        DDPOTrainer(policy, redness, prompts, floor=RewardFloor())


def test_divergence_with_two_weights_is_refused(policy: DiffusionPolicy, redness: Any, prompts: list[str]) -> None:
    erasure, _ = image_constraint(FixedWeight(1.0))
    config = DDPOConfig(kl_weight=0.1)
    with pytest.raises(ValueError, match=r"^DDPOConfig\.kl_weight must be 0 where floor is .*, got 0\.1$"):
        DDPOTrainer(policy, redness, prompts, config, erasure=erasure, floor=ReferenceDivergence())
