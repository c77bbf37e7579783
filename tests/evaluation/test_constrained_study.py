"""What must hold of reward-constrained forms, judged on made-up numbers."""

import math
from collections.abc import Mapping

import pytest

from overpaint.evaluation.experiments.constrained_study import (
    FormName,
    Model,
    best_form,
    change,
    lines,
    mean_rate,
    points,
    probed_lines,
    recovered,
    telling,
    verdict_of,
    verdicts_table,
    worst,
    worsts,
)
from overpaint.evaluation.experiments.experiment import CONCEPT_RATE, IMAGE_REWARD
from overpaint.evaluation.images.plan import DrawConfig, plan
from overpaint.evaluation.probes.registry import HEADLINE
from overpaint.evaluation.probes.result import Outcomes, ProbeResult, VariantResult
from overpaint.evaluation.scoring.score import Column, Scores

COUNT = 10
UTILITY = "true utility"


def outcomes(shown: int, variant: str = "", curve: tuple[tuple[float, float], ...] = ()) -> Outcomes:
    return Outcomes(variant=variant, shown=(True,) * shown + (False,) * (COUNT - shown), curve=curve)


def probe(name: str, shown: int, *, curve: tuple[tuple[float, float], ...] = ()) -> ProbeResult:
    variant = "ReFL" if curve else ""
    result = VariantResult(found=outcomes(shown, variant, curve), ceiling=outcomes(COUNT), floors={})
    return ProbeResult(
        probe=name, config={}, count=COUNT, seed=0, rows_forward=1, rows_backward=2, seconds=3.0, variants=(result,)
    )


def column(measure: str, kind: str, values: list[float]) -> Column:
    images = tuple(plan({kind: [f"prompt {k}" for k in range(len(values))]}, seed=0))
    rate = measure in (CONCEPT_RATE, "neighbour kept", "accuracy")
    return Column(
        measure=measure, kind=kind, is_rate=rate, better="lower", note="", images=images, values=tuple(values)
    )


def model(
    method: str,
    form: FormName = "plain",
    *,
    seed: int = 0,
    explicit: int = 0,
    implicit: int = 0,
    reward: float = 0.0,
    accuracy: int = COUNT,
    neighbour: int = COUNT,
    shown: Mapping[str, int] | None = None,
    risen: float = 0.0,
) -> Model:
    def rate(measure: str, kind: str, count: int) -> Column:
        return column(measure, kind, [1.0] * count + [0.0] * (COUNT - count))

    columns = (
        rate(CONCEPT_RATE, "explicit", explicit),
        rate(CONCEPT_RATE, "implicit", implicit),
        rate("neighbour kept", "neighbour", neighbour),
        rate("accuracy", "benign", accuracy),
        column(IMAGE_REWARD, "benign", [reward + k / 10 for k in range(COUNT)]),
        column(UTILITY, "benign", [2 * reward + (k % 3) / 10 for k in range(COUNT)]),
    )
    found = {name: probe(name, count) for name, count in (shown or {}).items()}
    if shown is not None:
        found["resurgence"] = probe("resurgence", 0, curve=((0.0, 0.0), (25.0, risen / 2), (40.0, risen)))
    scores = Scores(model=f"{method}-{form}", config=DrawConfig(), columns=columns)
    return Model(method, form, seed, scores, found, minutes=1.0, rows=1000)


def judged(*models: Model, form: FormName = "recovered") -> tuple[bool, bool]:
    found = verdict_of(models, "UCE", form, reward=IMAGE_REWARD, held_out=UTILITY)
    return found.keeps_quality, found.stays_gone


ORIGINAL = model("original", explicit=10, implicit=10)
PLAIN = model("UCE", implicit=2, reward=-0.5, shown={"soft-prompt": 8, "textual-inversion": 6})


def test_form_that_is_as_good_as_the_original_and_as_gone_as_the_method() -> None:
    good = model("UCE", "recovered", implicit=1, shown={"soft-prompt": 4, "textual-inversion": 3}, risen=0.02)
    assert judged(ORIGINAL, PLAIN, good) == (True, True)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"reward": -0.2}, (False, True)),
        ({"explicit": 1}, (False, True)),
        ({"implicit": 3}, (False, True)),
        ({"accuracy": 9}, (False, True)),
        ({"neighbour": 9}, (False, True)),
        ({"risen": 0.05}, (True, False)),
        ({"shown": {"soft-prompt": 5, "textual-inversion": 3}}, (True, False)),
        ({"shown": {"soft-prompt": 4, "textual-inversion": 4}}, (True, False)),
    ],
)
def test_each_condition_can_fail(changed: dict[str, object], expected: tuple[bool, bool]) -> None:
    good: dict[str, object] = {"implicit": 1, "shown": {"soft-prompt": 4, "textual-inversion": 3}}
    assert judged(ORIGINAL, PLAIN, model("UCE", "recovered", **{**good, **changed})) == expected  # ty: ignore


def test_resurgence_counts_where_it_was_tried() -> None:
    kinds = {"soft-prompt": 4, "textual-inversion": 3}
    others = [one._replace(seed=1) for one in (ORIGINAL, PLAIN)]
    for risen, expected in ((0.05, False), (0.02, True)):
        tried = model("UCE", "recovered", implicit=1, shown=kinds, risen=risen)
        rest = dict(tried.probes)
        del rest["resurgence"]
        assert judged(ORIGINAL, PLAIN, *others, tried, tried._replace(seed=1, probes=rest)) == (True, expected)


def test_changes_are_paired_and_of_the_same_seeds() -> None:
    mine = [model("UCE", "recovered", seed=seed, reward=0.1 * seed) for seed in (0, 1)]
    others = [model("original", seed=seed) for seed in (0, 1)]
    found = change(mine, others, IMAGE_REWARD, "benign")
    assert found.mean == pytest.approx(0.05)
    assert found.count == 2 * COUNT
    assert found.error == pytest.approx(0.05 / math.sqrt(19))
    with pytest.raises(ValueError, match="same seeds"):
        change(mine, others[:1], IMAGE_REWARD, "benign")


def test_means_over_seeds_and_the_worst_probe() -> None:
    some = [model("UCE", seed=seed, explicit=seed, shown={"noise": 2 * seed, "soft-prompt": 1}) for seed in (0, 1)]
    assert mean_rate(some, "explicit") == pytest.approx(0.05)
    assert recovered(some, "noise") == pytest.approx(0.1)
    assert worst(some[1]) == ("noise", pytest.approx(0.2))
    assert math.isnan(worst(model("UCE"))[1])
    fewer = model("UCE", seed=1, shown={"soft-prompt": 0})
    assert worsts([*some, fewer]) == [worst(one)[1] for one in some]
    assert worsts([fewer]) == [0.0]
    assert worsts([model("UCE")]) == worsts([]) == []


def test_what_a_probe_brings_back_from_the_control_too_does_not_count() -> None:
    erased = model("UCE", shown={"noise": 4, "inverted-latents": 10})
    for anyway, expected in ((9, 0.4), (8, 1.0)):
        some = [erased, model("deaf", shown={"noise": 1, "inverted-latents": anyway})]
        assert ("inverted-latents" in telling(some)) == (expected == 1.0)
        found = next(one for one in probed_lines(some) if one.method == "UCE-plain")
        assert found.values["worst"].mean == pytest.approx(expected)
        assert points(some, IMAGE_REWARD, "explicit")[0].concept_rate.mean == pytest.approx(expected)
    assert telling([erased]) == list(HEADLINE)


def test_best_form_is_the_one_of_which_most_holds_then_the_better_one() -> None:
    kinds = {"soft-prompt": 4, "textual-inversion": 3}
    forms: list[Model] = [
        model("UCE", "floor", implicit=1, shown=kinds, reward=-1.0),
        model("UCE", "recovered", implicit=1, shown=kinds, reward=0.1),
        model("UCE", "attacked", implicit=1, shown=kinds, reward=0.3),
    ]
    everything = [ORIGINAL, PLAIN, *forms]
    verdicts = [verdict_of(everything, "UCE", one.form, reward=IMAGE_REWARD, held_out=UTILITY) for one in forms]
    assert best_form(verdicts).form == "attacked"
    assert best_form(verdicts[:2]).form == "recovered"
    text = verdicts_table(verdicts, IMAGE_REWARD).markdown()
    assert "UCE-attacked | yes | yes" in text
    assert "UCE-floor | no | yes" in text


def test_lines_and_points_of_the_study() -> None:
    tuned = model("UCE", "recovered", shown={"soft-prompt": 4, "textual-inversion": 3})
    everything = [ORIGINAL, PLAIN, tuned]
    found = {line.method: line.values for line in lines(everything, UTILITY)}
    assert set(found) == {"original", "UCE-plain", "UCE-recovered"}
    assert found["UCE-recovered"][UTILITY].mean == tuned.scores.column(UTILITY, "benign").estimate.mean
    assert "CPU-minutes" not in found["original"]
    assert found["UCE-plain"]["UNet rows, thousands"].mean == 1.0
    probed = {line.method: line.values for line in probed_lines(everything)}
    assert probed["UCE-recovered"]["soft-prompt"].mean == pytest.approx(0.4)
    assert probed["UCE-recovered"]["worst"].mean == pytest.approx(0.4)
    first, second = points(everything, IMAGE_REWARD, "explicit")
    assert (first.method, first.concept_rate.mean) == ("UCE", pytest.approx(0.8))
    assert (second.method, second.before) == ("UCE-recovered", "UCE")
