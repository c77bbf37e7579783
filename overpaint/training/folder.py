"""The output folder of a run: who may write there, and the record of the settings."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overpaint.policy.atomic import write_text

from .config import FREE_FIELDS, TrainingConfig

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
IMAGES = "images"
CONFIG = "run_config.json"


def claim(config: TrainingConfig, configs: Mapping[str, Any]) -> None:
    """Makes the output folder this run's own, and writes the settings into it.

    Args:
        config: Settings of the run.
        configs: Other settings to record, dataclasses by name.

    Raises:
        ValueError: The folder holds another run, or resuming would change the settings of the run it holds.
    """
    check_output_dir(config)
    folder = Path(config.output_dir)
    record = recorded(config, configs)
    used = _holds_run(folder)
    if used and (folder / CONFIG).exists():
        free = FREE_FIELDS if config.schedule == "constant" else FREE_FIELDS - {"iterations"}
        changed = _changes(json.loads((folder / CONFIG).read_text(encoding="utf-8")), record, free)
        if changed:
            raise ValueError(
                f"resume must keep the settings that the run in output_dir {str(folder)!r} began with, got "
                f"{', '.join(changed)}"
            )
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def recorded(config: TrainingConfig, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings as JSON holds them; paths and other objects become text."""
    settings = {"training": config, **configs}
    record = {name: dataclasses.asdict(value) for name, value in settings.items()}
    return json.loads(json.dumps(record, default=str))


def _holds_run(folder: Path) -> list[str]:
    """Returns what in a folder comes from an earlier run."""
    metrics = folder / METRICS
    found = [METRICS] if metrics.exists() and metrics.stat().st_size else []
    return found + ([CHECKPOINTS] if any((folder / CHECKPOINTS).glob("*")) else [])


def _changes(old: dict[str, Any], new: dict[str, Any], may_change: frozenset[str]) -> list[str]:
    """Returns a phrase for each setting that differs and would change the numbers of the run."""
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, {}), new.get(name, {})
        for field in sorted(before.keys() | after.keys()):
            free = name == "training" and field in may_change
            if not free and before.get(field) != after.get(field):
                phrases.append(f"{name}.{field} {after.get(field)!r} instead of {before.get(field)!r}")
    return phrases


def check_output_dir(config: TrainingConfig) -> None:
    """Checks that a run may write to its output folder, for programs that do long work before they start it.

    Raises:
        ValueError: The folder holds another run, and `resume` is not set.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, got the file {str(folder)!r}")
    used = _holds_run(folder)
    if used and not config.resume:
        raise ValueError(
            f"output_dir must not hold another run unless resume is set, got {str(folder)!r}, where there are "
            f"{' and '.join(used)}"
        )
