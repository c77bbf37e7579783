"""The loss of DiffusionNFT: pure functions of tensors, without a model.

A prediction `q` that is trained and the old policy's, for the same noised latents, are mixed into one that is led
towards a picture and one that is led away from it,

    plus  = beta q + (1 - beta) old          minus = (1 + beta) old - beta q

and a picture's advantage A says which of the two is to see it:

    r = clip(A, -m, m) / (2 m) + 1/2         loss = m (r L(plus) + (1 - r) L(minus)) / beta
    L(q) = mean of e(q)^2 / max(mean of |e(q)|, 1e-5)      the denominator held constant

`e(q)` is the error of the clean latents that q amounts to, as the authors have it for flow matching, or of q itself.
No likelihood is needed, so that any sampler may draw the pictures.

Source: Zheng et al. (2025), DiffusionNFT, https://arxiv.org/abs/2509.16117, with the weights and the clipping of the
authors' code. Errors of the prediction itself, for networks that predict noise or v, are ours: there an error of the
clean latents is one of the prediction times up to 14.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Positive

Forgetting = Literal["at once", "soon", "late"]
"""How fast the old policy follows, see `kept_share`."""


class NFTLoss(NamedTuple):
    """One number for each sample, and what they are made of."""

    loss: PerSample
    """With gradient to the trained prediction."""
    plus: PerSample
    """L of the prediction that is led towards the picture."""
    minus: PerSample
    """L of the one that is led away."""


def share_of(advantages: PerSample, max_advantage: float) -> PerSample:
    """Returns r: 1/2 for an advantage of 0, 0 and 1 at the ends of the clipping."""
    return advantages.clamp(-max_advantage, max_advantage) / (2 * max_advantage) + 0.5


def nft_loss(
    prediction: Latents,
    old: Latents,
    advantages: PerSample,
    error: Callable[[Latents], Latents],
    *,
    beta: Positive,
    max_advantage: Positive = 5.0,
) -> NFTLoss:
    """Returns the loss of each sample.

    Args:
        prediction: Of the trained policy, of the network's own kind.
        old: Of the old policy, without gradient.
        advantages: Of the pictures.
        error: From a prediction to its error: of the clean latents that it amounts to, or of itself.
        beta: How far the two predictions lie from the old one, above 0.
        max_advantage: Where advantages are clipped, above 0.
    """
    plus = _weighted_square(error(beta * prediction + (1 - beta) * old))
    minus = _weighted_square(error((1 + beta) * old - beta * prediction))
    share = share_of(advantages, max_advantage)
    return NFTLoss(max_advantage * (share * plus + (1 - share) * minus) / beta, plus, minus)


def kept_share(updates: int, forgetting: Forgetting) -> float:
    """Returns how much of the old policy stays when it follows the trained one after so many updates.

    The authors' three schedules: none of it; more and more of it up to a half, from 500 updates on; and nothing until
    update 75, and then more and more up to nearly all.
    """
    if forgetting == "at once":
        return 0.0
    return min(0.001 * updates, 0.5) if forgetting == "soon" else min(0.0075 * max(updates - 75, 0), 0.999)


def _weighted_square(error: Latents) -> PerSample:
    flat = error.flatten(1)
    weight = flat.detach().abs().mean(dim=1).clamp(min=1e-5)
    return flat.square().mean(dim=1) / weight
