"""The published numbers against the notes that they were typed from, read again by a program."""

import math
import re
from pathlib import Path

import pytest

from overpaint.evaluation.experiments import published as module
from overpaint.evaluation.experiments.published import EXPERIMENTS, OWN_SIZE, PUBLISHED, SOURCES, published

METHODS = ("original", "SLD", "AC", "ESD", "UCE", "SA", "RECELER", "MACE", "SAFREE", "ANT")
NUMBER = r"[\u2212-]?\d*\.?\d+"


@pytest.fixture(scope="module")
def notes(shared: Path) -> str:
    return (shared / "experiments.md").read_text(encoding="utf-8")


def section(notes: str, heading: str) -> str:
    """Returns what is between a heading and the next."""
    (found,) = (part for part in notes.split("\n## ")[1:] if part.startswith(heading))
    return found


def table(text: str, first_column: str) -> list[list[str]]:
    """Returns the cells of the rows below the header of a table."""
    lines = text.split("\n")
    (start,) = (k for k, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def number(text: str) -> float:
    """Returns the first number of a cell; footnotes are raised digits, which are not among those it looks for."""
    match = re.search(NUMBER, re.sub("[¹²³]", "", text))
    assert match is not None, text
    return float(match[0].replace("\u2212", "-"))


def value(experiment: str, model: str, metric: str, setting: str, source: str) -> float:
    key = (experiment, model, metric, setting, source)
    (found,) = (n.value for n in PUBLISHED if (n.experiment, n.model, n.metric, n.setting, n.source) == key)
    return found


def test_every_number_is_there_once_and_is_finite() -> None:
    keys = [(n.experiment, n.model, n.metric, n.setting, n.source) for n in PUBLISHED]
    assert len(set(keys)) == len(keys)
    assert all(math.isfinite(n.value) for n in PUBLISHED)
    assert all(n.model and n.metric for n in PUBLISHED)


def test_every_experiment_and_every_source_is_explained_and_used() -> None:
    assert {n.experiment for n in PUBLISHED} == set(EXPERIMENTS)
    assert {n.source for n in PUBLISHED} == set(SOURCES)
    assert all(source.title and not source.title.endswith(".") for source in SOURCES.values())
    assert all(source.url.startswith("https://") or source.url == "" for source in SOURCES.values())


def test_numbers_are_found_by_experiment_metric_and_source() -> None:
    assert published("preference") == tuple(n for n in PUBLISHED if n.experiment == "preference")
    found = published("preference", "preference accuracy, %", "study")
    assert [(n.model, n.value) for n in found] == [
        ("CLIP score", 54.81),
        ("Aesthetic score", 57.32),
        ("BLIP score", 57.84),
        ("ImageReward", 65.15),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("animals",), r"experiment must be one of captions, .*, got 'animals'"),
        (("captions", "CLIP score"), r"metric must be one of those of captions \(ImageReward; FID\), got 'CLIP score'"),
        (("captions", None, "ANT"), r"source must be one of those of captions \(study; ImageReward\), got 'ANT'"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        published(*arguments)


def test_captions_are_as_noted(notes: str) -> None:
    text = section(notes, "1-1")
    for model, at_256, at_512, paper in table(text, "model"):
        assert value("captions", model, "ImageReward", "256²", "study") == number(at_256)
        assert value("captions", model, "ImageReward", "512²", "study") == number(at_512)
        assert value("captions", model, "ImageReward", OWN_SIZE, "ImageReward") == number(paper)
    rows = table(text, "model, 256²")
    for model, *cells in rows:
        for scale, cell in zip(("1.5", "2", "3", "4", "5"), cells, strict=True):
            assert value("captions", model, "ImageReward", f"256², CFG {scale}", "study") == number(cell)
    assert len(rows) == 3
    (rest,) = re.findall(r"for the rest: (.*); zero-shot FID: (.*)\.", text)
    full = {"SD 2.1": "Stable Diffusion v2.1", "SD 1.4": "Stable Diffusion v1.4", "VD": "Versatile Diffusion"}
    for listed, metric, setting in ((rest[0], "ImageReward", OWN_SIZE), (rest[1], "FID", "zero-shot")):
        items = re.findall(rf"([A-Z][\w .-]*?\d?) ({NUMBER})(?:,|$)", listed)
        for name, cell in items:
            assert value("captions", full.get(name, name), metric, setting, "ImageReward") == number(cell)
        assert len(items) == (3 if metric == "ImageReward" else 6)


def test_prompts_are_as_noted(notes: str) -> None:
    rows = table(section(notes, "1-2"), "model")
    for model, study, study_clip, paper, paper_clip, human in rows:
        assert value("prompts", model, "ImageReward", "", "study") == number(study)
        assert value("prompts", model, "CLIP score", "", "study") == number(study_clip)
        assert value("prompts", model, "ImageReward", "", "ImageReward") == number(paper)
        source = "ImageReward, as the study quotes it" if "¹" in paper_clip else "ImageReward"
        assert value("prompts", model, "CLIP score", "", source) == number(paper_clip)
        rank, wins = human.split("/")
        assert value("prompts", model, "human rank", "", "ImageReward") == number(rank)
        assert value("prompts", model, "human wins", "", "ImageReward") == number(wins)
    assert len(rows) == 6
    (corrected,) = re.findall(r"the paper's own table has ([\d.]+) for v1.4", section(notes, "1-2"))
    assert value("prompts", "Stable Diffusion v1.4", "CLIP score", "", "ImageReward") == float(corrected)


def test_preferences_are_as_noted(notes: str) -> None:
    text = section(notes, "1-3")
    rows = table(text, "metric")
    for model, study, paper in rows:
        assert value("preference", model, "preference accuracy, %", "", "study") == number(study)
        assert value("preference", model, "preference accuracy, %", "", "ImageReward") == number(paper)
    models = [row[0] for row in rows]
    recall, kept = text.split("filter: ")
    for metric, listed in (("recall", recall.split("(paper): ")[1]), ("filter", kept)):
        triples = re.findall(r"([\d.]+)/([\d.]+)/(\d+\.\d+)", listed)
        for model, triple in zip(models, triples, strict=True):
            for place, cell in zip((1, 2, 4), triple, strict=True):
                assert value("preference", model, f"{metric}@{place}, %", "", "ImageReward") == float(cell)


def test_erasures_are_as_noted(notes: str) -> None:
    text = section(notes, "2 ")
    rows = table(text, "method")
    assert tuple(row[0] for row in rows) == METHODS
    for method, reward, total, fid, clip in rows:
        name = "Receler" if method == "RECELER" else method
        assert value("erasures", name, "ImageReward", "", "study") == number(reward)
        setting = "earlier recipe" if "²" in total else "ESD-u" if "ESD-u" in total else ""
        source = "not recorded" if "³" in total else "ANT"
        assert value("erasures", name, module.I2P_TOTAL, setting, source) == number(total)
        for metric, cell in (("FID", fid), ("CLIP score in hundredths", clip)):
            there = [n for n in published("erasures", metric) if n.model == name]
            assert bool(there) == (cell != "\u2013")
            assert all(n.value == number(cell) for n in there)
    (newest,) = re.findall(r"a total of (\d+); AdvUnlearn (\d+), SalUn (\d+)", text)
    found = [
        value("erasures", "Semantic Surgery", module.I2P_TOTAL, "", "Semantic Surgery"),
        value("erasures", "AdvUnlearn", module.I2P_TOTAL, "", "not recorded"),
        value("erasures", "SalUn", module.I2P_TOTAL, "", "not recorded"),
    ]
    assert found == [float(cell) for cell in newest]


def test_benchmark_and_attacks_are_as_noted(notes: str) -> None:
    text = section(notes, "2 ")
    (listed,) = re.findall(r"ImageReward: (original .*) \(schedulers", text)
    pairs = [item.rsplit(" ", 1) for item in listed.split(", ")]
    assert {n.model: n.value for n in published("erasures", "ImageReward", "HUB")} == {
        name: number(cell) for name, cell in pairs
    }
    (listed,) = re.findall(r"success %\): (.*?)\. EraseFlow", text)
    pairs = [item.rsplit(" ", 1) for item in listed.split(", ")]
    assert {n.model: n.value for n in published("attacks", source="not recorded")} == {
        name: number(cell) for name, cell in pairs
    }
    (listed,) = re.findall(r"I2P-142 / Ring-A-Bell / MMA (.*)\.", text)
    assert [n.value for n in published("attacks", source="EraseFlow")] == [number(cell) for cell in listed.split(" / ")]


def test_people_and_ddpo_are_as_noted(notes: str) -> None:
    text = section(notes, "ReFL")
    (listed,) = re.findall(r"win rate\): (.*)\.", text)
    wins = {n.model: n.value for n in published("refl", "human wins")}
    rates = {n.model: n.value for n in published("refl", "human win rate, %")}
    items = re.findall(r"([A-Za-z][\w .]*?) (\d+)(?: \(([\d.]+) %\))?(?:;|$)", listed)
    for name, count, rate in items:
        model = "Stable Diffusion v1.4" if name == "SD v1.4" else name
        assert wins.pop(model) == float(count)
        assert rates.pop(model, None) == (float(rate) if rate else None)
    assert not wins
    assert not rates

    text = section(notes, "DDPO")
    (wolf,) = re.findall(
        r'"wolf", base ([\d.]+) → ([\d.]+) at 20k reward queries \(universal guidance ([\d.]+)\)', text
    )
    assert [n.value for n in published("ddpo", source="DDPO")] == [float(cell) for cell in wolf]
    (curves,) = re.findall(r"read off plots\): (.*)\.", text)
    expected = {
        (metric, model): number(cell)
        for metric, before, after in re.findall(rf"(\w+) ({NUMBER}) → about ({NUMBER})", curves)
        for model, cell in (("Stable Diffusion v1.4", before), ("DDPO", after))
    }
    assert len(expected) == 6
    assert {(n.metric, n.model): n.value for n in published("ddpo", source="D3PO")} == expected
