"""The scores of several models as one table: a row for each image, a column for each measure."""

from collections.abc import Sequence
from pathlib import Path

from overpaint.evaluation.images.other_images import UNKNOWN_SEED
from overpaint.evaluation.images.plan import PlannedImage

from .pair_table import OUTPUT_SUFFIXES, Row, write_table
from .score import Scores

COLUMNS = ("model", "file", "kind", "id", "copy", "prompt", "seed")
"""What a row says of its image, before what was measured of it."""


def score_rows(scores: Sequence[Scores]) -> list[Row]:
    """Returns one row for each image of each model, with `COLUMNS` and every measure.

    A measure that was not taken of an image is None, and so is a seed that is not known.

    Raises:
        ValueError: Two models share a name, or a measure is named like one of `COLUMNS`.
    """
    models = [one.model for one in scores]
    if len(set(models)) < len(models):
        raise ValueError(f"scores must be of models with unique names, got {models}")
    measures = list(dict.fromkeys(column.measure for one in scores for column in one.columns))
    for name in measures:
        if name in COLUMNS:
            raise ValueError(f"measures must not be named like columns of the table, got {name!r}")
    return [row for one in scores for row in _rows(one, measures)]


def write_scores(scores: Sequence[Scores], path: Path | str) -> None:
    """Writes `score_rows` as *.csv or *.parquet, whole or not at all; values keep float32's precision.

    Raises:
        ValueError: There are no scores, the ending is unknown, or a name occurs twice.
        ImportError: It is Parquet, and pyarrow is missing.
    """
    path = Path(path)
    if path.suffix not in OUTPUT_SUFFIXES:
        raise ValueError(f"path must be named {' or '.join(f'*{s}' for s in OUTPUT_SUFFIXES)}, got {path}")
    rows = score_rows(scores)
    if not rows:
        raise ValueError("scores must hold at least one image, got none")
    measures = [name for name in rows[0] if name not in COLUMNS]
    values = {name: [row.pop(name) for row in rows] for name in measures}
    write_table(rows, values, path)


def _rows(scores: Scores, measures: Sequence[str]) -> list[Row]:
    values: dict[PlannedImage, dict[str, float]] = {}
    for column in scores.columns:
        for image, value in zip(column.images, column.values, strict=True):
            values.setdefault(image, {})[column.measure] = value
    return [
        {
            "model": scores.model,
            "file": image.file_name,
            "kind": image.kind,
            "id": image.id,
            "copy": image.copy,
            "prompt": image.prompt,
            "seed": None if image.seed == UNKNOWN_SEED else image.seed,
            **{name: found.get(name) for name in measures},
        }
        for image, found in values.items()
    ]
