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
    if not all(map(math.isfinite, values)):
        raise ValueError(f"values must be finite, got {list(values)}")
    best_first = sorted(range(len(values)), key=lambda place: values[place], reverse=higher_is_better)
    found = [0.0] * len(values)
    start = 0
    while start < len(best_first):
        stop = start
        while stop < len(best_first) and values[best_first[stop]] == values[best_first[start]]:
            stop += 1
        for place in best_first[start:stop]:
            found[place] = (start + 1 + stop) / 2
        start = stop
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns Spearman's rank correlation, in [-1, 1]: Pearson's correlation of the average ranks.

    It is 1 where both have the same order. A score of which more is better and a human rank of which 1 is best have
    opposite orders: give `ranks(scores)` beside such ranks.

    Raises:
        ValueError: The two differ in length, there are fewer than 2 values, one is not finite, or all values of one
            are equal, which has no order.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must be of equal length, got {len(a)} and {len(b)}")
    if len(a) < 2:
        raise ValueError(f"a and b must hold at least 2 values, got {len(a)}")
    middle = (len(a) + 1) / 2
    deviations = []
    for name, values in (("a", a), ("b", b)):
        from_middle = [rank - middle for rank in ranks(values)]
        if not any(from_middle):
            raise ValueError(f"{name} must hold values that differ, got {len(values)} times {values[0]}")
        deviations.append(from_middle)
    first, second = deviations
    product = math.fsum(x * y for x, y in zip(first, second, strict=True))
    return product / math.sqrt(math.fsum(x * x for x in first) * math.fsum(y * y for y in second))
