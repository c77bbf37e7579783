"""What generating a folder of images costs beyond the calls of the networks that draw them.

    python -m benchmarks.generation_cost

`overpaint.evaluation.images` fills a folder with pictures of the tiny world: hash of the weights, prompts, noise, the
arithmetic of the steps, PNG files, rows. Against it stand the same calls of UNet and VAE by hand, with the same shapes
in the same order. The two alternate in one process and are timed in CPU-seconds, so that other load on the machine
touches both alike; medians count. The tiny world is the hard case: its networks are a thousandth of Stable Diffusion's.
"""

import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.overhead import cpu_seconds
from overpaint.evaluation import DrawConfig, PlannedImage, generate, plan
from overpaint.policy import DiffusionPolicy
from overpaint.settings import Field, settings

TARGET = 1.05


@settings
class Config:
    """What is drawn, and how often."""

    images: int = Field(32, ge=1)
    """Pictures in a folder."""

    batch_size: int = Field(16, ge=1)
    """Pictures drawn at a time; divides their number."""

    steps: int = 40
    """Denoising steps of a picture."""

    guidance_scale: float = 3.0
    """Classifier-free guidance; other than 1 each UNet call has twice the batch."""

    repeats: int = Field(10, ge=2)
    """Timed pairs of folders, after one that is not; two give quartiles."""

    def __post_init__(self) -> None:
        """Checks that batches are whole."""
        if self.images % self.batch_size:
            raise ValueError(f"images must be a positive multiple of batch_size {self.batch_size}, got {self.images}")


class Timing(NamedTuple):
    """CPU-seconds of each folder, pair by pair."""

    generate: list[float]
    bare: list[float]

    @property
    def ratio(self) -> float:
        """The median of `generate` over that of the bare calls."""
        return statistics.median(self.generate) / statistics.median(self.bare)


class BareCalls:
    """The calls of UNet and VAE for a folder, and nothing else; what they read is the same each time."""

    def __init__(self, policy: DiffusionPolicy, prompts: list[str], config: Config) -> None:
        branches = 1 if config.guidance_scale == 1 else 2
        side = policy.sample_size
        self.policy = policy
        self.batches = config.images // config.batch_size
        self.batch_size = config.batch_size
        self.timesteps = policy.timesteps(config.steps).tolist()
        self.latents = torch.randn(branches * config.batch_size, 4, side, side)
        self.embeddings = policy.encode(prompts[: config.batch_size]).tokens.repeat(branches, 1, 1)

    @torch.no_grad()
    def __call__(self) -> None:
        """Runs the calls once."""
        for _ in range(self.batches):
            for timestep in self.timesteps:
                at = torch.full((len(self.latents),), timestep)
                self.policy.unet(self.latents, at, encoder_hidden_states=self.embeddings, return_dict=False)
            for part in self.latents[: self.batch_size].split(8):  # as many as the policy decodes at a time
                self.policy.vae.decode(part, return_dict=False)


def measure(policy: DiffusionPolicy, planned: tuple[PlannedImage, ...], config: Config) -> Timing:
    """Times a folder and the bare calls in turn, each going first in every other pair."""
    bare = BareCalls(policy, [image.prompt for image in planned], config)
    drawing = DrawConfig(steps=config.steps, guidance_scale=config.guidance_scale)
    timing = Timing([], [])
    for repeat in range(config.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:

            def whole(folder: str = folder) -> None:
                policy.prompts.clear()
                generate(
                    policy,
                    planned,
                    Path(folder),
                    drawing,
                    model="tiny",
                    batch_size=config.batch_size,
                    rank=0,
                    world_size=1,
                    progress=False,
                )

            seconds = {work: cpu_seconds(work) for work in ((whole, bare) if repeat % 2 else (bare, whole))}
        if repeat > 0:
            timing.generate.append(seconds[whole])
            timing.bare.append(seconds[bare])
    return timing


def main(config: Config) -> Timing:
    """Measures on the tiny world and prints the ratio."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    policy = tinyworld.load_policy(device="cpu")
    planned = plan({"benign": tinyworld.captions("benign", config.images, 0)})
    timing = measure(policy, planned, config)
    print(f"{config.images} images in {config.steps} steps, {config.batch_size} at a time:")
    for name, times in timing._asdict().items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"  {name:8} {middle:.3f} CPU-seconds (quartiles {low:.3f} and {high:.3f}, {len(times)} folders)")
    print(f"  ratio    {timing.ratio:.3f} (target: at most {TARGET:.2f})")
    return timing


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
