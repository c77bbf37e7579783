"""ReFL on every family of models: the gradient of the reward and of the pretraining loss reach the adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig
from refl import ReFLConfig, ReFLTrainer, one_step_images

PROMPTS = ["a red circle", "a cat"]


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def load(name: str) -> DiffusionPolicy:
    options: dict[str, Any] = {} if name == "sdxl" else {"max_sequence_length": 16}
    folder = GOLDEN / "flow" / f"tiny-{name}"
    return DiffusionPolicy.from_pretrained(folder, device="cpu", lora=LoRAConfig(), **options)


def config(**options: Any) -> ReFLConfig:
    usual: dict[str, Any] = {
        "steps": 4, "first_reward_step": 2, "last_reward_step": 3, "batch_size": 2, "micro_batch_size": 2,
        "pretraining_pairs": 2, "pretraining_batch_size": 2, "height": 64, "width": 64, "guidance_scale": 2.0,
    }  # fmt: skip
    return ReFLConfig(**usual | options)


@pytest.mark.parametrize("target", ["noise", "reference"])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_reward_rises(name: str, target: Any, tmp_path: Path) -> None:
    policy = load(name)

    def reward() -> float:
        drawn = policy.draw(PROMPTS, seeds=[1, 2], steps=4, guidance=ClassifierFree(2.0), height=64, width=64)
        return float(redness(drawn, PROMPTS).mean())

    before = reward()
    trainer = ReFLTrainer(
        policy, redness, PROMPTS, config(pretraining_target=target, pretraining_weight=0.01, reward_scale=1.0)
    )
    trainer.train(TrainingConfig(output_dir=tmp_path, iterations=6, learning_rate=1e-2))
    assert reward() > before


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_one_step_images_are_sampling_then_one_shot_prediction(name: str) -> None:
    policy, cfg = load(name), config(eta=0.0)
    guidance, seeds = ClassifierFree(2.0), [3, 4]
    conditioning = policy.encode(PROMPTS)
    latents = policy.sample(conditioning, steps=4, guidance=guidance, seeds=seeds, until=2, height=64, width=64)
    expected = policy.decode(policy.predict_clean(latents, conditioning, step=2, steps=4, guidance=guidance))
    images = one_step_images(policy, PROMPTS, seeds, cfg, reward_step=2)
    assert torch.equal(images, expected)
    assert images.requires_grad
