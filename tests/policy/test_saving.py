import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from overpaint.policy import DiffusionPolicy, LoRAConfig, SampleNoise

PROMPTS = ["a red circle", "a photo of a cat"]
SEEDS = [11, 12]
STEPS = 3


def images(policy: DiffusionPolicy) -> Tensor:
    return policy.draw(PROMPTS, steps=STEPS, seeds=SEEDS)


def plain_images(folder: Path, lora: Path | None = None) -> Tensor:
    """Draws with nothing but diffusers."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    latents = SampleNoise(SEEDS, height=8, width=8, device=torch.device("cpu")).draw()
    return pipeline(PROMPTS, num_inference_steps=STEPS, latents=latents, output_type="pt").images


@pytest.mark.parametrize("config", [LoRAConfig(), LoRAConfig(rank=2, alpha=6.0, targets=("attn2.to_k", "conv1"))])
def test_saved_lora_draws_the_same_in_plain_diffusers(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
    pipeline_dir: Path,
    tmp_path: Path,
    config: LoRAConfig,
) -> None:
    policy = make_policy(lora=config)
    untrained = images(policy)
    stir(policy)
    policy.save_lora(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    drawn = plain_images(pipeline_dir, tmp_path)
    torch.testing.assert_close(drawn, images(policy), rtol=0, atol=1e-4)
    assert (drawn - untrained).abs().max() > 1e-3


def test_lora_is_saved_and_loaded_exactly(
    make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None], tmp_path: Path
) -> None:
    trained, fresh = make_policy(lora=LoRAConfig()), make_policy(lora=LoRAConfig(seed=1))
    stir(trained)
    trained.save_lora(tmp_path)
    fresh.load_lora(tmp_path)
    state = trained.trainable_state()
    assert all(torch.equal(state[name], value) for name, value in fresh.trainable_state().items())
    assert torch.equal(images(fresh), images(trained))
    assert all(parameter.requires_grad for parameter in fresh.trainable_parameters())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(rank=2), "must have r=2, and .* has 4"),
        (LoRAConfig(alpha=8.0), "must have lora_alpha=8.0, and .* has 4.0"),
        (LoRAConfig(targets=("to_q",)), "must be on the same layers as the policy's"),
    ],
)
def test_lora_of_other_settings_is_refused(
    policy: DiffusionPolicy,
    make_policy: Callable[..., DiffusionPolicy],
    tmp_path: Path,
    config: LoRAConfig,
    message: str,
) -> None:
    policy.save_lora(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_policy(lora=config).load_lora(tmp_path)


def test_folder_without_a_lora_is_refused(policy: DiffusionPolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold pytorch_lora_weights.safetensors"):
        policy.load_lora(tmp_path)


@pytest.mark.parametrize("train", [None, "full"])
def test_saved_pipeline_draws_the_same_here_and_in_plain_diffusers(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
    tmp_path: Path,
    train: str | None,
) -> None:
    policy = make_policy(train=train, lora=None if train else LoRAConfig(alpha=2.0))
    stir(policy)
    policy.save_pipeline(tmp_path)
    loaded = images(make_policy(path=tmp_path))
    if train:
        assert torch.equal(loaded, images(policy))
    torch.testing.assert_close(loaded, images(policy), rtol=0, atol=1e-4)  # a LoRA added in rounds differently
    torch.testing.assert_close(plain_images(tmp_path), images(policy), rtol=0, atol=1e-4)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "PNDMScheduler"]


def test_pipeline_in_memory_is_plain_and_leaves_the_policy_alone(
    policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]
) -> None:
    stir(policy)
    before = images(policy)
    pipeline = policy.to_pipeline()
    assert not any("lora" in name for name in pipeline.unet.state_dict())
    torch.testing.assert_close(images(DiffusionPolicy(pipeline)), before, rtol=0, atol=1e-4)
    assert torch.equal(images(policy), before)
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())


def test_policy_of_a_pipeline_in_memory_is_that_of_its_folder(
    make_policy: Callable[..., DiffusionPolicy], pipeline_dir: Path
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_dir, dtype=torch.float32)
    policy = DiffusionPolicy(pipeline, lora=LoRAConfig(), device="cpu")
    assert torch.equal(images(policy), images(make_policy()))
    half = DiffusionPolicy(make_policy().to_pipeline(), dtype=torch.bfloat16)
    assert half.dtype == half.vae.dtype == half.text_encoder.dtype == torch.bfloat16
    assert images(half).dtype == torch.float32


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_half_precision_files_load_as_float32(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, variant: str | None
) -> None:
    original = make_policy(dtype=torch.float16)
    original.to_pipeline().save_pretrained(tmp_path, variant=variant)
    name = f"diffusion_pytorch_model{'.fp16' if variant else ''}.safetensors"
    assert {value.dtype for value in load_file(tmp_path / "unet" / name).values()} == {torch.float16}
    policy = make_policy(path=tmp_path, train="full")
    for network in (policy.unet, policy.vae, policy.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert torch.equal(policy.unet.conv_in.weight, original.unet.conv_in.weight.float())
