"""Which images are drawn: a prompt, a kind and a seed for each, the same for every model compared."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

KINDS = {
    "explicit": "name the concept",
    "implicit": "elicit the concept without naming it",
    "neighbour": "show what is close to the concept and must survive",
    "benign": "have nothing to do with the concept",
}
"""The usual kinds of prompts, and what prompts of each do."""


class PlannedImage(NamedTuple):
    """One image to draw."""

    kind: str
    id: str
    """Names the prompt, in tables and in file names."""
    copy: int
    """Which image of that prompt, from 0."""
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        """Name in ImageReward's layout, `<id>_<k>.png`."""
        return f"{self.id}_{self.copy}.png"


@dataclass(frozen=True, kw_only=True)
class DrawConfig:
    """How images are drawn; what has to be the same for every model compared."""

    steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 5.0
    """Scale of classifier-free guidance; 1 is none."""
    eta: float = 0.0
    """Share of the noise of ancestral sampling in each step, in [0, 1]; 0 is deterministic."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not self.guidance_scale >= 0:
            raise ValueError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")


def plan(
    prompts: Mapping[str, Sequence[str]], *, images_per_prompt: int = 1, seed: int = 0
) -> tuple[PlannedImage, ...]:
    """Lists the images to draw for prompts of several kinds.

    The seed of an image follows from `seed`, its kind, its place and its copy alone, so that
    adding prompts or kinds leaves the other images as they are, and so that runs with different
    `seed` share no noise.

    Args:
        prompts: The prompts of each kind. A kind becomes part of file names: lower-case letters, digits, dashes.
        images_per_prompt: Images drawn for each prompt, each with its own noise.
        seed: Chooses the noise of all images.

    Raises:
        ValueError: There are no prompts, a prompt is not a string, or a kind cannot be part of a file name.
    """
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {images_per_prompt}")
    if not prompts:
        raise ValueError("prompts must hold at least one kind, got none")
    planned: list[PlannedImage] = []
    for kind, texts in prompts.items():
        _check_kind(kind, texts)
        for number, prompt in enumerate(texts):
            planned.extend(
                PlannedImage(kind, f"{kind}-{number:04d}", copy, prompt, _image_seed(seed, kind, number, copy))
                for copy in range(images_per_prompt)
            )
    return tuple(planned)


def kinds_of(planned: Sequence[PlannedImage]) -> tuple[str, ...]:
    """Returns the kinds that occur, in the order in which they first do."""
    return tuple(dict.fromkeys(image.kind for image in planned))


def _image_seed(seed: int, kind: str, number: int, copy: int) -> int:
    """Returns 32 bits, which is all that torch's CPU generator uses of a seed."""
    digest = hashlib.sha256(f"{seed}/{kind}/{number}/{copy}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _check_kind(kind: str, prompts: Sequence[str]) -> None:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", kind):
        raise ValueError(f"prompts: a kind must be lower-case letters, digits and dashes, got {kind!r}")
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts[{kind!r}] must be a non-empty list of strings, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"prompts[{kind!r}] must be strings, got {prompt!r}")
