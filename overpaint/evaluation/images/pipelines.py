"""Any text-to-image pipeline of diffusers as something that draws, with its own scheduler and way of sampling."""

import inspect
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from overpaint.policy.guidance import ClassifierFree, Guidance
from overpaint.policy.types import Images

from .model_record import class_name, safeguard_of, settings_of, weights_digest

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
        seeds: Sequence[int],
        steps: int,
        guidance: Guidance,
        eta: float = 0.0,
        batch_size: int = 16,
        height: int | None = None,
        width: int | None = None,
    ) -> Images:
        """Draws an image for each prompt, on the CPU.

        Raises:
            ValueError: The pipeline cannot be asked for this guidance, eta or size, or gives no RGB images.
        """
        options = self._options(guidance, eta, height, width)
        images = []
        with self._checker_put_aside():
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
        """Returns what decides the pictures: see `model_record.Described`."""
        parts: Mapping[str, Any] = self.pipeline.components
        checker = parts.get(SAFETY_CHECKER)
        networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        if not self.keep_safety_checker:
            networks.pop(SAFETY_CHECKER, None)
        scheduler = parts["scheduler"]
        return {
            "class": class_name(self.pipeline),
            "weights": weights_digest(networks),
            "scheduler": {"class": type(scheduler).__name__, **settings_of(scheduler)},
            "guard": safeguard_of(parts.get("unet")),
            "safety_checker": "none" if checker is None else "on" if self.keep_safety_checker else "put aside",
        }

    def _options(self, guidance: Guidance, eta: float, height: int | None, width: int | None) -> dict[str, Any]:
        """Returns what is asked of the pipeline besides prompts, seeds and steps; the rest it decides itself."""
        name = type(self.pipeline).__name__
        if not isinstance(guidance, ClassifierFree) or guidance.negative is not None:
            raise ValueError(f"guidance must be ClassifierFree without a negative prompt, got {guidance!r}")
        if guidance.scale < 1:
            raise ValueError(f"guidance_scale must be at least 1, which is none, for a pipeline, got {guidance.scale}")
        options: dict[str, Any] = {"guidance_scale": guidance.scale, "height": height, "width": width}
        options = {key: value for key, value in options.items() if value is not None}
        if eta > 0:
            options["eta"] = eta
            if "eta" not in inspect.signature(self.pipeline.scheduler.step).parameters:
                scheduler = type(self.pipeline.scheduler).__name__
                raise ValueError(f"eta must be 0 with a scheduler that has none, got {eta} with {scheduler}")
        for key, value in options.items():
            if key not in self._arguments:
                raise ValueError(f"{key} must be something that the pipeline takes, got {value} for a {name}")
        return options

    @contextmanager
    def _checker_put_aside(self) -> Generator[None]:
        checker = getattr(self.pipeline, SAFETY_CHECKER, None)
        if checker is None or self.keep_safety_checker:
            yield
            return
        setattr(self.pipeline, SAFETY_CHECKER, None)
        try:
            yield
        finally:
            setattr(self.pipeline, SAFETY_CHECKER, checker)
