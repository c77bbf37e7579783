"""A program that the tests start in one process and in two, where the networks are spread over both."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer
from erasure import ESD, Concept, ESDConfig, ObjectiveConstraint
from erasure.descend import DescentConfig
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig, process_state
from refl import ReFLConfig, ReFLTrainer

PROMPTS = ["a cat", "a house"]


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def load(models: Path, name: str) -> DiffusionPolicy:
    options: dict[str, Any] = {} if name == "sdxl" else {"max_sequence_length": 16}
    return DiffusionPolicy.from_pretrained(models / f"tiny-{name}", device="cpu", lora=LoRAConfig(), **options)


def run_of(folder: Path, iterations: int = 2) -> TrainingConfig:
    # With a large epsilon a step is proportional to the gradient, so that rounding stays as small as it is.
    return TrainingConfig(
        output_dir=folder, iterations=iterations, learning_rate=1e-2, adam_epsilon=1e-2, checkpoint_every=1,
        resume=True, progress=False, shard=True,
    )  # fmt: skip


def shares(policy: DiffusionPolicy) -> tuple[int, int]:
    """How many numbers of the network are here, and how many it has."""
    parameters = list(policy.model.parameters())
    here = sum((value.to_local() if hasattr(value, "to_local") else value).numel() for value in parameters)
    return here, sum(value.numel() for value in parameters)


def check(policy: DiffusionPolicy, folder: Path) -> None:
    """The network is shared out where there are two processes, and its LoRA is saved."""
    here, whole = shares(policy)
    if process_state().num_processes == 2:
        assert here < 0.6 * whole, f"{here} of {whole} numbers are in one process"
        with pytest.raises(ValueError, match="is sharded: save its LoRA"):
            policy.save_pipeline(folder / "pipeline")
    if process_state().is_main_process:
        policy.save_lora(folder / "lora")


def ddpo(models: Path, folder: Path, iterations: int = 2) -> None:
    policy = load(models, "flux")
    config = DDPOConfig(
        samples_per_round=4, updates_per_round=2, sampling_batch_size=2, minibatch_size=2, steps=3, guidance_scale=2.0,
        eta=0.7, baseline="round", height=64, width=64, kl_weight=0.1, pictures_every=1, clip_range=0.1,
    )  # fmt: skip
    DDPOTrainer(policy, redness, PROMPTS, config).train(run_of(folder, iterations))
    check(policy, folder)


def refl(models: Path, folder: Path) -> None:
    policy = load(models, "sdxl")
    config = ReFLConfig(
        steps=3, first_reward_step=1, last_reward_step=2, batch_size=4, micro_batch_size=2, pretraining_pairs=4,
        pretraining_batch_size=4, height=64, width=64, guidance_scale=2.0, evaluate_every=1,
    )  # fmt: skip
    ReFLTrainer(policy, redness, PROMPTS, config).train(run_of(folder))
    check(policy, folder)


def refused(models: Path, folder: Path) -> None:
    """An objective calls the network a different number of times in each process."""
    concept = Concept(name="stripes", phrases=("striped",))
    esd = ESD(ESDConfig(steps=2, train="xattn", descent=DescentConfig(iterations=1, learning_rate=1e-3)))
    constraint = ObjectiveConstraint(esd, concept, ceiling=1.0)
    config = ReFLConfig(
        steps=2, first_reward_step=1, last_reward_step=1, batch_size=2, micro_batch_size=2, erasure_batch_size=2,
        pretraining_weight=0.0, height=64, width=64,
    )  # fmt: skip
    trainer = ReFLTrainer(load(models, "sdxl"), redness, PROMPTS, config, erasure=constraint)
    with pytest.raises(ValueError, match="shard must be False with an ObjectiveConstraint"):
        trainer.train(run_of(folder))


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, given = Path(sys.argv[1]), Path(sys.argv[2])
    ddpo(given, output / "ddpo")
    for stop in (1, 2):
        ddpo(given, output / "resumed", stop)
    refl(given, output / "refl")
    if process_state().num_processes == 2:
        refused(given, output / "refused")
    process_state().destroy_process_group()
