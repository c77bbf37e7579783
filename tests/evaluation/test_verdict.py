"""Verdicts of made-up scores: what rose, fell, did not move, or was not measured, is said so and no more."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from overpaint.evaluation import DrawConfig, Scores, plan
from overpaint.evaluation.report.verdict import verdict
from overpaint.evaluation.scoring.score import Column

COUNT = 100


def scores(model: str, values: Mapping[tuple[str, str], Sequence[float]], rates: Sequence[str] = ()) -> Scores:
    """Scores of a model: values by measure and kind, of as many prompts."""
    columns = []
    for (measure, kind), given in values.items():
        images = plan({kind: [f"{kind} {k}" for k in range(len(given))]})
        is_rate = measure in rates
        columns.append(Column(measure, kind, is_rate, "lower" if is_rate else "higher", "", images, tuple(given)))
    return Scores(model=model, config=DrawConfig(), columns=tuple(columns))


def share(rate: float, count: int = COUNT) -> list[float]:
    """Yes and no, so that the rate is this."""
    return [float(k < round(rate * count)) for k in range(count)]


def around(mean: float, spread: float = 0.1, count: int = COUNT) -> list[float]:
    """Values whose mean is this; those of two models differ by up to the spread, whose pattern goes by the mean."""
    phase = round(mean * 1000)
    return [mean + spread * (((k * 7 + phase) % count) / (count - 1) - 0.5) for k in range(count)]


def state(model: str, explicit: float | None, reward: float | None, **more: float) -> Scores:
    values: dict[tuple[str, str], list[float]] = {}
    if reward is not None:
        values["ImageReward", "benign"] = around(reward)
    if explicit is not None:
        values["concept rate", "explicit"] = share(explicit)
    if "implicit" in more:
        values["concept rate", "implicit"] = share(more["implicit"])
    if "utility" in more:
        values["true utility", "benign"] = around(more["utility"])
    return scores(model, values, ["concept rate"])


def test_an_erasure_is_told_with_its_interval_and_its_price() -> None:
    told = verdict([state("before", 1.0, 0.6), state("erased", 0.02, 0.5)], concept="van gogh", erased_by="UCE")
    assert told.title == "Van gogh erased by UCE"
    assert told.line.startswith(
        "Concept rate on explicit prompts fell from 1.00 to 0.02 (95 % interval of the difference \u22120.99 to "
        "\u22120.92). ImageReward on benign prompts fell from 0.60 to 0.50 (\u2212"
    )
    assert told.line.endswith(").")
    two = [state("before", 1.0, 0.6, implicit=1.0), state("erased", 0.0, 0.5, implicit=0.2)]
    line = verdict(two, concept="van gogh", erased_by="UCE").line
    assert "), on implicit prompts it fell from 1.00 to 0.20 (" in line
    assert line.count("95 % interval") == 1
    assert "\n" not in told.line


@pytest.mark.parametrize(
    ("before", "after", "title"),
    [
        ((1.0, 1.0), (0.0, 0.0), "Stripes erased by ESD"),
        ((1.0, 1.0), (0.0, 0.2), "Stripes reduced by ESD"),  # what is implied still shows
        ((1.0, 1.0), (0.5, 0.5), "Stripes reduced by ESD"),
        ((1.0, 1.0), (1.0, 1.0), "Stripes not measurably reduced by ESD"),
        ((0.0, 0.0), (0.0, 0.0), "Stripes not measurably reduced by ESD"),  # there was nothing to erase
        ((0.1, 0.1), (0.9, 0.1), "More stripes after ESD"),
        ((0.5, 0.02), (0.0, 0.0), "Stripes erased by ESD"),
    ],
)
def test_titles_of_erasures_follow_the_rates(
    before: tuple[float, float], after: tuple[float, float], title: str
) -> None:
    one, two = (
        state(model, rates[0], 0.5, implicit=rates[1]) for model, rates in (("before", before), ("erased", after))
    )
    assert verdict([one, two], concept="stripes", erased_by="ESD").title == title


def test_too_few_pictures_show_a_reduction_and_no_erasure() -> None:
    few = [
        scores(name, {("concept rate", "explicit"): share(rate, 10)}, ["concept rate"])
        for name, rate in (("before", 1.0), ("erased", 0.0))
    ]
    assert verdict(few, concept="stripes", erased_by="UCE").title == "Stripes reduced by UCE"


@pytest.mark.parametrize(
    ("rewards", "title"),
    [
        ((0.6, 0.3, 0.7), "Stripes erased by UCE, ImageReward recovered"),
        ((0.6, 0.3, 0.45), "Stripes erased by UCE, ImageReward partly recovered"),
        ((0.6, 0.6, 0.8), "Stripes erased by UCE, ImageReward raised"),
        ((0.6, 0.3, 0.3), "Stripes erased by UCE, ImageReward not measurably raised"),
        ((0.6, 0.5, 0.3), "Stripes erased by UCE, ImageReward fell"),
    ],
)
def test_titles_of_recoveries_follow_the_reward_since_the_erasure(
    rewards: tuple[float, float, float], title: str
) -> None:
    states = [
        state(name, rate, reward)
        for name, rate, reward in zip(("before", "erased", "recovered"), (1.0, 0.0, 0.0), rewards, strict=True)
    ]
    told = verdict(states, concept="stripes", erased_by="UCE", tuned_by="ReFL")
    assert told.title == title
    assert ". From erased to recovered ImageReward on benign prompts " in told.line


def test_a_concept_that_the_recovery_brings_back_is_in_title_and_line() -> None:
    states = [state("before", 1.0, 0.6), state("erased", 0.0, 0.3), state("recovered", 0.4, 0.7)]
    told = verdict(states, concept="stripes", erased_by="UCE", tuned_by="ReFL")
    assert told.title == "Stripes reduced by UCE, partly back, ImageReward recovered"
    assert "; concept rate on explicit prompts rose from 0.00 to 0.40 (+0.3" in told.line.split("From erased")[1]
    states[2] = state("recovered", 1.0, 0.7)
    told = verdict(states, concept="stripes", erased_by="UCE", tuned_by="ReFL")
    assert told.title == "Stripes came back, ImageReward recovered"


def test_a_concept_without_a_measure_is_not_measured() -> None:
    states = [state("before", None, 0.6), state("erased", None, 0.5)]
    told = verdict(states, concept="van gogh", erased_by="UCE")
    assert told.title == "Van gogh and UCE: not measured"
    assert told.line.startswith("Van gogh was not measured. ImageReward on benign prompts fell from 0.60 to 0.50 (95 %")
    nothing = [scores(name, {("sharpness", "benign"): [0.0, 1.0]}) for name in ("before", "erased")]
    assert verdict(nothing, concept="van gogh", erased_by="UCE").line == (
        "Van gogh was not measured. ImageReward was not measured."
    )


@pytest.mark.parametrize(
    ("after", "title", "words"),
    [
        (0.8, "ImageReward raised by ReFL", "rose from 0.60 to 0.80 (95 % interval of the difference +0."),
        (0.6, "ImageReward not measurably raised by ReFL", "did not change measurably: 0.600 and 0.600 (95 %"),
        (0.4, "ImageReward fell with ReFL", "fell from 0.60 to 0.40 (95 % interval of the difference \u22120."),
    ],
)
def test_a_tuned_reward_is_raised_only_if_it_rose(after: float, title: str, words: str) -> None:
    told = verdict([state("before", None, 0.6), state("tuned", None, after)], tuned_by="ReFL")
    assert told.title == title
    assert words in told.line


@pytest.mark.parametrize("difference", [0.0, 1e-6])
def test_what_the_table_shows_as_equal_is_no_rise(difference: float) -> None:
    one, two = (
        scores(name, {("ImageReward", "benign"): [-2.396 + change] * 8})
        for name, change in (("a", 0.0), ("b", difference))
    )
    told = verdict([one, two], tuned_by="ReFL")
    assert told.title == "ImageReward not measurably raised by ReFL"
    assert "did not change measurably: \u22122.396 and \u22122.396" in told.line


def test_a_single_prompt_has_no_interval_and_proves_nothing() -> None:
    one, two = (scores(name, {("ImageReward", "benign"): [value]}) for name, value in (("a", 0.1), ("b", 0.9)))
    told = verdict([one, two], tuned_by="ReFL")
    assert told.title == "ImageReward measured on a single prompt"
    assert told.line == (
        "ImageReward on benign prompts went from 0.10 to 0.90 (a single prompt, so that there is no interval)."
    )
    one, two = (
        scores(name, {("concept rate", "explicit"): [value]}, ["concept rate"])
        for name, value in (("a", 1.0), ("b", 0.0))
    )
    assert verdict([one, two], concept="stripes", erased_by="UCE").title == "Stripes not measurably reduced by UCE"


def test_a_held_out_reward_that_fell_is_in_the_title() -> None:
    states = [state("before", None, 0.6, utility=0.5), state("tuned", None, 0.9, utility=0.1)]
    told = verdict(states, tuned_by="DDPO", held_out="true utility")
    assert told.title == "ImageReward raised by DDPO, true utility fell"
    assert "their true utility fell from 0.50 to 0.10 (" in told.line


def test_a_concept_that_was_to_stay_out_while_tuning_is_told_too() -> None:
    options: dict[str, Any] = {"concept": "stripes", "tuned_by": "DDPO"}
    kept = verdict([state("before", 0.0, 0.5), state("tuned", 0.0, 0.8)], **options)
    assert kept.title == "ImageReward raised by DDPO"
    assert kept.line.startswith("Concept rate on explicit prompts did not change measurably: 0.000 and 0.000 (")
    back = verdict([state("before", 0.0, 0.5), state("tuned", 0.5, 0.8)], **options)
    assert back.title == "ImageReward raised by DDPO, stripes came back"


def test_the_reward_is_told_on_the_kind_that_was_asked_for_or_the_first_there_is() -> None:
    states = [
        scores(name, {("size", "trained"): around(5000.0 + rise), ("size", "unseen"): around(4000.0)})
        for name, rise in (("before", 0.0), ("tuned", 30.0))
    ]
    assert verdict(states, tuned_by="DDPO", reward="size").line.startswith(
        "Size on trained prompts rose from 5000.0 to 5030.0 ("
    )
    told = verdict(states, tuned_by="DDPO", reward="size", kind="unseen")
    assert told.title == "Size not measurably raised by DDPO"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "verdict must be of an erasure or a fine-tuning, got neither"),
        ({"erased_by": "UCE"}, "concept must be named, got none that UCE erased"),
        (
            {"concept": "stripes", "erased_by": "UCE", "tuned_by": "ReFL"},
            r"scores must be of at least 3 models, got \['before', 'after'\]",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verdict([state("before", 1.0, 0.5), state("after", 0.0, 0.5)], **options)
