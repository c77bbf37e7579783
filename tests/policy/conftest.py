"""Fixtures of the policy's own tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import DiffusionPolicy, SampleNoise

PROMPTS, SEEDS, STEPS = ["a red circle", "a photo of a cat"], [11, 12], 3


@pytest.fixture
def images() -> Callable[[DiffusionPolicy], Tensor]:
    """Draws two prompts."""

    def draw(policy: DiffusionPolicy) -> Tensor:
        return policy.draw(PROMPTS, steps=STEPS, seeds=SEEDS)

    return draw


@pytest.fixture
def plain_images() -> Callable[..., Tensor]:
    """Draws the same two prompts with nothing but diffusers: a folder, loaded with any options, and a LoRA."""

    def draw(folder: Path, lora: Path | None = None, **options: Any) -> Tensor:
        from diffusers import DDIMScheduler, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        latents = SampleNoise(SEEDS, (4, 8, 8), torch.device("cpu")).draw().to(pipeline.unet.dtype)
        return pipeline(
            PROMPTS, num_inference_steps=STEPS, guidance_scale=5.0, latents=latents, output_type="pt"
        ).images

    return draw


@pytest.fixture
def stir() -> Callable[[DiffusionPolicy], None]:
    """Moves every trained weight, as an update would, by numbers that are the same each time."""

    @torch.no_grad()
    def move(policy: DiffusionPolicy) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)

    return move
