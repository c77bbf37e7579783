"""Bootstrap confidence intervals that draw whole clusters, since the images of one prompt are not independent."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy

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
    from scipy.stats import bootstrap

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
    settings: dict[str, Any] = {"paired": True, "batch": max(1, BLOCK // len(sums)), "confidence_level": confidence}
    found = bootstrap((sums, sizes), _mean, method="percentile", n_resamples=resamples, rng=seed, **settings)
    if method == "bca":
        means, mean = found.bootstrap_distribution, _mean(sums, sizes, 0)
        # Means that are equal but for rounding count as equal, so that the order of a sum does not matter.
        means[numpy.isclose(means, mean, rtol=0, atol=1e-12 * numpy.abs(sums).max())] = mean
        # All resamples on one side would be a bias without bound; where nothing varies, there is none.
        if means.min() <= mean <= means.max() and means.min() < means.max():
            found = bootstrap((sums, sizes), _mean, method="BCa", n_resamples=0, bootstrap_result=found, **settings)
    return Interval(*map(float, found.confidence_interval))


def _mean(sums: numpy.ndarray, sizes: numpy.ndarray, axis: int) -> numpy.ndarray | numpy.floating:
    """Returns the mean of all values of the clusters along an axis."""
    return sums.sum(axis=axis) / sizes.sum(axis=axis)
