import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from overpaint import tinyworld
from overpaint.policy import DiffusionPolicy, LoRAConfig

Images = Callable[[DiffusionPolicy], Tensor]


@pytest.mark.parametrize("train", [None, "full"])
def test_saved_pipeline_draws_the_same_here_and_in_plain_diffusers(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
    images: Images,
    plain_images: Callable[..., Tensor],
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
    policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None], images: Images
) -> None:
    stir(policy)
    before = images(policy)
    pipeline = policy.to_pipeline()
    assert not any("lora" in name for name in pipeline.unet.state_dict())
    torch.testing.assert_close(images(DiffusionPolicy(pipeline)), before, rtol=0, atol=1e-4)
    assert torch.equal(images(policy), before)
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())


def test_policy_of_a_pipeline_in_memory_is_that_of_its_folder(
    make_policy: Callable[..., DiffusionPolicy], images: Images, pipeline_dir: Path
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


# What others make of a saved folder.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_policys_folder_draws_without_being_told_its_precision(
    make_policy: Callable[..., DiffusionPolicy],
    images: Images,
    plain_images: Callable[..., Tensor],
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    make_policy(dtype=dtype).save_pipeline(tmp_path)
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert {value.dtype for value in load_file(tmp_path / f"{part}.safetensors").values()} == {dtype}
    torch.testing.assert_close(plain_images(tmp_path), images(make_policy(path=tmp_path)), rtol=0, atol=1e-4)
    assert plain_images(tmp_path, dtype=torch.bfloat16).isfinite().all()


def test_the_embedded_model_draws_after_a_plain_from_pretrained() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tinyworld.pipeline_dir())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    assert pipeline("a red star", num_inference_steps=1, output_type="pt").images.std() > 0


def test_a_precision_can_be_chosen_and_a_lora_is_rounded_once(
    make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None], images: Images, tmp_path: Path
) -> None:
    policy = make_policy(dtype=torch.bfloat16, lora=LoRAConfig())
    stir(policy)
    policy.save_pipeline(tmp_path / "exact", dtype=torch.float32)
    policy.save_pipeline(tmp_path / "half", dtype=torch.float16)
    policy.save_pipeline(tmp_path / "own")
    dtypes = {}
    for folder in ("exact", "half", "own"):
        parts = [load_file(file) for file in (tmp_path / folder).rglob("*.safetensors")]
        assert len(parts) == 3
        (dtypes[folder],) = {value.dtype for part in parts for value in part.values()}
    assert dtypes == {"exact": torch.float32, "half": torch.float16, "own": torch.bfloat16}
    assert policy.dtype == policy.vae.dtype == policy.text_encoder.dtype == torch.bfloat16
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    layer: Any = policy.unet.get_submodule(name)
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    saved = load_file(tmp_path / "exact/unet/diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    assert torch.equal(saved, expected)
    assert not torch.equal(saved, expected.bfloat16().float())


@pytest.mark.parametrize("words", [(), ("<cat-toy>", "<style>")])
def test_a_saved_tokenizer_has_the_files_of_transformers_4(
    make_policy: Callable[..., DiffusionPolicy], pipeline_dir: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    policy = make_policy()
    policy.tokenizer.add_tokens(list(words))
    policy.save_pipeline(tmp_path)
    folder = tmp_path / "tokenizer"
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    added = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")) if words else {}
    assert vocabulary | added == policy.tokenizer.get_vocab()
    assert set(added) == set(words)
    lines = [
        (path / "merges.txt").read_text(encoding="utf-8").split("\n") for path in (folder, pipeline_dir / "tokenizer")
    ]
    assert lines[0][1:] == lines[1][1:]  # the first is a comment
    assert make_policy(path=tmp_path).tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def test_a_saved_text_encoder_has_the_names_of_transformers_4(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy = make_policy()
    for folder in (tmp_path / "first", tmp_path / "second"):  # the second is of a policy that was loaded by these names
        policy.save_pipeline(folder)
        saved = load_file(folder / "text_encoder/model.safetensors")
        own = {name.removeprefix("text_model."): value for name, value in policy.text_encoder.state_dict().items()}
        assert saved.keys() == {f"text_model.{name}" for name in own}
        assert all(torch.equal(saved[f"text_model.{name}"], value) for name, value in own.items())
        policy = make_policy(path=folder)
