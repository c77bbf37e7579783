"""What generating a folder of images costs beyond the calls of the networks that draw them.

    python -m benchmarks.generation_cost

`overpaint.evaluation.images` fills a folder with pictures of the tiny world: hash of the weights, prompts, noise, the
arithmetic of the steps, PNG files, rows. Against it stand the same calls of UNet and VAE by hand, with the same shapes
in the same order. The two alternate in one process and are timed in CPU-seconds, so that other load on the machine
touches both alike; medians count. The tiny world is the hard case: its networks are a thousandth of Stable Diffusion's.
"""

import tempfile
from itertools import count
from pathlib import Path

import torch
import tyro

from benchmarks.timing import call_unet, comparison, take_turns, unet_inputs
from overpaint.evaluation import DrawConfig, PlannedImage, generate, plan
from overpaint.policy import DiffusionPolicy
from overpaint.policy.autoencoder import CHUNK
from overpaint.settings import Count, Field, NonNegative, settings

TARGET = 1.05


@settings
class Config:
    """What is drawn, and how often."""

    images: int = Field(32, ge=1)
    """Pictures in a folder."""

    batch_size: int = Field(16, ge=1)
    """Pictures drawn at a time; divides their number."""

    steps: Count = 40
    """Denoising steps of a picture."""

    guidance_scale: NonNegative = 3.0
    """Classifier-free guidance; other than 1 each UNet call has twice the batch."""

    repeats: int = Field(10, ge=2)
    """Timed pairs of folders, after one that is not; two give quartiles."""

    def __post_init__(self) -> None:
        """Checks that batches are whole."""
        if self.images % self.batch_size:
            raise ValueError(f"images must be a positive multiple of batch_size {self.batch_size}, got {self.images}")


class BareCalls:
    """The calls of UNet and VAE for a folder, and nothing else; what they read is the same each time."""

    def __init__(self, policy: DiffusionPolicy, prompts: list[str], config: Config) -> None:
        branches = 1 if config.guidance_scale == 1 else 2
        self.policy = policy
        self.config = config
        self.timesteps = policy.plan(config.steps).timesteps.tolist()
        self.latents, self.embeddings = unet_inputs(policy, prompts[: config.batch_size] * branches)

    @torch.no_grad()
    def __call__(self) -> None:
        """Runs the calls once."""
        for _ in range(self.config.images // self.config.batch_size):
            for timestep in self.timesteps:
                call_unet(self.policy, timestep, self.latents, self.embeddings)
            for part in self.latents[: self.config.batch_size].split(CHUNK):
                self.policy.vae.decode(part, return_dict=False)


def measure(policy: DiffusionPolicy, planned: tuple[PlannedImage, ...], config: Config) -> dict[str, list[float]]:
    """Times generating a folder and the bare calls in turn, in CPU-seconds."""
    drawing = DrawConfig(steps=config.steps, guidance_scale=config.guidance_scale)
    folders = count()
    with tempfile.TemporaryDirectory() as root:

        def whole() -> None:
            policy.prompts.clear()
            folder = Path(root) / str(next(folders))
            generate(policy, planned, folder, drawing, model="tiny", batch_size=config.batch_size, progress=False)

        bare = BareCalls(policy, [image.prompt for image in planned], config)
        return take_turns({"generate": whole, "bare": bare}, range(config.repeats + 1), warm_up=1)


def main(config: Config) -> dict[str, list[float]]:
    """Measures on the tiny world and prints the ratio."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    policy = tinyworld.load_policy(device="cpu")
    planned = plan({"benign": tinyworld.captions("benign", config.images, 0)})
    times = measure(policy, planned, config)
    print(f"{config.images} images in {config.steps} steps, {config.batch_size} at a time:")
    print(comparison(times, unit="folders", target=TARGET))
    return times


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
