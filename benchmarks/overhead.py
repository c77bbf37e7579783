"""What the ReFL trainer costs beyond the model calls that it cannot do without.

    python benchmarks/overhead.py

One iteration of the trainer on the tiny world stands against the same model calls made by hand, with the same shapes
in the same order: UNet forwards, VAE decoding, the reward, backward, and the optimizer's step. The two alternate in one
process and are timed in CPU-seconds, so that other load on the machine touches both alike; medians count. The tiny
world is the hard case: its networks are a thousandth of Stable Diffusion's, and what is around them is the same.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import Field, settings
from overpaint.training import TrainingConfig, TrainingRun
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer
from rewards import Reward

TARGET = 1.10


@settings
class Config:
    """Shapes of an iteration, by default those of examples/refl_erase_nudity.py, and how often it is run."""

    batch_size: int = 8
    """Prompts per iteration."""

    pretraining_batch_size: int = 16
    """Pairs of the pretraining term per iteration."""

    steps: int = 40
    """Denoising steps of a whole image."""

    reward_step: int = 35
    """The step that is graded in every iteration, counted from noise; the middle of the authors' range."""

    guidance_scale: float = 3.0
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
        )


class Timing(NamedTuple):
    """CPU-seconds of each iteration, pair by pair."""

    trainer: list[float]
    bare: list[float]

    @property
    def ratio(self) -> float:
        """The trainer's median over that of the bare calls."""
        return statistics.median(self.trainer) / statistics.median(self.bare)


class BareIteration:
    """The model calls of an iteration, and nothing else.

    The arithmetic between the calls is left out, and so is everything random: what a call reads is the same each time.
    The optimizer's step size is zero, so that the weights stay.

    Args:
        policy: Its networks are called.
        reward: What grades.
        prompts: One for each sample.
        config: Shapes.
    """

    def __init__(self, policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], config: Config) -> None:
        self.policy = policy
        self.reward = reward
        self.prompts = prompts
        self.reward_step = config.reward_step
        self.timesteps = policy.timesteps(config.steps).tolist()
        branches = 1 if config.guidance_scale == 1 else 2
        self.drawn = self._inputs(branches * len(prompts))
        self.pretrained = self._inputs(config.pretraining_batch_size)
        self.parameters = policy.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)

    def __call__(self) -> None:
        """Runs the calls once."""
        vae = self.policy.vae
        with torch.no_grad():
            for step in range(self.reward_step):
                self._unet(step, *self.drawn)
        clean = self._unet(self.reward_step, *self.drawn)[: len(self.prompts)]
        decoded = vae.decode(clean / vae.config.scaling_factor, return_dict=False)[0]
        self.reward((decoded / 2 + 0.5).clamp(0, 1), self.prompts).mean().backward()
        self._unet(self.reward_step, *self.pretrained).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _inputs(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns latents and embeddings for a call on that many samples."""
        side = self.policy.sample_size
        return torch.randn(count, 4, side, side), self.policy.encode([self.prompts[0]] * count).tokens

    def _unet(self, step: int, latents: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        timesteps = torch.full((len(latents),), self.timesteps[step])
        return self.policy.unet(latents, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]


def measure(policy: DiffusionPolicy, reward: Reward, prompts: Sequence[str], config: Config) -> Timing:
    """Times the trainer's iteration and the bare calls in turn, each going first in every other pair."""
    bare = BareIteration(policy, reward, prompts, config)
    pairs = PretrainingPairs(bare.pretrained[0], [prompts[0]] * config.pretraining_batch_size)
    trainer = ReFLTrainer(policy, reward, prompts, config.refl(), pretraining=pairs)
    timing = Timing([], [])
    with tempfile.TemporaryDirectory() as folder:
        run_config = TrainingConfig(output_dir=Path(folder), iterations=config.repeats + 2, progress=False)
        with TrainingRun(policy, run_config) as run:
            trainer.prepare(run)

            def iteration() -> None:
                run.log(trainer.step(run)._asdict())

            for k in run.iterations():
                seconds = {work: cpu_seconds(work) for work in ((iteration, bare) if k % 2 else (bare, iteration))}
                if k >= 2:
                    timing.trainer.append(seconds[iteration])
                    timing.bare.append(seconds[bare])
    return timing


def cpu_seconds(work: Callable[[], object]) -> float:
    """Returns the processor time of one run of the work, over all threads of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main(config: Config) -> Timing:
    """Measures on the tiny world and prints the ratio."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=8, alpha=8))
    prompts = tinyworld.captions("benign", config.batch_size, 0)
    timing = measure(policy, tinyworld.load_reward(), prompts, config)
    print(f"ReFL, {config.batch_size} prompts, graded at step {config.reward_step} of {config.steps}:")
    for name, times in timing._asdict().items():
        low, middle, high = statistics.quantiles(times, n=4)
        print(f"  {name:8} {middle:.3f} CPU-seconds (quartiles {low:.3f} and {high:.3f}, {len(times)} iterations)")
    print(f"  ratio    {timing.ratio:.3f} (target: at most {TARGET:.2f})")
    return timing


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
