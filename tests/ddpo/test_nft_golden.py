"""DiffusionNFT's loss and its gradient are those of the authors' code, and of the same formula for noise and v."""

from typing import Any

import pytest
import torch
from golden_case import GoldenCase
from torch import Tensor

from ddpo.nft_loss import kept_share, nft_loss, share_of
from overpaint.policy import ddim, flow

CASE = GoldenCase("flow/nft")
CASES = CASE.record["cases"]


def check(name: str, found: Tensor) -> None:
    expected, tolerance = CASE.tensors[name], CASE._content["tensors"][name]["tol"]
    bound = tolerance * (expected.abs().max().item() or 1.0)
    torch.testing.assert_close(
        found.to(expected.dtype), expected, rtol=0, atol=bound, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda one: one["prefix"])
@pytest.mark.parametrize("space", ["clean", "network"])
def test_loss_and_gradient(case: Any, space: str) -> None:
    prefix, kind = case["prefix"], case["kind"]
    given = CASE.tensors.under(f"{prefix}/")
    clean, noise, levels, old = (given[name] for name in ("clean", "noise", "levels", "old"))
    if kind == "flow":
        latents, target = flow.noised(clean, noise, levels), noise - clean
    else:
        latents = ddim.add_noise(clean, noise, levels)
        target = ddim.prediction_target(clean, noise, levels, kind)
    check(f"{prefix}/noised", latents)

    def error(prediction: Tensor) -> Tensor:
        if space == "network":
            return prediction - target
        if kind == "flow":
            return flow.clean_of(latents, prediction, levels) - clean
        return ddim.predict_clean(latents, prediction, levels, kind) - clean

    prediction = given["prediction"].clone().requires_grad_()
    found = nft_loss(
        prediction, old, given["advantages"], error, beta=case["beta"], max_advantage=case["max_advantage"]
    )
    nearness = (prediction - given["reference"]).square().mean()
    loss = found.loss.mean() + case["kl_weight"] * nearness
    (gradient,) = torch.autograd.grad(loss, [prediction])
    if space == "network":
        check(f"{prefix}/network_space/loss", loss)
        check(f"{prefix}/network_space/grad", gradient)
        return
    check(f"{prefix}/r", share_of(given["advantages"], case["max_advantage"]))
    for name, value in (("positive", found.plus), ("negative", found.minus), ("policy", found.loss.mean())):
        check(f"{prefix}/{name}", value)
    for name, value in (("kl", nearness), ("loss", loss), ("grad", gradient)):
        check(f"{prefix}/{name}", value)


@pytest.mark.parametrize(("number", "forgetting"), list(enumerate(("at once", "soon", "late"))))
def test_old_policy_follows_by_the_authors_schedules(number: int, forgetting: Any) -> None:
    updates = CASE.tensors["decay/update"].tolist()
    check(f"decay/type{number}", torch.tensor([kept_share(int(one), forgetting) for one in updates]))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_where_both_policies_are_one_the_gradient_does_not_depend_on_beta(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, old = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    advantages = torch.tensor([1.0, 0.0, -2.0])
    prediction = old.clone().requires_grad_()
    found = nft_loss(prediction, old, advantages, lambda one: one - clean, beta=beta)
    (gradient,) = torch.autograd.grad(found.loss.sum(), [prediction])
    weight = (old - clean).flatten(1).abs().mean(dim=1).view(-1, 1, 1, 1)
    expected = advantages.view(-1, 1, 1, 1) * 2 * (old - clean) / weight / old[0].numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
