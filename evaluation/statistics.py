"""Means, how sure they are, and paired differences.

Every interval is a 95 % interval. Means and their paired differences use Student's t; rates use
Wilson's score interval, which stays honest at 0 and 1, where the standard error of a rate is zero
and says nothing; differences of paired rates use Newcombe's interval, built from Wilson's.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

NORMAL_95 = 1.959963984540054
"""The point of the standard normal distribution that leaves 2.5 % above it."""


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


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean: standard error from the sample variance, interval from Student's t.

    Raises:
        ValueError: There are no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values must hold at least one number, got none")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    error = math.sqrt(variance / count)
    reach = student_95(count - 1) * error
    return Estimate(mean, error, mean - reach, mean + reach, count)


def rate_estimate(outcomes: Sequence[float]) -> Estimate:
    """Estimates a rate from outcomes that are 0 or 1: binomial standard error, Wilson's interval.

    Raises:
        ValueError: There are no outcomes, or one of them is neither 0 nor 1.
    """
    _require_outcomes(outcomes)
    count = len(outcomes)
    rate = math.fsum(outcomes) / count
    low, high = wilson_interval(round(math.fsum(outcomes)), count)
    return Estimate(rate, math.sqrt(rate * (1 - rate) / count), low, high, count)


def paired_difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Estimates the mean of after - before, value by value.

    What both share, such as an easy prompt or a lucky seed, cancels within each pair, so that the
    difference is known better than either mean.

    Raises:
        ValueError: The two have different lengths, or no values.
    """
    _require_pairs(after, before)
    return mean_estimate([a - b for a, b in zip(after, before, strict=True)])


def paired_rate_difference(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """Estimates the difference of two rates over the same images; outcomes are 0 or 1.

    The standard error is that of the paired differences. The interval is Newcombe's, which does
    not shrink to a point when every pair changes in the same way.

    Source: Newcombe (1998), "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17, method 10.

    Raises:
        ValueError: The two have different lengths, no values, or a value that is neither 0 nor 1.
    """
    _require_pairs(after, before)
    _require_outcomes(after)
    _require_outcomes(before)
    count = len(after)
    both = sum(a == b == 1 for a, b in zip(after, before, strict=True))
    only_after = round(math.fsum(after)) - both
    only_before = round(math.fsum(before)) - both
    neither = count - both - only_after - only_before

    rate_after, rate_before = (both + only_after) / count, (both + only_before) / count
    low_after, high_after = wilson_interval(both + only_after, count)
    low_before, high_before = wilson_interval(both + only_before, count)
    correlation = _corrected_phi(both, only_after, only_before, neither)
    difference = (only_after - only_before) / count
    low = difference - _joined(rate_after - low_after, high_before - rate_before, correlation)
    high = difference + _joined(high_after - rate_after, rate_before - low_before, correlation)
    error = paired_difference(after, before).error
    return Estimate(difference, error, max(low, -1.0), min(high, 1.0), count)


def wilson_interval(successes: int, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a rate. Source: Wilson (1927), JASA 22, eq. for the score interval."""
    square = NORMAL_95**2
    rate = successes / count
    centre = (rate + square / (2 * count)) / (1 + square / count)
    reach = NORMAL_95 / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    # At 0 and 1 the ends are exactly 0 and 1; arithmetic would leave them a rounding error away.
    low = 0.0 if successes == 0 else centre - reach
    high = 1.0 if successes == count else centre + reach
    return low, high


@lru_cache(maxsize=256)
def student_95(degrees: int) -> float:
    """Returns the point of Student's t distribution that leaves 2.5 % above it, by bisection.

    Source: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, the closed form for whole degrees of freedom.
    """
    low, high = 0.0, 13.0  # 12.71 at one degree of freedom is the largest
    while high - low > 1e-12:
        middle = (low + high) / 2
        if _student_within(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_within(t: float, degrees: int) -> float:
    """Returns the probability that Student's t lies within ±t."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine_squared * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _corrected_phi(both: int, only_after: int, only_before: int, neither: int) -> float:
    """Returns the correlation of two paired outcomes, corrected for continuity when it is positive."""
    margins = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    if margins == 0:
        return 0.0
    product = both * neither - only_after * only_before
    if product > 0:
        product = max(product - (both + only_after + only_before + neither) / 2, 0.0)
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
