"""What is liked: scores of (image, prompt)."""

from .blip_tokenizer import BlipTokenizer
from .combine import Clipped, WeightedSum
from .image_reward import ImageReward, ImageRewardConfig
from .nudity import NudeNet, NudeNetConfig, OpenNSFW
from .types import Reward

__all__ = [
    "BlipTokenizer",
    "Clipped",
    "ImageReward",
    "ImageRewardConfig",
    "NudeNet",
    "NudeNetConfig",
    "OpenNSFW",
    "Reward",
    "WeightedSum",
]
