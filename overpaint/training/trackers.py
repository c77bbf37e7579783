"""Trackers, such as wandb: each is told of the run by a thread of its own, so that nothing there stops a training."""

import importlib.util
import json
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from overpaint.policy.atomic import write_text

from .config import TrainingConfig
from .logging import image_bytes, tell

RUN_ID = "wandb_run_id.txt"
"""File with the name wandb gives the run, so that a resumed run goes on in the same curves."""
COLUMNS = ("iteration", "prompt", "image", "reward")
WAITING = 100
"""Messages that may wait for a tracker, some of which hold pictures."""
GRACE = 10.0
"""Seconds that the run waits for room for one more. From then on it waits no longer, and what finds no room is lost."""
PATIENCE = 120.0
"""Seconds that the end of a run waits for what a tracker has yet to take."""


def check_trackers(config: TrainingConfig) -> None:
    """Makes sure that every tracker can be used.

    Raises:
        ValueError: One is not installed; accelerate itself would go on silently without it.
    """
    for name in config.trackers:
        modules = ("tensorboard", "tensorboardX") if name == "tensorboard" else (name,)
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ValueError(f"trackers must be installed, got {name!r}, which is not: pip install {name}")


class Trackers:
    """The trackers of a run. What is wrong with one is told once, on stderr, and the run goes on.

    They start at once, since they may ask for a login, and all else waits for its turn in their threads.

    Args:
        config: Settings of the run, which name them.
        settings: What they show as hyperparameters.
    """

    def __init__(self, config: TrainingConfig, settings: Mapping[str, Any]) -> None:
        self._told = [_Told(name, config, settings) for name in config.trackers]

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        """Sends numbers to every tracker."""
        for told in self._told:
            told.tell(lambda tracker: tracker.log(dict(values), step=iteration))

    def log_image(self, name: str, image: Image.Image, iteration: int) -> None:
        """Sends one image to every tracker."""
        pixels = np.asarray(image)[None]
        for told in self._told:
            # tensorboard takes the colours for the first axis unless it is told; wandb knows an image's axes.
            options = {"dataformats": "NHWC"} if told.name == "tensorboard" else {}
            told.tell(lambda tracker, options=options: tracker.log_images({name: pixels}, step=iteration, **options))

    def log_table(
        self,
        name: str,
        images: Float[Tensor, "batch 3 H W"],
        prompts: Sequence[str],
        rewards: Sequence[float] | None,
        iteration: int,
    ) -> None:
        """Sends images as a table to wandb, a row for each; tensorboard has no tables."""
        pixels, numbers = image_bytes(images), [None] * len(images) if rewards is None else rewards

        def send(tracker: Any) -> None:
            import wandb

            pictures = [wandb.Image(Image.fromarray(array)) for array in pixels]
            rows = zip([iteration] * len(pictures), prompts, pictures, numbers, strict=True)
            tracker.log_table(name, columns=list(COLUMNS), data=[list(row) for row in rows], step=iteration)

        for told in self._told:
            if told.name == "wandb":
                told.tell(send)

    def finish(self) -> None:
        """Sends what is still waiting, for as long as `PATIENCE` says."""
        for told in self._told:
            told.finish()


class _Told:
    """One tracker, and the thread that tells it of the run."""

    def __init__(self, name: str, config: TrainingConfig, settings: Mapping[str, Any]) -> None:
        self.name = name
        self._tracker: Any = None
        self._complained = False
        self._messages: Queue[Callable[[Any], None] | None] = Queue(WAITING)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._try(lambda _: self._start(config, settings))
        if self._tracker is not None:
            self._thread.start()

    def tell(self, message: Callable[[Any], None]) -> None:
        """Has a message wait for its turn."""
        if self._tracker is not None:
            try:
                self._messages.put(message, timeout=0 if self._complained else GRACE)
            except Full:
                self._complain(f"it has not taken the last {WAITING} messages, and misses what comes until it does")

    def finish(self) -> None:
        """Waits until the tracker has taken all, but not for ever."""
        if self._tracker is not None:
            try:
                self._messages.put(None, timeout=PATIENCE)
            except Full:
                pass
            else:
                self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._complain(f"it has not taken everything within {PATIENCE:g} s, and is left to itself")

    def _start(self, config: TrainingConfig, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder, kind = Path(config.output_dir), LOGGER_TYPE_TO_CLASS[self.name]
        options: dict[str, Any] = {}
        if self.name == "wandb":
            options = {"dir": str(folder), "name": folder.name, "id": _run_id(folder), "resume": "allow"}
        if kind.requires_logging_directory:
            options["logging_dir"] = str(folder / "tensorboard")
        tracker = kind(config.project, **options)
        tracker.start()
        tracker.store_init_configuration(_flat(settings))
        self._tracker = tracker

    def _work(self) -> None:
        """Gives the tracker one message after another, and ends it after the last."""
        while (message := self._messages.get()) is not None:
            self._try(message)
        self._try(lambda tracker: tracker.finish())

    def _try(self, message: Callable[[Any], None]) -> None:
        try:
            message(self._tracker)
        except (Exception, SystemExit) as error:
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, why: str) -> None:
        """Tells what is wrong, the first time."""
        if not self._complained:
            self._complained = True
            tell(f"the tracker {self.name} failed, and the run goes on without it; metrics.jsonl has everything: {why}")


def _run_id(folder: Path) -> str:
    """Returns the run's name for wandb, a new one when the run is new."""
    file = folder / RUN_ID
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:12])
    return file.read_text(encoding="utf-8")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Returns nested settings as `training/learning_rate: 1e-05`, which all trackers take."""
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value if isinstance(value, str | int | float) else json.dumps(value)
    return flat
