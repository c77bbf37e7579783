"""Loads the trained parts that the package carries."""

from pathlib import Path
from typing import Unpack

from overpaint.policy import DiffusionPolicy
from overpaint.policy.loading import PolicyOptions
from rewards.image_reward import ImageReward

WEIGHTS = Path(__file__).parent / "weights"


def pipeline_dir() -> Path:
    """Returns the folder of the trained pipeline, which ``StableDiffusionPipeline.from_pretrained`` takes."""
    return WEIGHTS / "pipeline"


def reward_dir() -> Path:
    """Returns the folder of the trained reward model, which ``ImageReward.from_pretrained`` takes."""
    return WEIGHTS / "image-reward"


def load_policy(**options: Unpack[PolicyOptions]) -> DiffusionPolicy:
    """Loads the tiny text-to-image model as a policy; options as in ``DiffusionPolicy.from_pretrained``."""
    return DiffusionPolicy.from_pretrained(pipeline_dir(), **options)


def flow_dir() -> Path:
    """Returns the folder of the trained flow pipeline.

    ``StableDiffusion3Pipeline.from_pretrained`` takes it with ``text_encoder_3=None, tokenizer_3=None``.
    """
    return WEIGHTS / "flow"


def load_flow_policy(**options: Unpack[PolicyOptions]) -> DiffusionPolicy:
    """Loads the tiny world's rectified-flow transformer as a policy; options as in ``DiffusionPolicy.from_pretrained``.

    It has no T5, and was trained with one token of zeros in its place: that is `max_sequence_length` by default.
    """
    return DiffusionPolicy.from_pretrained(flow_dir(), **PolicyOptions(max_sequence_length=1) | options)


def load_reward() -> ImageReward:
    """Loads the tiny world's ImageReward, with frozen weights."""
    return ImageReward.from_pretrained(reward_dir())
