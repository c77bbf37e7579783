"""The map from rewards to a loss."""

import math

from overpaint.policy.types import PerSample


def hinge(rewards: PerSample, *, margin: float) -> PerSample:
    """Maps each reward to max(0, margin - reward).

    Samples that already score above the margin stop pulling, which keeps ReFL from running away with the reward.
    Source: phi of Algorithm 1 in Xu et al. (2023), https://arxiv.org/abs/2304.05977, with the margin of 2 that
    THUDM/ImageReward's `ReFL.py` has. An infinite reward, which would pass for one above the margin, gives NaN.
    """
    return (margin - rewards).relu().where(rewards != math.inf, math.nan)
