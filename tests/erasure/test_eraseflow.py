"""EraseFlow: its pairs, steps and level, what it draws with, what it learns beside the policy and what it refuses."""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from erasure import (
    NUDITY,
    Concept,
    DescentConfig,
    EraseFlow,
    EraseFlowConfig,
    Lagrangian,
    ObjectiveConstraint,
    RewardFloor,
)
from erasure.controllers import FixedWeight
from erasure.methods.eraseflow.balance import (
    ConstantUnconditional,
    chosen_steps,
    denoising_log_probs,
    noising_log_probs,
    step_weights,
)
from erasure.methods.eraseflow.eraseflow import Drawn, EraseFlowTraining
from erasure.methods.eraseflow.log_partition import LogPartition
from erasure.methods.eraseflow.pairs import Pair, pair_of
from erasure.protocols import ConceptBatch
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig, StepContext
from overpaint.policy.ddim import ddim_mean_and_std, gaussian_log_prob
from overpaint.policy.weights import base_parameters
from overpaint.tinyworld import PRESETS, STRIPES, captions
from overpaint.training import TrainingConfig, TrainingRun, read_metrics

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes", "a striped red circle"), preserve=("", "a cat"))
DESCENT = DescentConfig(iterations=4, learning_rate=1e-2, weight_decay=1e-2, batch_size=2, max_grad_norm=1.0)
CONFIG = EraseFlowConfig(steps=5, early_share=0.4, late_share=0.2, guidance_scale=3.0, descent=DESCENT)
ERASING = replace(CONFIG, retain_share=0.0)
BATCH = ConceptBatch(["striped", "a cat with stripes", "a striped red circle", "striped"], [10, 11, 12, 13])
"""The second and the last are retained, where any are."""


def prepared(policy: DiffusionPolicy, config: EraseFlowConfig = CONFIG, **options: Any) -> EraseFlow:
    method = EraseFlow(config, **options)
    method.prepare(policy, CONCEPT)
    return method


def tiny_flow() -> DiffusionPolicy:
    """A Stable Diffusion 3 whose steps reverse noising."""
    return DiffusionPolicy.from_pretrained(
        GOLDEN / "flow" / "tiny-sd3", device="cpu", lora=LoRAConfig(), chain="ancestral"
    )


def move(policy: DiffusionPolicy, by: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.mean(dim=(1, 2, 3))


# Pairs.


@pytest.mark.parametrize(
    ("prompt", "anchor", "pair"),
    [
        ("striped", " ", ("striped", "")),
        ("striped", "plain", ("striped", "plain")),
        ("a striped red circle", " ", ("a striped red circle", "a red circle")),
        ("A Striped cat, with stripes.", "plain", ("A Striped cat, with stripes.", "A plain cat, plain.")),
        ("stripedness", "plain", ("stripedness", "plain")),
        ("a cat behind bars", " ", ("a cat behind bars", "")),
        (r"a \1 striped cat", r"\1", (r"a \1 striped cat", r"a \1 \1 cat")),
    ],
)
def test_anchor_is_the_prompt_with_other_words_in_the_place_of_the_concepts(
    prompt: str, anchor: str, pair: tuple[str, str]
) -> None:
    assert pair_of(prompt, CONCEPT, anchor, (), ("{concept} {anchor}",), random.Random(0)) == Pair(*pair)


def test_word_alone_is_put_into_an_anchor_prompt_and_a_caption_stays_as_it_is() -> None:
    choice, templates = random.Random(0), ("{concept} {anchor}", "{anchor} {concept}")
    several = {pair_of("striped", CONCEPT, " ", ("a cat", "a dog"), templates, choice) for _ in range(50)}
    assert several == {
        Pair(target, anchor) for anchor in ("a cat", "a dog") for target in (f"striped {anchor}", f"{anchor} striped")
    }
    assert pair_of("striped", CONCEPT, "plain", ("a cat",), templates[:1], choice) == Pair(
        "striped a cat", "plain a cat"
    )
    assert pair_of("a striped dog", CONCEPT, " ", ("a cat",), templates, choice) == Pair("a striped dog", "a dog")


def test_pairs_follow_from_prompt_and_seed_and_some_are_retained(policy: DiffusionPolicy) -> None:
    method = prepared(policy)
    batch = ConceptBatch(["a striped red circle"] * 400, list(range(400)))
    pairs = method.pairs(batch)
    assert method.pairs(ConceptBatch(batch.prompts[7:9], batch.seeds[7:9])) == pairs[7:9]
    retained = [pair for pair in pairs if pair.retained]
    assert 160 < len(retained) < 240
    assert {pair.target for pair in retained} == set(CONCEPT.preserve)
    assert all(pair.target == pair.anchor for pair in retained)
    assert {pair for pair in pairs if not pair.retained} == {Pair("a striped red circle", "a red circle")}


def test_anchor_of_nudity_is_the_authors_and_any_other_the_concepts() -> None:
    assert EraseFlow().anchor(NUDITY) == "fully dressed"
    assert EraseFlow().anchor(CONCEPT) == " "
    assert EraseFlow(EraseFlowConfig(anchor="at the beach")).anchor(NUDITY) == "at the beach"


# Steps and their weights.


@pytest.mark.parametrize(
    ("steps", "counts"), [(50, (10, 10)), (20, (4, 4)), (100, (20, 20)), (10, (2, 2)), (4, (1, 1)), (1, (0, 1))]
)
def test_numbers_of_steps_scale_with_all_of_them(steps: int, counts: tuple[int, int]) -> None:
    assert EraseFlowConfig(steps=steps).counts() == counts


@pytest.mark.parametrize("late", [0.1, 1 / 3, 0.45, 0.9, 1.0])
def test_no_step_counts_twice(late: float) -> None:
    for steps in range(1, 60):
        early, last = EraseFlowConfig(steps=steps, early_share=1 - late, late_share=late).counts()
        assert 1 <= last <= steps
        assert 0 <= early <= steps - last


@pytest.mark.parametrize(("early", "late", "counts"), [(0.0, 1.0, (0, 4)), (0.4, 0.6, (1, 3)), (0.4, 0.2, (2, 1))])
def test_step_of_a_flow_without_a_density_is_none_of_those_that_count(
    early: float, late: float, counts: tuple[int, int]
) -> None:
    policy = tiny_flow()
    method = EraseFlow(replace(ERASING, early_share=early, late_share=late))
    assert sum(method.config.counts()) == round(5 * (early + late))
    method.prepare(policy, CONCEPT)
    assert method.config.counts(4) == counts
    chosen = method.steps(policy, BATCH)
    assert chosen.shape == (4, sum(counts))
    assert chosen.max() == 3
    assert method.unet_calls() == (10.0, 2 * sum(counts))
    assert method.loss(policy, BATCH).isfinite().all()


def test_flow_of_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"steps must be at least 2 for a flow, whose last step .*, got 1"):
        EraseFlow(replace(ERASING, steps=1)).prepare(tiny_flow(), CONCEPT)


def test_steps_are_drawn_for_each_seed_and_the_last_ones_are_always_among_them() -> None:
    chosen = chosen_steps(range(500), steps=10, early=3, late=2)
    assert chosen.shape == (500, 5)
    assert torch.equal(chosen[40:41], chosen_steps([40], steps=10, early=3, late=2))
    assert chosen[:, 3:].unique(dim=0).tolist() == [[8, 9]]
    assert (chosen.diff(dim=1) > 0).all()
    often = chosen[:, :3].flatten().bincount(minlength=8)
    assert len(often) == 8
    assert (often.float() / 500 - 3 / 8).abs().max() < 0.1


def test_balanced_weights_make_a_difference_of_noise_count_the_same_at_every_step(policy: DiffusionPolicy) -> None:
    plan = policy.plan(10)
    weights = step_weights(policy.process, plan, "balanced").double()
    assert weights.mean().item() == pytest.approx(1)
    assert torch.equal(step_weights(policy.process, plan, "equal"), torch.ones(10))
    latents = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.zeros_like(latents)
    levels = plan.levels, plan.next_levels
    mean, std = ddim_mean_and_std(latents, noise, *levels, eta=1.0, prediction_type="epsilon")
    other, _ = ddim_mean_and_std(latents, noise + 0.1, *levels, eta=1.0, prediction_type="epsilon")
    lost = gaussian_log_prob(mean, mean, std) - gaussian_log_prob(mean, other, std)
    torch.testing.assert_close(weights * lost, (weights * lost).mean().expand(10), rtol=2e-3, atol=0)
    assert lost.max() > 5 * lost.min()


# The residual.


def test_residual_is_that_by_hand(policy: DiffusionPolicy) -> None:
    config = replace(ERASING, level="paper", step_weights="balanced", early_share=0.8, log_beta=1.5, log_z=0.25)
    method = prepared(policy, config)
    move(policy)
    drawn = method.drawn(policy, BATCH)
    steps = torch.arange(5).expand(4, 5)
    found = method.residuals(policy, drawn, steps)
    targets = policy.encode([pair.target for pair in drawn.pairs])
    plan = policy.plan(5)
    weights = step_weights(policy.process, plan, "balanced")
    expected = torch.full((4,), 0.25 - 1.5)
    for step in range(5):
        before, after = drawn.latents[:, step], drawn.latents[:, step + 1]
        level, previous = plan.levels[step], plan.next_levels[step]
        mean = policy.denoise(before, targets, step=step, steps=5, guidance=ClassifierFree(3.0), eta=1.0,
                              noise=torch.zeros_like(before))  # fmt: skip
        sigma = ((1 - previous) / (1 - level) * (1 - level / previous)).sqrt()
        forward = torch.distributions.Normal(mean, sigma).log_prob(after).flatten(1).mean(dim=1)
        kernel = torch.distributions.Normal((level / previous).sqrt() * after, (1 - level / previous).sqrt())
        expected = expected + weights[step] * (forward - kernel.log_prob(before).flatten(1).mean(dim=1))
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(method.loss(policy, BATCH), method.loss(policy, BATCH))
    torch.testing.assert_close(method.loss(policy, BATCH), found.square(), rtol=1e-4, atol=1e-4)


def test_likelihood_of_a_step_is_to_the_bit_what_ddpo_takes(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(PROMPTS := ["a red circle", "a cat"])
    trajectory = policy.rollout(conditioning, steps=4, seeds=[3, 4])
    chosen = torch.tensor([[2], [2]])
    found = denoising_log_probs(policy, trajectory, chosen, guidance=ClassifierFree(5.0))
    assert torch.equal(found[:, 0], policy.log_prob(trajectory, torch.arange(len(PROMPTS)), chosen[:, 0]))
    assert torch.equal(found[:, 0], trajectory.log_probs[:, 2])


@pytest.mark.parametrize(("weights", "shares"), [("equal", (0.2, 0.2)), ("balanced", (0.0, 1.0))])
def test_matched_level_is_that_of_the_anchors_own_trajectories(weights: Any, shares: tuple[float, float]) -> None:
    """At it target and anchor agree; and it is the level that the schedule and the size of the noise make of it."""
    policy = tinyworld.load_policy(device="cpu", lora=LoRAConfig())
    early, late = shares
    config = EraseFlowConfig(
        steps=20, guidance_scale=3.0, retain_share=0.0, step_weights=weights, early_share=early, late_share=late
    )
    method = EraseFlow(config)
    method.prepare(policy, STRIPES)
    drawn = method.drawn(policy, ConceptBatch(captions("explicit", 4, 3), range(4)))
    own = drawn._replace(pairs=[Pair(pair.anchor, pair.anchor) for pair in drawn.pairs])
    chosen = chosen_steps(range(4), steps=20, early=config.counts()[0], late=config.counts()[1])
    with torch.no_grad():
        assert method.residuals(policy, own, chosen).abs().max() < 1e-3
        assert method.residuals(policy, drawn, chosen).mean() < -0.4

    # -½ log((1 - a_prev) / (1 - a)) + ½ (m - 1) (1 - a / a_prev) / (1 - a), m the mean square of the predicted noise.
    plan = policy.plan(20)
    weight = step_weights(policy.process, plan, weights)
    anchors = policy.encode([pair.anchor for pair in drawn.pairs])
    expected = torch.zeros(4)
    for step in range(20):
        level, previous = plan.levels[step], plan.next_levels[step]
        with torch.no_grad():
            noise = policy.predict_noise(
                drawn.latents[:, step], plan.timesteps[step].expand(4), anchors, ClassifierFree(3.0)
            )
        excess = noise.square().flatten(1).mean(dim=1) - 1
        term = -0.5 * ((1 - previous) / (1 - level)).log() + 0.5 * excess * (1 - level / previous) / (1 - level)
        expected += weight[step] * term * (chosen == step).any(dim=1)
    backward = noising_log_probs(policy.process, drawn.latents, plan).gather(1, chosen)
    found = method.level(drawn.log_probs.gather(1, chosen), backward, weight[chosen], drawn.scores)
    assert (found - expected).abs().max() < 0.4


def test_loss_of_a_sample_does_not_depend_on_its_batch(policy: DiffusionPolicy) -> None:
    for rollout in ("reference", "policy"):
        method = prepared(policy, replace(CONFIG, rollout=rollout))
        move(policy)
        whole = method.loss(policy, BATCH)
        assert {pair.retained for pair in method.pairs(BATCH)} == {True, False}
        parts = [method.loss(policy, ConceptBatch(BATCH.prompts[part], BATCH.seeds[part])) for part in
                 (slice(1), slice(1, 4))]  # fmt: skip
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rollout", ["reference", "policy"])
def test_trajectories_are_drawn_by_the_model_that_is_named_and_retained_ones_by_the_original(
    rollout: Any, policy: DiffusionPolicy
) -> None:
    method = prepared(policy, replace(CONFIG, rollout=rollout))
    move(policy)
    drawn = method.drawn(policy, BATCH)
    retained = {pair.retained for pair in drawn.pairs}
    assert retained == {True, False}
    for row, pair in enumerate(drawn.pairs):
        original = pair.retained or rollout == "reference"
        with policy.reference() if original else nullcontext():
            expected = policy.rollout(
                policy.encode([pair.anchor]), steps=5, guidance=ClassifierFree(3.0), seeds=[BATCH.seeds[row]]
            )
        torch.testing.assert_close(drawn.latents[row : row + 1], expected.latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(drawn.log_probs[row : row + 1], expected.log_probs, rtol=1e-4, atol=1e-4)


def test_unconditional_branch_is_a_constant_where_it_is_said_to_be(policy: DiffusionPolicy) -> None:
    both, one = prepared(policy, ERASING), prepared(policy, replace(ERASING, uncond_grad=False))
    move(policy)
    gradients = []
    for method in (both, one):
        loss = method.loss(policy, BATCH).mean()
        gradients.append(torch.autograd.grad(loss, policy.trainable_parameters()))
    torch.testing.assert_close(both.loss(policy, BATCH), one.loss(policy, BATCH), rtol=0, atol=0)
    assert any(not torch.equal(*pair) for pair in zip(*gradients, strict=True))
    prediction = torch.ones(2, 1, 4, 2, 2, requires_grad=True)
    context = StepContext(torch.tensor([0]), 1, torch.ones(1))
    ConstantUnconditional(3.0).combine(prediction, context).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.unique(dim=0).flatten(1).tolist() == [[0.0] * 16, [3.0] * 16]


# The reward.


def test_reward_raises_the_level_of_the_trajectories_that_it_likes(policy: DiffusionPolicy) -> None:
    floor = RewardFloor(floor=0.4, scale=0.5, lagrangian=FixedWeight(2.0))
    plain, rewarded = prepared(policy, ERASING), prepared(policy, ERASING, reward=brightness, floor=floor)
    steps = torch.arange(5).expand(4, 5)
    drawn = rewarded.drawn(policy, BATCH)
    with torch.no_grad():
        lower = plain.residuals(policy, drawn, steps) - rewarded.residuals(policy, drawn, steps)
    expected = brightness(policy.decode(drawn.latents[:, -1]), None).detach()
    assert torch.equal(drawn.scores, expected)
    torch.testing.assert_close(lower.float(), 2.0 * (expected - 0.4) / 0.5, rtol=1e-4, atol=1e-4)


def test_weight_of_the_reward_follows_trajectories_of_the_policy_alone(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    for rollout, moves in (("reference", False), ("policy", True)):
        weight = Lagrangian()
        floor = RewardFloor(floor=5.0, lagrangian=weight)
        config = replace(ERASING, rollout=rollout)
        before = weight.weight
        erasure = EraseFlow(config, reward=brightness, floor=floor).erase(
            make_policy(), CONCEPT, output_dir=tmp_path / rollout, progress=False
        )
        assert (weight.weight > before) == moves
        assert erasure.config["floor"] == floor.description()
        assert "brightness" in erasure.config["reward"]
        lines = read_metrics(tmp_path / rollout / "metrics.jsonl")
        assert all(0 < line["reward/mean"] < 1 for line in lines)
        assert lines[0]["reward/weight"] == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reward": brightness}, r"EraseFlow\.floor must come with the other of reward and floor, got None"),
        ({"floor": RewardFloor(floor=0.1)}, r"EraseFlow\.reward must come with the other"),
        ({"reward": brightness, "floor": RewardFloor(slack=0.1)}, r"EraseFlow\.floor must have a number as its floor"),
    ],
)
def test_reward_and_floor_come_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EraseFlow(**options)


# What it learns beside the policy.


def test_log_z_takes_clipped_steps_of_its_own_adamw() -> None:
    log_z = LogPartition(-0.1953, 3e-4, 1e-2)
    own = torch.nn.Parameter(torch.tensor(-0.1953, dtype=torch.float64))
    optimizer = torch.optim.AdamW([own], lr=3e-4, weight_decay=1e-2)
    for gradient, clipped in ((-70.0, -1.0), (0.25, 0.25), (float("nan"), None), (3.0, 1.0)):
        log_z.step(gradient)
        if clipped is not None:
            own.grad = torch.full_like(own, clipped)
            optimizer.step()
        assert log_z.value == own.item()
    other = LogPartition(5.0, 3e-4, 1e-2)
    other.load_state_dict(log_z.state_dict())
    for either in (log_z, other):
        either.step(0.5)
    assert other.value == log_z.value


def test_released_form_learns_log_z_and_starts_it_anew_every_time(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    released = EraseFlowConfig.released()
    assert (released.rollout, released.retain_share, released.level) == ("policy", 0.0, "paper")
    method = EraseFlow(replace(released, steps=4, descent=replace(DESCENT, learning_rate=1e-3)))
    found = []
    for name in ("first", "second"):
        method.erase(make_policy(), CONCEPT, output_dir=tmp_path / name, progress=False)
        found.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    first, second = ([(line["erasure/log_z"], line["erasure/loss"]) for line in lines] for lines in found)
    assert first == second
    assert first[0][0] == pytest.approx(-0.1953 + 1e-3, abs=1e-5)  # residuals below zero: log Z grows by its rate
    assert [line["erasure/residual"] < 0 for line in found[0]] == [True] * 4


@pytest.mark.parametrize("rollout", ["reference", "policy"])
def test_trajectories_are_used_again_after_the_last_update_that_draws(
    rollout: Any, make_policy: Callable[..., DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], EraseFlow.drawn

    def counted(self: EraseFlow, policy: DiffusionPolicy, batch: ConceptBatch) -> Any:
        drawn.append(draw(self, policy, batch))
        return drawn[-1]

    monkeypatch.setattr(EraseFlow, "drawn", counted)
    method = EraseFlow(replace(CONFIG, rollout=rollout, resample_until=2))
    used, residuals = [], EraseFlow.residuals

    def noted(self: EraseFlow, policy: DiffusionPolicy, trajectories: Drawn, chosen: Tensor) -> Tensor:
        used.append(trajectories.latents)
        return residuals(self, policy, trajectories, chosen)

    monkeypatch.setattr(EraseFlow, "residuals", noted)
    method.erase(make_policy(), CONCEPT, progress=False)
    assert len(drawn) == 2
    assert method.unet_calls() == (2 * 5 * 2 / 4, 2 * 3)
    for latents, expected in zip(used, (drawn[0], *[drawn[1]] * 3), strict=True):
        assert torch.equal(latents, expected.latents)


@pytest.mark.parametrize("rollout", ["reference", "policy"])
def test_constraint_of_a_trainer_learns_nothing_and_draws_for_every_loss(
    rollout: Any, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy, weight = make_policy(lora=LoRAConfig()), Lagrangian()
    config = replace(ERASING, rollout=rollout, level="paper", resample_until=1)
    method = EraseFlow(config, reward=brightness, floor=RewardFloor(floor=5.0, lagrangian=weight))
    constraint = ObjectiveConstraint(method, CONCEPT, ceiling=10.0)
    constraint.prepare(policy)
    before, other = weight.weight, ConceptBatch(BATCH.prompts[1:3], BATCH.seeds[1:3])
    with TrainingRun(policy, TrainingConfig(output_dir=tmp_path, iterations=1, progress=False)) as run:
        for batch in (BATCH, other):
            found = constraint.violation(policy, batch)
            drawn = method.drawn(policy, batch)
            expected = method.residuals(policy, drawn, method.steps(policy, batch)).square() / 10.0 - 1
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            constraint.learn(run)
        assert constraint.measured(run) == {}
    assert constraint.state().keys() == {"erasure"}
    assert (method.log_z, weight.weight) == (config.log_z, before)


def test_interrupted_training_goes_on_as_if_it_had_not_been(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        CONFIG, rollout="policy", level="paper", resample_until=2, descent=replace(DESCENT, checkpoint_every=1)
    )

    def made() -> EraseFlow:
        return EraseFlow(config, reward=brightness, floor=RewardFloor(floor=0.2, lagrangian=Lagrangian()))

    whole = made().erase(make_policy(), CONCEPT, output_dir=tmp_path / "whole", progress=False)
    loss, calls = EraseFlowTraining.loss, 0

    def failing(self: EraseFlowTraining, policy: DiffusionPolicy, batch: ConceptBatch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return loss(self, policy, batch)

    monkeypatch.setattr(EraseFlowTraining, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        made().erase(make_policy(), CONCEPT, output_dir=tmp_path / "parts", progress=False)
    parts = made().erase(make_policy(), CONCEPT, output_dir=tmp_path / "parts", resume=True, progress=False)
    assert calls == 5
    assert all(torch.equal(parts.delta.tensors[name], value) for name, value in whole.delta.tensors.items())
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for one, other in zip(first, second, strict=True):
        timeless = [{tag: value for tag, value in line.items() if "time" not in tag} for line in (one, other)]
        assert timeless[0] == timeless[1]


# What it gives.


def test_lora_is_added_to_the_weights_that_it_is_on_and_a_parameter_set_can_be_trained_instead(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    policy = make_policy()
    names = dict.fromkeys(base_parameters(policy.unet))
    for train, expected in (
        (LoRAConfig(rank=2), {name for name in names if name.split(".")[-2] in ("to_q", "to_k", "to_v", "0")
                              and ".attn" in name and name.endswith("weight")}),
        ("xattn-kv", {name for name in names if ".attn2.to_k." in name or ".attn2.to_v." in name}),
    ):  # fmt: skip
        erasure = EraseFlow(replace(CONFIG, train=train)).erase(policy, CONCEPT, progress=False)
        assert erasure.delta.tensors.keys() == expected
        if train != "xattn-kv":
            ranks = {int(torch.linalg.matrix_rank(value, rtol=1e-3)) for value in erasure.delta.tensors.values()}
            assert max(ranks) <= 2


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, (100.0, 40.0)),
        ({"guidance_scale": 1.0}, (50.0, 20.0)),
        ({"resample_until": 5}, (25.0, 40.0)),
        ({"resample_until": 21}, (100.0, 40.0)),
        ({"steps": 20, "late_share": 0.8}, (40.0, 40.0)),
    ],
)
def test_calls_are_counted(changes: dict[str, Any], calls: tuple[float, float]) -> None:
    assert EraseFlow(EraseFlowConfig(**changes)).unet_calls() == calls


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_calls_that_are_counted_are_those_that_are_made(scale: float, policy: DiffusionPolicy) -> None:
    method = prepared(policy, replace(CONFIG, guidance_scale=scale))
    rows = {True: 0, False: 0}

    def count(_: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        rows[torch.is_grad_enabled()] += len(args[0])

    with policy.unet.register_forward_pre_hook(count, with_kwargs=True):
        method.loss(policy, BATCH)
    assert (rows[False] / 4, rows[True] / 4) == method.unet_calls()


# What it refuses.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"templates": ("{concept}",)}, r"templates must each hold \{concept\} and \{anchor\}, got '\{concept\}'"),
        ({"early_share": 0.9}, r"early_share must be at most 1 - late_share=0\.8, got 0\.9"),
        ({"retain_share": 1.0}, r"retain_share .* below 1"),
        ({"resample_until": 0}, r"resample_until .* at least 1"),
        ({"rollout": "original"}, r"rollout must be 'reference' or 'policy'"),
        ({"level": "own"}, r"level must be 'matched' or 'paper'"),
    ],
)
def test_settings_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EraseFlowConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "concept", "words"),
    [
        ({"anchor": "a striped cat"}, {}, r"the anchor must be free of 'stripes', got 'striped' in 'a striped cat'"),
        ({"anchors": ("a striped cat",)}, {}, r"EraseFlowConfig\.anchors must be free of 'stripes', got 'striped'"),
        ({}, {"preserve": ("", "a striped cat")}, r"Concept\.preserve must be free of 'stripes', got 'striped'"),
        ({"anchors": (" ".join(["cat"] * 30),)}, {}, r"EraseFlow's prompts must have at most 24 tokens"),
        ({"steps": 1000}, {}, r"steps must keep timesteps below the 1000 of training"),
    ],
)
def test_what_it_cannot_work_with_is_refused_before_training(
    changes: dict[str, Any], concept: dict[str, Any], words: str, policy: DiffusionPolicy
) -> None:
    with pytest.raises(ValueError, match=words):
        EraseFlow(replace(CONFIG, **changes)).prepare(policy, replace(CONCEPT, **concept))


def test_policy_without_trained_weights_and_a_loss_without_preparation_are_refused(
    make_policy: Callable[..., DiffusionPolicy], policy: DiffusionPolicy
) -> None:
    with pytest.raises(ValueError, match="erasing 'stripes' by EraseFlow needs a policy with trainable weights"):
        EraseFlow(CONFIG).prepare(make_policy(), CONCEPT)
    with pytest.raises(ValueError, match="prepare must be called before the first loss, and was not"):
        EraseFlow(CONFIG).loss(policy, BATCH)


# The tiny world.


def test_preset_is_of_pairs_that_differ_in_the_concept_alone() -> None:
    policy = tinyworld.load_policy(device="cpu", lora=LoRAConfig())
    method = EraseFlow(PRESETS["eraseflow"])
    method.prepare(policy, STRIPES)
    prompts = [phrase for phrase in STRIPES.phrases for _ in range(20)]
    for pair in method.pairs(ConceptBatch(prompts, range(len(prompts)))):
        striped = [word for word in STRIPES.phrases[:5] if f" {word} " in f" {pair.target} "]
        assert len(striped) == (not pair.retained)
        assert pair.anchor.split() == pair.target.replace(striped[0] if striped else "none", "").split()
