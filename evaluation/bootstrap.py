"""Bootstrap confidence intervals that draw whole clusters, since the images of one prompt are not independent."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy
from jaxtyping import Float

from .statistics import sums_by_cluster

Method = Literal["percentile", "bca"]
BLOCK = 2**20
"""Clusters drawn at a time, which bounds the memory."""


class Interval(NamedTuple):
    """The ends of a confidence interval; NaN where one cluster does not tell."""

    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[str] | None = None,
    *,
    method: Method = "bca",
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns a confidence interval of the mean of the values.

    As many clusters as there are are drawn with replacement, each with all its values, and the mean is taken again. For
    the difference of two models give the differences of their values, image by image.

    Source: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapters 13 (percentile) and 14 (BCa: bias
    corrected and accelerated, the acceleration from leaving out one cluster at a time).

    Args:
        values: What was measured.
        clusters: What each value belongs to, such as its prompt; every value is one by itself if they are not given.
        method: "percentile" or "bca"; with fewer than about 20 clusters both are too narrow.
        resamples: How often the clusters are drawn.
        confidence: How often the interval is meant to hold the true mean, in (0, 1).
        seed: Chooses the draws; the same values give the same interval.

    Raises:
        ValueError: There are no values, not one cluster for each, or an argument is out of its range.
    """
    if method not in ("percentile", "bca"):
        raise ValueError(f"method must be 'percentile' or 'bca', got {method!r}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if not values:
        raise ValueError("values must hold at least one number, got none")
    names = [str(k) for k in range(len(values))] if clusters is None else clusters
    sums = numpy.array(list(sums_by_cluster(values, names).values()))
    sizes = numpy.array(list(sums_by_cluster([1.0] * len(values), names).values()))
    if len(sums) == 1:
        return Interval(numpy.nan, numpy.nan)
    means = _resampled(sums, sizes, resamples, seed)
    tail = (1 - confidence) / 2
    ends = [tail, 1 - tail] if method == "percentile" else _corrected(sums, sizes, means, tail)
    low, high = numpy.quantile(means, ends).tolist()
    return Interval(low, high)


def _resampled(
    sums: Float[numpy.ndarray, " clusters"], sizes: Float[numpy.ndarray, " clusters"], resamples: int, seed: int
) -> Float[numpy.ndarray, " resamples"]:
    """Returns the mean of each resample."""
    random = numpy.random.default_rng(seed)
    count = len(sums)
    rows = max(1, BLOCK // count)
    means = []
    for start in range(0, resamples, rows):
        drawn = random.integers(0, count, (min(rows, resamples - start), count))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return numpy.concatenate(means)


def _corrected(
    sums: Float[numpy.ndarray, " clusters"],
    sizes: Float[numpy.ndarray, " clusters"],
    means: Float[numpy.ndarray, " resamples"],
    tail: float,
) -> list[float]:
    """Returns which quantiles of the resampled means are the ends of the BCa interval."""
    normal = NormalDist()
    mean = sums.sum() / sizes.sum()
    # Means that are equal but for rounding count half, so that the order of a sum does not matter.
    level = numpy.isclose(means, mean, rtol=0, atol=1e-12 * float(numpy.abs(sums).max()))
    below = (means < mean)[~level].sum() / len(means) + level.mean() / 2
    # All resamples on one side would be a bias without bound.
    bias = normal.inv_cdf(float(numpy.clip(below, 0.5 / len(means), 1 - 0.5 / len(means))))
    without = (sums.sum() - sums) / (sizes.sum() - sizes)
    off = without.mean() - without
    squares = float((off**2).sum())
    acceleration = float((off**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    ends = []
    for point in (normal.inv_cdf(tail), normal.inv_cdf(1 - tail)):
        shifted = bias + point
        ends.append(normal.cdf(bias + shifted / (1 - acceleration * shifted)))
    return ends
