"""What the DiffusionNFT trainer costs beyond the model calls that it cannot do without.

    python benchmarks/nft_overhead.py
    python benchmarks/nft_overhead.py --family sd3 --samples-per-round 16 --minibatch-size 8

A round of the trainer stands against the same model calls made by hand, with the same shapes: the network's forwards of
the drawing, VAE decoding, the reward, and for each minibatch a forward under the old policy, one under the reference
and one that is differentiated, and the optimizer's steps. The two alternate in one process and are timed in
CPU-seconds, so that other load on the machine touches both alike; medians count. The networks are small: what is around
them is the same as around large ones.
"""

from collections.abc import Sequence

import torch
import tyro

from benchmarks.ddpo_by_hand import BareRound
from benchmarks.random_models import BUILDERS, FamilyName
from benchmarks.timing import comparison, take_turns, temporary_run
from ddpo import NFTConfig, NFTTrainer
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import Count, Field, NonNegative, settings
from rewards import Reward

TARGET = 1.05
SIDE = 64
"""Of the images, in pixels."""
STILL = 1e-12
"""Learning rate of the trainer, which has to be positive, and moves no weight by anything that matters."""


@settings
class Config:
    """Shapes of a round, and how often it is run. What is not here has the trainer's default."""

    family: FamilyName = "sd"
    """The tiny world's Stable Diffusion, or a small random network of another family."""

    samples_per_round: Count = 32
    """Images of a round."""

    images_per_prompt: int = Field(4, ge=2)
    """Images of each prompt."""

    sampling_batch_size: Count = 16
    """Images that are drawn at a time."""

    minibatch_size: Count = 16
    """Pairs of sample and level that go through the network at a time in an update."""

    updates_per_round: Count = 1
    """Optimizer steps of a round."""

    steps: int = Field(10, ge=2)
    """Denoising steps; all levels but the last are trained at."""

    kl_weight: NonNegative = 1e-4
    """Of the distance from the reference; other than 0, it is a further call for each minibatch."""

    repeats: int = Field(6, ge=2)
    """Timed pairs of rounds, after one that is not."""

    def nft(self) -> NFTConfig:
        """Returns the trainer's settings."""
        return NFTConfig(
            samples_per_round=self.samples_per_round,
            images_per_prompt=self.images_per_prompt,
            sampling_batch_size=self.sampling_batch_size,
            minibatch_size=self.minibatch_size,
            updates_per_round=self.updates_per_round,
            steps=self.steps,
            kl_weight=self.kl_weight,
            height=SIDE,
            width=SIDE,
        )


def measure(policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], config: Config) -> dict[str, list[float]]:
    """Times the trainer's round and the bare calls in turn, in CPU-seconds."""
    policy.encode(["", *prompts])  # once a run, and so no part of a round
    trainer = NFTTrainer(policy, reward, prompts, config.nft())
    with temporary_run(policy, iterations=config.repeats + 1, learning_rate=STILL) as run:
        trainer.prepare(run)
        bare = BareRound(policy, reward, prompts, config.nft(), run.autocast)
        arms = {"trainer": lambda: run.log(trainer.tagged(trainer.step(run), run)), "bare": bare}
        return take_turns(arms, run.iterations(), warm_up=1)


def main(config: Config) -> dict[str, list[float]]:
    """Measures on the tiny world, or a random network of another family, and prints the ratio."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    lora = LoRAConfig(rank=8, alpha=8)
    if config.family == "sd":
        policy = tinyworld.load_policy(lora=lora)
    else:
        policy = DiffusionPolicy(BUILDERS[config.family](torch.device("cpu"), tiny=True), lora=lora, device="cpu")
    times = measure(policy, tinyworld.load_reward(), tinyworld.captions("train", 32, 0), config)
    print(f"DiffusionNFT, {config.family}, {config.samples_per_round} images a round, {config.steps} steps:")
    print(comparison(times, unit="rounds", target=TARGET))
    return times


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
