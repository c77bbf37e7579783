"""wandb and tensorboard, through accelerate."""

import importlib.util
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

RUN_ID = "wandb_run_id.txt"
"""File with the name wandb gives the run, so that a resumed run goes on in the same curves."""


def check_trackers(config: TrainingConfig) -> None:
    """Makes sure that every tracker can be used.

    Raises:
        ValueError: One is not installed; accelerate itself would go on silently without it.
    """
    for name in config.trackers:
        modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(f"trackers must be installed, got {name!r}, which is not: pip install {name}")


def start_trackers(accelerator: "Accelerator", config: TrainingConfig, settings: Mapping[str, Any]) -> None:
    """Starts every tracker, with the settings of the run as its hyperparameters."""
    if not config.trackers:
        return
    folder = Path(config.output_dir)
    options = {}
    if "wandb" in config.trackers and accelerator.is_main_process:
        options["wandb"] = {"dir": str(folder), "name": folder.name, "id": _run_id(folder), "resume": "allow"}
    accelerator.init_trackers(config.project, config=_flat(settings), init_kwargs=options)


def log_image(accelerator: "Accelerator", name: str, image: Image.Image, iteration: int) -> None:
    """Sends one image to every tracker."""
    pixels = np.asarray(image)[None]
    for tracker in accelerator.trackers:
        # tensorboard takes the colours for the first axis unless it is told; wandb knows an image's axes.
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step=iteration, **options)


def finish_trackers(accelerator: "Accelerator") -> None:
    """Sends what is still waiting. Unlike accelerate's own `end_training`, leaves the processes connected."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _run_id(folder: Path) -> str:
    """Returns the run's name for wandb, a new one when the run is new."""
    file = folder / RUN_ID
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    return file.read_text(encoding="utf-8")


def _flat(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Returns nested settings as `training/learning_rate: 1e-05`, which all trackers take."""
    return {
        f"{name}/{field}": value if isinstance(value, str | int | float) else json.dumps(value)
        for name, fields in settings.items()
        for field, value in fields.items()
    }
