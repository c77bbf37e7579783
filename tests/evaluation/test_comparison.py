import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest

from overpaint.evaluation import Column, DrawConfig, PlannedImage, Scores, compare, plan, text_table
from overpaint.evaluation.metrics.statistics import bootstrap_interval, paired_rate_difference
from overpaint.evaluation.report.table import number
from overpaint.evaluation.scoring.compare import Intervals
from overpaint.evaluation.scoring.score import Better

COLOURS = ("red", "blue", "green", "gray")
PLANNED = plan(
    {"explicit": [f"a striped {one} star" for one in COLOURS], "benign": [f"a {one} star" for one in COLOURS]}
)
EXPLICIT, BENIGN = PLANNED[:4], PLANNED[4:]


def scores(
    model: str,
    rewards: tuple[float, ...],
    shown: tuple[float, ...],
    *,
    benign: tuple[PlannedImage, ...] = BENIGN,
    config: DrawConfig | None = None,
) -> Scores:
    return Scores(
        model=model,
        config=config or DrawConfig(steps=7),
        columns=(
            Column("ImageReward", "benign", False, "higher", "", benign, rewards),
            Column("concept rate", "explicit", True, "lower", "", EXPLICIT, shown),
            Column("concept rate", "benign", True, "lower", "", BENIGN, (0.0, 0.0, 0.0, 0.0)),
        ),
    )


BEFORE = scores("before", (0.1, 0.2, 0.3, 0.4), (1.0, 1.0, 1.0, 0.0))
ERASED = scores("erased", (-0.4, -0.3, -0.2, -0.1), (0.0, 0.0, 0.0, 0.0))
RECOVERED = scores("recovered", (0.2, 0.3, 0.4, 0.6), (0.0, 0.0, 0.0, 0.0))

TABLE = """\
measure         kind      n         before          erased       recovered
--------------  --------  -  -------------  --------------  --------------
ImageReward ↑   benign    4  0.250 ± 0.065  -0.250 ± 0.065   0.375 ± 0.085
                                            -0.500 ± 0.000  +0.125 ± 0.025
concept rate ↓  explicit  4  0.750 ± 0.217   0.000 ± 0.000   0.000 ± 0.000
                                            -0.750 ± 0.250  -0.750 ± 0.250
                benign    4  0.000 ± 0.000   0.000 ± 0.000   0.000 ± 0.000
                                            +0.000 ± 0.000  +0.000 ± 0.000

Mean ± standard error; below it the paired difference from before, same prompts and seeds. \
↑ higher is better, ↓ lower is better."""


def test_differences_are_paired() -> None:
    row = compare([BEFORE, ERASED, RECOVERED]).row("ImageReward", "benign")
    assert [estimate.mean for estimate in row.estimates] == pytest.approx([0.25, -0.25, 0.375], rel=1e-12)
    # Differences 0.1, 0.1, 0.1, 0.2: mean 0.125, variance 0.0025, error 0.025.
    assert row.differences[1].mean == pytest.approx(0.125, rel=1e-12)
    assert row.differences[1].error == pytest.approx(0.025, rel=1e-12)
    assert row.differences[0].error == pytest.approx(0.0, abs=1e-12)


def test_differences_of_rates_keep_an_interval_where_all_images_agree() -> None:
    comparison = compare([BEFORE, ERASED])
    assert comparison.row("concept rate", "explicit").differences[0] == paired_rate_difference(
        ERASED.columns[1].values, BEFORE.columns[1].values
    )
    unchanged = comparison.row("concept rate", "benign").differences[0]
    assert unchanged.low < -0.4 < 0.4 < unchanged.high


def test_zero_has_no_minus() -> None:
    assert number(-0.0004, 3) == "0.000"
    assert number(-0.0004, 3, sign=True) == "+0.000"
    assert number(-0.0006, 3, sign=True) == "-0.001"


def test_the_terminal_table_reads_well() -> None:
    assert text_table(compare([BEFORE, ERASED, RECOVERED])) == TABLE


def test_one_model_alone_has_a_table_without_differences() -> None:
    assert text_table(compare([BEFORE])) == (
        "measure         kind      n         before\n"
        "--------------  --------  -  -------------\n"
        "ImageReward ↑   benign    4  0.250 ± 0.065\n"
        "concept rate ↓  explicit  4  0.750 ± 0.217\n"
        "                benign    4  0.000 ± 0.000\n"
        "\n"
        "Mean ± standard error. ↑ higher is better, ↓ lower is better."
    )


def test_large_numbers_have_fewer_decimals_and_single_ones_no_error() -> None:
    one = Scores(
        model="before",
        config=DrawConfig(),
        columns=(
            Column("JPEG kB", "benign", False, "neither", "", BENIGN[:1], (106.25,)),
            Column("objects", "benign", False, "neither", "", BENIGN[:1], (12.5,)),
        ),
    )
    assert text_table(compare([one])).splitlines()[2:4] == [
        "JPEG kB  benign  1  106.2 ± -",
        "objects  benign  1  12.50 ± -",
    ]


@pytest.mark.parametrize(
    ("better", "after", "verdict"),
    [
        ("higher", (1.1, 2.2, 3.1, 4.2), "better"),
        ("higher", (0.9, 1.8, 2.9, 3.8), "worse"),
        ("lower", (0.9, 1.8, 2.9, 3.8), "better"),
        ("lower", (1.1, 2.2, 3.1, 4.2), "worse"),
        ("higher", (1.1, 1.9, 3.1, 3.9), "unclear"),
        ("neither", (1.1, 2.2, 3.1, 4.2), "unclear"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(better: Better, after: tuple[float, ...], verdict: str) -> None:
    def column(values: tuple[float, ...]) -> Column:
        return Column("m", "benign", False, better, "", BENIGN, values)

    one = Scores(model="one", config=DrawConfig(), columns=(column((1.0, 2.0, 3.0, 4.0)),))
    two = Scores(model="two", config=DrawConfig(), columns=(column(after),))
    assert compare([one, two]).rows[0].verdicts == (verdict,)


def test_json_holds_every_number(tmp_path: Path) -> None:
    comparison = compare([BEFORE, RECOVERED])
    comparison.save(tmp_path / "comparison.json")
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["models"] == ["before", "recovered"]
    assert content["config"] == asdict(DrawConfig(steps=7))
    row = content["rows"][0]
    assert (row["measure"], row["kind"], row["verdicts"]) == ("ImageReward", "benign", {"recovered": "better"})
    assert row["models"]["before"]["mean"] == pytest.approx(0.25)
    assert row["models"]["before"]["error"] == pytest.approx(math.sqrt(0.05 / 3 / 4))
    assert row["differences"]["recovered"]["low"] == pytest.approx(0.125 - 3.182446 * 0.025, rel=1e-6)


def test_json_of_a_single_value_has_no_error(tmp_path: Path) -> None:
    one = Scores(
        model="m",
        config=DrawConfig(),
        columns=(Column("r", "benign", False, "higher", "", BENIGN[:1], (1.0,)),),
    )
    comparison = compare([one])
    comparison.save(tmp_path / "comparison.json")
    assert comparison.as_dict()["rows"][0]["models"]["m"]["error"] is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            scores("erased", (0.0,) * 4, (0.0,) * 4, benign=(*BENIGN[:3], BENIGN[3]._replace(seed=1))),
            r"before and erased, ImageReward on benign: must be of the same prompts and seeds .* got .* and .*seed=1,",
        ),
        (
            scores("erased", (0.0,) * 4, (0.0,) * 4, benign=(BENIGN[1], BENIGN[0], *BENIGN[2:])),
            "must be of the same prompts and seeds in the same order",
        ),
        (
            scores("erased", (0.0,) * 3, (0.0,) * 4, benign=BENIGN[:3]),
            "ImageReward on benign: must be of the same images, got 4 and 3 of them",
        ),
        (
            scores("erased", (0.0,) * 4, (0.0,) * 4, config=DrawConfig(steps=8)),
            r"must be drawn with the same settings, got .*steps=7.* and .*steps=8",
        ),
        (
            Scores(model="erased", config=DrawConfig(steps=7), columns=BEFORE.columns[1:]),
            "must have the same measures, got .*ImageReward on benign.* and .*'concept rate on explicit'",
        ),
        (
            Scores(
                model="erased",
                config=DrawConfig(steps=7),
                columns=(*BEFORE.columns[:2], BEFORE.columns[2]._replace(is_rate=False)),
            ),
            "concept rate on benign: values must be rates for both or for neither",
        ),
        (scores("before", (0.0,) * 4, (0.0,) * 4), "must be of models with unique names"),
    ],
)
def test_models_that_are_not_paired_are_refused(other: Scores, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare([BEFORE, other])


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="scores must hold at least one model, got none"):
        compare([])


def test_asking_for_a_row_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"ImageReward on benign, .* got ImageReward on explicit"):
        compare([BEFORE]).row("ImageReward", "explicit")


COPIES = plan({"benign": ["a", "b", "c"]}, images_per_prompt=2)
NUMBERS = (0.0, 0.2, 1.0, 1.2, 2.0, 2.2)


def of_copies(model: str, values: tuple[float, ...], *, is_rate: bool = False, known: bool = True) -> Scores:
    images = COPIES if known else tuple(image._replace(seed=-1) for image in COPIES[: len(values)])
    column = Column("m", "benign", is_rate, "higher", "", images, values)
    return Scores(model=model, config=DrawConfig() if known else None, columns=(column,))


def test_copies_of_a_prompt_are_not_taken_for_independent() -> None:
    after = tuple(value + change for value, change in zip(NUMBERS, (0.1, 0.1, 0.2, 0.2, 0.3, 0.3), strict=True))
    row = compare([of_copies("one", NUMBERS), of_copies("two", after)]).rows[0]
    # Means of three prompts: 0.1, 1.1, 2.1, and differences 0.1, 0.2, 0.3; Student's t for two degrees of freedom.
    assert row.estimates[0].error == pytest.approx(1 / math.sqrt(3))
    assert row.differences[0].error == pytest.approx(0.1 / math.sqrt(3))
    assert row.differences[0].high == pytest.approx(0.2 + 4.302652730 * 0.1 / math.sqrt(3))
    assert row.differences[0].count == 6


def test_one_text_under_several_ids_is_one_prompt() -> None:
    listed = plan({"benign": ["a", "a", "b", "b", "c", "c"]})
    assert len({image.id for image in listed}) == 6
    column = Column("m", "benign", False, "higher", "", listed, NUMBERS)
    copies = of_copies("one", NUMBERS).columns[0]
    assert column.estimate == copies.estimate
    assert column.estimate.error == pytest.approx(1 / math.sqrt(3))


def test_another_system_s_images_are_compared_by_prompt() -> None:
    first = of_copies("one", NUMBERS)
    other = of_copies("other", (0.3, 0.5, 1.0, 1.4, 1.9), known=False)
    with pytest.raises(ValueError, match=r"one and other must both be drawn from known seeds.*; compare by prompt"):
        compare([first, other])
    comparison = compare([first, other], by="prompt")
    # Means of the prompts 0.4, 1.2 and 1.9 against 0.1, 1.1 and 2.1: differences 0.3, 0.1 and -0.2.
    change = comparison.rows[0].differences[0]
    assert (change.mean, change.count) == (pytest.approx(0.2 / 3), 3)
    assert change.error == pytest.approx(math.sqrt((0.14 - 0.04 / 3) / 2 / 3))
    assert comparison.config == DrawConfig()
    assert compare([other], by="prompt").as_dict()["config"] is None


def test_rates_compared_by_prompt_keep_their_interval() -> None:
    first = of_copies("one", (1.0,) * 6, is_rate=True)
    other = of_copies("other", (0.0,) * 6, is_rate=True, known=False)
    change = compare([first, other], by="prompt").rows[0].differences[0]
    # Three of three and none of three, Wilson's: 3.841459 / 6.841459 each.
    assert (change.mean, change.low) == (-1, -1)
    assert change.high == pytest.approx(-1 + math.sqrt(2) * 3.841459 / 6.841459, rel=1e-6)


def test_other_prompts_are_not_compared_by_prompt() -> None:
    other = of_copies("other", NUMBERS[:4], known=False)
    with pytest.raises(ValueError, match="must be of the same prompts, got 'c' and None for 'benign-0002'"):
        compare([of_copies("one", NUMBERS), other], by="prompt")


def test_bootstrap_intervals_are_those_of_the_prompts() -> None:
    after = tuple(value + change for value, change in zip(NUMBERS, (0.1, 0.1, 0.2, 0.2, 0.3, 0.6), strict=True))
    scores = [of_copies("one", NUMBERS), of_copies("two", after)]
    ways: tuple[Intervals, ...] = ("closed", "bootstrap")
    closed, drawn = (compare(scores, intervals=way).rows[0] for way in ways)
    changes = [b - a for a, b in zip(NUMBERS, after, strict=True)]
    names = [image.id for image in COPIES]
    assert drawn.estimates[1][2:4] == tuple(bootstrap_interval(after, names))
    assert drawn.differences[0][2:4] == tuple(bootstrap_interval(changes, names))
    assert drawn.differences[0][:2] == closed.differences[0][:2]
    assert drawn.differences[0].high < closed.differences[0].high
    rates = [of_copies(name, (1.0, 0.0) * 3, is_rate=True) for name in ("one", "two")]
    assert compare(rates, intervals="bootstrap").rows == compare(rates).rows
