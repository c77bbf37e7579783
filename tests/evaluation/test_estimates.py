import math

import pytest
from scipy.stats import binomtest

from overpaint.evaluation.metrics.statistics import (
    mean_estimate,
    paired_difference,
    paired_rate_difference,
    rate_estimate,
    student_95,
    wilson_interval,
)


def outcomes(both: int, only_after: int, only_before: int, neither: int) -> tuple[list[float], list[float]]:
    after = [1.0] * (both + only_after) + [0.0] * (only_before + neither)
    before = [1.0] * both + [0.0] * only_after + [1.0] * only_before + [0.0] * neither
    return after, before


def test_mean_has_the_error_and_interval_computed_by_hand() -> None:
    # Deviations 1.5, 0.5, 0.5, 1.5 give a variance of 5 / 3; Student's t for three degrees of freedom is 3.182446.
    estimate = mean_estimate([1.0, 2.0, 3.0, 4.0])
    assert estimate.mean == 2.5
    assert estimate.error == pytest.approx(math.sqrt(5 / 12), rel=1e-12)
    assert estimate.low == pytest.approx(2.5 - 3.182446305 * math.sqrt(5 / 12), rel=1e-8)
    assert estimate.high == pytest.approx(2.5 + 3.182446305 * math.sqrt(5 / 12), rel=1e-8)
    assert estimate.count == 4


@pytest.mark.parametrize(
    ("degrees", "point"),
    [(1, 12.706204736), (2, 4.302652730), (3, 3.182446305), (10, 2.228138852), (30, 2.042272456), (1000, 1.962339081)],
)
def test_student_quantiles_are_those_of_the_printed_tables(degrees: int, point: float) -> None:
    assert student_95(degrees) == pytest.approx(point, abs=1e-8)


def test_one_value_has_a_mean_and_no_error() -> None:
    estimate = mean_estimate([3.0])
    assert estimate.mean == 3.0
    assert math.isnan(estimate.error)
    assert math.isnan(estimate.low)


def test_paired_difference_is_surer_than_its_means() -> None:
    # Differences 0.1, 0.3, 0.2: mean 0.2, variance 0.01, error 0.1 / sqrt(3).
    estimate = paired_difference([1.1, 2.3, 3.2], [1.0, 2.0, 3.0])
    assert estimate.mean == pytest.approx(0.2, rel=1e-12)
    assert estimate.error == pytest.approx(0.1 / math.sqrt(3), rel=1e-12)
    assert estimate.error < mean_estimate([1.1, 2.3, 3.2]).error / 10


@pytest.mark.parametrize(
    ("successes", "low", "high"), [(0, 0.0, 0.2775328), (1, 0.0178762, 0.4041500), (5, 0.2365931, 0.7634069)]
)
def test_wilson_interval_of_ten_trials_is_the_published_one(successes: int, low: float, high: float) -> None:
    assert wilson_interval(successes, 10) == pytest.approx((low, high), abs=1e-7)


def test_wilson_interval_of_ten_successes_mirrors_that_of_none() -> None:
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.2775328, 1.0), abs=1e-7)


@pytest.mark.parametrize("count", [1, 2, 7, 40, 1000])
def test_wilson_interval_of_whole_counts_is_scipy_s(count: int) -> None:
    for successes in {0, 1, count // 3, count}:
        theirs = binomtest(successes, count).proportion_ci(method="wilson")
        assert wilson_interval(successes, count) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_rate_of_zero_is_not_certain() -> None:
    estimate = rate_estimate([0.0] * 200)
    assert (estimate.mean, estimate.error, estimate.low) == (0.0, 0.0, 0.0)
    # z^2 / (n + z^2) = 3.841459 / 203.841459
    assert estimate.high == pytest.approx(0.0188453, abs=1e-7)


def test_rate_error_is_binomial() -> None:
    assert rate_estimate([1.0, 0.0, 0.0, 0.0]).error == pytest.approx(math.sqrt(0.25 * 0.75 / 4), rel=1e-12)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),  # phi is -24 / sqrt(48 * 2 * 38 * 12)
        ((20, 12, 2, 16), 0.0562, 0.3292),  # phi is (320 - 24 - 50 / 2) / sqrt(32 * 18 * 22 * 28)
    ],
)
def test_paired_rate_differences_are_newcombe_s_examples(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    # Newcombe (1998), Statistics in Medicine 17, 2635-2650, method 10.
    estimate = paired_rate_difference(*outcomes(*cells))
    assert estimate.mean == pytest.approx(0.2, rel=1e-12)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


def test_paired_rate_difference_without_correlation_joins_the_wilson_ends() -> None:
    # Of 2 x 2 equal cells phi is 0, and both rates are 10 / 20: the reach is sqrt(2) * 0.2006595.
    reach = 0.5 - wilson_interval(10, 20)[0]
    estimate = paired_rate_difference(*outcomes(5, 5, 5, 5))
    assert (estimate.low, estimate.high) == pytest.approx((-math.sqrt(2) * reach, math.sqrt(2) * reach), rel=1e-12)


def test_erasing_a_concept_from_every_image_leaves_doubt_about_the_rest() -> None:
    estimate = paired_rate_difference([0.0] * 10, [1.0] * 10)
    assert (estimate.mean, estimate.low) == (-1.0, -1.0)
    assert -0.65 < estimate.high < -0.55


def test_paired_rate_difference_changes_sign_with_its_arguments() -> None:
    after, before = outcomes(7, 5, 2, 9)
    there, back = paired_rate_difference(after, before), paired_rate_difference(before, after)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low), rel=1e-12)


def test_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="after and before must be of equal length, got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="values must hold at least one number, got none"):
        mean_estimate([])
    with pytest.raises(ValueError, match="outcomes must hold at least one, got none"):
        rate_estimate([])


def test_a_rate_of_other_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"outcomes must be 0 or 1, got 0\.5"):
        rate_estimate([0.0, 0.5])


def test_values_of_one_cluster_count_once() -> None:
    # Ten copies of each value say nothing new.
    names = [name for name in "abcd" for _ in range(10)]
    copies = mean_estimate([value for value in (1.0, 2.0, 3.0, 4.0) for _ in range(10)], names)
    once = mean_estimate([1.0, 2.0, 3.0, 4.0])
    assert tuple(copies)[:4] == pytest.approx(tuple(once)[:4], rel=1e-12)
    assert copies.count == 40
    assert mean_estimate([1.0, 2.0, 3.0, 4.0], ["a", "b", "c", "d"]) == once


def test_unequal_clusters_have_the_error_of_a_ratio_computed_by_hand() -> None:
    # Mean 2; the clusters' sums of deviations are -1, -1 + 1 and 1: sqrt(3 / 2 * 2) / 4.
    estimate = mean_estimate([1.0, 1.0, 3.0, 3.0], ["a", "b", "b", "c"])
    assert (estimate.mean, estimate.error) == (2.0, pytest.approx(math.sqrt(3) / 4, rel=1e-12))
    assert estimate.high == pytest.approx(2 + 4.302652730 * math.sqrt(3) / 4, rel=1e-8)


def test_one_cluster_has_no_error() -> None:
    assert math.isnan(mean_estimate([1.0, 2.0], ["a", "a"]).error)


def test_a_rate_counts_as_many_outcomes_as_its_clusters_are_worth() -> None:
    names = [name for name in "abcdefghij" for _ in range(4)]
    # All alike within clusters: four of ten.
    alike = rate_estimate([1.0] * 16 + [0.0] * 24, names)
    assert (alike.low, alike.high) == pytest.approx(wilson_interval(4 * 0.9, 10 * 0.9), abs=0.03)
    assert alike.error == pytest.approx(math.sqrt(0.4 * 0.6 / 9), rel=1e-12)
    # Every cluster alike: no more than all outcomes.
    spread = rate_estimate([1.0, 0.0, 0.0, 1.0] * 10, names)
    assert (spread.low, spread.high) == pytest.approx(wilson_interval(20, 40), rel=1e-12)
    # None at all: ten prompts, not forty images.
    assert rate_estimate([0.0] * 40, names).high == pytest.approx(0.2775328, abs=1e-7)


def test_a_paired_difference_of_clustered_rates_keeps_its_interval_where_all_change() -> None:
    names = [name for name in "abcdefghij" for _ in range(4)]
    estimate = paired_rate_difference([0.0] * 40, [1.0] * 40, names)
    # Two rates of ten prompts each, without correlation: -1 + sqrt(2) * 0.2775328.
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((-1, -1, -1 + math.sqrt(2) * 0.2775328))
    single = [str(k) for k in range(26)]
    assert paired_rate_difference(*outcomes(7, 5, 2, 12), single) == paired_rate_difference(*outcomes(7, 5, 2, 12))


def test_clusters_need_one_name_for_each_value() -> None:
    with pytest.raises(ValueError, match="clusters must hold one for each of 2 values, got 1"):
        mean_estimate([1.0, 2.0], ["a"])
