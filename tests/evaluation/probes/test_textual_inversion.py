"""Textual inversion: a word is learned on pictures, on the model under test or on the original."""

from dataclasses import replace

import pytest
import torch

from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.noise_error import generator_of
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.evaluation.probes.textual_inversion import TINY, TextualInversion, TextualInversionConfig
from overpaint.policy import DiffusionPolicy
from overpaint.policy.soft_prompts import encode_soft, initial_vectors


@pytest.fixture(scope="module")
def target() -> ProbeTarget:
    return target_of(tiny_world(), DrawConfig(steps=10, guidance_scale=3.0))


@pytest.fixture(scope="module")
def original() -> DiffusionPolicy:
    return tinyworld.load_policy()


def test_the_first_update_is_adams(original: DiffusionPolicy, target: ProbeTarget) -> None:
    config = TextualInversionConfig(
        initial_text="red star", updates=1, batch_size=2, learning_rate=0.1, weight_decay=0.2
    )
    task = target.task(original, count=3, seed=0, progress=False)
    learned = TextualInversion(config).learn(original, task, 3)

    generator = generator_of("textual-inversion-3", task.seeds[0])
    chosen = torch.randint(3, (2,), generator=generator)
    timesteps = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    word = initial_vectors(original.prompts, "red star red", 3).clone().requires_grad_()
    clean = original.encode_images(task.pictures[chosen])
    templates = [task.templates[index] for index in chosen.tolist()]
    encoded = encode_soft(original.prompts, templates, word.expand(2, -1, -1))
    seen = original.predict_noise(original.add_noise(clean, noise, timesteps), timesteps, encoded)
    (gradient,) = torch.autograd.grad(((seen - noise) ** 2).mean(), [word])
    expected = (1 - 0.1 * 0.2) * word - 0.1 * gradient / (gradient.abs() + 1e-8)  # Adam's first step is a sign
    torch.testing.assert_close(learned, expected.detach(), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_word_brings_stripes_back_after_uce(original: DiffusionPolicy, target: ProbeTarget) -> None:
    policy = tinyworld.load_policy()
    UCE(tinyworld.PRESETS["uce"]).erase(policy, tinyworld.STRIPES).apply(policy)
    probe = TextualInversion(replace(TINY, vectors=(1,)))
    task = target.task(original, count=4, seed=0, progress=False)
    white, black = probe.attempt(policy, task)
    assert (white.variant, black.variant) == ("white box, 1 vector", "black box, 1 vector")
    assert (white.scores >= task.shown_from).float().mean() == 1
    ceiling = probe.attempt(original, task)
    assert all((one.scores >= task.shown_from).all() for one in ceiling)
    assert torch.equal(ceiling[0].images, ceiling[1].images)


def test_a_word_for_plain_objects_brings_nothing(original: DiffusionPolicy, target: ProbeTarget) -> None:
    task = target.task(original, count=4, seed=0, floor="benign", progress=False)
    probe = TextualInversion(replace(TINY, vectors=(1,), updates=20))
    assert not any((one.scores >= task.shown_from).any() for one in probe.attempt(original, task))


def test_a_word_has_vectors() -> None:
    with pytest.raises(ValueError, match=r"TextualInversionConfig.vectors\[0\] must be at least 1, got 0"):
        TextualInversionConfig(vectors=(0,))
