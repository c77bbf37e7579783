"""The output folder of a run: who may write there, and what the run is made of, which a resumed one has to keep."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overpaint.policy.atomic import write_text
from overpaint.text_files import read_json_object

from .config import FREE_FIELDS, TrainingConfig

METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
IMAGES = "images"
CONFIG = "run_config.json"

SHOWN = 200
"""Characters of a value that a message shows."""


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
        check_same_settings(_read_settings(folder / CONFIG), record, config)
    write_text(folder / CONFIG, json.dumps(record, indent=2) + "\n")


def recorded(config: TrainingConfig, configs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings as JSON holds them; paths and other objects become text."""
    settings = {"training": config, **configs}
    record = {name: dataclasses.asdict(value) for name, value in settings.items()}
    return json.loads(json.dumps(record, default=str))


def made_of(config: TrainingConfig, configs: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what decides the numbers of a run, as its checkpoints hold it: settings, model, reward and prompts.

    A program's notes do not, nor does the address of a served reward, since servers move.
    """
    told = json.dumps({name: value for name, value in about.items() if name != "notes"}, default=str)
    return {"settings": recorded(config, configs), "about": json.loads(re.sub(r"https?://[^\s'\"\\]+", "", told))}


def check_same_run(saved: Mapping[str, Any], present: Mapping[str, Any], config: TrainingConfig) -> None:
    """Compares what a checkpoint's run was made of with what the present one is made of.

    Raises:
        ValueError: They differ in more than a resumed run may change.
    """
    check_same_settings(saved["settings"], present["settings"], config)
    if changed := _changes(saved["about"], present["about"]):
        raise ValueError(
            f"resume must keep what the run in output_dir {str(config.output_dir)!r} is made of, got "
            f"{', '.join(changed)}"
        )


def check_same_settings(saved: Mapping[str, Any], present: Mapping[str, Any], config: TrainingConfig) -> None:
    """Compares settings as `recorded` returns them.

    Raises:
        ValueError: They differ in more than a resumed run may change.
    """
    free = FREE_FIELDS if config.schedule == "constant" else FREE_FIELDS - {"iterations"}
    if changed := _changes(saved, present, free):
        raise ValueError(
            f"resume must keep the settings that the run in output_dir {str(config.output_dir)!r} began with, got "
            f"{', '.join(changed)}"
        )


def _read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the record of the settings; a ValueError where it is damaged."""
    try:
        record = read_json_object(path)
        if all(isinstance(group, dict) for group in record.values()):
            return record
        raise ValueError(f"{path} must hold groups of settings by name")
    except ValueError as error:
        raise ValueError(f"{error}; it is damaged: delete it to go on by what the checkpoints say") from error


def _holds_run(folder: Path) -> list[str]:
    """Returns what in a folder comes from an earlier run."""
    metrics = folder / METRICS
    found = [METRICS] if metrics.exists() and metrics.stat().st_size else []
    return found + ([CHECKPOINTS] if any((folder / CHECKPOINTS).glob("*")) else [])


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], may_change: frozenset[str] = frozenset()) -> list[str]:
    """Returns a phrase for each field that differs and would change the numbers of the run."""
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name) or {}, new.get(name) or {}
        for field in sorted(before.keys() | after.keys()):
            free = name == "training" and field in may_change
            if not free and before.get(field) != after.get(field):
                phrases.append(f"{name}.{field} {_short(after.get(field))} instead of {_short(before.get(field))}")
    return phrases


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


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
