"""What is liked: scores of (image, prompt)."""

from .blip_tokenizer import BlipTokenizer
from .combine import Clipped, WeightedSum
from .held_out import HeldOut, HeldOutWatch, Look
from .image_reward import ImageReward, ImageRewardConfig
from .jpeg import Compressibility, Incompressibility
from .nudity import NudeNet, NudeNetConfig, OpenNSFW
from .scores import scores_of
from .types import Reward

__all__ = [
    "BlipTokenizer",
    "Clipped",
    "Compressibility",
    "HeldOut",
    "HeldOutWatch",
    "ImageReward",
    "ImageRewardConfig",
    "Incompressibility",
    "Look",
    "NudeNet",
    "NudeNetConfig",
    "OpenNSFW",
    "Reward",
    "WeightedSum",
    "scores_of",
]
