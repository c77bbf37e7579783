"""Between images and latents, some at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from .parts import VAE
from .types import Images, Latents

CHUNK = 8
"""How many images go through the VAE at a time; its activations are the largest of all at 512 pixels."""


def decode(vae: VAE, latents: Latents, *, chunk: int = CHUNK) -> Images:
    """Returns the images of latents, clamped to [0, 1]; differentiable."""
    _check_chunk(chunk)
    images = []
    for part in latents.split(chunk):
        unscaled = part / vae.config["scaling_factor"]
        if shift := vae.config.get("shift_factor"):
            unscaled = unscaled + shift
        image: Tensor = vae.decode(unscaled.to(vae.dtype), return_dict=False)[0]
        images.append((image.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(images)


@torch.no_grad()
def encode(vae: VAE, images: Images, *, noise: Callable[[], Latents] | None = None, chunk: int = CHUNK) -> Latents:
    """Returns the latents of images: the mean of the VAE's posterior, or a draw from it with the noise given."""
    _check_chunk(chunk)
    posteriors = [vae.encode((part * 2 - 1).to(vae.device, vae.dtype)).latent_dist for part in images.split(chunk)]
    latents = torch.cat([posterior.mean for posterior in posteriors]).float()
    if noise is not None:
        latents = latents + torch.cat([posterior.std for posterior in posteriors]).float() * noise()
    if shift := vae.config.get("shift_factor"):
        latents = latents - shift
    return latents * vae.config["scaling_factor"]


def latent_shape(
    vae: VAE, sample_size: int, height: int | None, width: int | None, *, patch: int = 1
) -> tuple[int, int, int]:
    """Returns channels, height and width of the latents of an image.

    Args:
        vae: Between the two.
        sample_size: Side of the latents where no size is given.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        patch: Side of the square of latents that the network reads as one token.

    Raises:
        ValueError: The VAE's factor, times that side, does not divide one of them.
    """
    factor = scale_factor(vae)
    told = f"the VAE's factor {factor}" if patch == 1 else f"{factor * patch}"
    for name, value in (("height", height), ("width", width)):
        if value is not None and (value < 1 or value % (factor * patch)):
            raise ValueError(f"{name} must be a positive multiple of {told}, got {value}")
    down, across = (sample_size if value is None else value // factor for value in (height, width))
    return vae.config["latent_channels"], down, across


def scale_factor(vae: VAE) -> int:
    """Returns how many pixels one latent stands for, along each side."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
