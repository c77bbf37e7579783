"""Ranks and their correlation, by hand and on the published table."""

import math
import re

import pytest

from overpaint.evaluation.experiments.published import (
    CLIP,
    COGVIEW2,
    DALLE2,
    FID,
    IMAGE_REWARD,
    OPENJOURNEY,
    OWN_SIZE,
    SD14,
    SD21,
    VERSATILE,
    published,
)
from overpaint.evaluation.metrics.statistics import ranks, spearman

MODELS = (SD14, SD21, OPENJOURNEY, DALLE2, VERSATILE, COGVIEW2)


def of_models(experiment: str, metric: str, setting: str = "") -> list[float]:
    values = {n.model: n.value for n in published(experiment, metric, "ImageReward") if n.setting == setting}
    return [values[model] for model in MODELS]


def test_the_best_has_rank_one_and_ties_share_the_mean() -> None:
    assert ranks([0.3, 0.9, 0.3, 0.1, 0.3]) == [3.0, 1.0, 3.0, 5.0, 3.0]
    assert ranks([0.3, 0.9, 0.3, 0.1, 0.3], higher_is_better=False) == [3.0, 5.0, 3.0, 1.0, 3.0]
    assert ranks([2.0, 2.0]) == [1.5, 1.5]
    assert ranks([]) == []


@pytest.mark.parametrize("values", [[5.0, -1.0, 2.5, 2.5], [1.0, 1.0, 1.0], [0.0]])
def test_ranks_always_sum_to_those_of_distinct_values(values: list[float]) -> None:
    assert sum(ranks(values)) == sum(range(1, len(values) + 1))


def test_correlation_of_a_worked_example_without_ties() -> None:
    # Rank differences 0, -2, 1, 1 of 4 values: 1 - 6 * 6 / (4 * 15).
    assert spearman([10.0, 20.0, 30.0, 40.0], [1.0, 9.0, 2.0, 5.0]) == pytest.approx(1 - 36 / 60)


def test_correlation_with_ties_is_pearsons_of_the_average_ranks() -> None:
    # Deviations from the middle: -1.5, 0, 0, 1.5 and -1.5, -0.5, 0.5, 1.5.
    assert spearman([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))


def test_any_increasing_map_leaves_the_correlation_and_a_decreasing_one_turns_it() -> None:
    a, b = [0.2, -1.0, 3.0, 0.5, 2.0], [1.0, 4.0, 2.0, 5.0, 3.0]
    assert spearman([math.exp(value) for value in a], b) == pytest.approx(spearman(a, b))
    assert spearman([-value for value in a], b) == pytest.approx(-spearman(a, b))
    assert spearman(a, a) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("experiment", "metric", "setting", "expected"),
    [
        ("prompts", IMAGE_REWARD, "", "1.00"),
        ("prompts", CLIP, "", "0.60"),
        ("captions", IMAGE_REWARD, OWN_SIZE, "0.77"),
        ("captions", FID, "zero-shot", "0.09"),
    ],
)
def test_table_1_of_image_reward_agrees_with_people_as_published(
    experiment: str, metric: str, setting: str, expected: str
) -> None:
    values = of_models(experiment, metric, setting)
    human = of_models("prompts", "human rank")
    assert f"{spearman(ranks(values, higher_is_better=metric != FID), human):.2f}" == expected


def test_only_the_papers_own_clip_score_of_v1_4_gives_060() -> None:
    human = of_models("prompts", "human rank")
    quoted = of_models("prompts", CLIP)
    assert quoted[0] == 0.2763
    (number,) = published("prompts", CLIP, "ImageReward, as the study quotes it")
    quoted[0] = number.value
    # A tie with Openjourney: ranks 1.5, 4, 1.5, 3, 5, 6 beside 4, 2, 1, 3, 5, 6.
    by_hand = (-2 * 0.5 + 0.5 * -1.5 + -2 * -2.5 + -0.5 * -0.5 + 1.5 * 1.5 + 2.5 * 2.5) / math.sqrt(17.0 * 17.5)
    assert spearman(ranks(quoted), human) == pytest.approx(by_hand)
    assert f"{by_hand:.2f}" == "0.70"


def test_human_ranks_are_those_of_the_wins() -> None:
    assert ranks(of_models("prompts", "human wins")) == of_models("prompts", "human rank")


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], "a and b must be of equal length, got 2 and 1"),
        ([1.0], [1.0], "a and b must hold at least 2 values, got 1"),
        ([], [], "a and b must hold at least 2 values, got 0"),
        ([1.0, 1.0], [1.0, 2.0], "a must hold values that differ, got 2 times 1.0"),
        ([1.0, 2.0], [3.0, 3.0], "b must hold values that differ, got 2 times 3.0"),
        ([1.0, math.nan], [1.0, 2.0], "a[1] must be a finite number, got nan"),
    ],
)
def test_what_has_no_order_is_an_error(a: list[float], b: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spearman(a, b)
