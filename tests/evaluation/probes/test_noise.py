"""Noise along the trajectory: the step's formula, seeds of every pair, and the best picture of each attempt."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from overpaint.evaluation.probes.noise import Noise, NoiseConfig, Way, draw_ways, noisy_step
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.evaluation.probes.seeds import seed_of
from overpaint.policy import ClassifierFree, DiffusionPolicy


def test_a_step_is_the_hand_computed_one() -> None:
    alpha, previous, eta, scale = 0.3, 0.5, 1.85, 1.04
    std = eta * math.sqrt((1 - previous) / (1 - alpha) * (1 - alpha / previous))
    assert 1 - previous - std**2 < 0  # so the absolute value matters
    expected = math.sqrt(previous) * 2.0 + math.sqrt(abs(1 - previous - std**2)) * 0.5 + scale * std * -1.5
    clean, epsilon, noise = (torch.full((1, 4, 2, 2), value) for value in (2.0, 0.5, -1.5))
    numbers = (torch.tensor([value]) for value in (alpha, previous, eta, scale))
    found = noisy_step(clean, epsilon, *numbers, noise)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_with_no_more_noise_than_ddim_has_it_is_ddim(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask], eta: float
) -> None:
    task = make_task(policy)
    (images,) = draw_ways(policy, task, task.prompts, [Way(eta)], batch_size=4, desc="")
    drawn = policy.draw(task.prompts, seeds=task.seeds, steps=3, guidance=ClassifierFree(3.0), eta=eta)
    torch.testing.assert_close(images, drawn, rtol=0, atol=1e-4)


def test_each_pair_has_its_own_seed_whatever_others_are_tried(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]
) -> None:
    task = make_task(policy)
    alone = Noise(NoiseConfig(etas=(1.5,), scales=(1.02,))).attempt(policy, task)[0]
    ways = [Way(eta, 1.02, f"noise {eta} 1.02") for eta in (1.2, 1.5)]
    first, second = draw_ways(policy, task, task.prompts, ways, batch_size=16, desc="")
    torch.testing.assert_close(alone.images, second, rtol=0, atol=1e-4)
    assert not torch.allclose(first, second, atol=0.01)
    assert len({way.seed(seed) for way in ways for seed in task.seeds} | set(task.seeds)) == 6
    assert seed_of("a", 1) != seed_of("a", 2)


def test_the_best_picture_counts_beside_the_mean(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    task, config = make_task(policy), NoiseConfig(etas=(1.85, 1.0), scales=(1.0, 1.04))
    ways = [Way(eta, scale, f"noise {eta:g} {scale:g}") for eta in config.etas for scale in config.scales]
    scores = torch.stack(
        [task.score(one) for one in draw_ways(policy, task, task.prompts, ways, batch_size=64, desc="")]
    )
    task = replace(task, shown_from=scores.median().item())
    shown = (scores >= task.shown_from).float()
    (found,) = Noise(config).attempt(policy, task)
    assert found.variant == "best of 4"
    torch.testing.assert_close(found.scores, scores.amax(dim=0))
    torch.testing.assert_close(task.score(found.images), found.scores)
    assert found.mean_rate == pytest.approx(shown.mean().item())
    assert [eta for eta, _ in found.curve] == [1.0, 1.85]
    assert found.curve[0][1] == pytest.approx(shown[2:].mean().item())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"NoiseConfig.etas\[0\] must be at least 0, got -1\.0"):
        NoiseConfig(etas=(-1.0,))
    with pytest.raises(ValueError, match=r"NoiseConfig\.scales"):
        NoiseConfig(scales=())
    assert len(NoiseConfig().etas) * len(NoiseConfig().scales) == 24
