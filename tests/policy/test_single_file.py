import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import random_models
from overpaint.policy import DiffusionPolicy, check_checkpoint, single_file
from overpaint.policy.digest import weights_digest
from tests.policy.ldm_layout import in_one_file

UNET = "model.diffusion_model."


class Code:
    """What a pickle can hold besides tensors."""


@pytest.fixture
def weights(pipeline_dir: Path) -> dict[str, Tensor]:
    """The tiny pipeline's weights under the names of a single file."""
    policy = DiffusionPolicy.from_pretrained(pipeline_dir, device="cpu")
    return in_one_file(policy.unet, policy.vae, policy.text_encoder)


@pytest.fixture
def config(pipeline_dir: Path, tmp_path: Path) -> Path:
    """The tiny pipeline's folder without its weights."""
    return Path(shutil.copytree(pipeline_dir, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))


def save(file: Path, weights: Mapping[str, Tensor]) -> Path:
    if file.suffix == ".safetensors":
        save_file(dict(weights), file)
    else:
        torch.save({"state_dict": dict(weights), "global_step": 470000}, file, _use_new_zipfile_serialization=True)
    return file


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_file_draws_what_the_folder_draws(
    kind: str, ending: str, pipeline_dir: Path, v_pipeline_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = pipeline_dir if kind == "epsilon" else v_pipeline_dir
    expected = DiffusionPolicy.from_pretrained(folder, device="cpu")
    file = save(tmp_path / f"m.{ending}", in_one_file(expected.unet, expected.vae, expected.text_encoder))
    config = shutil.copytree(folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    capfd.readouterr()

    check_checkpoint(file, config)
    found = DiffusionPolicy.from_pretrained(str(file), config=str(config), device="cpu")
    assert capfd.readouterr() == ("", "")
    for part in ("unet", "vae", "text_encoder"):
        theirs, ours = (getattr(policy, part).state_dict() for policy in (expected, found))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    pictures = [policy.draw(["a red circle"], seeds=[0], steps=3) for policy in (expected, found)]
    assert torch.equal(*pictures)
    assert found.process.prediction_type == kind


def test_single_file_takes_the_policys_options_and_is_saved_as_a_folder(
    weights: dict[str, Tensor], config: Path, tmp_path: Path
) -> None:
    file = save(tmp_path / "m.safetensors", {name: value.half() for name, value in weights.items()})
    policy = DiffusionPolicy.from_pretrained(file, config=config, device="cpu", dtype=torch.bfloat16)
    assert {policy.dtype, policy.vae.dtype, policy.text_encoder.dtype} == {torch.bfloat16}
    trained = DiffusionPolicy.from_pretrained(file, config=config, device="cpu", train="full")
    assert trained.dtype == torch.float32
    trained.save_pipeline(tmp_path / "saved")
    again = DiffusionPolicy.from_pretrained(tmp_path / "saved", device="cpu")
    assert torch.equal(again.unet.conv_in.weight, weights[f"{UNET}input_blocks.0.0.weight"].half().float())


@pytest.fixture
def sdxl(tmp_path: Path) -> tuple[DiffusionPolicy, Path, Path]:
    """A small SDXL from its folder, its single file, and its folder without weights."""
    folder = GOLDEN / "flow" / "tiny-sdxl"
    policy = DiffusionPolicy.from_pretrained(folder, device="cpu")
    file = save(tmp_path / "xl.safetensors", in_one_file(policy.network, policy.vae, *policy.family.encoders))
    ignored = shutil.ignore_patterns("*.safetensors")
    return policy, file, Path(shutil.copytree(folder, tmp_path / "xl-config", ignore=ignored))


def test_single_file_of_sdxl_draws_what_the_folder_draws(sdxl: tuple[DiffusionPolicy, Path, Path]) -> None:
    expected, file, config = sdxl
    check_checkpoint(file, config)
    found = DiffusionPolicy.from_pretrained(file, config=config, device="cpu")
    assert weights_digest(found.family.named_networks) == weights_digest(expected.family.named_networks)
    pictures = [policy.draw(["a red circle"], seeds=[0], steps=2, height=64, width=64) for policy in (expected, found)]
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)  # the last bit depends on where weights lie in memory


def test_configuration_of_another_family_is_refused(sdxl: tuple[DiffusionPolicy, Path, Path], config: Path) -> None:
    _, file, _ = sdxl
    for attempt in (check_checkpoint, DiffusionPolicy.from_pretrained):
        with pytest.raises(ValueError, match=r"config must be of a StableDiffusionXLPipeline, as .*xl\.safetensors is"):
            attempt(file, config=config)


def renamed(weights: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): value for name, value in weights.items()}


def only(weights: Mapping[str, Tensor], prefix: str, cut: str = "") -> dict[str, Tensor]:
    return {name.removeprefix(cut): value for name, value in weights.items() if name.startswith(prefix)}


OTHERS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "SDXL's refiner": (
        lambda weights: renamed(weights, "cond_stage_model.transformer", "conditioner.embedders.0.model"),
        "lacks its first text encoder",
    ),
    "SDXL without its second text encoder": (
        lambda weights: renamed(weights, "cond_stage_model", "conditioner.embedders.0"),
        "lacks its second text encoder",
    ),
    "inpainting": (
        lambda weights: weights | {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)},
        r"must take 4 channels of latents and nothing else, got 9 \(of an inpainting model\)",
    ),
    "kohya's LoRA": (
        lambda weights: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)},
        "is a LoRA",
    ),
    "diffusers' LoRA": (lambda weights: {"unet.mid_block.attn1.to_q.lora_A.weight": torch.zeros(2, 2)}, "is a LoRA"),
    "VAE": (lambda weights: only(weights, "first_stage_model.", "first_stage_model."), "is a VAE alone"),
    "VAE with prefix": (lambda weights: only(weights, "first_stage_model."), "lacks a UNet"),
    "UNet": (lambda weights: only(weights, UNET), "lacks a VAE"),
    "UNet without prefix": (lambda weights: only(weights, UNET, UNET), "is a UNet alone"),
    "no text encoder": (
        lambda weights: only(weights, UNET) | only(weights, "first_stage_model."),
        "lacks a text encoder",
    ),
    "diffusers' UNet": (
        lambda weights: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)},
        "is one network of a folder in diffusers' layout",
    ),
    "ControlNet": (lambda weights: {"control_model.time_embed.0.weight": torch.zeros(2)}, "is a ControlNet"),
    "embedding": (lambda weights: {"emb_params": torch.zeros(2, 16)}, "is a textual inversion"),
    "Stable Diffusion 3": (
        lambda weights: {f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": torch.zeros(2)},
        "is a Stable Diffusion 3",
    ),
    "FLUX": (lambda weights: {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, "is a FLUX"),
}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kind", OTHERS)
def test_file_of_another_kind_is_refused_by_name_before_it_is_loaded(
    kind: str, ending: str, weights: dict[str, Tensor], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", None)
    make, message = OTHERS[kind]
    file = save(tmp_path / f"m.{ending}", make(weights))
    for attempt in (check_checkpoint, DiffusionPolicy.from_pretrained):
        with pytest.raises(ValueError, match=message):
            attempt(file, config=config)


@pytest.mark.parametrize("content", [b"stand-in", b""])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_file_that_holds_no_tensors_is_refused(content: bytes, ending: str, config: Path, tmp_path: Path) -> None:
    file = tmp_path / f"m.{ending}"
    file.write_bytes(content)
    kind = "safetensors file" if ending == "safetensors" else "file of torch.save"
    refused = {
        check_checkpoint: rf"m\.{ending} must be a {kind}, and ",
        DiffusionPolicy.from_pretrained: rf"must be a .safetensors or .ckpt file, and .*m.{ending} is neither",
    }
    for attempt, message in refused.items():
        with pytest.raises(ValueError, match=message):
            attempt(file, config=config)
        with pytest.raises(ValueError, match=message):
            attempt(file)


def test_pickle_that_could_run_code_is_refused(weights: dict[str, Tensor], config: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.ckpt"
    torch.save({"state_dict": weights, "callbacks": [Code()]}, file)
    for attempt in (check_checkpoint, DiffusionPolicy.from_pretrained):
        with pytest.raises(ValueError, match=r"must hold tensors, numbers and texts only, .* needs \S+\.Code\. If"):
            attempt(file, config=config)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match=r"must hold tensors by name, and .* holds a list"):
        check_checkpoint(file, config)


def test_old_pickles_are_read(weights: dict[str, Tensor], config: Path, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "m.ckpt", _use_new_zipfile_serialization=False)
    check_checkpoint(tmp_path / "m.ckpt", config)
    policy = DiffusionPolicy.from_pretrained(tmp_path / "m.ckpt", config=config, device="cpu")
    assert torch.equal(policy.unet.conv_in.weight, weights[f"{UNET}input_blocks.0.0.weight"])


@pytest.mark.parametrize(
    "name",
    [f"{UNET}out.2.weight", "first_stage_model.decoder.conv_in.weight",
     "cond_stage_model.transformer.text_model.final_layer_norm.weight"],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_file_that_lacks_a_weight_is_refused(
    name: str, dtype: torch.dtype | None, weights: dict[str, Tensor], config: Path, tmp_path: Path
) -> None:
    del weights[name]
    file = save(tmp_path / "m.safetensors", weights)
    with pytest.raises(ValueError, match="lacks some"):
        DiffusionPolicy.from_pretrained(file, config=config, device="cpu", dtype=dtype)


def test_file_with_names_that_diffusers_does_not_know_is_refused(
    weights: dict[str, Tensor], config: Path, tmp_path: Path
) -> None:
    older = renamed(weights, "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
    with pytest.raises(ValueError, match=r"under names that diffusers knows: .*CLIPTextModel"):
        DiffusionPolicy.from_pretrained(save(tmp_path / "m.safetensors", older), config=config, device="cpu")


def test_configuration_is_needed_where_the_hub_cannot_be_reached(
    weights: dict[str, Tensor], config: Path, tmp_path: Path
) -> None:
    file = save(tmp_path / "m.safetensors", weights)
    for attempt in (check_checkpoint, DiffusionPolicy.from_pretrained):
        with pytest.raises(
            ValueError, match=r"config must be given for .*m.safetensors: .* its sizes are not those of"
        ):
            attempt(file)
        with pytest.raises(ValueError, match=r"checkpoint must be a folder .* got .*nowhere"):
            attempt(file, config=tmp_path / "nowhere")
    keys = [name for name in weights if name.endswith("attn2.to_k.weight")]
    save(file, weights | {name: torch.zeros(8, 768) for name in keys})
    with pytest.raises(
        ValueError, match=r"config must be given .*, as stable-diffusion-v1-5/stable-diffusion-v1-5 has"
    ):
        check_checkpoint(file)
    (config / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match="must hold unet/"):
        check_checkpoint(file, config)


def test_configuration_is_for_single_files_only(pipeline_dir: Path, config: Path) -> None:
    for attempt in (check_checkpoint, DiffusionPolicy.from_pretrained):
        with pytest.raises(
            ValueError, match=r"config must be given for a single file only, got '.*config' for .*epsilon"
        ):
            attempt(pipeline_dir, config=config)


def test_configuration_of_the_hub_is_fetched_by_the_width_of_its_prompts(
    weights: dict[str, Tensor], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(config)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    layout = single_file.STABLE_DIFFUSION._replace(configurations={16: "somebody/tiny"})
    monkeypatch.setattr(single_file, "STABLE_DIFFUSION", layout)
    policy = DiffusionPolicy.from_pretrained(save(tmp_path / "m.safetensors", weights), device="cpu")
    assert asked == ["somebody/tiny"]
    assert torch.equal(policy.unet.conv_in.weight, weights[f"{UNET}input_blocks.0.0.weight"])


@pytest.mark.parametrize(
    ("width", "linear", "hub_id"),
    [(768, False, "stable-diffusion-v1-5/stable-diffusion-v1-5"), (1024, True, "stabilityai/stable-diffusion-2-1")],
)
def test_names_and_shapes_of_the_published_structure_are_known(width: int, linear: bool, hub_id: str) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=width, use_linear_projection=linear)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        )
        text_encoder = CLIPTextModel(CLIPTextConfig(hidden_size=width))
    tensors = in_one_file(unet, vae, text_encoder)
    assert infer_diffusers_model_type(tensors) == ("v2" if linear else "v1")
    assert f"{UNET}output_blocks.11.0.skip_connection.weight" in tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = single_file.layout_of(shapes, "here")
    assert single_file.configuration_of(shapes, layout) == hub_id


def test_names_and_shapes_of_the_published_sdxl_are_known() -> None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    pipeline: Any = random_models.sdxl(torch.device("meta"), tiny=False)
    tensors = in_one_file(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert infer_diffusers_model_type(tensors) == "xl_base"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layout = single_file.layout_of(shapes, "here")
    assert layout is single_file.SDXL
    assert single_file.configuration_of(shapes, layout) == "stabilityai/stable-diffusion-xl-base-1.0"
