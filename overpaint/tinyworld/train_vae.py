"""Trains the tiny autoencoder: ``python -m overpaint.tinyworld.train_vae``.

The loss is led by the squared error: an L1-led one stalls, since the median picture is bare background. Afterwards the
latents are whitened channel by channel, exactly, inside the two 1 x 1 convolutions around them, so that every
channel has zero mean and, after Stable Diffusion's scaling factor, unit variance.
"""

import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from overpaint.settings import AnyPath, Field, NonNegative, settings

from . import components, workers
from .caption import training_scene
from .render import render
from .scene import to_tensors


@settings
class VAETrainingConfig(workers.WorkersConfig):
    """How the autoencoder is trained."""

    output_dir: AnyPath = Path("tinyworld-training/vae")
    """Where weights are written."""

    steps: int = Field(7000, ge=1)
    """Optimizer steps of each worker."""

    batch_size: int = Field(8, ge=1)
    """Pictures per step and worker; small batches learn faster per picture here."""

    kl_weight: NonNegative = 5e-5
    """Weight of the mean KL divergence per latent entry."""


def reconstruction_loss(drawn: Tensor, target: Tensor) -> Tensor:
    """Mixes squared and absolute error of pixels with the squared error of their differences."""
    loss = 2 * F.mse_loss(drawn, target) + 0.15 * F.l1_loss(drawn, target)
    for axis in (-1, -2):
        loss = loss + F.mse_loss(drawn.diff(dim=axis), target.diff(dim=axis))
    return loss


def pictures(rng: random.Random, count: int) -> Float[Tensor, "count 3 size size"]:
    """Draws training pictures as RGB in [-1, 1]."""
    return render(to_tensors([training_scene(rng)[1] for _ in range(count)])) * 2 - 1


@torch.no_grad()
def whiten(vae, images: Float[Tensor, "batch 3 size size"]) -> None:
    """Shifts and scales each latent channel to mean 0 and deviation 1 / scaling factor, in place and exactly."""
    mean = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in images.split(64)])
    shift = mean.mean(dim=(0, 2, 3))
    scale = (1 / components.LATENT_SCALE) / mean.std(dim=(0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight * shift[None, :, None, None]).sum(dim=(1, 2, 3))
    out.weight /= scale[None, :, None, None]
    into.weight[:4] *= scale[:, None, None, None]
    into.bias[:4] = (into.bias[:4] - shift) * scale
    into.bias[4:] += 2 * scale.log()


def train(rank: int, count: int, config: VAETrainingConfig) -> None:
    """Trains one worker; worker 0 saves."""
    torch.manual_seed(config.seed)
    vae = components.build_vae()
    torch.manual_seed(config.seed * 1000 + rank)
    rng = random.Random(f"vae-{config.seed}-{rank}")
    descent = workers.Descent(vae, config, weight_decay=0.0)
    start = time.time()
    for step in range(1, config.steps + 1):
        images = pictures(rng, config.batch_size)
        posterior = vae.encode(images).latent_dist
        drawn = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = reconstruction_loss(drawn, images) + config.kl_weight * kl
        descent.step(loss, step)
        if rank == 0 and step % 250 == 0:
            error = F.mse_loss(drawn.clamp(-1, 1), images).item() / 4
            print(f"step {step}  PSNR {-10 * math.log10(error):.2f} dB  {time.time() - start:.0f} s", flush=True)
        if rank == 0 and step % 1000 == 0:
            vae.save_pretrained(config.output_dir / "last")
    workers.average([vae])
    if rank == 0:
        vae.save_pretrained(config.output_dir / "unwhitened")
        whiten(vae, pictures(random.Random("whiten"), 2048))
        vae.save_pretrained(config.output_dir / "final")


if __name__ == "__main__":
    workers.run_program(train, VAETrainingConfig)
