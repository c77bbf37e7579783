"""The report of a run: one page with its tables, charts and pictures, and how it came about, whole in itself."""

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from overpaint.evaluation.images.files import ImageSource, data_uri
from overpaint.evaluation.images.plan import KINDS, PlannedImage, kinds_of
from overpaint.evaluation.scoring.compare import Comparison
from overpaint.evaluation.scoring.score import Scores
from overpaint.policy.atomic import write_text
from overpaint.policy.digest import library_versions
from overpaint.settings import Count

from .charts import Chart, Panel, metrics_by_tag, panel_charts, script
from .table import MINUS, number, numbers_table, render, results_table

LIBRARIES = ("overpaint", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pillow")
"""Distributions whose versions a report names."""
SMALL = 128
"""Images up to this width, in pixels, are enlarged towards it with their pixels sharp."""


class Section(NamedTuple):
    """One part of a report."""

    anchor: str
    """What links point to: letters, digits and dashes, unique on the page."""
    heading: str
    """Plain text."""
    html: str
    """The content: of a `Table` or a `Chart`, or whatever else; what comes from outside is escaped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that a report tells."""

    title: str
    lead: str
    """What was done, in a sentence or two."""
    verdict: str = ""
    """What came out, in one line above everything; see `verdict`."""
    comparison: Comparison | None = None
    """What models scored on the same prompts and seeds; None where the report is about something else."""
    sections: Sequence[Section] = ()
    """Further parts, shown after the results."""
    models: Mapping[str, str] = field(default_factory=dict)
    """What each model of the comparison is: which policy, in which state."""
    notes: Sequence[str] = ()
    """What a reader has to know to read the numbers right."""
    metrics: Path | None = None
    """The run's `metrics.jsonl`."""
    panels: Sequence[Panel] = ()
    """Which of its tags are drawn."""
    pictures: Sequence[ImageSource] = ()
    """Images of each model, on the same prompts and seeds."""
    scores: Sequence[Scores] = ()
    """Values of single images, shown under the pictures; of any of their models."""
    pictures_per_kind: Count = 6
    """Prompts shown of each kind, evenly spaced over all of them."""
    commands: Sequence[str] = ()
    """Commands that repeat the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run; mappings within become tables of their own."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """All else that made the result, such as model, data, device and commit; mappings within get dotted names."""
    started: datetime | None = None
    """When the run began, with its time zone."""
    written: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When the report was made, with its time zone."""
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions(LIBRARIES))
    """Versions of the libraries, by name."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hash of each model's weights."""

    def __post_init__(self) -> None:
        if self.pictures_per_kind < 1:
            raise ValueError(f"pictures_per_kind must be at least 1, got {self.pictures_per_kind}")
        if self.comparison is not None and (unknown := sorted(self.models.keys() - set(self.comparison.models))):
            raise ValueError(f"models must be among {list(self.comparison.models)}, got {unknown}")
        strange = sorted({one.model for one in self.scores} - {source.model for source in self.pictures})
        if strange:
            raise ValueError(f"scores must be of models with pictures, got those of {strange}")
        for name, date in (("started", self.started), ("written", self.written)):
            if date is not None and date.tzinfo is None:
                raise ValueError(f"{name} must have a time zone, got {date}")
        for source in self.pictures[1:]:
            first = self.pictures[0]
            if (source.planned, source.config) != (first.planned, first.config):
                raise ValueError(
                    "pictures must be of the same prompts, seeds and settings, "
                    f"got others for {source.model} than for {first.model}"
                )

    def html(self) -> str:
        """Returns the page.

        Raises:
            ValueError: Two sections share an anchor, or one has none that a link can name.
        """
        sections = self._all_sections()
        anchors = [section.anchor for section in sections]
        if len(set(anchors)) < len(anchors) or not all(re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", one) for one in anchors):
            raise ValueError(f"sections must have unique anchors of letters, digits and dashes, got {anchors}")
        here = files("overpaint.evaluation.report").joinpath("templates")
        scripts = [here.joinpath("page.js").read_text(encoding="utf-8")]
        if any('class="spec"' in section.html for section in sections):
            scripts.insert(0, script())
        # The browser is told to load nothing, and to run these scripts and no other.
        digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode("ascii") for one in scripts]
        allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
        page = render(
            "page.html.j2",
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}",
            style=here.joinpath("page.css").read_text(encoding="utf-8"),
            scripts=scripts,
            title=self.title,
            lead=self.lead,
            verdict=self.verdict,
            date=self.written,
            sections=sections,
        )
        return f"{page}\n"

    def save(self, path: Path | str) -> None:
        """Writes the page, whole or not at all."""
        write_text(Path(path), self.html())

    def _all_sections(self) -> list[Section]:
        sections = []
        models = render("models.html.j2", models=self.models) if self.models else ""
        if self.comparison is not None:
            sections.append(Section("results", "Results", results_table(self.comparison).html() + models))
        elif models:
            sections.append(Section("models", "Models", models))
        sections += self.sections
        if self.metrics is not None and self.panels:
            sections.append(Section("curves", "Learning curves", learning_curves(self.metrics, self.panels)))
        if self.pictures:
            sheets = contact_sheets(self.pictures, per_kind=self.pictures_per_kind, scores=self.scores)
            sections.append(Section("pictures", "Pictures", sheets))
        if self.comparison is not None:
            sections.append(Section("numbers", "All numbers", numbers_table(self.comparison).html()))
        if notes := self._all_notes():
            sections.append(Section("measuring", "How it was measured", render("notes.html.j2", notes=notes)))
        plain = {name: value for name, value in self.settings.items() if not isinstance(value, Mapping)}
        nested = {name: _flat(value) for name, value in self.settings.items() if isinstance(value, Mapping)}
        groups = {"versions": self.versions, "weights, as hashes": self.hashes, "run": plain, **nested}
        dates = {"started": self.started, "written": self.written}
        ran = render("run.html.j2", commands=self.commands, groups=groups, record=_flat(self.record), **dates)
        return [*sections, Section("ran", "What ran, and when", ran)]

    def _all_notes(self) -> list[str]:
        """Returns what is known of every comparison, what is known of its measures, and the notes given."""
        if self.comparison is None:
            return list(self.notes)
        config, by_image = self.comparison.config, self.comparison.by == "image"
        drawn = (
            f"Every model {'drew the same prompts from the same seeds' if by_image else 'was given the same prompts'}"
        )
        if config is not None:
            drawn += f"{', in' if by_image else '; where it is known how, in'} {config.steps} denoising steps"
            drawn += f" with guidance scale {config.guidance_scale:g} and eta {config.eta:g}"
        measures = {row.measure: row.note for row in self.comparison.rows if row.note}
        return [f"{drawn}.", *(f"{measure}: {note}" for measure, note in measures.items()), *self.notes]


def chart_section(anchor: str, chart: Chart) -> Section:
    """Returns a chart as a section of its own."""
    return Section(anchor, chart.title, chart.html())


def learning_curves(path: Path, panels: Sequence[Panel]) -> Any:
    """Draws the panels from the metrics of a run; one whose tags were not logged says so."""
    metrics = metrics_by_tag(path)
    figures = [(panel, [chart.html() for chart in panel_charts(panel, metrics)]) for panel in panels]
    return render("curves.html.j2", figures=figures)


def contact_sheets(pictures: Sequence[ImageSource], *, per_kind: int, scores: Sequence[Scores] = ()) -> Any:
    """Shows the images of every model, prompt by prompt within each kind, with what each image scored.

    The pictures are of every model, on the same prompts and seeds; `per_kind` prompts of each kind are shown.
    """
    planned = pictures[0].planned
    values = values_by_image(scores)
    sheets = []
    for kind in kinds_of(planned):
        places = evenly_spaced([k for k, image in enumerate(planned) if image.kind == kind], per_kind)
        columns = [source.pixels(places) for source in pictures]
        cards = [
            (
                planned[place].prompt,
                [
                    _shot(source.model, column[row], values.get((source.model, planned[place]), ()))
                    for source, column in zip(pictures, columns, strict=True)
                ],
            )
            for row, place in enumerate(places)
        ]
        sheets.append({"kind": kind, "meaning": KINDS.get(kind, ""), "cards": cards})
    # At most seven pictures stand side by side, in rows of a prompt that are about as full; four or five leave room for
    # the prompt beside them on a wide page.
    across = math.ceil(len(pictures) / math.ceil(len(pictures) / 7))
    # On a phone up to three stay in one row, and more stand in two.
    narrow = across if across <= 3 else math.ceil(across / 2)
    return render("pictures.html.j2", sheets=sheets, across=across, narrow=narrow)


def values_by_image(scores: Sequence[Scores]) -> dict[tuple[str, PlannedImage], list[tuple[str, float, bool]]]:
    """Returns measure, value and whether it is yes or no, for every image of every model."""
    values: dict[tuple[str, PlannedImage], list[tuple[str, float, bool]]] = {}
    for one in scores:
        for column in one.columns:
            for image, value in zip(column.images, column.values, strict=True):
                values.setdefault((one.model, image), []).append((column.measure, value, column.is_rate))
    return values


def evenly_spaced(places: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the places, from the first to the last; all of them if there are fewer."""
    if len(places) <= count:
        return list(places)
    return [places[round(k * (len(places) - 1) / max(count - 1, 1))] for k in range(count)]


def _shot(model: str, image: UInt8[Tensor, "3 H W"], values: Sequence[tuple[str, float, bool]]) -> dict[str, Any]:
    height, width = image.shape[-2:]
    # Small images are shown at a whole multiple of their size, so that all their pixels are as large.
    side = SMALL // width * width if width <= SMALL else 0
    told = []
    for measure, value, is_rate in values:
        text = number(value, 2 if abs(value) < 10 else 1).replace("-", MINUS)
        told.append((measure, ("yes" if value else "no") if is_rate else text))
    return {"model": model, "width": width, "height": height, "side": side, "uri": data_uri(image), "scores": told}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
