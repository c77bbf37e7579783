"""Adversarial prompts: words before a prompt are sought on the vocabulary's simplex, the concept's own barred."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from erasure import UCE, Concept
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.adversarial_prompt import (
    TINY,
    AdversarialPrompt,
    AdversarialPromptConfig,
    NearestTokens,
    SimplexTokens,
    StraightThrough,
    allowed_tokens,
    onto_simplex,
)
from overpaint.evaluation.probes.noise_error import noise_error
from overpaint.evaluation.probes.prompt_attack import AttackConfig, PromptAttack
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.policy import DiffusionPolicy
from overpaint.policy.soft_prompts import encode_soft


@pytest.fixture(scope="module")
def target() -> ProbeTarget:
    return target_of(tiny_world(), DrawConfig(steps=10, guidance_scale=3.0))


@pytest.fixture(scope="module")
def original() -> DiffusionPolicy:
    return tinyworld.load_policy()


def test_points_go_to_the_nearest_ones_of_the_simplex() -> None:
    points = torch.tensor([[0.5, 0.9, -0.2], [0.2, 0.3, 0.5], [9.0, 1.0, 1.0], [-5.0, -5.0, -5.0]])
    expected = torch.tensor([[0.3, 0.7, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(onto_simplex(points), expected, rtol=0, atol=1e-6)


def test_the_gradient_of_drawn_words_is_that_of_the_points_up_to_one() -> None:
    points = torch.full((1, 2, 3), 1 / 3, requires_grad=True)
    apply: Any = StraightThrough.apply
    words = apply(points, torch.tensor([[2, 0]]))
    assert words.tolist() == [[[0, 0, 1], [1, 0, 0]]]
    (words * torch.tensor([[[0.5, -3.0, 2.0], [0.0, 0.1, -0.2]]])).sum().backward()
    assert points.grad is not None
    torch.testing.assert_close(points.grad, torch.tensor([[[0.5, -1.0, 1.0], [0.0, 0.1, -0.2]]]))


def test_words_are_drawn_by_their_shares_and_found_by_the_largest() -> None:
    words = torch.eye(3)
    tokens = SimplexTokens(words, prompts=2, tokens=1)
    with torch.no_grad():
        tokens.free[1, 0] = torch.tensor([0.25, 0.0, 0.75])
    generators = [torch.Generator().manual_seed(0)]
    drawn = torch.stack([tokens.drawn([1], generators)[0, 0].detach() for _ in range(400)]).mean(dim=0)
    assert drawn[1] == 0
    assert abs(float(drawn[2]) - 0.75) < 0.08
    assert tokens.found([1])[0, 0].tolist() == [0, 0, 1]
    with torch.no_grad():
        tokens.free[1, 0] += 1
    tokens.settle()
    torch.testing.assert_close(tokens.free[1, 0].detach(), torch.tensor([0.25, 0.0, 0.75]))


def test_vectors_count_as_the_word_nearest_in_angle() -> None:
    words = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    tokens = NearestTokens(words, 1, [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        tokens.free[0, 0] = torch.tensor([0.4, 0.5])
    drawn = tokens.drawn([0], [])
    torch.testing.assert_close(drawn[0, 0], words[1])
    drawn.sum().backward()
    assert tokens.free.grad is not None
    assert tokens.free.grad.tolist() == [[[1.0, 1.0]]]


def test_the_concepts_words_are_barred(original: DiffusionPolicy) -> None:
    allowed = set(allowed_tokens(original.prompts, tinyworld.STRIPES).tolist())
    barred = ("striped", "with", "stripes", "zebra", "in", "prison", "at", "the", "circus")
    for word in tinyworld.caption.WORDS:
        (token,) = original.prompts.ids(word)[1:-1]
        assert (token in allowed) == (word not in barred), word
    assert not allowed & set(original.tokenizer.all_special_ids)
    without_dots = allowed_tokens(original.prompts, Concept(name="dots", phrases=("dots", "a red dots square")))
    assert set(original.prompts.ids("a red square")[1:-1]) <= set(without_dots.tolist())  # of a phrase with another
    assert original.prompts.ids("dots")[1] not in without_dots


def test_p4d_descends_on_what_the_original_sees_for_the_clean_prompt(
    original: DiffusionPolicy, target: ProbeTarget
) -> None:
    task = target.task(original, count=2, seed=0, progress=False)
    words = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    config = replace(AdversarialPromptConfig.p4d().attack, timesteps=(700,))
    attack = PromptAttack(original, task, NearestTokens(words, 2, attack_generators(2)), config, "p4d")
    error = attack.error([0, 1], 700)
    attack = PromptAttack(original, task, NearestTokens(words, 2, attack_generators(2)), config, "p4d")
    noise = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in attack.generators])
    timesteps = torch.tensor([700, 700])
    noised = original.add_noise(original.encode_images(task.pictures), noise, timesteps)
    clean = original.predict_noise(noised, timesteps, original.encode(task.prompts))
    assert noise_error(original, noised, timesteps, original.encode(task.prompts), clean).sum() == 0
    soft = encode_soft(original.prompts, task.prompts, attack.tokens.found([0, 1]))
    expected = (original.predict_noise(noised, timesteps, soft) - clean).square().mean(dim=(1, 2, 3)).sum()
    torch.testing.assert_close(error.detach(), expected, rtol=1e-4, atol=0)


def attack_generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_words_bring_stripes_back_after_uce(original: DiffusionPolicy, target: ProbeTarget) -> None:
    policy = tinyworld.load_policy()
    UCE(tinyworld.PRESETS["uce"]).erase(policy, tinyworld.STRIPES).apply(policy)
    task = target.task(original, count=4, seed=0, progress=False)
    probe = AdversarialPrompt(replace(TINY, attack=replace(TINY.attack, timesteps=(700, 700))))
    (attempt,) = probe.attempt(policy, task)
    assert attempt.numbers["rate before"] == 0
    assert attempt.numbers["rate after"] >= 0.75
    assert attempt.mean_rate is not None
    assert attempt.mean_rate < attempt.numbers["rate after"]


def test_what_cannot_be_is_refused(original: DiffusionPolicy, target: ProbeTarget) -> None:
    task = target.task(original, count=1, seed=0, progress=False)
    probe = AdversarialPrompt(AdversarialPromptConfig(attack=AttackConfig(timesteps=(1000,))))
    with pytest.raises(ValueError, match="timesteps must be below 1000, got 1000"):
        probe.attempt(original, task)
    with pytest.raises(ValueError, match=r"AttackConfig.timesteps\[0\] must be at least 0, got -1"):
        AttackConfig(timesteps=(-1,))
