"""Concept masks: from a user's files, from a user's segmenter, or from cross-attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from erasure.methods.attention_maps import concept_map, recorded_attention
from overpaint.policy import DiffusionPolicy
from overpaint.policy.noise import SampleNoise
from overpaint.policy.types import Images, Latents
from rewards.encoded import decode_image

MASK_ENDING = ".mask.png"
"""What the name of a mask's file ends in; the rest is that of its image."""

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg")


class MaskedImages(NamedTuple):
    """Images of a concept, all of one size."""

    images: Images
    masks: Shaped[Tensor, "batch H W"] | None
    """True, or above a half, where an image shows the concept, in the images' size; None has them found."""


@runtime_checkable
class Segmenter(Protocol):
    """Finds what a text names in images, such as Grounding-DINO with SAM."""

    def __call__(self, images: Images, phrase: str) -> Shaped[Tensor, "batch H W"]:
        """Returns masks of the images' size, True, or above a half, where an image shows the phrase."""
        ...


def checked_masks(masks: Shaped[Tensor, "..."], images: Images, phrase: str) -> Bool[Tensor, "batch H W"]:
    """Returns masks as bools; a `ValueError` refuses a number or size other than the images', and an empty one."""
    expected = (len(images), *images.shape[-2:])
    if tuple(masks.shape) != expected:
        raise ValueError(f"masks of {phrase!r} must have the images' shape {expected}, got {tuple(masks.shape)}")
    marked = masks if masks.dtype == torch.bool else masks > 0.5
    if empty := [index for index, mask in enumerate(marked) if not mask.any()]:
        raise ValueError(f"masks of {phrase!r} must each mark some pixel, and that of image {empty[0]} marks none")
    return marked


def masked_images(folder: str | Path) -> dict[str, MaskedImages]:
    """Reads images and masks of some phrases from a folder with one folder for each phrase, named as it.

    ``zebra/03.png`` is an image of a zebra and ``zebra/03.mask.png`` its mask, white where the zebra is.

    Raises:
        ValueError: There are no images, only some have a mask, or sizes differ within a phrase.
    """
    found = {}
    for place in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        files = [path for path in sorted(place.iterdir()) if path.suffix.lower() in IMAGE_ENDINGS]
        images = [path for path in files if not path.name.endswith(MASK_ENDING)]
        masks = [place / f"{path.stem}{MASK_ENDING}" for path in images]
        missing = [path.name for path in masks if not path.is_file()]
        if not images:
            raise ValueError(f"a folder of a phrase must hold images, and {place} holds none")
        if missing and len(missing) < len(images):
            raise ValueError(f"all images of {place.name!r} must have a mask or none, and {missing[0]} is not there")
        read = [read_image(path) for path in images]
        sizes = {path.name: image.shape[-2:] for path, image in zip(images, read, strict=True)}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"images of {place.name!r} must be of one size, got {sizes}")
        marked = None if missing else torch.stack([read_image(path).mean(dim=0) for path in masks])
        found[place.name] = MaskedImages(torch.stack(read), marked)
    if not found:
        raise ValueError(f"a folder of images must hold a folder for each phrase, and {folder} holds none")
    return found


def read_image(path: Path) -> Float[Tensor, "3 H W"]:
    """Reads an image file as RGB in [0, 1]; a `ValueError` refuses what is no PNG or JPEG, RGB or grey."""
    try:
        return decode_image(path.read_bytes(), max_pixels=1 << 24)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@torch.no_grad()
def attention_masks(
    policy: DiffusionPolicy,
    latents: Latents,
    prompts: Sequence[str],
    words: Bool[Tensor, "batch tokens"],
    *,
    timesteps: Sequence[int],
    threshold: float,
    side: int,
    seeds: Sequence[int],
) -> Bool[Tensor, "batch mask_h mask_w"]:
    """Returns where pictures attend to words: the mean map over some timesteps, from a share of its highest value on.

    The latents are clean, and noised to each timestep with the seeds, one for each picture; for `side` see
    `concept_map`, and `threshold` is the share.
    """
    height, width = latents.shape[-2:]
    stream = SampleNoise(seeds, latents.shape[1:], policy.device)
    conditioning = policy.encode(prompts)
    maps = []
    for timestep in timesteps:
        times = torch.full((len(latents),), timestep, device=policy.device)
        with recorded_attention(policy.unet) as record:
            policy.predict_noise(policy.add_noise(latents.to(policy.device), stream.draw(), times), times, conditioning)
        maps.append(concept_map(record, words, height=height, width=width, side=side))
    mean = torch.stack(maps).mean(dim=0)
    return mean >= threshold * mean.amax(dim=(1, 2), keepdim=True)


def at_size(masks: Bool[Tensor, "batch mask_h mask_w"], height: int, width: int) -> Bool[Tensor, "batch h w"]:
    """Returns masks of another size; a pixel that covers anything of the concept belongs to it, so none is lost."""
    return torch.nn.functional.adaptive_max_pool2d(masks.float().unsqueeze(1), (height, width)).squeeze(1) > 0
