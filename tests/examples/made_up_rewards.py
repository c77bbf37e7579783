"""Rewards that the tests name as `made_up_rewards:Brightness`; they note every call in the file NOTED, if it is set."""

import os
import time
from collections.abc import Sequence

import torch
from torch import Tensor


class Brightness:
    """The mean of an image, as slow as SECONDS_PER_BATCH says."""

    differentiable = True
    reads_prompts = False

    def __init__(self) -> None:
        self._note("loaded")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(float(os.environ.get("SECONDS_PER_BATCH", "0")))
        self._note(f"scored {len(images)}")
        return images.mean(dim=(1, 2, 3))

    def _note(self, what: str) -> None:
        if "NOTED" in os.environ:
            with open(os.environ["NOTED"], "a", encoding="utf-8") as file:
                file.write(f"{what}\n")


class PromptLength:
    """The number of characters of the prompt."""

    differentiable = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts], device=images.device)


class InverseBrightness:
    """One over the mean of an image, which is infinite for a black one."""

    differentiable = True
    reads_prompts = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 1 / images.mean(dim=(1, 2, 3))
