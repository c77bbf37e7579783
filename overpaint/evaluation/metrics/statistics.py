"""Means, how sure they are, and paired differences.

Every interval is a 95 % interval. Means and their paired differences use Student's t; rates use
Wilson's score interval, which stays honest at 0 and 1, where the standard error of a rate is zero
and says nothing; differences of paired rates use Newcombe's interval, built from Wilson's. Values
of one cluster, such as the images of one prompt, may be dependent: given the clusters, only these
count as independent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy


class Estimate(NamedTuple):
    """A mean and how sure it is."""

    mean: float
    error: float
    """Standard error of the mean; NaN where one value does not tell."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    count: int
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
    _require_outcomes(outcomes)
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
    _require_pairs(after, before)
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
    _require_pairs(after, before)
    ends = rate_estimate(after, clusters), rate_estimate(before, clusters)
    change = paired_difference(after, before, clusters)
    sums = None if clusters is None else [list(sums_by_cluster(o, clusters).values()) for o in (after, before)]
    if sums is None or len(sums[0]) == len(after):
        shared = _outcomes_correlation(after, before)
    else:
        shared = correlation(sums[0], sums[1])
    return joined_rates(*ends, change, shared)


def joined_rates(after: Estimate, before: Estimate, change: Estimate, correlation: float) -> Estimate:
    """Returns `change`, the difference of two rates, with an interval joined from those of the rates."""
    low = change.mean - _joined(after.mean - after.low, before.high - before.mean, correlation)
    high = change.mean + _joined(after.high - after.mean, before.mean - before.low, correlation)
    return change._replace(low=max(low, -1.0), high=min(high, 1.0))


def sums_by_cluster(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """Adds up the values of each cluster, in the order in which clusters first occur.

    Raises:
        ValueError: There is not one cluster for each value.
    """
    if len(values) != len(clusters):
        raise ValueError(f"clusters must hold one for each of {len(values)} values, got {len(clusters)}")
    members: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    return {cluster: math.fsum(some) for cluster, some in members.items()}


def means_by_cluster(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """Returns the mean of the values of each cluster, in the order in which clusters first occur.

    Raises:
        ValueError: There is not one cluster for each value.
    """
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


def _joined(first: float, second: float, correlation: float) -> float:
    """Returns the reach of a difference from the reaches of its two correlated parts."""
    return math.sqrt(max(first**2 - 2 * correlation * first * second + second**2, 0.0))


def _require_pairs(after: Sequence[float], before: Sequence[float]) -> None:
    if len(after) != len(before):
        raise ValueError(f"after and before must be of equal length, got {len(after)} and {len(before)}")


def _require_outcomes(outcomes: Sequence[float]) -> None:
    if not outcomes:
        raise ValueError("outcomes must hold at least one, got none")
    for outcome in outcomes:
        if outcome not in (0, 1):
            raise ValueError(f"outcomes must be 0 or 1, got {outcome}")
