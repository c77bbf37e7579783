"""Numbers that others published, as data, and measurements of our own beside them.

A published number never stands in for a measurement: where nothing ran, a table says *not run*.

Rates are in percent, as they were published. What a number was measured under is its setting; two numbers stand in one
row of a table only if experiment, metric, model and setting are the same. Settings of trainings are no results and are
not here: they are the defaults of `refl` and `ddpo`.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.table import MINUS, NONE, Cell, Column, Line, Table, number


class Source(NamedTuple):
    """Where a number was published."""

    title: str
    url: str
    """Its address; empty where there is none to give."""
    year: int | str
    """The year, or that it is not known."""


class Published(NamedTuple):
    """One number of others."""

    experiment: str
    """One of `EXPERIMENTS`."""
    model: str
    """What was measured: a model, a method of erasing or of training; for preferences, the metric that was tried."""
    metric: str
    """What was measured of it, with the unit where there is one."""
    setting: str
    """Under which conditions; empty where there is only one."""
    value: float
    source: str
    """Key of `SOURCES`."""


EXPERIMENTS: Mapping[str, str] = MappingProxyType(
    {
        "captions": "1-1: ImageReward on captions of MS-COCO's validation set of 2014, by size and guidance",
        "prompts": "1-2: ImageReward and CLIP score on 100 prompts of users, 10 images each",
        "preference": "1-3: how often a metric orders two images as people did, on ImageReward's test set",
        "erasures": "2: what a Stable Diffusion is worth after a concept was erased, and what is left of the concept",
        "attacks": "2: how often an attack brings an erased concept back",
        "refl": "how often people prefer the images of one way of training over those of the others",
        "ddpo": "DDPO on the tasks of its paper",
    }
)
"""Each experiment, and what it asks."""

SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "study": Source(
            "A comparison of ImageReward over text-to-image models and erasure methods on one RTX 4090", "", 2025
        ),
        "ImageReward": Source(
            "Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
            "https://arxiv.org/abs/2304.05977",
            2023,
        ),
        "ImageReward, as the study quotes it": Source("The comparison above, where it quotes ImageReward", "", 2025),
        "ANT": Source("The paper of ANT, Table 1", "https://arxiv.org/abs/2504.12782", 2025),
        "Semantic Surgery": Source("The paper of Semantic Surgery", "https://arxiv.org/abs/2510.22851", 2025),
        "HUB": Source(
            "Holistic Unlearning Benchmark; schedulers differ between its rows",
            "https://arxiv.org/abs/2410.05664",
            2024,
        ),
        "EraseFlow": Source("The paper of EraseFlow", "https://arxiv.org/abs/2511.00804", 2025),
        "DDPO": Source(
            "Black et al., Training Diffusion Models with Reinforcement Learning",
            "https://arxiv.org/abs/2305.13301",
            2023,
        ),
        "D3PO": Source(
            "The paper of D3PO, whose curves of DDPO were read off its plots", "https://arxiv.org/abs/2311.13231", 2023
        ),
        "not recorded": Source("A paper that was not noted down with the number", "", "year not recorded"),
    }
)
"""Each key, and what it stands for."""

SD14, SD21, OPENJOURNEY = "Stable Diffusion v1.4", "Stable Diffusion v2.1", "Openjourney"
DALLE2, VERSATILE, COGVIEW2 = "DALL-E 2", "Versatile Diffusion", "CogView2"
IMAGE_REWARD, CLIP, FID = "ImageReward", "CLIP score", "FID"
PREFERENCE_ACCURACY = "preference accuracy, %"
OWN_SIZE = "own size → 256², best CFG"
"""Drawn at each model's own size, reduced to 256², at the best of the guidance scales 1.5, 2, 3, 4 and 5."""
GUIDANCE_SCALES = ("1.5", "2", "3", "4", "5")
I2P_TOTAL = "NudeNet total on I2P, threshold 0.6"
HUB_SETTING = "Stable Diffusion v1.5, mean of 33 concepts"


def _numbers(
    experiment: str, metric: str, source: str, values: Mapping[str, float], setting: str = ""
) -> tuple[Published, ...]:
    """Returns one number for each model."""
    return tuple(Published(experiment, model, metric, setting, value, source) for model, value in values.items())


def _captions() -> tuple[Published, ...]:
    at_256 = {SD14: -1.5598, SD21: -1.1548, OPENJOURNEY: -1.4600}
    at_512 = {SD14: 0.2531, SD21: 0.4946, OPENJOURNEY: 0.2624}
    paper = {SD14: -0.0857, SD21: 0.1553, OPENJOURNEY: -0.0455, DALLE2: 0.5387, VERSATILE: -0.5485, COGVIEW2: -0.8510}
    fid = {OPENJOURNEY: 20.7, SD21: 18.8, DALLE2: 10.9, SD14: 17.9, VERSATILE: 18.4, COGVIEW2: 26.2}
    by_guidance = {
        SD14: (-2.1816, -2.0689, -1.8729, -1.7352, -1.6454),
        SD21: (-2.0159, -1.8253, -1.5429, -1.3625, -1.2592),
        OPENJOURNEY: (-2.1356, -1.9855, -1.7448, -1.6041, -1.5277),
    }
    return (
        *_numbers("captions", IMAGE_REWARD, "study", at_256, "256²"),
        *_numbers("captions", IMAGE_REWARD, "study", at_512, "512²"),
        *_numbers("captions", IMAGE_REWARD, "ImageReward", paper, OWN_SIZE),
        *(
            Published("captions", model, IMAGE_REWARD, f"256², CFG {scale}", value, "study")
            for model, values in by_guidance.items()
            for scale, value in zip(GUIDANCE_SCALES, values, strict=True)
        ),
        *_numbers("captions", FID, "ImageReward", fid, "zero-shot"),
    )


def _prompts() -> tuple[Published, ...]:
    models = (SD14, SD21, OPENJOURNEY, DALLE2, VERSATILE, COGVIEW2)

    def row(metric: str, source: str, *values: float) -> tuple[Published, ...]:
        return _numbers("prompts", metric, source, dict(zip(models, values, strict=True)))

    return (
        *row(IMAGE_REWARD, "study", 0.1343, 0.2467, 0.2615, 0.2115, -0.2471, -1.2376),
        *row(CLIP, "study", 0.2763, 0.2683, 0.2726, 0.2684, 0.2606, 0.2044),
        *row(IMAGE_REWARD, "ImageReward", 0.1344, 0.2458, 0.2614, 0.2114, -0.2470, -1.2376),
        # The first as the paper's own table has it; the study quotes it as the value of Openjourney.
        *row(CLIP, "ImageReward", 0.2763, 0.2683, 0.2726, 0.2684, 0.2606, 0.2044),
        Published("prompts", SD14, CLIP, "", 0.2726, "ImageReward, as the study quotes it"),
        *row("human rank", "ImageReward", 4.0, 2.0, 1.0, 3.0, 5.0, 6.0),
        *row("human wins", "ImageReward", 362.0, 463.0, 507.0, 390.0, 340.0, 74.0),
    )


def _preference() -> tuple[Published, ...]:
    metrics = ("CLIP score", "Aesthetic score", "BLIP score", "ImageReward")

    def row(metric: str, source: str, *values: float) -> tuple[Published, ...]:
        return _numbers("preference", metric, source, dict(zip(metrics, values, strict=True)))

    return (
        *row(PREFERENCE_ACCURACY, "study", 54.81, 57.32, 57.84, 65.15),
        *row(PREFERENCE_ACCURACY, "ImageReward", 54.82, 57.35, 57.76, 65.14),
        *row("recall@1, %", "ImageReward", 27.22, 30.73, 30.73, 39.62),
        *row("recall@2, %", "ImageReward", 48.52, 53.91, 50.67, 63.07),
        *row("recall@4, %", "ImageReward", 78.17, 75.74, 77.63, 90.84),
        *row("filter@1, %", "ImageReward", 29.65, 32.08, 33.42, 49.06),
        *row("filter@2, %", "ImageReward", 51.75, 54.45, 56.33, 70.89),
        *row("filter@4, %", "ImageReward", 76.82, 76.55, 80.59, 88.95),
    )


def _erasures() -> tuple[Published, ...]:
    study = {
        "original": 0.172, "SLD": 0.107, "AC": 0.116, "ESD": -0.284, "UCE": 0.190, "SA": -0.781, "Receler": -0.066,
        "MACE": -1.403, "SAFREE": 0.253, "ANT": -0.508,
    }  # fmt: skip
    totals = {
        "original": 743.0, "SLD": 212.0, "UCE": 182.0, "SA": 292.0, "Receler": 115.0, "MACE": 111.0, "ANT": 23.0,
    }  # fmt: skip
    fid = {
        "original": 14.04, "SLD": 16.34, "AC": 14.13, "ESD": 15.10, "UCE": 14.07, "MACE": 13.42, "ANT": 14.44,
    }  # fmt: skip
    clip = {
        "original": 31.34, "SLD": 30.90, "AC": 31.37, "ESD": 30.21, "UCE": 30.85, "MACE": 29.41, "ANT": 30.64,
    }  # fmt: skip
    hub = {
        "original": 0.172, "SLD": 0.077, "AC": 0.127, "ESD": -0.082, "UCE": 0.193, "SA": -0.322, "Receler": 0.006,
        "MACE": -0.345,
    }  # fmt: skip
    return (
        *_numbers("erasures", IMAGE_REWARD, "study", study),
        *_numbers("erasures", I2P_TOTAL, "ANT", totals),
        Published("erasures", "AC", I2P_TOTAL, "earlier recipe", 838.0, "ANT"),
        Published("erasures", "ESD", I2P_TOTAL, "ESD-u", 123.0, "ANT"),
        *_numbers("erasures", I2P_TOTAL, "not recorded", {"SAFREE": 82.0, "AdvUnlearn": 52.0, "SalUn": 51.0}),
        Published("erasures", "Semantic Surgery", I2P_TOTAL, "", 1.0, "Semantic Surgery"),
        *_numbers("erasures", FID, "ANT", fid),
        *_numbers("erasures", "CLIP score in hundredths", "ANT", clip),
        *_numbers("erasures", IMAGE_REWARD, "HUB", hub, HUB_SETTING),
    )


def _attacks() -> tuple[Published, ...]:
    rates = {"ESD": 76.1, "UCE": 79.6, "SLD": 82.4, "SalUn": 11.3, "AdvUnlearn": 21.1}
    erase_flow = {"I2P-142": 2.8, "Ring-A-Bell": 0.0, "MMA": 0.6}
    return (
        *_numbers("attacks", "attack success, %", "not recorded", rates, "UnlearnDiffAtk"),
        *(
            Published("attacks", "EraseFlow", "attack success, %", setting, value, "EraseFlow")
            for setting, value in erase_flow.items()
        ),
    )


def _trained() -> tuple[Published, ...]:
    wins = {SD14: 1315.0, "dataset filtering": 1394.0, "reward weighted": 1075.0, "RAFT": 1341.0, "ReFL": 1508.0}
    rates = {"dataset filtering": 55.17, "reward weighted": 39.52, "RAFT": 49.86, "ReFL": 58.79}
    wolf = {SD14: 5.95, "DDPO": 6.63, "universal guidance": 6.14}
    read_off = {"compressibility": (-106.0, -29.0), "incompressibility": (106.0, 252.0), "aesthetic": (5.57, 6.19)}
    return (
        *_numbers("refl", "human wins", "ImageReward", wins),
        *_numbers("refl", "human win rate, %", "ImageReward", rates),
        *_numbers("ddpo", "aesthetic", "DDPO", wolf, "prompt wolf, 20,000 reward queries"),
        *(
            Published("ddpo", model, metric, "30,000 samples", value, "D3PO")
            for metric, values in read_off.items()
            for model, value in zip((SD14, "DDPO"), values, strict=True)
        ),
    )


PUBLISHED: tuple[Published, ...] = tuple(
    chain(_captions(), _prompts(), _preference(), _erasures(), _attacks(), _trained())
)
"""All of them."""


def published(experiment: str, metric: str | None = None, source: str | None = None) -> tuple[Published, ...]:
    """Returns the numbers of an experiment, in the order of `PUBLISHED`.

    Args:
        experiment: One of `EXPERIMENTS`.
        metric: Only numbers of this metric.
        source: Only numbers of this source, a key of `SOURCES`.

    Raises:
        ValueError: The experiment has no numbers of that name, metric or source.
    """
    found = [number for number in PUBLISHED if number.experiment == experiment]
    if not found:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    for field, wanted in (("metric", metric), ("source", source)):
        there = dict.fromkeys(getattr(number, field) for number in found)
        if wanted is not None and wanted not in there:
            raise ValueError(f"{field} must be one of those of {experiment} ({'; '.join(there)}), got {wanted!r}")
    return tuple(number for number in found if metric in (None, number.metric) and source in (None, number.source))


class Measured(NamedTuple):
    """A number of our own, named as a published one is."""

    experiment: str
    model: str
    metric: str
    setting: str
    """As `Published.setting`; empty where there is only one."""
    estimate: Estimate
    """In the unit of the published numbers: an accuracy in percent, for example."""


Key = tuple[str, str, str, str]
"""Experiment, metric, model and setting."""


def published_comparison(measured: Sequence[Measured], published: Sequence[Published]) -> tuple[Table, ...]:
    """Sets numbers side by side, a table for each metric of each experiment: ours, theirs, and the differences.

    Rows are in the order of the published numbers; what was measured and not published comes after them.

    Raises:
        ValueError: A number of ours, or of one source, occurs twice.
    """
    ours: dict[Key, Estimate] = {}
    for one in measured:
        key = (one.experiment, one.metric, one.model, one.setting)
        if key in ours:
            raise ValueError(f"measured must hold each number once, got {_named(key)} twice")
        ours[key] = one.estimate
    theirs: dict[Key, dict[str, float]] = {}
    for each in published:
        key = (each.experiment, each.metric, each.model, each.setting)
        values = theirs.setdefault(key, {})
        if each.source in values:
            raise ValueError(f"published must hold each number of {each.source} once, got {_named(key)} twice")
        values[each.source] = each.value
    keys = list(dict.fromkeys([*theirs, *ours]))
    return tuple(
        _table(metric, [key for key in keys if key[:2] == (experiment, metric)], ours, theirs)
        for experiment, metric in dict.fromkeys(key[:2] for key in keys)
    )


def tables_html(tables: Sequence[Table]) -> Any:
    """Returns tables for a page, each below its name."""
    from markupsafe import Markup

    return Markup("\n").join(Markup("<h3>{}</h3>\n{}").format(table.label, table.html()) for table in tables)


def tables_markdown(tables: Sequence[Table]) -> str:
    """Returns tables as Markdown, each below its name."""
    return "\n\n".join(f"{table.label}\n\n{table.markdown()}" for table in tables)


def _table(
    metric: str, keys: Sequence[Key], ours: Mapping[Key, Estimate], theirs: Mapping[Key, Mapping[str, float]]
) -> Table:
    sources = list(dict.fromkeys(source for key in keys for source in theirs.get(key, {})))
    known = [value for key in keys for value in theirs.get(key, {}).values()]
    digits = max(map(_decimals, known)) if known else 3  # as many as the most exact published number has
    settings = any(setting for *_, setting in keys)
    columns = [Column("model", True), *([Column("setting", True)] if settings else []), Column("measured")]
    columns += [Column(source, over="published") for source in sources]
    columns += [Column(source, over=f"measured {MINUS} published") for source in sources]
    lines = []
    for key in keys:
        found, values = ours.get(key), theirs.get(key, {})
        cells = [Cell(key[3])] if settings else []
        cells.append(_own(found, digits))
        cells += [Cell(number(values.get(source), digits, unknown=NONE)) for source in sources]
        changes = [None if found is None or s not in values else found.mean - values[s] for s in sources]
        cells += [Cell(number(change, digits, sign=True, unknown=NONE)) for change in changes]
        lines.append(Line(key[2], cells, data={"model": key[2]}))
    ran = sum(key in ours for key in keys)
    caption = "All measured here, mean \u00b1 standard error."
    if ran < len(keys):
        caption = f"{ran} of {len(keys)} measured here, mean \u00b1 standard error; the others were not run."
    return Table(
        label=metric, columns=columns, lines=lines, caption=_with_sources(caption, sources), style="plain beside"
    )


def _own(estimate: Estimate | None, digits: int) -> Cell:
    if estimate is None:
        return Cell("not run", style="ours not-run")
    error = "" if math.isnan(estimate.error) else f"\u00b1 {number(estimate.error, digits)}"
    return Cell(number(estimate.mean, digits), error, style="ours")


def _with_sources(caption: str, sources: Sequence[str]) -> Any:
    """Says what the key of each source stands for, with a link where its address is known."""
    from markupsafe import Markup

    told = Markup("{}").format(caption)
    for key in sources:
        source = SOURCES.get(key)
        if source is None:
            told += Markup(" {}.").format(key)
            continue
        link = Markup('<a href="{}">{}</a>') if source.url else Markup("{1}")
        told += Markup(" <b>{}</b>: {} ({}).").format(key, link.format(source.url, source.title), source.year)
    return told


def _decimals(value: float) -> int:
    """Returns how many decimals a number was published with; zeros at the end are not seen."""
    whole, _, decimals = f"{value!r}".partition(".")
    return 0 if "e" in whole or decimals in ("", "0") else len(decimals)


def _named(key: Key) -> str:
    experiment, metric, model, setting = key
    return f"{metric} of {model}{f' at {setting}' if setting else ''} in {experiment}"
