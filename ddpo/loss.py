"""The losses of policy gradients over denoising steps, one number for each (sample, step) pair.

Log-probabilities are means over the latent's elements, so that ratios stay very near 1 and clip ranges are small.
Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, section 4.3.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy.types import Latents, PerSample
from overpaint.settings import NonNegative


def score_function(log_probs: PerSample, advantages: PerSample) -> PerSample:
    """Returns -advantage * log_prob (DDPO-SF); its gradient is right for samples of the present weights only."""
    return -advantages * log_probs


def clipped_surrogate(
    log_probs: PerSample, old_log_probs: PerSample, advantages: PerSample, *, clip_range: NonNegative
) -> PerSample:
    """Returns max(-advantage * ratio, -advantage * clip(ratio, 1 - clip_range, 1 + clip_range)) (DDPO-IS).

    The ratio is that of the present probability of a step to the one it was drawn with. A step that has moved farther
    than the clip range in the direction of its advantage gets no more gradient.
    Source of the clipping: Schulman et al. (2017), https://arxiv.org/abs/1707.06347, equation 7.
    """
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def guarded_log_ratio(values: Latents, mean: Latents, old_mean: Latents, std: PerSample) -> PerSample:
    """Returns the logarithm of GRPO-Guard's ratio: mean over elements of z (mean - old_mean), in float64.

    With the noise `z = (values - old_mean) / std` of a step it is (log ratio + |mean - old_mean|^2 / (2 std^2)) std:
    the ratio's logarithm without its negative mean, and without 1 / std, by which some steps are clipped more often.
    Source: Wang et al. (2025), GRPO-Guard, https://arxiv.org/abs/2510.22319, and yifan123/flow_grpo. Departure: the
    released code takes the mean of |mean - old_mean|^2 over the minibatch, here each sample has its own.
    """
    noise = (values.double() - old_mean.double()) / std.double().view(-1, 1, 1, 1)
    return (noise * (mean.double() - old_mean.double())).flatten(1).mean(dim=1)


def ratio_statistics(
    log_probs: PerSample, old_log_probs: PerSample, *, clip_range: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " 3"]]:
    """Returns how far present and old log-probabilities of some pairs have parted, without gradient.

    Returns:
        The largest |ratio - 1|; and the sums over the pairs of: whether it is above the clip range, k1 = old - new, and
        k3 = ratio - 1 - log ratio. The means of the last two estimate the divergence of the old policy from the new
        one; k3 is never negative and varies less. Source: Schulman (2020), http://joschu.net/blog/kl-approx.html.
    """
    change = (log_probs - old_log_probs).detach()
    off = change.expm1()
    sums = torch.stack([(off.abs() > clip_range).float().sum(), -change.sum(), (off - change).sum()])
    return off.abs().max(), sums
