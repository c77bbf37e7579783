"""ReFL on every family of models: the gradient of the reward and of the pretraining loss reach the adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from erasure import ReferenceDivergence
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer, one_step_images
from refl.pretraining import pretraining_term
from refl.terms import divergence_term

PROMPTS = ["a red circle", "a cat"]


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


def load(name: str, **options: Any) -> DiffusionPolicy:
    if name != "sdxl":
        options["max_sequence_length"] = 16
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


@pytest.mark.parametrize("chain", ["sde", "cps", "dance", "ancestral"])
def test_divergence_from_the_reference_leaves_out_a_flows_last_step(chain: Any) -> None:
    policy = load("sd3", chain=chain)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    settings = config(eta=1.0 if chain == "ancestral" else 0.7)
    found = divergence_term(policy, settings, ReferenceDivergence(1.0))(["a cat"] * 8, [*range(8)]).losses
    assert found.isfinite().all()
    assert (found > -1).all()


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_a_dropped_caption_leaves_what_guidance_leads_away_from(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, told = load(name), []

    def loss(policy: DiffusionPolicy, latents: Tensor, conditioning: Conditioning, *, seeds: Sequence[int]) -> Tensor:
        told.append(conditioning)
        return torch.zeros(len(latents))

    monkeypatch.setattr("refl.pretraining.denoising_loss", loss)
    pairs = PretrainingPairs(torch.zeros(2, *policy.latent_shape(64, 64)), PROMPTS)
    for share in (0.0, 0.5, 1.0):
        pretraining_term(policy, pairs, config(caption_dropout=share))([0, 1, 0, 1], [1, 2, 3, 4])
    captions = policy.encode(PROMPTS * 2)
    away = policy.prompts.empty(captions)
    assert torch.equal(told[0].tokens, captions.tokens)
    assert torch.equal(told[2].tokens, away.tokens)
    assert told[1].pooled is not None
    kept = [torch.equal(row, caption) for row, caption in zip(told[1].tokens, captions.tokens, strict=True)]
    dropped = [torch.equal(row, nothing) for row, nothing in zip(told[1].tokens, away.tokens, strict=True)]
    assert [*map(int, kept)] == [1 - one for one in dropped]
    assert 0 < sum(dropped) < 4
    if name == "sdxl":
        assert not away.tokens.any()
