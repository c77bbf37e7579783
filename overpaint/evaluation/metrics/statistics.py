"""Means and rates with 95 % intervals, paired differences, bootstrap intervals and ranks.

Means and their paired differences use Student's t; rates use Wilson's score interval, which stays honest at 0 and 1,
where the standard error of a rate is zero and says nothing; differences of paired rates use Newcombe's interval, built
from Wilson's. Values of one cluster, such as the images of one prompt, may be dependent: given the clusters, only these
count as independent.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy

from overpaint.settings import AnyFloat, Index


class Estimate(NamedTuple):
    """A mean and how sure it is."""

    mean: AnyFloat
    error: AnyFloat
    """Standard error of the mean; NaN where one value does not tell."""
    low: AnyFloat
    """Lower end of the 95 % interval."""
    high: AnyFloat
    """Upper end of the 95 % interval."""
    count: Index
    """Number of values, or of pairs."""


def mean_estimate(values: Sequence[float], clusters: Sequence[str] | None = None) -> Estimate:
    """Estimates a mean: standard error from the sample variance, interval from Student's t.

    Source for clusters: the linearised variance of a ratio, Cochran (1977), "Sampling Techniques", chapters 6 and 9A;
    one degree of freedom less than there are clusters.

    Args:
        values: What was measured.
        clusters: What each value belongs to, such as its prompt: values of one cluster count as dependent. With one
            value in each it changes nothing.

    Raises:
        ValueError: There are no values, or not one cluster for each.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = math.fsum(values) / count
    deviations = [value - mean for value in values]
    if clusters is not None:
        deviations = list(sums_by_cluster(deviations, clusters).values())
    independent = len(deviations)
    if independent == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, count)
    squares = math.fsum(deviation**2 for deviation in deviations)
    error = math.sqrt(independent / (independent - 1) * squares) / count
    reach = student_95(independent - 1) * error
    return Estimate(mean, error, mean - reach, mean + reach, count)


def rate_estimate(outcomes: Sequence[float], clusters: Sequence[str] | None = None) -> Estimate:
    """Estimates a rate from outcomes that are 0 or 1: binomial standard error, Wilson's interval.

    With clusters the error is that of `mean_estimate`, and Wilson's interval is that of the effective number of
    outcomes, p(1 - p) / error², which is at least the number of clusters and at most that of outcomes; at rates of 0
    and 1, which tell nothing of the dependence, it is the number of clusters.

    Source for clusters: Korn and Graubard (1998), Survey Methodology 24, 193-201, with Wilson's interval.

    Raises:
        ValueError: There are no outcomes, one of them is neither 0 nor 1, or there is not one cluster for each.
    """
    if not outcomes:
        raise ValueError("outcomes must hold at least one, got none")
    strange = [outcome for outcome in outcomes if outcome not in (0, 1)]
    if strange:
        raise ValueError(f"outcomes must be 0 or 1, got {strange[0]}")
    count = len(outcomes)
    rate = math.fsum(outcomes) / count
    variance = rate * (1 - rate)
    independent = count if clusters is None else len(sums_by_cluster(outcomes, clusters))
    if independent == count:
        low, high = wilson_interval(round(math.fsum(outcomes)), count)
        return Estimate(rate, math.sqrt(variance / count), low, high, count)
    error = mean_estimate(outcomes, clusters).error
    effective = float(independent)
    if variance > 0 and independent > 1:
        effective = min(max(variance / error**2, effective), count) if error > 0 else float(count)
    low, high = wilson_interval(rate * effective, effective)
    return Estimate(rate, error, low, high, count)


def paired_difference(
    after: Sequence[float], before: Sequence[float], clusters: Sequence[str] | None = None
) -> Estimate:
    """Estimates the mean of after - before, value by value.

    What both share, such as an easy prompt or a lucky seed, cancels within each pair, so that the
    difference is known better than either mean.

    Raises:
        ValueError: The two have different lengths, or no values, or there is not one cluster for each pair.
    """
    if len(after) != len(before):
        raise ValueError(f"after and before must be of equal length, got {len(after)} and {len(before)}")
    return mean_estimate([a - b for a, b in zip(after, before, strict=True)], clusters)


def paired_rate_difference(
    after: Sequence[float], before: Sequence[float], clusters: Sequence[str] | None = None
) -> Estimate:
    """Estimates the difference of two rates over the same images; outcomes are 0 or 1.

    The standard error is that of the paired differences. The interval is Newcombe's, which does
    not shrink to a point when every pair changes in the same way. With clusters it is joined in the same way from the
    intervals that `rate_estimate` gives, and from the correlation of the clusters' sums.

    Source: Newcombe (1998), "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17, method 10; Zou and Donner (2008), Statistics in
    Medicine 27, for joining any two intervals so.

    Raises:
        ValueError: The two have different lengths, no values, a value that is neither 0 nor 1, or there is not one
            cluster for each pair.
    """
    change = paired_difference(after, before, clusters)
    rates = rate_estimate(after, clusters), rate_estimate(before, clusters)
    if clusters is None or len(set(clusters)) == len(after):
        shared = _outcomes_correlation(after, before)
    else:
        shared = correlation(*(list(sums_by_cluster(some, clusters).values()) for some in (after, before)))
    return joined_rates(*rates, change, shared)


def joined_rates(after: Estimate, before: Estimate, change: Estimate, correlation: float) -> Estimate:
    """Returns `change`, the difference of two rates, with an interval joined from those of the rates."""

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    low = change.mean - reach(after.mean - after.low, before.high - before.mean)
    high = change.mean + reach(after.high - after.mean, before.mean - before.low)
    return change._replace(low=max(low, -1.0), high=min(high, 1.0))


def sums_by_cluster(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """Adds up the values of each cluster, in the order in which clusters first occur."""
    if len(values) != len(clusters):
        raise ValueError(f"clusters must hold one for each of {len(values)} values, got {len(clusters)}")
    members: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    return {cluster: math.fsum(some) for cluster, some in members.items()}


def means_by_cluster(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """Returns the mean of the values of each cluster, in the order in which clusters first occur."""
    sizes = sums_by_cluster([1.0] * len(values), clusters)
    return {cluster: total / sizes[cluster] for cluster, total in sums_by_cluster(values, clusters).items()}


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns Pearson's correlation; 0 where one of the two does not vary."""
    if min(numpy.std(first), numpy.std(second)) < 1e-12:
        return 0.0
    return float(numpy.corrcoef(first, second)[0, 1])


def wilson_interval(successes: float | int, count: float | int) -> tuple[float, float]:
    """Returns the 95 % interval of a rate, also of effective numbers that are not whole, which SciPy's does not take.

    Source: Wilson (1927), JASA 22, eq. for the score interval.
    """
    from scipy.stats import norm

    point = float(norm.ppf(0.975))
    square = point**2
    rate = successes / count
    centre = (rate + square / (2 * count)) / (1 + square / count)
    reach = point / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    # At 0 and 1 the ends are exactly 0 and 1; arithmetic would leave them a rounding error away.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == count else centre + reach
    return low, high


def student_95(degrees: int) -> float:
    """Returns the point of Student's t distribution that leaves 2.5 % above it."""
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))


def _outcomes_correlation(after: Sequence[float], before: Sequence[float]) -> float:
    """Returns the correlation of two paired outcomes, corrected for continuity when it is positive."""
    count = len(after)
    both = sum(a == b == 1 for a, b in zip(after, before, strict=True))
    only_after, only_before = round(math.fsum(after)) - both, round(math.fsum(before)) - both
    neither = count - both - only_after - only_before
    margins = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_after * only_before
    if product > 0:
        product = max(product - count / 2, 0.0)
    return product / math.sqrt(margins)


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
    sums, sizes = (numpy.array(list(sums_by_cluster(some, names).values())) for some in (values, [1.0] * len(values)))
    if len(sums) == 1:
        return Interval(math.nan, math.nan)
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


def ranks(values: Sequence[float], higher_is_better: bool = True) -> list[float]:
    """Returns the rank of each value: 1 is best, and equal values share the mean of the ranks that they take up.

    Raises:
        ValueError: A value is not finite.
    """
    from scipy.stats import rankdata

    if not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite, got {list(values)}")
    return rankdata([-value for value in values] if higher_is_better else values).tolist()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns Spearman's rank correlation, in [-1, 1]: Pearson's correlation of the average ranks.

    It is 1 where both have the same order. A score of which more is better and a human rank of which 1 is best have
    opposite orders: give `ranks(scores)` beside such ranks.

    Raises:
        ValueError: The two differ in length, there are fewer than 2 values, one is not finite, or all values of one
            are equal, which has no order.
    """
    from scipy.stats import spearmanr

    if len(a) != len(b):
        raise ValueError(f"a and b must be of equal length, got {len(a)} and {len(b)}")
    if len(a) < 2:
        raise ValueError(f"a and b must hold at least 2 values, got {len(a)}")
    for name, values in (("a", a), ("b", b)):
        if not all(map(math.isfinite, values)):
            raise ValueError(f"values must be finite, got {list(values)}")
        if len(set(values)) == 1:
            raise ValueError(f"{name} must hold values that differ, got {len(values)} times {values[0]}")
    return float(spearmanr(a, b).statistic)
