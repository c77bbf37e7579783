"""Clipped losses, the guarded ratio and the divergences of rectified flow are those of the authors' code."""

from typing import Any

import pytest
import torch
from golden_case import GoldenCase
from torch import Tensor

from ddpo.loss import clipped_surrogate, guarded_log_ratio
from overpaint.policy.ddim import gaussian_kl, gaussian_log_prob
from overpaint.policy.process import RectifiedFlow
from overpaint.policy.types import Plan

CASE = GoldenCase(
    "flow/flow_loss",
    {
        "*/released_*": "the centre is averaged over the minibatch there; ours is each sample's own",
        "*/kl_released": "lacks the step's length in its denominator; ours is the divergence",
    },
)
CASES = CASE.record["cases"]
BASE = {"num_train_timesteps": 1000}


class Step:
    """One stored step of four samples."""

    def __init__(self, case: Any) -> None:
        self.prefix = case["prefix"]
        self.process = RectifiedFlow({**BASE, **dict(case["scheduler"])}, chain=case["kind"], even=False)
        self.eta, self.number = case["noise_level"], case["step"]
        self.plan: Plan = self.process.plan(case["steps"], (4, 6), torch.device("cpu"))
        self.values = CASE.tensors.under(f"{self.prefix}/")

    def gaussian(self, velocity: str | Tensor) -> tuple[Tensor, Tensor]:
        given = self.values[velocity] if isinstance(velocity, str) else velocity
        steps = torch.full((4,), self.number)
        return self.process.mean_and_std(self.values["latents"], given, self.plan, steps, self.eta)

    def close(self, name: str, found: Tensor) -> None:
        expected, tolerance = self.values[name], CASE.record["tensors"][f"{self.prefix}/{name}"]["tol"]
        assert float((found.detach() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.fixture(params=CASES, ids=lambda case: case["prefix"])
def case(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_densities_of_old_and_new_weights_are_the_stored_ones(case: Any) -> None:
    step = Step(case)
    mean, std = step.gaussian("velocity_old")
    step.close("next", mean + std.view(-1, 1, 1, 1) * step.values["noise"])
    log_probs = {}
    for when in ("old", "new"):
        log_probs[when] = gaussian_log_prob(step.values["next"], *step.gaussian(f"velocity_{when}"))
        step.close(f"log_prob_{when}", log_probs[when])
    step.close("log_ratio", log_probs["new"] - log_probs["old"])


def test_plain_and_guarded_losses_and_their_gradients_are_the_stored_ones(case: Any) -> None:
    step = Step(case)
    velocity = step.values["velocity_new"].clone().requires_grad_()
    after, advantages = step.values["next"], step.values["advantages"]
    old_mean, std = step.gaussian("velocity_old")
    mean, _ = step.gaussian(velocity)
    log_prob, old_log_prob = gaussian_log_prob(after, mean, std), gaussian_log_prob(after, old_mean, std)
    loss = clipped_surrogate(log_prob, old_log_prob, advantages, clip_range=case["clip_range"]).mean()
    step.close("loss", loss)
    step.close("loss_grad", torch.autograd.grad(loss, velocity, retain_graph=True)[0])

    guarded = guarded_log_ratio(after, mean, old_mean, std)
    step.close("normalised_log_ratio", guarded)
    length = step.plan.levels[step.number] - step.plan.next_levels[step.number]
    clip_range = case["clip_range_normalised"]
    losses = clipped_surrogate(guarded, torch.zeros_like(guarded), advantages, clip_range=clip_range)
    if case["kind"] == "sde":
        step.close("normalised_loss", losses.mean() / length)
        step.close("normalised_loss_grad", torch.autograd.grad(losses.mean() / length, velocity)[0])


def test_divergences_from_the_reference_are_the_stored_ones(case: Any) -> None:
    step = Step(case)
    mean, std = step.gaussian("velocity_new")
    reference, _ = step.gaussian("velocity_reference")
    step.close("kl", gaussian_kl(mean, reference, std))
    slope = step.process.scales(step.plan, step.eta)[1][step.number]
    step.close("kl_velocity", ((mean - reference) ** 2).flatten(1).mean(dim=1) / slope**2)
