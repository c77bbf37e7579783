"""The attack on the vectors behind the words of a constraint's prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import (
    ESD,
    SAFREE,
    SLD,
    UCE,
    Concept,
    ConceptBatch,
    ESDConfig,
    ReferenceDistance,
    ReferenceDistanceConfig,
    SAFREEConfig,
    SLDConfig,
    SoftAttack,
    SoftAttackConfig,
)
from erasure.protocols import UNetCalls
from erasure.soft_attack import TAGS, Judge, Judged, start_vectors
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.policy.soft_prompts import encode_soft
from overpaint.policy.types import Images, PerSample
from overpaint.tinyworld.texture import stripe_response
from overpaint.training import TrainingConfig, TrainingRun

PROMPTS = ["a striped red star", "a blue circle in prison", "a striped red star"]
SEEDS = [3, 4, 5]
ALL = SoftAttackConfig(share=1.0, steps=3)
STEPS, AT = 6, 2


def contrast(images: Images, prompts: Sequence[str]) -> PerSample:
    """How much a picture looks like stripes, without a floor."""
    return stripe_response(images)


def pictures(policy: DiffusionPolicy, prompts: Sequence[str], seeds: Sequence[int], scale: float = 1.0) -> Tensor:
    """One-step pictures, with gradient from an early step, where a prompt still decides much."""
    conditioning, guidance = policy.encode(prompts), ClassifierFree(scale)
    latents = policy.sample(conditioning, steps=STEPS, guidance=guidance, seeds=seeds, until=AT)
    return policy.decode(policy.predict_clean(latents, conditioning, step=AT, steps=STEPS, guidance=guidance))


def judge_of(policy: DiffusionPolicy, scale: float = 1.0) -> Judge:
    return lambda prompts, seeds: Judged(contrast(pictures(policy, prompts, seeds, scale), prompts))


@pytest.fixture(scope="module")
def erased() -> DiffusionPolicy:
    """A tiny world without stripes, with a LoRA to train."""
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    UCE().erase(policy, tinyworld.STRIPES).apply(policy)
    return policy


def measured(attack: SoftAttack, policy: DiffusionPolicy, folder: Path) -> dict[str, float]:
    with TrainingRun(policy, TrainingConfig(output_dir=folder, iterations=1, progress=False)) as run:
        return attack.measured(run)


# What it does.


def test_attack_raises_what_it_climbs(erased: DiffusionPolicy, tmp_path: Path) -> None:
    attack = SoftAttack(SoftAttackConfig(share=1.0))
    plain = judge_of(erased)(PROMPTS, SEEDS).violation.detach()
    raised = attack.judged(erased, PROMPTS, SEEDS, judge_of(erased), iteration=0).detach()
    assert raised.shape == plain.shape
    assert raised.mean() > 1.5 * plain.mean()
    told = measured(attack, erased, tmp_path)
    assert told["erasure/attacked_samples"] == 3
    assert told["erasure/violation_before_attack"] == pytest.approx(float(plain.mean()), rel=1e-4)
    assert told["erasure/violation_after_attack"] == pytest.approx(float(raised.mean()), rel=1e-4)
    assert measured(attack, erased, tmp_path / "again") == {}


def test_detector_that_is_flat_is_overcome_by_a_score_that_is_not(erased: DiffusionPolicy, tmp_path: Path) -> None:
    detector = tinyworld.StripeScore()

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        images = pictures(erased, prompts, seeds)
        return Judged(detector(images, prompts), contrast(images, prompts) if scored else None)

    found = {}
    for scored in (False, True):
        attack = SoftAttack(SoftAttackConfig(share=1.0, steps=8))
        found[scored] = attack.judged(erased, PROMPTS, SEEDS, judge, iteration=0)
    assert found[False].max() == 0
    assert found[True].max() > 0.05


def test_before_the_first_step_an_attacked_prompt_is_the_plain_one(erased: DiffusionPolicy) -> None:
    texts = ["a striped red star", "circle"]
    vectors = start_vectors(erased.prompts, texts, 5)
    soft = encode_soft(erased.prompts, [f"{text} {{}}" for text in texts], vectors).tokens
    torch.testing.assert_close(soft, erased.encode(texts).tokens, rtol=0, atol=1e-5)


def test_tokens_of_the_words_are_those_of_the_plain_prompt(erased: DiffusionPolicy) -> None:
    words = len(erased.prompts.ids(PROMPTS[0])) - 1
    seen: list[Tensor] = []

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        tokens = erased.encode(prompts).tokens
        seen.append(tokens[0].detach())
        return Judged(tokens.flatten(1).square().sum(dim=1))

    SoftAttack(ALL).judged(erased, PROMPTS[:1], SEEDS[:1], judge, iteration=0)
    assert len(seen) == ALL.steps + 2
    torch.testing.assert_close(seen[-1][:words], seen[0][:words], rtol=0, atol=1e-5)
    assert not torch.allclose(seen[-1][words:], seen[0][words:], atol=0.1)


@pytest.mark.parametrize("objective", ["esd", "reference"])
def test_losses_of_objectives_are_raised_too(objective: str) -> None:
    policy = tinyworld.load_policy(train="xattn")
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.mul_(1.01)
    loss = ESD(ESDConfig(steps=4)) if objective == "esd" else ReferenceDistance(ReferenceDistanceConfig(steps=4))
    loss.prepare(policy, tinyworld.STRIPES)

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        return Judged(loss.loss(policy, ConceptBatch(prompts, seeds)) / 1e-3 - 1)

    plain = judge(PROMPTS, SEEDS).violation
    raised = SoftAttack(ALL).judged(policy, PROMPTS, SEEDS, judge, iteration=0)
    assert raised.mean() > plain.mean() + 0.1 * (1 + plain.mean())
    raised.mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.trainable_parameters())


def test_highest_point_on_the_way_is_kept_for_each_prompt(erased: DiffusionPolicy) -> None:
    """The first prompt is highest after a step, the second at the start."""
    heights = iter([[1.0, 9.0], [7.0, 2.0], [3.0, 1.0], [4.0, 5.0]])
    seen: list[Tensor] = []

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        tokens = erased.encode(prompts).tokens
        seen.append(tokens.detach())
        return Judged(torch.tensor(next(heights, [0.0, 0.0])) + tokens.flatten(1).sum(dim=1) * 1e-6)

    SoftAttack(ALL).judged(erased, ["a red star", "a blue cross"], SEEDS[:2], judge, iteration=0)
    assert len(seen) == 5
    torch.testing.assert_close(seen[-1][0], seen[1][0])
    torch.testing.assert_close(seen[-1][1], seen[0][1])


# Which samples.


def test_samples_come_back_in_their_order_attacked_or_not(erased: DiffusionPolicy) -> None:
    seeds, prompts = list(range(12)), ["a red star", "a blue star", "a cross"] * 4
    asked: list[int] = []

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        tokens = erased.encode(prompts).tokens
        if tokens.requires_grad:
            asked.extend(seed for seed in seeds if seed not in asked)
        numbers = torch.tensor([[float(seed), seed + 0.5] for seed in seeds])  # two for each sample
        return Judged((numbers + 0 * tokens.sum()).flatten())

    found = SoftAttack(SoftAttackConfig(steps=1)).judged(erased, prompts, seeds, judge, iteration=0)
    assert found.tolist() == [half / 2 for half in range(24)]
    assert 0 < len(asked) < 12


def test_share_is_met_on_average_whatever_the_batch(erased: DiffusionPolicy) -> None:
    attack = SoftAttack(SoftAttackConfig(share=0.3))
    assert sum(attack._takes(seed) for seed in range(4000)) / 4000 == pytest.approx(0.3, abs=0.03)


def test_attack_is_made_at_every_so_manieth_update(erased: DiffusionPolicy, tmp_path: Path) -> None:
    attack = SoftAttack(SoftAttackConfig(share=1.0, steps=1, every=3))
    judge: Judge = lambda prompts, seeds: Judged(erased.encode(prompts).tokens.flatten(1).sum(dim=1))  # noqa: E731
    told = []
    for iteration in range(4):
        attack.judged(erased, PROMPTS, SEEDS, judge, iteration=iteration)
        told.append(measured(attack, erased, tmp_path / str(iteration)).get("erasure/attacked_samples", 0.0))
    assert told == [3.0, 0.0, 0.0, 3.0]


def test_samples_do_not_depend_on_whom_they_are_judged_with(erased: DiffusionPolicy) -> None:
    judge = judge_of(erased)
    attack = SoftAttack(SoftAttackConfig(share=0.6, steps=2))
    prompts, seeds = [*PROMPTS[:2], "a green cross"], [11, 12, 13]
    together = attack.judged(erased, prompts, seeds, judge, iteration=0)
    alone = [
        attack.judged(erased, [prompt], [seed], judge, iteration=0) for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-2, atol=1e-3)


def test_same_seeds_give_the_same_attack_to_the_last_bit(erased: DiffusionPolicy) -> None:
    first, again = (
        SoftAttack(ALL).judged(erased, PROMPTS, SEEDS, judge_of(erased), iteration=0).detach() for _ in range(2)
    )
    assert torch.equal(first, again)
    other = SoftAttack(ALL).judged(erased, PROMPTS, [6, 7, 8], judge_of(erased), iteration=0).detach()
    assert not torch.equal(first, other)


# What it leaves alone.


def test_ascent_gives_the_weights_no_gradient_and_the_update_does(erased: DiffusionPolicy) -> None:
    grads: list[bool] = []

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        grads.append(any(parameter.grad is not None for parameter in erased.unet.parameters()))
        return judge_of(erased)(prompts, seeds)

    raised = SoftAttack(ALL).judged(erased, PROMPTS, SEEDS, judge, iteration=0)
    assert grads == [False] * (ALL.steps + 2)
    assert all(parameter.grad is None for parameter in erased.text_encoder.parameters())
    raised.mean().backward()
    assert all(parameter.grad is not None for parameter in erased.trainable_parameters())
    assert all(parameter.grad is None for parameter in erased.text_encoder.parameters())
    for parameter in erased.trainable_parameters():
        parameter.grad = None


@pytest.mark.parametrize("when", [1, 4, 5])
def test_encodings_and_network_are_restored_after_an_error(erased: DiffusionPolicy, when: int) -> None:
    before, network, asked = erased.encode(PROMPTS).tokens, erased.network, []

    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        asked.append(1)
        if len(asked) == when:
            raise RuntimeError("out of memory")
        return judge_of(erased)(prompts, seeds)

    with pytest.raises(RuntimeError, match="out of memory"):
        SoftAttack(ALL).judged(erased, PROMPTS, SEEDS, judge, iteration=0)
    assert torch.equal(erased.encode(PROMPTS).tokens, before)
    assert erased.network is network


# What it costs.


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_calls_are_as_many_as_stated(erased: DiffusionPolicy, scale: float, tmp_path: Path) -> None:
    branches = 1 if scale == 1.0 else 2
    cost = UNetCalls(forward=AT * branches, backward=branches)
    attack = SoftAttack(ALL)
    rows = {True: 0, False: 0}

    def count(module: object, inputs: tuple[Any, ...]) -> None:
        rows[torch.is_grad_enabled()] += len(inputs[0])

    with torch.enable_grad():
        hook = erased.unet.register_forward_pre_hook(count)
        attack.judged(erased, PROMPTS, SEEDS, judge_of(erased, scale), iteration=0)
        hook.remove()
    stated = attack.unet_calls(cost)
    assert rows[False] == len(PROMPTS) * (stated.forward + cost.forward)
    assert rows[True] == len(PROMPTS) * (stated.backward + cost.backward)
    told = measured(attack, erased, tmp_path)
    assert told["erasure/attack_rows_forward"] == len(PROMPTS) * stated.forward
    assert told["erasure/attack_rows_backward"] == len(PROMPTS) * stated.backward
    assert set(told) == set(TAGS)


def test_stated_calls_are_an_average_over_samples_and_updates() -> None:
    config = SoftAttackConfig(steps=5, share=0.5, every=4)
    assert SoftAttack(config).unet_calls(UNetCalls(16.0, 2.0)) == UNetCalls((5 * 16 + 18) / 8, 1.25)


# Guards.


@pytest.mark.parametrize("guard", ["sld", "safree"])
def test_guards_stay_at_work_and_are_climbed_past_with_gradient(guard: str) -> None:
    policy = tinyworld.load_policy()
    concept = Concept(name="stripes", phrases=("striped", "with stripes"))
    guards: dict[str, Any] = {
        "sld": SLD(SLDConfig(warmup_steps=0, momentum_scale=0.3)),
        "safree": SAFREE(SAFREEConfig(filtered_steps=50, midpoint=0.0, latent_reattention=False)),
    }
    guards[guard].erase(policy, concept).apply(policy)
    plain = judge_of(policy, 3.0)(PROMPTS, SEEDS).violation
    raised = SoftAttack(ALL).judged(policy, PROMPTS, SEEDS, judge_of(policy, 3.0), iteration=0)
    policy.guard, kept = None, policy.guard
    unguarded = SoftAttack(ALL).judged(policy, PROMPTS, SEEDS, judge_of(policy, 3.0), iteration=0)
    policy.guard = kept
    assert raised.mean() > plain.mean()
    assert not torch.allclose(raised, unguarded, atol=1e-3)
    torch.testing.assert_close(judge_of(policy, 3.0)(PROMPTS, SEEDS).violation, plain, rtol=0, atol=1e-6)


# What cannot be.


def test_prompts_without_room_are_refused_before_the_training(erased: DiffusionPolicy) -> None:
    attack = SoftAttack(SoftAttackConfig(vectors=15))
    attack.check(erased, ["a striped red star circle cross square"])
    with pytest.raises(ValueError, match=r"vectors=15 and have at most 9 tokens.*got 10"):
        attack.check(erased, ["a star", "a striped red star circle cross square blue"])
    with pytest.raises(ValueError, match="must be without"):
        attack.check(erased, ["a {} star"])


@pytest.mark.parametrize("kind", ["detached", "own prompts"])
def test_cost_without_a_gradient_to_the_prompts_is_refused(erased: DiffusionPolicy, kind: str) -> None:
    def judge(prompts: Sequence[str], seeds: Sequence[int]) -> Judged:
        images = pictures(erased, ["a star"] if kind == "own prompts" else prompts, SEEDS[:1])
        violation = contrast(images, prompts)
        return Judged(violation.detach() if kind == "detached" else violation)

    with pytest.raises(ValueError, match="must have a gradient to how its prompts are encoded"):
        SoftAttack(ALL).judged(erased, PROMPTS[:1], SEEDS[:1], judge, iteration=0)


def test_score_that_says_it_has_no_gradient_is_refused() -> None:
    class Counted:
        differentiable = False

        def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
            return torch.zeros(len(images))

    with pytest.raises(ValueError, match=r"SoftAttack\.score must be differentiable"):
        SoftAttack(score=Counted())


@pytest.mark.parametrize(
    "settings", [{"vectors": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"share": 0.0}, {"share": 1.5}, {"every": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"SoftAttackConfig\.{next(iter(settings))} must be"):
        SoftAttackConfig(**settings)
