import math

import pytest

from overpaint.evaluation.metrics.statistics import Method, bootstrap_interval

METHODS: tuple[Method, ...] = ("percentile", "bca")

VALUES = [0.1, 0.4, 0.2, 1.9, 0.7, 0.3, 0.5, 3.2, 0.9, 0.1, 0.6, 1.1]


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [("percentile", 0.4166666666666667, 1.375), ("bca", 0.4833333333333332, 1.5666666666666664)],
)
def test_intervals_are_those_of_a_million_resamples(method: Method, low: float, high: float) -> None:
    # scipy.stats.bootstrap of scipy 1.17.1 with a million resamples; sums of these values are 0.1 / 12 apart.
    assert tuple(bootstrap_interval(VALUES, method=method, resamples=100_000)) == pytest.approx((low, high), abs=0.0095)


@pytest.mark.parametrize(
    ("method", "clusters", "low", "high"),
    [
        ("percentile", None, 0.4166666666666667, 1.3833333333333333),
        ("percentile", "aabbbcdefffg", 0.4375, 1.5090909090909093),
        ("bca", None, 0.475, 1.5666666666666667),
        ("bca", "aabbbcdefffg", 0.4916666666666667, 1.7777777777777777),
    ],
)
def test_a_seed_keeps_its_interval(method: Method, clusters: str | None, low: float, high: float) -> None:
    # As computed before SciPy drew: `Generator.integers` over clusters, the acceleration in closed form.
    names = None if clusters is None else list(clusters)
    assert tuple(bootstrap_interval(VALUES, names, method=method, seed=3)) == pytest.approx((low, high), abs=1e-10)


def test_draws_that_all_lie_above_the_mean_are_not_corrected() -> None:
    # Two draws, both above 0.8333, are no measure of a bias.
    plain, corrected = (bootstrap_interval(VALUES, method=method, resamples=2, seed=2) for method in METHODS)
    assert plain.low > sum(VALUES) / len(VALUES)
    assert corrected == plain


def test_skewed_values_shift_the_corrected_interval_to_the_long_side() -> None:
    plain, corrected = (bootstrap_interval(VALUES, method=method) for method in METHODS)
    assert corrected.low > plain.low + 0.02
    assert corrected.high > plain.high + 0.05


def test_clusters_are_drawn_whole() -> None:
    # Copies within a prompt say nothing new: ten of each leave the interval of one of each.
    names = [str(k) for k in range(len(VALUES)) for _ in range(10)]
    copies = [value for value in VALUES for _ in range(10)]
    for method in METHODS:
        once = bootstrap_interval(VALUES, method=method)
        assert tuple(bootstrap_interval(copies, names, method=method)) == pytest.approx(tuple(once), rel=1e-9)
        lone = bootstrap_interval(copies, method=method)
        assert lone.high - lone.low < 0.4 * (once.high - once.low)


def test_two_clusters_have_the_interval_of_their_four_draws() -> None:
    # Means 0 (1 / 4), 3 / 4 of one draw of each: (0 * 1 + 1 * 3) / 4 (1 / 2), and 1 (1 / 4).
    values, clusters = [0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"]
    assert bootstrap_interval(values, clusters, method="percentile", confidence=0.6) == (0.0, 1.0)
    assert bootstrap_interval(values, clusters, method="percentile", confidence=0.4) == (0.75, 0.75)


def test_the_same_values_give_the_same_interval_and_another_seed_another() -> None:
    assert bootstrap_interval(VALUES) == bootstrap_interval(VALUES)
    assert bootstrap_interval(VALUES, seed=1) != bootstrap_interval(VALUES)


def test_values_that_do_not_vary_have_an_interval_without_width() -> None:
    assert bootstrap_interval([0.5] * 8) == (0.5, 0.5)


def test_one_cluster_has_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([0.1, 0.2], ["a", "a"]))


def test_many_clusters_are_drawn_in_parts() -> None:
    # 2,000 clusters 1,000 times are two parts; the interval is the normal one, 1.96 / sqrt(2,000) * sqrt(1 / 12).
    values = [(k + 0.5) / 2000 for k in range(2000)]
    low, high = bootstrap_interval(values, resamples=1000)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(1 / 12 / 2000), rel=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"values": []}, "values must hold at least one number, got none"),
        ({"values": [1.0], "clusters": ["a", "b"]}, "clusters must hold one for each of 1 values, got 2"),
        ({"values": [1.0], "resamples": 0}, "resamples must be at least 1, got 0"),
        ({"values": [1.0], "confidence": 1.0}, r"confidence must lie in \(0, 1\), got 1\.0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(**given)
