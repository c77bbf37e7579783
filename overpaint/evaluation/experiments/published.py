"""Numbers that others published, as data, and comparisons with measurements of our own.

A published number never stands in for a measurement: where nothing ran, a table says *not run*.

Rates are in percent, as they were published. What a number was measured under is its setting; two numbers stand in one
row of a table only if experiment, metric, model and setting are the same. Settings of trainings are no results and are
not here: they are the defaults of `refl` and `ddpo`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.report.table import MINUS, NONE, Cell, Column, Line, Table, number, render


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


EXPERIMENTS: Mapping[str, str] = {
    "captions": "1-1: ImageReward on captions of MS-COCO's validation set of 2014, by size and guidance",
    "prompts": "1-2: ImageReward and CLIP score on 100 prompts of users, 10 images each",
    "preference": "1-3: how often a metric orders two images as people did, on ImageReward's test set",
    "erasures": "2: what a Stable Diffusion is worth after a concept was erased, and what is left of the concept",
    "attacks": "2: how often an attack brings an erased concept back",
    "refl": "how often people prefer the images of one way of training over those of the others",
    "ddpo": "DDPO on the tasks of its paper",
}
"""Each experiment, and what it asks."""

STUDY = "A comparison of ImageReward over text-to-image models and erasure methods on one RTX 4090"
XU = "Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation"
BLACK = "Black et al., Training Diffusion Models with Reinforcement Learning"
HUB = "Holistic Unlearning Benchmark; schedulers differ between its rows"
D3PO = "The paper of D3PO, whose curves of DDPO were read off its plots"
SOURCES: Mapping[str, Source] = {
    "study": Source(STUDY, "", 2025),
    "ImageReward": Source(XU, "https://arxiv.org/abs/2304.05977", 2023),
    "ImageReward, as the study quotes it": Source("The comparison above, where it quotes ImageReward", "", 2025),
    "ANT": Source("The paper of ANT, Table 1", "https://arxiv.org/abs/2504.12782", 2025),
    "Semantic Surgery": Source("The paper of Semantic Surgery", "https://arxiv.org/abs/2510.22851", 2025),
    "HUB": Source(HUB, "https://arxiv.org/abs/2410.05664", 2024),
    "EraseFlow": Source("The paper of EraseFlow", "https://arxiv.org/abs/2511.00804", 2025),
    "DDPO": Source(BLACK, "https://arxiv.org/abs/2305.13301", 2023),
    "D3PO": Source(D3PO, "https://arxiv.org/abs/2311.13231", 2023),
    "not recorded": Source("A paper that was not noted down with the number", "", "year not recorded"),
}
"""Each key, and what it stands for."""

SD14, SD21, OPENJOURNEY = "Stable Diffusion v1.4", "Stable Diffusion v2.1", "Openjourney"
DALLE2, VERSATILE, COGVIEW2 = "DALL-E 2", "Versatile Diffusion", "CogView2"
IMAGE_REWARD, CLIP, FID = "ImageReward", "CLIP score", "FID"
PREFERENCE_ACCURACY = "preference accuracy, %"
OWN_SIZE = "own size → 256², best CFG"
"""Drawn at each model's own size, reduced to 256², at the best of the guidance scales 1.5, 2, 3, 4 and 5."""
GUIDANCE_SCALES = ("1.5", "2", "3", "4", "5")
I2P_TOTAL = "NudeNet total on I2P, threshold 0.6"


def _of(models: Sequence[str], *values: float) -> dict[str, float]:
    return dict(zip(models, values, strict=True))


_MODELS = (SD14, SD21, OPENJOURNEY, DALLE2, VERSATILE, COGVIEW2)
_METRICS = ("CLIP score", "Aesthetic score", "BLIP score", "ImageReward")
_BY_GUIDANCE = {
    SD14: (-2.1816, -2.0689, -1.8729, -1.7352, -1.6454),
    SD21: (-2.0159, -1.8253, -1.5429, -1.3625, -1.2592),
    OPENJOURNEY: (-2.1356, -1.9855, -1.7448, -1.6041, -1.5277),
}
# Experiment, metric, setting, source, and the number of each model.
# fmt: off
_ROWS: tuple[tuple[str, str, str, str, Mapping[str, float]], ...] = (
    ("captions", IMAGE_REWARD, "256²", "study", _of(_MODELS[:3], -1.5598, -1.1548, -1.4600)),
    ("captions", IMAGE_REWARD, "512²", "study", _of(_MODELS[:3], 0.2531, 0.4946, 0.2624)),
    ("captions", IMAGE_REWARD, OWN_SIZE, "ImageReward",
     _of(_MODELS, -0.0857, 0.1553, -0.0455, 0.5387, -0.5485, -0.8510)),
    *(
        ("captions", IMAGE_REWARD, f"256², CFG {scale}", "study", {model: value})
        for model, values in _BY_GUIDANCE.items()
        for scale, value in zip(GUIDANCE_SCALES, values, strict=True)
    ),
    ("captions", FID, "zero-shot", "ImageReward",
     {OPENJOURNEY: 20.7, SD21: 18.8, DALLE2: 10.9, SD14: 17.9, VERSATILE: 18.4, COGVIEW2: 26.2}),
    ("prompts", IMAGE_REWARD, "", "study", _of(_MODELS, 0.1343, 0.2467, 0.2615, 0.2115, -0.2471, -1.2376)),
    ("prompts", CLIP, "", "study", _of(_MODELS, 0.2763, 0.2683, 0.2726, 0.2684, 0.2606, 0.2044)),
    ("prompts", IMAGE_REWARD, "", "ImageReward", _of(_MODELS, 0.1344, 0.2458, 0.2614, 0.2114, -0.2470, -1.2376)),
    # The first as the paper's own table has it; the study quotes it as the value of Openjourney.
    ("prompts", CLIP, "", "ImageReward", _of(_MODELS, 0.2763, 0.2683, 0.2726, 0.2684, 0.2606, 0.2044)),
    ("prompts", CLIP, "", "ImageReward, as the study quotes it", {SD14: 0.2726}),
    ("prompts", "human rank", "", "ImageReward", _of(_MODELS, 4.0, 2.0, 1.0, 3.0, 5.0, 6.0)),
    ("prompts", "human wins", "", "ImageReward", _of(_MODELS, 362.0, 463.0, 507.0, 390.0, 340.0, 74.0)),
    ("preference", PREFERENCE_ACCURACY, "", "study", _of(_METRICS, 54.81, 57.32, 57.84, 65.15)),
    ("preference", PREFERENCE_ACCURACY, "", "ImageReward", _of(_METRICS, 54.82, 57.35, 57.76, 65.14)),
    ("preference", "recall@1, %", "", "ImageReward", _of(_METRICS, 27.22, 30.73, 30.73, 39.62)),
    ("preference", "recall@2, %", "", "ImageReward", _of(_METRICS, 48.52, 53.91, 50.67, 63.07)),
    ("preference", "recall@4, %", "", "ImageReward", _of(_METRICS, 78.17, 75.74, 77.63, 90.84)),
    ("preference", "filter@1, %", "", "ImageReward", _of(_METRICS, 29.65, 32.08, 33.42, 49.06)),
    ("preference", "filter@2, %", "", "ImageReward", _of(_METRICS, 51.75, 54.45, 56.33, 70.89)),
    ("preference", "filter@4, %", "", "ImageReward", _of(_METRICS, 76.82, 76.55, 80.59, 88.95)),
    ("erasures", IMAGE_REWARD, "", "study",
     {"original": 0.172, "SLD": 0.107, "AC": 0.116, "ESD": -0.284, "UCE": 0.190, "SA": -0.781, "Receler": -0.066,
      "MACE": -1.403, "SAFREE": 0.253, "ANT": -0.508}),
    ("erasures", I2P_TOTAL, "", "ANT",
     {"original": 743.0, "SLD": 212.0, "UCE": 182.0, "SA": 292.0, "Receler": 115.0, "MACE": 111.0, "ANT": 23.0}),
    ("erasures", I2P_TOTAL, "earlier recipe", "ANT", {"AC": 838.0}),
    ("erasures", I2P_TOTAL, "ESD-u", "ANT", {"ESD": 123.0}),
    ("erasures", I2P_TOTAL, "", "not recorded", {"SAFREE": 82.0, "AdvUnlearn": 52.0, "SalUn": 51.0}),
    ("erasures", I2P_TOTAL, "", "Semantic Surgery", {"Semantic Surgery": 1.0}),
    ("erasures", FID, "", "ANT",
     {"original": 14.04, "SLD": 16.34, "AC": 14.13, "ESD": 15.10, "UCE": 14.07, "MACE": 13.42, "ANT": 14.44}),
    ("erasures", "CLIP score in hundredths", "", "ANT",
     {"original": 31.34, "SLD": 30.90, "AC": 31.37, "ESD": 30.21, "UCE": 30.85, "MACE": 29.41, "ANT": 30.64}),
    ("erasures", IMAGE_REWARD, "Stable Diffusion v1.5, mean of 33 concepts", "HUB",
     {"original": 0.172, "SLD": 0.077, "AC": 0.127, "ESD": -0.082, "UCE": 0.193, "SA": -0.322, "Receler": 0.006,
      "MACE": -0.345}),
    ("attacks", "attack success, %", "UnlearnDiffAtk", "not recorded",
     {"ESD": 76.1, "UCE": 79.6, "SLD": 82.4, "SalUn": 11.3, "AdvUnlearn": 21.1}),
    ("attacks", "attack success, %", "I2P-142", "EraseFlow", {"EraseFlow": 2.8}),
    ("attacks", "attack success, %", "Ring-A-Bell", "EraseFlow", {"EraseFlow": 0.0}),
    ("attacks", "attack success, %", "MMA", "EraseFlow", {"EraseFlow": 0.6}),
    ("refl", "human wins", "", "ImageReward",
     {SD14: 1315.0, "dataset filtering": 1394.0, "reward weighted": 1075.0, "RAFT": 1341.0, "ReFL": 1508.0}),
    ("refl", "human win rate, %", "", "ImageReward",
     {"dataset filtering": 55.17, "reward weighted": 39.52, "RAFT": 49.86, "ReFL": 58.79}),
    ("ddpo", "aesthetic", "prompt wolf, 20,000 reward queries", "DDPO",
     {SD14: 5.95, "DDPO": 6.63, "universal guidance": 6.14}),
    ("ddpo", "compressibility", "30,000 samples", "D3PO", {SD14: -106.0, "DDPO": -29.0}),
    ("ddpo", "incompressibility", "30,000 samples", "D3PO", {SD14: 106.0, "DDPO": 252.0}),
    ("ddpo", "aesthetic", "30,000 samples", "D3PO", {SD14: 5.57, "DDPO": 6.19}),
)
# fmt: on
PUBLISHED = tuple(
    Published(experiment, model, metric, setting, value, source)
    for experiment, metric, setting, source, values in _ROWS
    for model, value in values.items()
)
"""All of them."""


def published(experiment: str, metric: str | None = None, source: str | None = None) -> tuple[Published, ...]:
    """Returns the numbers of an experiment, or only those of one metric or source, in the order of `PUBLISHED`.

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
    caption = render("sources.html.j2", caption=caption, sources={key: SOURCES.get(key) for key in sources})
    return Table(label=metric, columns=columns, lines=lines, caption=caption, style="plain beside")


def _own(estimate: Estimate | None, digits: int) -> Cell:
    if estimate is None:
        return Cell("not run", style="ours not-run")
    error = "" if math.isnan(estimate.error) else f"\u00b1 {number(estimate.error, digits)}"
    return Cell(number(estimate.mean, digits), error, style="ours")


def _decimals(value: float) -> int:
    """Returns how many decimals a number was published with; zeros at the end are not seen."""
    whole, _, decimals = f"{value!r}".partition(".")
    return 0 if "e" in whole or decimals in ("", "0") else len(decimals)


def _named(key: Key) -> str:
    experiment, metric, model, setting = key
    return f"{metric} of {model}{f' at {setting}' if setting else ''} in {experiment}"
