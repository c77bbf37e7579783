"""Ranks, and how well two rankings agree."""

import math
from collections.abc import Sequence


def ranks(values: Sequence[float], higher_is_better: bool = True) -> list[float]:
    """Returns the rank of each value: 1 is best, and equal values share the mean of the ranks that they take up.

    Args:
        values: What is ranked.
        higher_is_better: Whether the highest is best, or the lowest.

    Raises:
        ValueError: A value is not finite.
    """
    from scipy.stats import rankdata

    _require_finite(values)
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
        _require_finite(values)
        if len(set(values)) == 1:
            raise ValueError(f"{name} must hold values that differ, got {len(values)} times {values[0]}")
    return float(spearmanr(a, b).statistic)


def _require_finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite, got {list(values)}")
