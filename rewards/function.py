"""Plain functions as rewards: one of images and prompts needs nothing else to serve wherever a reward does."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from overpaint.policy.types import Images, PerSample

from .types import Reward, RewardLike, scores_of, to_device


class FunctionReward:
    """A function of images and prompts as a reward; it may be a network, too, or anything else that can be called.

    It gives a tensor, an array or a list with one number for each image, on any device.

    Args:
        function: Takes images, RGB in [0, 1], [batch, 3, height, width], and a sequence with one prompt for each.
    """

    differentiable = True
    """A function does not say whether it has a gradient. Who needs one tries: ReFL does before its first iteration."""

    def __init__(self, function: Callable[[Images, Any], Any]) -> None:
        self.function = function
        self.reads_prompts = bool(getattr(function, "reads_prompts", True))

    def __repr__(self) -> str:
        """Returns the function's name."""
        return f"FunctionReward({name_of(self)})"

    def to(self, device: torch.device | str) -> "FunctionReward":
        """Moves the function to a device, where it is a network."""
        to_device(self.function, device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the function's score of each image.

        Raises:
            ScoresError: The function does not give one number for each image.
        """
        return scores_of(f"the reward {name_of(self)}", self.function, images, prompts)


def as_reward(reward: RewardLike, name: str = "reward") -> Reward:
    """Returns a reward as it is, and a plain function of images and prompts as one.

    Args:
        reward: The reward or the function.
        name: What to call it in a message.

    Raises:
        TypeError: It is a class, cannot be called with images and prompts, or is a coroutine.
    """
    what = f"{name} must be callable with (images, prompts)"
    if isinstance(reward, type):
        raise TypeError(f"{what}, got the class {reward.__name__} itself; make an object of it: {reward.__name__}(...)")
    if not callable(reward):
        raise TypeError(f"{what}, got {reward!r}")
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        raise TypeError(f"{what} and give scores, got {name_of(reward)}, which is a coroutine")
    if isinstance(reward, Reward):
        if not isinstance(reward.differentiable, bool):
            raise TypeError(f"{name}.differentiable must be True or False, got {reward.differentiable!r}")
        return reward
    signature = signature_of(reward)
    if signature is not None and not takes_pairs(signature):
        raise TypeError(f"{what}, got {name_of(reward)}{signature}")
    return FunctionReward(reward)


def name_of(scorer: object) -> str:
    """Returns what to call a reward or a function in a message: its own name, or that of its class."""
    if isinstance(scorer, FunctionReward):
        return name_of(scorer.function)
    if isinstance(scorer, partial):
        return name_of(scorer.func)
    return getattr(scorer, "__name__", type(scorer).__name__)


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """Returns the signature of a function, or None where it has none to read, as some that are written in C."""
    try:
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:
        return None


def takes_pairs(signature: inspect.Signature) -> bool:
    """Says whether a function can be called with images and prompts."""
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True
