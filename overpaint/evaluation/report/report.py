"""The report of a run: one page with its table, its curves, its pictures and how it came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overpaint.evaluation.experiments.compare import Comparison
from overpaint.evaluation.images.files import ImageSource
from overpaint.evaluation.scoring.score import Scores
from overpaint.policy.atomic import write_text

from .curves import Panel
from .figures import contact_sheets, learning_curves
from .page import Section, page
from .result_tables import library_versions, model_list, moment, notes_list, numbers_table, results_table, run_section


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that a report tells."""

    title: str
    lead: str
    """What was done and what came out, in a sentence or two."""
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
    pictures_per_kind: int = 6
    """Prompts shown of each kind, evenly spaced over all of them."""
    commands: Sequence[str] = ()
    """Commands that repeat the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run; mappings within become tables of their own."""
    started: datetime | None = None
    """When the run began, with its time zone."""
    written: datetime = field(default_factory=lambda: datetime.now(UTC))
    """When the report was made, with its time zone."""
    versions: Mapping[str, str] = field(default_factory=library_versions)
    """Versions of the libraries, by name."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Hash of each model's weights."""

    def __post_init__(self) -> None:
        if self.pictures_per_kind < 1:
            raise ValueError(f"pictures_per_kind must be at least 1, got {self.pictures_per_kind}")
        unknown = sorted(self.models.keys() - set(self.comparison.models)) if self.comparison is not None else []
        if self.comparison is not None and unknown:
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
        """Returns the page."""
        sections = []
        models = model_list(self.models) if self.models else ""
        if self.comparison is not None:
            sections.append(Section("results", "Results", results_table(self.comparison) + models))
        elif models:
            sections.append(Section("models", "Models", models))
        sections += self.sections
        if self.metrics is not None and self.panels:
            sections.append(Section("curves", "Learning curves", learning_curves(self.metrics, self.panels)))
        if self.pictures:
            sheets = contact_sheets(self.pictures, per_kind=self.pictures_per_kind, scores=self.scores)
            sections.append(Section("pictures", "Pictures", sheets))
        if self.comparison is not None:
            sections.append(Section("numbers", "All numbers", numbers_table(self.comparison)))
        notes = self._all_notes()
        if notes:
            sections.append(Section("measuring", "How it was measured", notes_list(notes)))
        ran = run_section(
            started=self.started,
            written=self.written,
            commands=self.commands,
            versions=self.versions,
            hashes=self.hashes,
            settings=self.settings,
        )
        sections.append(Section("ran", "What ran, and when", ran))
        return page(title=self.title, lead=self.lead, date=moment(self.written), sections=sections)

    def save(self, path: Path | str) -> None:
        """Writes the page, whole or not at all."""
        write_text(Path(path), self.html())

    def _all_notes(self) -> list[str]:
        """Returns what is known of every comparison, what is known of its measures, and the notes given."""
        if self.comparison is None:
            return list(self.notes)
        config = self.comparison.config
        drawn = "Every model was given the same prompts"
        if self.comparison.by == "image":
            drawn = "Every model drew the same prompts from the same seeds"
        if config is not None:
            drawn += (
                f", in {config.steps} denoising steps"
                if self.comparison.by == "image"
                else (f"; where it is known how, in {config.steps} denoising steps")
            )
            drawn += f" with guidance scale {config.guidance_scale:g} and eta {config.eta:g}"
        measures = {row.measure: row.note for row in self.comparison.rows if row.note}
        return [f"{drawn}.", *(f"{measure}: {note}" for measure, note in measures.items()), *self.notes]
