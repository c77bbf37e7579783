"""What draws: `DiffusionPolicy` or any text-to-image pipeline of diffusers, and the record of which model it is.

A folder of images holds the record as `<root>/<model>/model.json`, written before the first image. One that another
model began is refused, so that no folder ever holds images of two.
"""

import inspect
import json
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import write_text
from overpaint.policy.digest import (
    class_name,
    guard_of,
    library_versions,
    policy_record,
    scheduler_settings,
    weights_digest,
)
from overpaint.policy.guidance import ClassifierFree, Guidance
from overpaint.policy.types import Images
from overpaint.settings import Count, Seed, Share
from overpaint.text_files import read_json_object

from .plan import DrawConfig


@runtime_checkable
class Drawable(Protocol):
    """Whatever draws images from prompts; `policy.DiffusionPolicy` does, and `PipelineDrawable` for the others.

    What decides its images is known to a folder's record if it is `Described`.
    """

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: Guidance,
        eta: float,
        batch_size: int,
        height: int | None,
        width: int | None,
    ) -> Images:
        """Draws one image for each prompt from the noise of its seed; None is the model's own size in pixels."""


RECORD = "model.json"
LIBRARIES = ("overpaint", "torch", "diffusers", "transformers", "peft", "pillow")
"""Distributions whose versions a record names."""


@runtime_checkable
class Described(Protocol):
    """Something that draws and can say what decides its images."""

    def description(self) -> Mapping[str, Any]:
        """Returns its class, the hash of its weights, its scheduler and the like, as JSON can hold them."""


def model_record(drawable: object, config: DrawConfig) -> dict[str, Any]:
    """Returns what decides the images that something draws, and the versions of the libraries that it draws with.

    Whatever is neither a `DiffusionPolicy` nor `Described` is known by its class alone.
    """
    if isinstance(drawable, DiffusionPolicy):
        description: Mapping[str, Any] = {**policy_record(drawable), "safety_checker": "none"}
    elif isinstance(drawable, Described):
        description = drawable.description()
    else:
        description = {"class": class_name(drawable), "weights": None}
    record = {"format": 1, **description, "drawing": asdict(config), "libraries": library_versions(LIBRARIES)}
    return json.loads(json.dumps(record, default=str))


def write_record(folder: Path, record: Mapping[str, Any], *, writer: str = "") -> None:
    """Writes `model.json` into a folder that has no images, or checks that the one that is there says the same.

    Versions of libraries may differ: a run may go on after an upgrade.

    Raises:
        ValueError: The folder holds images of another model, or images of which nothing is known.
    """
    path = folder / RECORD
    # Looked at before the record: another process may be writing that and the first images just now.
    has_images = next(folder.glob("*.png"), None) is not None
    if not path.exists():
        if has_images:
            raise ValueError(
                f"model: {folder} must be empty or hold {RECORD}, got images without; "
                "choose another model name or folder"
            )
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n", writer=writer)
        return
    there = read_record(folder)
    for name in (*record, *there):
        if name != "libraries" and there.get(name) != record.get(name):
            raise ValueError(
                f"model: {folder} was drawn by another model, with {name} {there.get(name)!r}, got "
                f"{record.get(name)!r}; choose another model name or folder"
            )


def read_record(folder: Path | str) -> dict[str, Any]:
    """Reads which model drew the images of a folder; a ValueError where it does not say so readably."""
    path = Path(folder) / RECORD
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder must hold {RECORD}, which `generate` writes, got {folder} with {error!r}") from error


SAFETY_CHECKER = "safety_checker"
NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")
"""Arguments without which a pipeline cannot draw planned images."""


class PipelineDrawable:
    """Draws with a pipeline of diffusers, each image from a generator of its own seed.

    Where the pipeline's scheduler is DDIM, a Stable Diffusion draws what a `DiffusionPolicy` draws from the same seed.
    The pipeline's progress bar is switched off.

    Args:
        pipeline: Any that takes a prompt and a number of steps.
        keep_safety_checker: Whether a safety checker blackens pictures, as it does by default in diffusers. Here it is
            put aside while drawing: a black picture says nothing about the model. `description` tells which.

    Raises:
        ValueError: The pipeline does not take what is needed.
    """

    def __init__(self, pipeline: Any, *, keep_safety_checker: bool = False) -> None:
        self.pipeline = pipeline
        self.keep_safety_checker = keep_safety_checker
        self._arguments = frozenset(inspect.signature(pipeline.__call__).parameters)
        lacking = [name for name in NEEDED if name not in self._arguments]
        if lacking:
            raise ValueError(
                f"pipeline must take {', '.join(NEEDED)}, got {type(pipeline).__name__} without {', '.join(lacking)}"
            )
        pipeline.set_progress_bar_config(disable=True)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[Seed],
        steps: Count,
        guidance: Guidance,
        eta: Share = 0.0,
        batch_size: Count = 16,
        height: Count | None = None,
        width: Count | None = None,
    ) -> Images:
        """Draws an image for each prompt, on the CPU.

        Raises:
            ValueError: The pipeline does not take this guidance, eta or size, or gives no RGB images.
        """
        options = self._options(guidance, eta, height, width)
        images = []
        with self._without_checker():
            for start in range(0, len(prompts), batch_size):
                part = slice(start, start + batch_size)
                output = self.pipeline(
                    prompt=list(prompts[part]),
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                    num_inference_steps=steps,
                    output_type="np",
                    **options,
                )
                blackened = sum(map(bool, getattr(output, "nsfw_content_detected", None) or ()))
                if blackened:
                    warnings.warn(f"the pipeline's safety checker blackened {blackened} images", stacklevel=2)
                images.append(torch.from_numpy(output.images).float())
        together = torch.cat(images)
        if together.ndim != 4 or together.shape[-1] != 3:
            raise ValueError(f"pipeline must give RGB images, got shape {tuple(together.shape)}")
        return together.permute(0, 3, 1, 2)

    def description(self) -> dict[str, Any]:
        """Returns what decides the pictures: see `Described`."""
        parts: Mapping[str, Any] = self.pipeline.components
        checker = parts.get(SAFETY_CHECKER)
        networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if not self.keep_safety_checker:
            networks.pop(SAFETY_CHECKER, None)
        scheduler = parts["scheduler"]
        return {
            "class": class_name(self.pipeline),
            "weights": weights_digest(networks),
            "scheduler": {"class": type(scheduler).__name__, **scheduler_settings(scheduler)},
            "guard": guard_of(parts.get("unet")),
            "safety_checker": "none" if checker is None else "on" if self.keep_safety_checker else "put aside",
        }

    def _options(self, guidance: Guidance, eta: float, height: int | None, width: int | None) -> dict[str, Any]:
        """Returns the pipeline's arguments besides prompts, seeds and steps; the rest are its own defaults."""
        if not isinstance(guidance, ClassifierFree) or guidance.negative is not None:
            raise ValueError(f"guidance must be ClassifierFree without a negative prompt, got {guidance!r}")
        if guidance.scale < 1:
            raise ValueError(f"guidance_scale must be at least 1, which is none, for a pipeline, got {guidance.scale}")
        wanted = {"guidance_scale": guidance.scale, "height": height, "width": width, "eta": eta if eta > 0 else None}
        options = {key: value for key, value in wanted.items() if value is not None}
        if "eta" in options and "eta" not in inspect.signature(self.pipeline.scheduler.step).parameters:
            scheduler = type(self.pipeline.scheduler).__name__
            raise ValueError(f"eta must be 0 with a scheduler that has none, got {eta} with {scheduler}")
        for key, value in options.items():
            if key not in self._arguments:
                name = type(self.pipeline).__name__
                raise ValueError(f"{key} must be something that the pipeline takes, got {value} for a {name}")
        return options

    @contextmanager
    def _without_checker(self) -> Generator[None]:
        checker = getattr(self.pipeline, SAFETY_CHECKER, None)
        if checker is None or self.keep_safety_checker:
            yield
            return
        setattr(self.pipeline, SAFETY_CHECKER, None)
        try:
            yield
        finally:
            setattr(self.pipeline, SAFETY_CHECKER, checker)
