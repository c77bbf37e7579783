"""How much each denoising step counts, checked by hand and by the network's own gradient."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ddpo import DDPOConfig
from ddpo.steps import signal_weights, step_plan, step_scales
from overpaint.policy import ClassifierFree, DiffusionPolicy


@pytest.mark.parametrize("steps", [3, 10])
def test_weights_are_variance_over_slope_by_the_equations_of_ddim(steps: int, policy: DiffusionPolicy) -> None:
    timesteps = policy.plan(steps).timesteps
    level = policy.process.levels(timesteps).double()
    previous = policy.process.levels((timesteps - 1000 // steps).clamp(min=0)).double()
    variance = (1 - previous) / (1 - level) * (1 - level / previous)
    slope = (previous / level).sqrt() * (1 - level).sqrt() - (1 - previous - variance).clamp(min=0).sqrt()
    expected = (variance / slope).float()
    torch.testing.assert_close(signal_weights(policy, steps=steps, eta=1.0), expected, rtol=1e-5, atol=0.0)


def test_slope_is_how_the_mean_of_a_step_follows_the_prediction(
    make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path
) -> None:
    for policy in (make_policy(), DiffusionPolicy.from_pretrained(v_pipeline_dir, device="cpu")):
        _, slope = step_scales(policy, steps=5, eta=0.7)
        latents = torch.zeros(1, 4, 8, 8)

        def mean(step: int, prediction: float, latents: torch.Tensor = latents, policy: DiffusionPolicy = policy):
            policy.network = lambda *_, **__: (torch.full((1, 4, 8, 8), prediction),)
            noise = torch.zeros_like(latents)
            guidance = ClassifierFree(1.0)
            return policy.denoise(
                latents, policy.encode(["a cat"]), step=step, steps=5, guidance=guidance, eta=0.7, noise=noise
            )

        for step in range(5):
            moved = float((mean(step, 1.0) - mean(step, 0.0)).abs().mean())
            assert moved == pytest.approx(float(slope[step]), rel=1e-4)


def test_equal_weights_are_one_and_steps_are_drawn_anew(policy: DiffusionPolicy) -> None:
    weights, chosen, *_ = step_plan(policy, DDPOConfig(steps=10, timestep_fraction=0.5))
    assert torch.equal(weights, torch.ones(10))
    assert chosen is None


def test_signal_trains_on_the_heaviest_steps_whose_weights_have_mean_one(policy: DiffusionPolicy) -> None:
    weights, chosen, *_ = step_plan(policy, DDPOConfig(steps=10, timestep_fraction=0.3, step_weights="signal"))
    assert chosen is not None
    assert len(chosen) == 3
    assert float(weights[chosen].mean()) == pytest.approx(1.0, abs=1e-6)
    rest = [step for step in range(10) if step not in chosen.tolist()]
    assert weights[chosen].min() >= weights[rest].max()
