"""How the constraints of a study's models were weighed: curves of weight and violation, and where they ended."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from overpaint.evaluation.report import table
from overpaint.evaluation.report.charts import Chart, band_of, metrics_by_tag, series_chart

LAST = 10
"""Updates at the end of a training that tell where it has come to."""
QUANTITIES = ("violation", "weight")
"""What is logged of every constraint."""


class Weighed(NamedTuple):
    """Trainings under one kind of constraint."""

    name: str
    side: str
    """Which of a trainer's constraints: "erasure" or "floor"."""
    runs: Mapping[str, Mapping[str, Mapping[int, float]]]
    """Values that were logged, by model, tag and update."""

    @classmethod
    def read(cls, name: str, side: str, paths: Mapping[str, Path]) -> "Weighed":
        """Reads the metrics of some models; those that were not trained under the constraint are left out."""
        known = {model: metrics_by_tag(path) for model, path in paths.items() if path.is_file()}
        return cls(name, side, {model: logged for model, logged in known.items() if f"{side}/weight" in logged})

    def charts(self) -> dict[str, Chart]:
        """Draws both quantities over the updates that all models have; none without a model."""
        return {f"{self.name}-{quantity}": self._chart(quantity) for quantity in QUANTITIES if self.runs}

    def _chart(self, quantity: str) -> Chart:
        values = [logged[f"{self.side}/{quantity}"] for logged in self.runs.values()]
        return series_chart(
            {quantity: band_of([[(float(update), value) for update, value in sorted(one.items())] for one in values])},
            bands=True,
            title=f"{quantity.capitalize()} of the constraint, {self.name}: mean of {len(values)} models",
            x_label="update",
            y_label=quantity,
            references={"bound": 0.0} if quantity == "violation" else {},
        )


def ends_table(kinds: Sequence[Weighed]) -> table.Table:
    """Returns where violation and weight of each model ended."""
    lines = [
        table.Line(model, [table.Cell(_end(logged[f"{kind.side}/{quantity}"])) for quantity in QUANTITIES])
        for kind in kinds
        for model, logged in kind.runs.items()
    ]
    caption = (
        f"Mean and standard deviation over the last {LAST} updates. A violation of 0 is the bound; below it the "
        "constraint holds, and its weight falls."
    )
    columns = [table.Column("model", True), *map(table.Column, QUANTITIES)]
    return table.Table(label="Where the constraints ended", columns=columns, lines=lines, caption=caption)


def _end(values: Mapping[int, float]) -> str:
    last = [values[update] for update in sorted(values)[-LAST:]]
    return f"{fmean(last):.3f} ± {stdev(last):.3f}" if len(last) > 1 else f"{last[0]:.3f}"
