"""Trains in forks that are killed again and again, until they are done; test_kills.py looks at what came out.

A program of its own because it forks, which a test runner with its threads should not.

    killed_trainings.py ROOT PIPELINE KIND KILLS

ROOT is as `under_fire` leaves it.
"""

import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ddpo import CriticConfig, DDPOConfig, DDPOTrainer, NFTConfig, NFTTrainer, RWRConfig, RWRTrainer
from erasure import (
    ESD,
    Destruction,
    DestructionConfig,
    ESDConfig,
    ImageConstraint,
    Lagrangian,
    ObjectiveConstraint,
)
from erasure.generated import for_run
from erasure.registry import erase
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.types import Images, PerSample
from overpaint.training import HeldOut, TrainingConfig
from refl import ReFLConfig, ReFLTrainer
from tests.erasure.test_every_method import METHODS, STRIPED
from tests.training.under_fire import under_fire

PROMPTS = ["a red circle", "a blue square", "a cat", "two dogs", "a large green triangle"]
ITERATIONS = 6


class Colour:
    """A reward: the mean of a colour."""

    def __init__(self, channel: int, *, differentiable: bool = True) -> None:
        self.channel = channel
        self.differentiable = differentiable

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images[:, self.channel].mean(dim=(1, 2))


def images_constraint() -> ImageConstraint:
    return ImageConstraint(Colour(1), ["a striped circle"], Lagrangian(), ceiling=0.3)


def destruction(folder: Path) -> ObjectiveConstraint:
    """The constraint that pictures, which the reference draws and the folder keeps, are seen as something else."""
    objective = Destruction(DestructionConfig(pictures=2, steps=2, words=2, vectors=1, attack_steps=1))
    return ObjectiveConstraint(for_run(objective, folder / "constraint", progress=False), STRIPED, ceiling=0.1)


def run_config(folder: Path, **settings: Any) -> TrainingConfig:
    """A run with averaged weights and a checkpoint after every iteration."""
    return TrainingConfig(
        output_dir=folder, iterations=ITERATIONS, learning_rate=1e-2, checkpoint_every=1, keep_checkpoints=2,
        ema_decay=0.5, resume=True, progress=False, **settings,
    )  # fmt: skip


def refl(policy: DiffusionPolicy, folder: Path, erasure: Any = None, **settings: Any) -> None:
    """ReFL with the pretraining term and held-out prompts."""
    config = ReFLConfig(
        batch_size=2, micro_batch_size=2, steps=3, first_reward_step=1, last_reward_step=2, pretraining_batch_size=2,
        erasure_batch_size=2, evaluate_every=2, guidance_scale=1.0,
    )  # fmt: skip
    trainer = ReFLTrainer(policy, Colour(0), PROMPTS, config, erasure=erasure, held_out=HeldOut(PROMPTS[:2], Colour(2)))
    trainer.train(run_config(folder, **settings))


def ddpo(policy: DiffusionPolicy, folder: Path, erasure: Any = None, **settings: Any) -> None:
    """DDPO with statistics of each prompt, or any other baseline."""
    config = DDPOConfig(
        samples_per_round=4, updates_per_round=2, sampling_batch_size=4, minibatch_size=4, steps=2, guidance_scale=1.0,
        erasure_samples_per_round=4, min_count=2, buffer_size=4, evaluate_every=2, critic=CriticConfig(), **settings,
    )  # fmt: skip
    reward, held_out = Colour(0, differentiable=False), HeldOut(PROMPTS[:2], Colour(2))
    DDPOTrainer(policy, reward, PROMPTS, config, erasure=erasure, held_out=held_out).train(run_config(folder))


def rwr(policy: DiffusionPolicy, folder: Path) -> None:
    config = RWRConfig(samples_per_round=4, sampling_batch_size=4, minibatch_size=4, steps=2, guidance_scale=1.0)
    RWRTrainer(policy, Colour(0, differentiable=False), PROMPTS, config).train(run_config(folder))


def nft(policy: DiffusionPolicy, folder: Path) -> None:
    config = NFTConfig(
        samples_per_round=4, images_per_prompt=2, sampling_batch_size=4, minibatch_size=4, steps=3, updates_per_round=2
    )
    NFTTrainer(policy, Colour(0, differentiable=False), PROMPTS, config).train(run_config(folder))


def erasing(name: str) -> Callable[[DiffusionPolicy, Path], None]:
    """A method of erasing, with what it draws and measures before it trains."""

    def work(policy: DiffusionPolicy, folder: Path) -> None:
        method = METHODS[name](STRIPED)
        descent = replace(method.config.descent, iterations=ITERATIONS, checkpoint_every=1)
        method = type(method)(replace(method.config, descent=descent))
        resume = folder.is_dir() and any(folder.iterdir())
        erasure = erase(method, policy, STRIPED, output_dir=folder, resume=resume, progress=False)
        erasure.save(folder / "erasure")
        erasure.apply(policy)

    return work


KINDS: Mapping[str, tuple[dict[str, Any], Callable[[DiffusionPolicy, Path], None]]] = {
    "refl": ({"lora": LoRAConfig(rank=2)}, refl),
    "refl-images": ({"lora": LoRAConfig(rank=2)}, lambda policy, folder: refl(policy, folder, images_constraint())),
    "refl-objective": (
        {"train": "xattn-kv"},
        lambda policy, folder: refl(
            policy, folder, ObjectiveConstraint(ESD(ESDConfig(train="xattn", steps=2)), STRIPED, ceiling=0.1)
        ),
    ),
    "refl-destruction": (
        {"lora": LoRAConfig(rank=2)},
        lambda policy, folder: refl(policy, folder, destruction(folder)),
    ),
    "refl-bf16": ({"lora": LoRAConfig(rank=2)}, lambda policy, folder: refl(policy, folder, mixed_precision="bf16")),
    "ddpo": ({"lora": LoRAConfig(rank=2)}, lambda policy, folder: ddpo(policy, folder, images_constraint())),
    "ddpo-critic": ({"lora": LoRAConfig(rank=2)}, lambda policy, folder: ddpo(policy, folder, baseline="critic")),
    "rwr": ({"lora": LoRAConfig(rank=2)}, rwr),
    "nft": ({"lora": LoRAConfig(rank=2)}, nft),
    **{name: ({}, erasing(name)) for name in ("esd", "ac", "sa", "receler", "mace", "ant", "eraseflow")},
}
"""What the policy trains, and the training."""


def child(policy: DiffusionPolicy, work: Callable[[DiffusionPolicy, Path], None], folder: Path) -> None:
    """Trains, and writes down the weights that it ended with."""
    torch.manual_seed(os.getpid())  # a new process has other generators
    random.seed(os.getpid())
    try:
        work(policy, folder)
    except Exception:
        traceback.print_exc()
        raise
    weights = {name: value.detach().clone() for name, value in policy.model.state_dict().items()}
    save_file(weights, folder / "end.safetensors")


def main(root: Path, pipeline: str, kind: str, kills: int) -> None:
    """Trains once in peace, and then under fire."""
    options, work = KINDS[kind]
    policy = DiffusionPolicy.from_pretrained(pipeline, device="cpu", **options)
    under_fire(lambda folder: child(policy, work, folder), root, kills, kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
