"""Loads the trained parts that the package carries."""

from pathlib import Path

import torch

from overpaint.policy import DiffusionPolicy, LoRAConfig
from rewards.image_reward import ImageReward

WEIGHTS = Path(__file__).parent / "weights"


def pipeline_dir() -> Path:
    """Returns the folder of the trained pipeline, which ``StableDiffusionPipeline.from_pretrained`` takes."""
    return WEIGHTS / "pipeline"


def reward_dir() -> Path:
    """Returns the folder of the trained reward model, which ``ImageReward.from_pretrained`` takes."""
    return WEIGHTS / "image-reward"


def load_policy(
    *,
    lora: LoRAConfig | None = None,
    train: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> DiffusionPolicy:
    """Loads the tiny text-to-image model as a policy; options as in ``DiffusionPolicy.from_pretrained``."""
    return DiffusionPolicy.from_pretrained(
        pipeline_dir(),
        lora=lora,
        train=train,
        dtype=dtype,
        device=device,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
    )


def load_reward() -> ImageReward:
    """Loads the tiny world's ImageReward, with frozen weights."""
    return ImageReward.from_pretrained(reward_dir())
