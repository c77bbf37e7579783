"""Rewards by name, for programs: a short name of this package's, or "package.module:factory" of anybody's."""

import importlib
from functools import reduce
from types import MappingProxyType

from .types import Reward

FACTORIES = MappingProxyType(
    {
        "image-reward": "rewards.image_reward:ImageReward.load",
        "clip": "rewards.clip:CLIPScore.load",
        "aesthetic": "rewards.aesthetic:Aesthetic.load",
        "blip": "rewards.blip:BLIPScore.load",
        "pick": "rewards.pick:PickScore.load",
        "hps": "rewards.hps:HPSv2.load",
        "alignment": "rewards.alignment:Alignment.load",
        "compressibility": "rewards.jpeg:Compressibility",
        "incompressibility": "rewards.jpeg:Incompressibility",
        "nudenet": "rewards.nudity:NudeNet",
        "opennsfw": "rewards.nudity:OpenNSFW",
        "tiny-image-reward": "tinyworld:load_reward",
    }
)
"""Each short name, and what is called without arguments to make the reward."""


def reward_named(name: str) -> Reward:
    """Makes a reward by its short name, or by calling the factory that "package.module:factory" names.

    Raises:
        ValueError: There is no such thing, or what it makes is no reward.
    """
    module, _, factory = FACTORIES.get(name, name).partition(":")
    try:
        make: object = reduce(getattr, factory.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(FACTORIES)
        raise ValueError(f"reward must be one of {known}, or package.module:factory, got {name!r}: {error}") from error
    reward = make() if callable(make) else make
    if not isinstance(reward, Reward):
        raise ValueError(f"reward must be callable and say whether it is differentiable, got {reward!r} from {name!r}")
    return reward
