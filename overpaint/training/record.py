"""The record of a run, `run.json`: everything that made its result, and how long it took.

It is written when a run starts, brought up to date with every checkpoint, and completed at the end. `run_config.json`
beside it has the settings that a resumed run has to keep; nothing in the record is compared.
"""

import hashlib
import json
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overpaint.policy.atomic import write_text
from overpaint.policy.digest import class_name, library_versions, weights_digest
from overpaint.text_files import read_json
from rewards import Reward

RECORD = "run.json"
FORMAT = 1
LIBRARIES = (
    "overpaint", "torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors", "numpy"
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]

FIRST_PROMPTS = 5
REPR = 400
"""Characters that are kept of what something says of itself; some print their whole network."""


class RunRecord:
    """The record of a run that is going on. A run that is resumed adds a session to those before.

    Args:
        path: The file.
        content: What it holds; the last of its sessions is the present one.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content
        self._start = time.monotonic()

    @classmethod
    def begin(
        cls,
        folder: Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        *,
        run: Mapping[str, Any],
        iteration: int,
    ) -> "RunRecord":
        """Writes the record of a run that starts, or goes on from an iteration.

        Args:
            folder: Of the run.
            settings: Of the run and its trainer, as `run_config.json` has them.
            about: What else made the result, by name.
            run: What the run knows of itself: device, processes, precision.
            iteration: Number of iterations done before.
        """
        sessions: list[Any] = []
        if iteration:
            with suppress(ValueError, KeyError):
                sessions = read_run_record(folder)["sessions"]
        session = {
            "started": _now(),
            "ended": None,
            "seconds": 0.0,
            "first_iteration": iteration,
            "iterations_done": iteration,
            "outcome": "running",
        }
        content = {
            "format": FORMAT,
            "run": dict(run),
            **about,
            "settings": dict(settings),
            "libraries": library_versions(LIBRARIES),
            "commit": commit_of(ROOT),
            "seconds": 0.0,
            "sessions": [*sessions, session],
        }
        record = cls(folder / RECORD, json.loads(json.dumps(content, default=str)))
        record.note(iteration)
        return record

    def note(self, iteration: int, outcome: str = "running") -> None:
        """Writes down how far the run has come and how long it has taken.

        Raises:
            OSError: The disk is full, for example, or the folder is not there any more; the message names it.
        """
        session = self.content["sessions"][-1]
        session["seconds"] = round(time.monotonic() - self._start, 3)
        session["iterations_done"], session["outcome"] = iteration, outcome
        if outcome != "running":
            session["ended"] = _now()
        self.content["seconds"] = round(sum(each["seconds"] for each in self.content["sessions"]), 3)
        self.path.parent.stat()  # a folder that has gone is not made anew, for it may come back
        write_text(self.path, json.dumps(self.content, indent=2, ensure_ascii=False) + "\n")

    def end(self, iteration: int, error: BaseException | None) -> None:
        """Completes the record.

        Args:
            iteration: Number of iterations done.
            error: What ended the run, if anything did. Where the record cannot be written either, it is told so.

        Raises:
            OSError: As `note`, where no error ended the run.
        """
        if isinstance(error, SystemExit | KeyboardInterrupt):
            outcome = "stopped by a signal"
        elif error is not None:
            outcome = f"failed: {type(error).__name__}: {error}"
        else:
            outcome = "finished" if iteration == self.content["run"]["iterations"] else "stopped early"
        try:
            self.note(iteration, outcome)
        except OSError as failure:
            if error is None:
                raise
            error.add_note(f"the record of the run could not be completed: {failure}")

    def for_trackers(self) -> dict[str, Any]:
        """Returns what trackers are given besides the settings."""
        return {
            name: value
            for name, value in self.content.items()
            if name not in ("format", "settings", "seconds", "sessions") and value is not None
        }


def read_run_record(folder: Path | str) -> dict[str, Any]:
    """Reads the record of a run from its folder.

    Its keys: `run` (name, iterations, number of trained weights, device, processes, precision), `settings` of run and
    trainer, `model`, `reward`, `prompts`, `held_out` and `erasure` as the trainer knows them, `notes` of the program,
    `libraries`, `commit` of a source checkout, `seconds` in all, and `sessions`, one for each start, with its outcome.

    Raises:
        ValueError: The folder holds no readable record.
    """
    path = Path(folder) / RECORD
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder must hold the {RECORD} that a training run writes, got {error!r}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} must be a run's record of format {FORMAT}, got something else")
    return record


def prompts_record(prompts: Sequence[str]) -> dict[str, Any]:
    """Returns how many prompts there are, the SHA-256 of all in their order, and the first few."""
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    return {"count": len(prompts), "sha256": digest, "first": list(prompts[:FIRST_PROMPTS])}


def reward_record(reward: Reward) -> dict[str, Any]:
    """Returns the class of a reward, whether it has a gradient, and its weights' hash or what it says of itself."""
    record = {"class": class_name(reward), "differentiable": reward.differentiable}
    if isinstance(reward, nn.Module):
        return record | {"weights": weights_digest({"reward": reward})}
    return record | {"repr": shown(reward)}


def shown(thing: object) -> str:
    """Returns what something says of itself, without where in memory it lies."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))[:REPR]


def device_name(device: torch.device) -> str:
    """Returns a device with the name of what it is."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {platform.processor() or platform.machine()}"


def commit_of(folder: Path) -> str | None:
    """Returns the commit of a source checkout, with "+" where files were changed since; None where there is no git."""
    if not (folder / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
