"""What the ReFL trainer costs beyond the model calls that it cannot do without.

    python benchmarks/overhead.py

One iteration of the trainer on the tiny world stands against the same model calls made by hand, with the same shapes
in the same order: UNet forwards, VAE decoding, the reward, backward, and the optimizer's step. The two alternate in one
process and are timed in CPU-seconds, so that other load on the machine touches both alike; medians count. The tiny
world is the hard case: its networks are a thousandth of Stable Diffusion's, and what is around them is the same.
"""

from collections.abc import Sequence

import torch
import tyro

from benchmarks.random_models import BUILDERS, FamilyName
from benchmarks.timing import IdleOptimizer, call_unet, comparison, take_turns, temporary_run, unet_inputs
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import Count, Field, Index, NonNegative, settings
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer
from rewards import Reward

TARGET = 1.10
SIDE = 64
"""Of the images, in pixels."""


@settings
class Config:
    """Shapes of an iteration, by default those of examples/refl_erase_nudity.py, and how often it is run."""

    family: FamilyName = "sd"
    """The tiny world's Stable Diffusion, or a small random network of another family."""

    batch_size: Count = 8
    """Prompts per iteration."""

    pretraining_batch_size: Index = 16
    """Pairs of the pretraining term per iteration."""

    steps: Count = 40
    """Denoising steps of a whole image."""

    reward_step: Index = 35
    """The step that is rewarded in every iteration, counted from noise; the middle of the authors' range."""

    guidance_scale: NonNegative = 3.0
    """Classifier-free guidance; other than 1 each UNet call has twice the batch."""

    repeats: int = Field(10, ge=2)
    """Timed pairs of iterations, after two that are not."""

    def refl(self) -> ReFLConfig:
        """Returns the trainer's settings."""
        return ReFLConfig(
            batch_size=self.batch_size,
            micro_batch_size=max(self.batch_size, self.pretraining_batch_size),
            pretraining_batch_size=self.pretraining_batch_size,
            steps=self.steps,
            first_reward_step=self.reward_step,
            last_reward_step=self.reward_step,
            guidance_scale=self.guidance_scale,
            height=SIDE,
            width=SIDE,
        )


class BareIteration:
    """The model calls of an iteration, and nothing else.

    The arithmetic between the calls is left out, and so is everything random: what a call reads is the same each time.
    The optimizer's step size is zero, so that the weights stay.

    Args:
        policy: Its networks are called.
        reward: Scores the images.
        prompts: One for each sample.
        config: Shapes.
    """

    def __init__(self, policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], config: Config) -> None:
        self.policy = policy
        self.reward = reward
        self.prompts = prompts
        self.timesteps = policy.plan(config.steps, SIDE, SIDE).timesteps.tolist()[: config.reward_step + 1]
        branches = 1 if config.guidance_scale == 1 or config.family == "flux" else 2
        self.drawn = unet_inputs(policy, [prompts[0]] * branches * len(prompts), SIDE)
        self.pretrained = unet_inputs(policy, [prompts[0]] * config.pretraining_batch_size, SIDE)
        self.optimizer = IdleOptimizer(policy.trainable_parameters())

    def __call__(self) -> None:
        """Runs the calls once."""
        policy, vae = self.policy, self.policy.vae
        *earlier, rewarded = self.timesteps
        with torch.no_grad():
            for timestep in earlier:
                call_unet(policy, timestep, *self.drawn)
        clean = call_unet(policy, rewarded, *self.drawn)[: len(self.prompts)]
        decoded = vae.decode(clean / vae.config.scaling_factor + (vae.config.shift_factor or 0), return_dict=False)[0]
        self.reward((decoded / 2 + 0.5).clamp(0, 1), self.prompts).mean().backward()
        call_unet(policy, rewarded, *self.pretrained).square().mean().backward()
        self.optimizer.step()


def measure(policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], config: Config) -> dict[str, list[float]]:
    """Times the trainer's iteration and the bare calls in turn, in CPU-seconds."""
    bare = BareIteration(policy, reward, prompts, config)
    pairs = PretrainingPairs(bare.pretrained[0], [prompts[0]] * config.pretraining_batch_size)
    trainer = ReFLTrainer(policy, reward, prompts, config.refl(), pretraining=pairs)
    with temporary_run(policy, iterations=config.repeats + 2) as run:
        trainer.prepare(run)
        arms = {"trainer": lambda: run.log(trainer.step(run)._asdict()), "bare": bare}
        return take_turns(arms, run.iterations(), warm_up=2)


def main(config: Config) -> dict[str, list[float]]:
    """Measures on the tiny world, or a random network of another family, and prints the ratio."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    if config.family == "sd":
        policy = tinyworld.load_policy(lora=LoRAConfig(rank=8, alpha=8))
    else:
        pipeline = BUILDERS[config.family](torch.device("cpu"), tiny=True)
        policy = DiffusionPolicy(pipeline, lora=LoRAConfig(rank=8, alpha=8), device="cpu")
    prompts = tinyworld.captions("benign", config.batch_size, 0)
    times = measure(policy, tinyworld.load_reward(), prompts, config)
    print(f"ReFL, {config.family}, {config.batch_size} prompts, reward at step {config.reward_step} of {config.steps}:")
    print(comparison(times, unit="iterations", target=TARGET))
    return times


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
