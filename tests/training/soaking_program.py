"""Trains for thousands of updates, and writes down what the process holds meanwhile; test_soak.py looks at it.

soaking_program.py FOLDER PIPELINE refl|ddpo UPDATES
"""

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddpo import DDPOConfig, DDPOTrainer
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig
from refl import ReFLConfig, ReFLTrainer

PROMPTS = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "green", "blue")]
EVERY = 50


class Watching:
    """A reward, the mean of red, which is asked once in each iteration and then looks at its own process."""

    differentiable = True

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[tuple[int, float, int]] = []
        """Iteration, resident memory in MB, and open files."""

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        if self.calls % EVERY == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            self.seen.append((self.calls, memory, len(os.listdir("/proc/self/fd"))))
        self.calls += 1
        return images[:, 0].mean(dim=(1, 2))


def main(folder: Path, pipeline: str, trainer: str, updates: int) -> None:
    """Trains, and writes what was seen."""
    policy = DiffusionPolicy.from_pretrained(pipeline, device="cpu", lora=LoRAConfig(rank=2))
    reward = Watching()
    run = TrainingConfig(
        output_dir=folder, iterations=updates, learning_rate=1e-4, checkpoint_every=100, progress=False
    )
    if trainer == "refl":
        refl = ReFLConfig(
            batch_size=2, micro_batch_size=2, steps=2, first_reward_step=1, last_reward_step=1,
            pretraining_batch_size=2, guidance_scale=1.0,
        )  # fmt: skip
        ReFLTrainer(policy, reward, PROMPTS, refl).train(run)
    else:
        ddpo = DDPOConfig(
            samples_per_round=2, updates_per_round=1, sampling_batch_size=2, minibatch_size=2, steps=2,
            guidance_scale=1.0, pictures_every=100,
        )  # fmt: skip
        DDPOTrainer(policy, reward, PROMPTS, ddpo).train(run)
    (folder / "seen.json").write_text(json.dumps(reward.seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
