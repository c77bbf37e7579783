"""Rewards by name, for programs: a short name, the address of a served one, or "package.module:factory"."""

import importlib
import os
from functools import reduce
from types import MappingProxyType

from .remote import RemoteConfig, RemoteReward
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


TOKEN_VARIABLE = "OVERPAINT_TOKEN"
"""Environment variable with the token of a server that is named by its address, where it asks for one."""


def reward_named(name: str) -> Reward:
    """Makes a reward by its short name, by the address of `rewards.serve`, or by calling "package.module:factory".

    Raises:
        ValueError: There is no such thing, or what it makes is no reward.
    """
    if name.startswith(("http://", "https://")):
        variable = TOKEN_VARIABLE if TOKEN_VARIABLE in os.environ else None
        return RemoteReward(RemoteConfig(url=name, token_variable=variable))
    module, _, factory = FACTORIES.get(name, name).partition(":")
    try:
        make: object = reduce(getattr, factory.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        known = f"{', '.join(FACTORIES)}, an address"
        raise ValueError(f"reward must be one of {known}, or package.module:factory, got {name!r}: {error}") from error
    reward = make() if callable(make) else make
    if not isinstance(reward, Reward):
        raise ValueError(f"reward must be callable and say whether it is differentiable, got {reward!r} from {name!r}")
    return reward
