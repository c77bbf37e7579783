"""What is liked: scores of (image, prompt)."""

from .blip_tokenizer import BlipTokenizer
from .combine import Clipped, WeightedSum
from .held_out import HeldOut, HeldOutWatch, Look
from .image_reward import ImageReward, ImageRewardConfig
from .jpeg import Compressibility, Incompressibility
from .named import FACTORIES, reward_named
from .nudity import NudeNet, NudeNetConfig, OpenNSFW
from .scores import scores_of
from .types import Reward

__all__ = [
    "FACTORIES",
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
    "reward_named",
    "scores_of",
]
