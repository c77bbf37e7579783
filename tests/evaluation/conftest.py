"""A policy that draws without any network, a plan for it, and a browser that opens reports."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
import torch

from overpaint.evaluation import PlannedImage, plan
from overpaint.policy.guidance import Guidance
from overpaint.policy.types import Images

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PROMPTS = {
    "explicit": ["a striped star", "a <b>striped</b> cross & more"],
    "benign": ["a red star", "a blue cross", "a green circle"],
}


class NoisePolicy:
    """Draws noise of the image's seed, brightened by `shift`; notes what it was asked for."""

    def __init__(self, shift: float = 0.0, *, fail_after: int | None = None) -> None:
        self.shift = shift
        self.fail_after = fail_after
        self.drawn: list[tuple[str, int]] = []
        self.batch_sizes: list[int] = []
        self.asked: list[tuple[int, Guidance]] = []

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: Guidance,
        eta: float,
        batch_size: int,
        height: int | None,
        width: int | None,
    ) -> Images:
        if self.fail_after is not None and len(self.batch_sizes) >= self.fail_after:
            raise KeyboardInterrupt
        self.drawn += zip(prompts, seeds, strict=True)
        self.batch_sizes.append(len(prompts))
        self.asked.append((steps, guidance))
        noise = [
            torch.rand(3, height or 8, width or 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(noise) * 0.8 + self.shift


@pytest.fixture
def planned() -> tuple[PlannedImage, ...]:
    return plan(PROMPTS, images_per_prompt=2)


@pytest.fixture
def noise_policy() -> type[NoisePolicy]:
    return NoisePolicy


@pytest.fixture(scope="module")
def chromium(chromium_path: str) -> "Iterator[Browser]":
    """A Chromium without a window."""
    # Not for the whole session: as long as the driver runs, no other test of this thread can start an event loop.
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path)
        yield browser
        browser.close()
