"""The report of a run: one page with its table, its curves, its pictures and how it came about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from .compare import Comparison
from .curves import Panel
from .figures import contact_sheets, learning_curves
from .files import write_text
from .images import ImageSource
from .page import page
from .result_tables import model_list, notes_list, numbers_table, results_table, settings_tables


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """All that a report tells."""

    title: str
    lead: str
    """What was done and what came out, in a sentence or two."""
    comparison: Comparison
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
    pictures_per_kind: int = 6
    """Prompts shown of each kind, evenly spaced over all of them."""
    commands: Sequence[str] = ()
    """Commands that repeat the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run; mappings within become tables of their own."""

    def __post_init__(self) -> None:
        if self.pictures_per_kind < 1:
            raise ValueError(f"pictures_per_kind must be at least 1, got {self.pictures_per_kind}")
        unknown = sorted(self.models.keys() - set(self.comparison.models))
        if unknown:
            raise ValueError(f"models must be among {list(self.comparison.models)}, got {unknown}")
        for source in self.pictures[1:]:
            first = self.pictures[0]
            if (source.planned, source.config) != (first.planned, first.config):
                raise ValueError(
                    "pictures must be of the same prompts, seeds and settings, "
                    f"got others for {source.model} than for {first.model}"
                )

    def html(self) -> str:
        """Returns the page."""
        sections = [("results", "Results", results_table(self.comparison))]
        if self.models:
            sections[0] = ("results", "Results", results_table(self.comparison) + model_list(self.models))
        if self.metrics is not None and self.panels:
            sections.append(("curves", "Learning curves", learning_curves(self.metrics, self.panels)))
        if self.pictures:
            sheets = contact_sheets(self.pictures, per_kind=self.pictures_per_kind)
            sections.append(("pictures", "Pictures", sheets))
        sections.append(("numbers", "All numbers", numbers_table(self.comparison)))
        sections.append(("measuring", "How it was measured", notes_list(self._all_notes())))
        if self.commands or self.settings:
            commands = "".join(f"<pre><code>{escape(command)}</code></pre>" for command in self.commands)
            sections.append(("settings", "Commands and settings", commands + settings_tables(self.settings)))
        return page(title=self.title, lead=self.lead, sections=sections)

    def save(self, path: Path | str) -> None:
        """Writes the page, whole or not at all."""
        write_text(Path(path), self.html())

    def _all_notes(self) -> list[str]:
        """Returns what is known of every comparison, what is known of its measures, and the notes given."""
        config = self.comparison.config
        drawn = f"Every model drew the same prompts from the same seeds, in {config.steps} denoising steps"
        drawn += f" with guidance scale {config.guidance_scale:g} and eta {config.eta:g}."
        measures = {row.measure: row.note for row in self.comparison.rows if row.note}
        return [drawn, *(f"{measure}: {note}" for measure, note in measures.items()), *self.notes]
