"""Rewards by name, for programs: a short name, the address of a served one, or "package.module:factory"."""

import importlib
import os
from collections.abc import Callable, Mapping
from functools import reduce
from types import MappingProxyType

from .aesthetic import Aesthetic
from .alignment import Alignment
from .blip import BLIPScore
from .clip import CLIPScore
from .hps import HPSv2
from .image_reward import ImageReward
from .jpeg import Compressibility, Incompressibility
from .nudity import NudeNet, OpenNSFW
from .pick import PickScore
from .remote import RemoteConfig, RemoteReward
from .types import Reward

FACTORIES: Mapping[str, Callable[[], Reward]] = MappingProxyType(
    {
        "image-reward": ImageReward.load,
        "clip": CLIPScore.load,
        "aesthetic": Aesthetic.load,
        "blip": BLIPScore.load,
        "pick": PickScore.load,
        "hps": HPSv2.load,
        "alignment": Alignment.load,
        "compressibility": Compressibility,
        "incompressibility": Incompressibility,
        "nudenet": NudeNet,
        "opennsfw": OpenNSFW,
    }
)
"""Each short name, and what is called without arguments to make the reward."""


TOKEN_VARIABLE = "OVERPAINT_TOKEN"
"""Environment variable with the token of a server that is named by its address, where it asks for one."""


def reward_named(name: str, more: Mapping[str, Callable[[], Reward]] = MappingProxyType({})) -> Reward:
    """Makes a reward by its short name, by the address of `rewards.serve`, or by calling "package.module:factory".

    Args:
        name: Which reward.
        more: Short names besides those of `FACTORIES`, such as `overpaint.tinyworld.REWARDS`.

    Raises:
        ValueError: There is no such thing, or what it makes is no reward.
    """
    if name.startswith(("http://", "https://")):
        variable = TOKEN_VARIABLE if TOKEN_VARIABLE in os.environ else None
        return RemoteReward(RemoteConfig(url=name, token_variable=variable))
    factories = {**FACTORIES, **more}
    make: object = factories.get(name)
    if make is None:
        module, _, factory = name.partition(":")
        try:
            make = reduce(getattr, factory.split("."), importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"reward must be one of {', '.join(factories)}, an address, or package.module:factory, got {name!r}: "
                f"{error}"
            ) from error
    reward = make() if callable(make) else make
    if not isinstance(reward, Reward):
        raise ValueError(f"reward must be callable and say whether it is differentiable, got {reward!r} from {name!r}")
    return reward
