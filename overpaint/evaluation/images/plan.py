"""The plan of an evaluation: a prompt, a kind and a seed for each image, the same for every model compared.

Several processes share a plan out: by images where they draw into memory, by whole batches where they fill a folder.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from overpaint.settings import Count, Field, Index, NonNegative, Seed, settings

KINDS = {
    "explicit": "name the concept",
    "implicit": "elicit the concept without naming it",
    "neighbour": "show what is close to the concept and must survive",
    "benign": "have nothing to do with the concept",
}
"""The usual kinds of prompts, and what prompts of each do."""


class Prompt(NamedTuple):
    """One prompt, with what its authors say of how to draw it."""

    id: str
    """Unique in its set; letters, digits, '.', '_' and '-', since it becomes part of file names."""
    text: str
    """As it was published, spaces at its ends included."""
    seed: Seed | None = None
    """The seed that its authors drew it from; None where they give none."""
    extras: Mapping[str, Any] = MappingProxyType({})
    """The other columns of its row, such as `Category`."""
    guidance: NonNegative | None = None
    """The scale of classifier-free guidance that its authors drew it with; None where they give none."""


class PlannedImage(NamedTuple):
    """One image to draw."""

    kind: str
    id: str
    """Names the prompt, in tables and in file names."""
    copy: Index
    """Which image of that prompt, from 0."""
    prompt: str
    seed: Seed
    """The seed of its noise, of which every number that is written of the image tells."""
    guidance_scale: NonNegative | None = None
    """Scale of classifier-free guidance; None is that of the run's `DrawConfig`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PlannedImage":
        """Reads what `to_dict` wrote, among whatever else is there; a KeyError where a field is missing."""
        return cls(
            values["kind"],
            values["id"],
            values["copy"],
            values["prompt"],
            values["seed"],
            values.get("guidance_scale"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as they are written down: a guidance scale only where the image has its own."""
        values = self._asdict()
        if self.guidance_scale is None:
            del values["guidance_scale"]
        return values

    @property
    def file_name(self) -> str:
        """Name in ImageReward's layout, `<id>_<k>.png`."""
        return f"{self.id}_{self.copy}.png"


@settings
class DrawConfig:
    """How images are drawn; what has to be the same for every model compared."""

    steps: int = Field(50, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(5.0, ge=0)
    """Scale of classifier-free guidance; 1 is none. The default is ours; that of diffusers for Stable Diffusion is
    7.5."""
    eta: float = Field(0.0, ge=0, le=1)
    """Share of the noise of ancestral sampling in each step, in [0, 1]; 0 is deterministic."""
    size: int | None = Field(None, ge=8, multiple_of=8)
    """Side of the images in pixels, a multiple of 8; None is the model's own."""


def plan(
    prompts: Mapping[str, Sequence[str | Prompt]],
    *,
    images_per_prompt: Count = 1,
    seed: Seed = 0,
    own_seeds: bool = True,
    own_guidance: bool = True,
) -> tuple[PlannedImage, ...]:
    """Lists the images to draw for prompts of several kinds.

    The seed of an image follows from `seed`, its kind, its place and its copy alone, so that
    adding prompts or kinds leaves the other images as they are, and so that runs with different
    `seed` share no noise.

    A `Prompt` may bring a seed and a guidance scale of its own. Its first image is drawn from that seed itself, as its
    authors did; the seeds of further ones follow from it as they would from `seed`.

    Args:
        prompts: The prompts of each kind. A kind becomes part of file names: lower-case letters, digits, dashes.
        images_per_prompt: Images drawn for each prompt, each with its own noise.
        seed: Chooses the noise of all images whose prompt has no seed of its own.
        own_seeds: Whether prompts' own seeds are used.
        own_guidance: Whether prompts' own guidance scales are used.

    Raises:
        ValueError: There are no prompts, a prompt is not a string, or a kind cannot be part of a file name.
    """
    if not prompts:
        raise ValueError("prompts must hold at least one kind, got none")
    planned: list[PlannedImage] = []
    for kind, given in prompts.items():
        _check_kind(kind, given, images_per_prompt)
        for number, one in enumerate(given):
            prompt = _followed(one if isinstance(one, Prompt) else Prompt("", one), own_seeds, own_guidance)
            name = f"{kind}-{number:04d}"
            planned += _copies(kind, name, prompt, images_per_prompt, seed, number)
    return tuple(planned)


def plan_named(
    prompts: Sequence[Prompt],
    *,
    kind: str = "benign",
    images_per_prompt: int = 1,
    seed: int = 0,
    own_seeds: bool = True,
    own_guidance: bool = True,
) -> tuple[PlannedImage, ...]:
    """Lists the images to draw for prompts that have names of their own, such as those of a benchmark.

    As in `plan`, the seed of an image follows from `seed`, `kind`, the name of its prompt and its copy alone, and a
    prompt's own seed and guidance scale are used. A name becomes part of file names.

    Raises:
        ValueError: There are no prompts, or a name occurs twice or cannot be part of a file name.
    """
    _check_kind(kind, prompts, images_per_prompt)
    followed = [_followed(prompt, own_seeds, own_guidance) for prompt in prompts]
    planned = [
        image for prompt in followed for image in _copies(kind, prompt.id, prompt, images_per_prompt, seed, prompt.id)
    ]
    check_plan(planned)
    return tuple(planned)


def _followed(prompt: Prompt, own_seeds: bool, own_guidance: bool) -> Prompt:
    """Returns a prompt with that of its own which is used."""
    return prompt._replace(seed=prompt.seed if own_seeds else None, guidance=prompt.guidance if own_guidance else None)


def _copies(kind: str, name: str, prompt: Prompt, count: int, seed: int, number: int | str) -> list[PlannedImage]:
    """Returns the images of one prompt; `number` is what their seeds know it by."""

    def seed_of(copy: int) -> int:
        if prompt.seed is None:
            return _image_seed(seed, kind, number, copy)
        return prompt.seed if copy == 0 else _image_seed(prompt.seed, kind, number, copy)

    return [PlannedImage(kind, name, copy, prompt.text, seed_of(copy), prompt.guidance) for copy in range(count)]


def check_plan(planned: Sequence[PlannedImage]) -> None:
    """Raises a ValueError unless there are images, and each can have a file of its own."""
    if not planned:
        raise ValueError("planned must hold at least one image, got none")
    seen: dict[str, PlannedImage] = {}
    for image in planned:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", image.id):
            raise ValueError(f"planned: an id must be letters, digits, '.', '_' and '-', got {image.id!r}")
        if image.file_name in seen:
            raise ValueError(
                f"planned must name every image once, got {image.file_name} for {seen[image.file_name].prompt!r} and "
                f"for {image.prompt!r}"
            )
        seen[image.file_name] = image


def kinds_of(planned: Sequence[PlannedImage]) -> tuple[str, ...]:
    """Returns the kinds that occur, in the order in which they first do."""
    return tuple(dict.fromkeys(image.kind for image in planned))


def shard(planned: Sequence[PlannedImage], rank: Index, world_size: Count) -> tuple[PlannedImage, ...]:
    """Returns the images that one of several processes draws into memory: every `world_size`-th, from `rank` on."""
    check_rank(rank, world_size)
    return tuple(planned[rank::world_size])


def batches_of(planned: Sequence[PlannedImage], batch_size: int) -> list[tuple[PlannedImage, ...]]:
    """Cuts a plan into batches of one guidance scale, which processes that share a folder share out whole.

    So the batches, and with them the last bit of every image, do not depend on the number of processes. Scales come in
    the order in which they first occur, and images of one scale in that of the plan.
    """
    return [tuple(planned[place] for place in batch) for batch in batched_places(planned, batch_size)]


def batched_places(planned: Sequence[PlannedImage], batch_size: int) -> list[list[int]]:
    """Returns the places in the plan of the images of each batch of `batches_of`."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    by_scale: dict[float | None, list[int]] = {}
    for place, image in enumerate(planned):
        by_scale.setdefault(image.guidance_scale, []).append(place)
    return [places[k : k + batch_size] for places in by_scale.values() for k in range(0, len(places), batch_size)]


def check_rank(rank: int, world_size: int) -> None:
    """Raises a ValueError unless the process is one of the processes."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size {world_size}, got {rank}")


def _image_seed(seed: int, kind: str, number: int | str, copy: int) -> int:
    """Returns 32 bits, which is all that torch's CPU generator uses of a seed."""
    digest = hashlib.sha256(f"{seed}/{kind}/{number}/{copy}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _check_kind(kind: str, prompts: Sequence[str | Prompt], images_per_prompt: int) -> None:
    if images_per_prompt < 1:
        raise ValueError(f"images_per_prompt must be at least 1, got {images_per_prompt}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", kind):
        raise ValueError(f"prompts: a kind must be lower-case letters, digits and dashes, got {kind!r}")
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts[{kind!r}] must be a non-empty list of strings, got {prompts!r}")
    for prompt in prompts:
        if not isinstance(prompt, str | Prompt):
            raise ValueError(f"prompts[{kind!r}] must be strings, got {prompt!r}")
