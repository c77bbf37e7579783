"""What every family of models does alike: saved LoRAs and pipelines draw the same in plain diffusers; refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from ddpo import NFTConfig, NFTTrainer
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig, check_checkpoint
from overpaint.policy.digest import policy_record
from overpaint.policy.families import FAMILIES, family_named
from overpaint.training import TrainingConfig

FOLDER = GOLDEN / "flow"
NAMES = ("sdxl", "sd3", "flux")
SMALL: dict[str, Any] = {"height": 64, "width": 64}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0}
"""Of Playground 2.5."""
PROMPTS, SEEDS, STEPS = ["a red circle", "a photo of a cat"], [11, 12], 2


def load(name: str, **options: Any) -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(FOLDER / f"tiny-{name}", device="cpu", **options)


def drawn(policy: DiffusionPolicy) -> Tensor:
    return policy.draw(PROMPTS, steps=STEPS, seeds=SEEDS, guidance=ClassifierFree(3.0), **SMALL)


def plainly_drawn(pipeline: Any) -> Tensor:
    """What diffusers draws with the same noise and guidance, and no word of ours."""
    pipeline.set_progress_bar_config(disable=True)
    channels = 4 if hasattr(pipeline, "unet") else 16
    noise = torch.stack([torch.randn(channels, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    if hasattr(pipeline, "unet"):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    if type(pipeline).__name__ == "FluxPipeline":
        noise = pipeline._pack_latents(noise, 2, 16, 8, 8)
    return pipeline(
        PROMPTS, num_inference_steps=STEPS, guidance_scale=3.0, latents=noise, output_type="pt", **SMALL
    ).images


def pipeline_of(path: Path, **parts: None) -> Any:
    index = json.loads((path / "model_index.json").read_text())
    return getattr(diffusers, index["_class_name"]).from_pretrained(path, **parts)


@pytest.mark.parametrize("name", NAMES)
def test_loras_load_in_plain_diffusers_with_the_same_pictures(
    name: str, tmp_path: Path, stir: Callable[[DiffusionPolicy], None]
) -> None:
    policy = load(name, lora=LoRAConfig(rank=2, alpha=4.0))
    before = drawn(policy)
    stir(policy)
    policy.save_lora(tmp_path)
    pipeline = pipeline_of(FOLDER / f"tiny-{name}")
    pipeline.load_lora_weights(tmp_path)
    assert (drawn(policy) - before).abs().max() > 1e-2
    torch.testing.assert_close(plainly_drawn(pipeline), drawn(policy), atol=1e-4, rtol=0)

    again = load(name)
    again.load_lora(tmp_path)
    assert again.trainable_state().keys() == policy.trainable_state().keys()
    assert torch.equal(drawn(again), drawn(policy))
    with policy.reference():
        assert torch.equal(drawn(policy), before)


@pytest.mark.parametrize("name", NAMES)
def test_saved_pipelines_draw_the_same_plainly_and_as_a_policy(
    name: str, tmp_path: Path, stir: Callable[[DiffusionPolicy], None]
) -> None:
    policy = load(name, lora=LoRAConfig(rank=2))
    stir(policy)
    policy.save_pipeline(tmp_path)
    check_checkpoint(tmp_path)
    expected = drawn(policy)
    for found in (
        plainly_drawn(pipeline_of(tmp_path)),
        plainly_drawn(policy.to_pipeline()),
        drawn(DiffusionPolicy.from_pretrained(tmp_path, device="cpu")),
        drawn(policy.student_copy("full")),
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_pretraining_reach_the_adapter(name: str) -> None:
    policy = load(name, lora=LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(0)
    clean = policy.encode_images(torch.rand(2, 3, 64, 64, generator=generator))
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.tensor([10, 900])
    loss = policy.denoising_loss(clean, policy.encode(PROMPTS), timesteps, noise)
    assert loss.shape == (2,)
    loss.sum().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters()]
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_stable_diffusion_3_draws_without_its_t5(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "tiny-sd3", tmp_path / "model")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / "model" / part)
    index = tmp_path / "model" / "model_index.json"
    record = json.loads(index.read_text())
    index.write_text(json.dumps(record | {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    policy = DiffusionPolicy.from_pretrained(tmp_path / "model", device="cpu")
    tokens = policy.encode(PROMPTS).tokens
    assert tokens.shape[1] == 77 + 256
    assert not tokens[:, 77:].any()
    plain = pipeline_of(tmp_path / "model", text_encoder_3=None, tokenizer_3=None)
    torch.testing.assert_close(plainly_drawn(plain), drawn(policy), atol=1e-4, rtol=0)
    policy.save_pipeline(tmp_path / "saved")
    assert torch.equal(drawn(DiffusionPolicy.from_pretrained(tmp_path / "saved", device="cpu")), drawn(policy))


def test_vae_stays_float32_where_float16_overflows() -> None:
    for name in NAMES:
        policy = load(name, dtype=torch.float16)
        assert policy.dtype == torch.float16
        assert policy.vae.dtype == torch.float32
        assert drawn(policy).isfinite().all()


def test_families_are_found_by_the_names_of_their_pipelines() -> None:
    assert [family_named(family.pipelines[0]) for family in FAMILIES] == list(FAMILIES)
    assert family_named("FluxFillPipeline") is None
    assert family_named(None) is None


@pytest.mark.parametrize(
    ("name", "part", "change", "message"),
    [
        ("sdxl", "unet", {"addition_embed_type": "text"}, "must read pooled text and sizes"),
        ("sdxl", "unet", {"time_cond_proj_dim": 8}, "reads the scale of guidance"),
        ("sdxl", "scheduler", EDM, "must have cumulative alphas, .*, got EDMEuler"),
        ("sd3", "transformer", {"in_channels": 33}, "must take 16 channels of latents and nothing else, got 33"),
        (
            "flux",
            "transformer",
            {"in_channels": 128},
            "must take 64 channels of packed latents .*, got 128",
        ),
        ("flux", "scheduler", {"use_karras_sigmas": True}, "scheduler's use_karras_sigmas must be False, got True"),
        ("sd3", "scheduler", {"_class_name": "DDIMScheduler"}, "must be of rectified flow, .*, got DDIMScheduler"),
    ],
)
def test_relatives_are_refused_before_weights_are_read(
    name: str, part: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(FOLDER / f"tiny-{name}", tmp_path / "model")
    path = tmp_path / "model" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        check_checkpoint(tmp_path / "model")


def test_options_of_another_family_are_refused(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="max_sequence_length must be left out for a StableDiffusionXLPipeline"):
        load("sdxl", max_sequence_length=20)
    with pytest.raises(ValueError, match="max_sequence_length must be from 1 to 512, got 513"):
        load("flux", max_sequence_length=513)
    with pytest.raises(ValueError, match=r"chain must be left out for a diffusion model, .* got 'cps'"):
        load("sdxl", chain="cps")
    with pytest.raises(ValueError, match="the model must have a UNet, and a FluxPipeline has a transformer"):
        _ = load("flux").unet
    with pytest.raises(ValueError, match="height must be a positive multiple of 16, got 72"):
        load("sd3").draw(["a cat"], seeds=[0], height=72)


def test_loras_of_other_models_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LoRA must hold pairs of matrices and nothing else, and .* has down_blocks"):
        load("sd3").load_lora(FOLDER / "lora-sdxl")
    with pytest.raises(ValueError, match=r"LoRA must be on layers of the UNet, .* this UNet lacks"):
        load("sdxl").load_lora(FOLDER / "lora-flux")
    with pytest.raises(ValueError, match="must be saved in format 'diffusers', got 'kohya'"):
        load("flux", lora=LoRAConfig()).save_lora(tmp_path, format="kohya")


def test_free_vectors_need_one_text_encoder() -> None:
    policy = load("sdxl")
    refused = pytest.raises(ValueError, match="free vectors must be read by a model with one text encoder")
    with refused, policy.prompts.coined({"<word>": torch.zeros(1, 40)}):
        pass


def test_tiles_of_a_large_image_are_joined() -> None:
    plain, tiled = load("flux"), load("flux", tiling=True)
    for policy in (plain, tiled):
        policy.vae.tile_sample_min_size, policy.vae.tile_latent_min_size = 64, 8
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, joined = plain.decode(latents), tiled.decode(latents)
    assert joined.shape == whole.shape == (1, 3, 128, 128)
    assert not torch.equal(joined, whole)
    assert (joined - whole).abs().mean() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_released_text_encoders_take_no_memory_and_known_prompts_draw_the_same(name: str, tmp_path: Path) -> None:
    policy = load(name, lora=LoRAConfig(rank=2))
    before = drawn(policy)
    policy.prompts.clear()
    policy.release_encoders(PROMPTS)
    assert all(parameter.is_meta for encoder in policy.family.encoders for parameter in encoder.parameters())
    assert torch.equal(drawn(policy.to("cpu")), before)
    with pytest.raises(ValueError, match="among those that were encoded before the text encoder was released"):
        policy.encode(["a dog"])
    with pytest.raises(ValueError, match="text encoders must be there to copy or save the model, and were released"):
        policy.save_pipeline(tmp_path)
    policy.save_lora(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_known_and_trained_as_before_when_its_text_encoders_are_released(name: str, tmp_path: Path) -> None:
    policy = load(name, lora=LoRAConfig(rank=2))
    records = [policy_record(policy), policy_record(policy, untrained=True)]
    policy.release_encoders(PROMPTS)
    policy.release_encoders(PROMPTS)
    assert [policy_record(policy), policy_record(policy, untrained=True)] == records
    before = policy.trainable_state()
    config = NFTConfig(
        samples_per_round=2, images_per_prompt=2, sampling_batch_size=2, minibatch_size=2, steps=2, **SMALL
    )
    trainer = NFTTrainer(policy, lambda images, prompts: images.mean(dim=(1, 2, 3)), PROMPTS, config)
    trainer.train(TrainingConfig(output_dir=tmp_path, iterations=1, learning_rate=1e-3, progress=False))
    assert any(not torch.equal(value, before[key]) for key, value in policy.trainable_state().items())
