"""Files as the official releases write them, made of the tiny model and read back."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from safetensors.torch import save_file
from torch import Tensor

from erasure import NUDITY, UCE, AddedNetworks, Concept, Erasure, WeightChange, load_erasure
from erasure.methods.attention_maps import cross_attentions
from erasure.unet_names import unet_names
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.weights import base_parameters

Write = Callable[[Mapping[str, Tensor], Path], Path]
KEYS = ("attn2.to_k.weight", "attn2.to_v.weight")
STYLE = Concept(name="van gogh", phrases=("van gogh",))


@pytest.fixture
def base(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


def weights_of(policy: DiffusionPolicy, *endings: str) -> dict[str, Tensor]:
    """A copy of the UNet's parameters, or of those whose names end so."""
    parameters = base_parameters(policy.unet).items()
    return {name: value.detach().clone() for name, value in parameters if name.endswith(endings or ("",))}


def trained(weights: Mapping[str, Tensor], scale: float = 1e-2) -> dict[str, Tensor]:
    """Weights a little away from others, every number of them."""
    generator = torch.Generator().manual_seed(0)
    return {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


def ldm_name(name: str, layers: int = 1) -> str:
    """The name of a UNet's parameter in the original Stable Diffusion, whose blocks are counted through."""
    for ours, theirs in (
        ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
        ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
    ):  # fmt: skip
        if name.startswith(ours):
            return name.replace(ours, theirs)
    side, rest = name.split(".", 1)
    if side == "mid_block":
        kind, index, rest = rest.split(".", 2)
        place = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    else:
        block, kind, index, rest = rest.split(".", 3)
        first = int(block) * (layers + 1) + (side == "down_blocks")
        counted = "input_blocks" if side == "down_blocks" else "output_blocks"
        if kind == "downsamplers":
            return f"{counted}.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":  # behind the attention, where the block has one; a Stable Diffusion's first has none
            return f"{counted}.{first + layers}.{1 if block == '0' else 2}.{rest}"
        place = f"{counted}.{first + int(index)}.{int(kind == 'attentions')}"
    if kind == "resnets":
        for ours, theirs in (
            ("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
            ("norm2", "out_layers.0"), ("conv2", "out_layers.3"), ("conv_shortcut", "skip_connection"),
        ):  # fmt: skip
            rest = rest.replace(ours, theirs)
    return f"{place}.{rest}"


def ldm_vae_name(name: str, blocks: int = 4) -> str:
    """The name of a VAE's parameter in the original Stable Diffusion."""
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    for ours, theirs in (
        ("mid_block.attentions.0", "mid.attn_1"), ("group_norm", "norm"), ("to_out.0", "proj_out"), ("to_q", "q"),
        ("to_k", "k"), ("to_v", "v"), ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def ldm_checkpoint(policy: DiffusionPolicy, unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A whole checkpoint of the original Stable Diffusion, averaged weights and the schedule's tables included."""
    vae = {}
    for name, value in policy.vae.state_dict().items():
        convolution = "attentions" in name and name.endswith("weight") and value.ndim == 2
        vae[f"first_stage_model.{ldm_vae_name(name)}"] = value[:, :, None, None] if convolution else value
    text = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": value
        for name, value in policy.text_encoder.state_dict().items()
    }
    return {
        **{f"model.diffusion_model.{ldm_name(name)}": value for name, value in unet.items()},
        **vae,
        **text,
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "betas": torch.linspace(0, 1, 1000),
    }


def safetensors(weights: Mapping[str, Tensor], folder: Path) -> Path:
    save_file(dict(weights), folder / "esd-nudity-from-nudity-esdx.safetensors")
    return folder / "esd-nudity-from-nudity-esdx.safetensors"


def prefixed_safetensors(weights: Mapping[str, Tensor], folder: Path) -> Path:
    save_file({f"unet.{name}": value for name, value in weights.items()}, folder / "uce_nudity.safetensors")
    return folder / "uce_nudity.safetensors"


def parameters_pt(weights: Mapping[str, Tensor], folder: Path) -> Path:
    """As a state dict of parameters, which unpickle as such."""
    state = {name: torch.nn.Parameter(value) for name, value in weights.items()}
    torch.save(state, folder / "diffusers-nudity-ESDx1-UNET.pt")
    return folder / "diffusers-nudity-ESDx1-UNET.pt"


def modules_pt(weights: Mapping[str, Tensor], folder: Path) -> Path:
    """As ESD's first code for diffusers: a state dict for each trained module."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(f"unet.{module}", {})[parameter] = value
    torch.save(modules, folder / "esd-nudity_from_nudity-xattn_1-epochs_200.pt")
    return folder / "esd-nudity_from_nudity-xattn_1-epochs_200.pt"


def old_pickle(weights: Mapping[str, Tensor], folder: Path) -> Path:
    """As torch.save wrote before 1.6, which cannot be mapped into memory."""
    torch.save(dict(weights), folder / "esd.pt", _use_new_zipfile_serialization=False)
    return folder / "esd.pt"


def delta_bin(weights: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save({"unet": dict(weights), "modifier_token": {}}, folder / "delta.bin")
    return folder / "delta.bin"


def delta_ckpt(weights: Mapping[str, Tensor], folder: Path) -> Path:
    named = {f"model.diffusion_model.{ldm_name(name)}": value for name, value in weights.items()}
    torch.save({"state_dict": named}, folder / "delta_epoch=000003.ckpt")
    return folder / "delta_epoch=000003.ckpt"


def bare_ldm(weights: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save({ldm_name(name): value for name, value in weights.items()}, folder / "compvis-nudity-ESDx1-UNET.pt")
    return folder / "compvis-nudity-ESDx1-UNET.pt"


@pytest.mark.parametrize(
    ("write", "method"),
    [
        (safetensors, "ESD (official file)"),
        (prefixed_safetensors, "UCE (official file)"),
        (parameters_pt, "ESD (official file)"),
        (modules_pt, "ESD (official file)"),
        (old_pickle, "file esd.pt"),
        (delta_bin, "AC (official file)"),
        (delta_ckpt, "file delta_epoch=000003.ckpt"),
        (bare_ldm, "ESD (official file)"),
    ],
)
@pytest.mark.parametrize("endings", [KEYS, ("",)], ids=["attention", "whole"])
def test_weights_as_a_release_writes_them_are_the_difference_to_the_base(
    base: DiffusionPolicy, tmp_path: Path, write: Write, method: str, endings: tuple[str, ...]
) -> None:
    before = weights_of(base, *endings)
    after = trained(before)
    path = write(after, tmp_path)
    erasure = Erasure.from_official(path, base=base, concept=NUDITY)
    assert erasure.delta.tensors.keys() == before.keys()
    for name, difference in erasure.delta.tensors.items():
        assert difference.dtype == torch.float32
        torch.testing.assert_close(difference, after[name] - before[name], rtol=0, atol=1e-6)
    assert erasure.method == method
    assert erasure.concept == NUDITY
    assert erasure.config["source"] == path.name
    assert re.fullmatch("[0-9a-f]{64}", erasure.config["sha256"][path.name])
    assert all(torch.equal(value, before[name]) for name, value in weights_of(base, *endings).items())
    erasure.apply(base)
    for name, value in weights_of(base, *endings).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-6)


def test_parts_of_attention_in_the_names_of_the_original_are_found_wherever_they_are(
    base: DiffusionPolicy, tmp_path: Path
) -> None:
    before = weights_of(base, "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.weight")
    assert len(before) == 1  # the last block alone, which a converter that counts the file's blocks does not reach
    erasure = Erasure.from_official(delta_ckpt(trained(before), tmp_path), base=base, concept=NUDITY)
    assert erasure.delta.tensors.keys() == before.keys()


def test_every_name_of_stable_diffusion_one_in_the_original_is_known() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)  # its other settings are diffusers' defaults
    names = {ldm_name(name, layers=2): name for name in base_parameters(unet)}
    assert len(names) == 686
    assert {
        "input_blocks.3.0.op.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.8.2.conv.bias",
    } <= names.keys()
    assert unet_names(names, unet, Path("sd-v1-4.ckpt")) == names


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_whole_checkpoint_of_the_original_is_read(
    base: DiffusionPolicy, tmp_path: Path, wrapped: bool, suffix: str
) -> None:
    before = weights_of(base)
    after = before | trained(weights_of(base, *KEYS))
    state = ldm_checkpoint(base, after)
    path = tmp_path / f"sa{suffix}"
    if suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3, "lr_schedulers": [{"rate": 0.1}]} if wrapped else state, path)
    erasure = Erasure.from_official(path, base=base, concept=NUDITY, method="SA")
    assert erasure.method == "SA"
    assert erasure.config["layout"] == "original Stable Diffusion's checkpoint"
    assert erasure.delta.tensors.keys() == weights_of(base, *KEYS).keys()
    for name, difference in erasure.delta.tensors.items():
        torch.testing.assert_close(difference, after[name] - before[name], rtol=0, atol=1e-6)


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder as Stable Diffusion 2 has it in its original files: OpenCLIP's names, queries to values in one."""
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {}
    for name, value in plain.items():
        if ".k_proj" in name or ".v_proj" in name:
            continue
        if ".q_proj" in name:
            value = torch.cat([plain[name.replace("q_proj", f"{which}_proj")] for which in "qkv"])
        for ours, theirs in (
            ("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn", "attn"), ("final_layer_norm", "ln_final"),
            ("embeddings.position_embedding.weight", "positional_embedding"), ("embeddings.token", "token"),
            ("q_proj.", "in_proj_"),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        found[f"cond_stage_model.model.{name}"] = value
    return found


def test_whole_checkpoint_of_stable_diffusion_two_is_read(
    make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path, tmp_path: Path
) -> None:
    base = make_policy(path=v_pipeline_dir)
    whole = ldm_checkpoint(base, weights_of(base) | trained(weights_of(base, *KEYS)))
    whole = {name: value for name, value in whole.items() if not name.startswith("cond_stage_model.")}
    text = open_clip(base.text_encoder.state_dict())
    torch.save({"state_dict": whole | text}, tmp_path / "v2.ckpt")
    erasure = Erasure.from_official(tmp_path / "v2.ckpt", base=base, concept=NUDITY)
    assert erasure.delta.tensors.keys() == weights_of(base, *KEYS).keys()
    for name in text:  # every one is compared
        torch.save({"state_dict": whole | text | {name: text[name] + 1}}, tmp_path / "v2.ckpt")
        with pytest.raises(ValueError, match=r"the base's text encoder.* differs in [13] of 36 weights"):
            Erasure.from_official(tmp_path / "v2.ckpt", base=base, concept=NUDITY)


def test_whole_checkpoint_with_another_text_encoder_vae_or_with_weights_missing_is_refused(
    base: DiffusionPolicy, tmp_path: Path
) -> None:
    state = ldm_checkpoint(base, trained(weights_of(base)))
    path = tmp_path / "sa.ckpt"
    for part, ending in (
        ("text encoder", "text_model.final_layer_norm.weight"),
        ("VAE", "first_stage_model.decoder.mid.attn_1.q.weight"),
    ):  # fmt: skip
        name = next(name for name in state if name.endswith(ending))
        torch.save({"state_dict": state | {name: state[name] + 1}}, path)
        with pytest.raises(
            ValueError, match=rf"the base's {part}, as an erasure changes the UNet alone, .* 1 of \d+ w"
        ):
            Erasure.from_official(path, base=base, concept=NUDITY)
    torch.save({"state_dict": {name: value for name, value in state.items() if "input_blocks.0.0" not in name}}, path)
    with pytest.raises(ValueError, match=r"must hold every weight of the base's UNet, and lacks 'conv_in\.bias'"):
        Erasure.from_official(path, base=base, concept=NUDITY)


# Folders.


@pytest.mark.parametrize("half", [False, True])
def test_folder_of_a_pipeline_or_of_its_unet_is_read(
    base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, half: bool
) -> None:
    erased = make_policy()
    wanted = UCE().erase(erased, NUDITY)
    wanted.apply(erased)
    pipeline = erased.to_pipeline()
    if half:  # every weight is rounded, and those that were not erased count as unchanged all the same
        pipeline.to(torch.float16)
        pipeline.save_pretrained(tmp_path / "MACE-nudity", variant="fp16")
    else:
        pipeline.save_pretrained(tmp_path / "MACE-nudity", safe_serialization=False)
    for folder, method in (
        (tmp_path / "MACE-nudity", "folder MACE-nudity"),
        (tmp_path / "MACE-nudity/unet", "folder unet"),
    ):
        erasure = Erasure.from_official(folder, base=base, concept=NUDITY)
        assert erasure.method == method
        assert erasure.delta.tensors.keys() == wanted.delta.tensors.keys()
        for name, difference in erasure.delta.tensors.items():
            torch.testing.assert_close(difference, wanted.delta.tensors[name], rtol=0, atol=2e-3 if half else 1e-6)


def test_sharded_unet_is_read(
    base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    erased = make_policy()
    wanted = UCE().erase(erased, NUDITY)
    wanted.apply(erased)
    erased.unet.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    erasure = Erasure.from_official(tmp_path, base=base, concept=NUDITY)
    assert erasure.delta.tensors.keys() == wanted.delta.tensors.keys()
    assert len(erasure.config["sha256"]) > 1


def test_pipeline_of_another_prediction_is_refused(base: DiffusionPolicy, tmp_path: Path) -> None:
    base.to_pipeline().save_pretrained(tmp_path)
    settings = tmp_path / "scheduler/scheduler_config.json"
    changed = json.loads(settings.read_text()) | {"prediction_type": "v_prediction"}
    settings.write_text(json.dumps(changed))
    save_file(trained(weights_of(base)), tmp_path / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="prediction_type='epsilon', got 'v_prediction'"):
        Erasure.from_official(tmp_path, base=base, concept=NUDITY)


# Several text encoders.


@pytest.fixture(scope="module")
def two_encoders() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "flow" / "tiny-sdxl", device="cpu")


def whole_folder(weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> Path:
    for part, tensors in weights.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / part / f"{stem}.safetensors")
    return folder


def whole_file(weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> Path:
    state = {f"{part}.{name}": value for part, tensors in weights.items() for name, value in tensors.items()}
    torch.save(state, folder / "whole.pt")
    return folder / "whole.pt"


def whole_delta(weights: Mapping[str, Mapping[str, Tensor]], folder: Path) -> Path:
    torch.save({part: dict(tensors) for part, tensors in weights.items()}, folder / "delta.bin")
    return folder / "delta.bin"


@pytest.mark.parametrize("write", [whole_folder, whole_file, whole_delta])
def test_every_text_encoder_is_compared(
    two_encoders: DiffusionPolicy, tmp_path: Path, write: Callable[..., Path]
) -> None:
    base = two_encoders
    whole = {name: dict(network.state_dict()) for name, network in base.family.named_networks.items()}
    erased = trained(weights_of(base, *KEYS))
    whole["unet"] |= erased
    path = write(whole, tmp_path)
    assert Erasure.from_official(path, base=base, concept=NUDITY).delta.tensors.keys() == erased.keys()
    for part, title in (("text_encoder", "text encoder"), ("text_encoder_2", "second text encoder")):
        name = next(name for name in whole[part] if name.endswith("final_layer_norm.weight"))
        write(whole | {part: whole[part] | {name: whole[part][name] + 1}}, tmp_path)
        for one in (base, base.to_pipeline()):
            with pytest.raises(
                ValueError, match=rf"the base's {title}, .* differs in 1 of \d+ weights, .*final_layer_"
            ):
                Erasure.from_official(path, base=one, concept=NUDITY)


def test_model_in_memory_with_another_second_text_encoder_is_refused(two_encoders: DiffusionPolicy) -> None:
    erased = DiffusionPolicy.from_pretrained(GOLDEN / "flow" / "tiny-sdxl", device="cpu")
    UCE().erase(erased, NUDITY).apply(erased)
    assert Erasure.between(two_encoders, erased, NUDITY).delta.tensors
    with torch.no_grad():
        erased.family.named_networks["text_encoder_2"].get_parameter("text_projection.weight")[0] += 1
    with pytest.raises(ValueError, match=r"base's second text encoder, .* differs in 1 of"):
        Erasure.between(two_encoders, erased, NUDITY)
    erased.release_encoders(["a cat"])
    with pytest.raises(ValueError, match="text encoders must be there to be compared with another model's, and were"):
        Erasure.between(two_encoders, erased, NUDITY)


def test_text_encoder_that_the_base_lacks_is_refused(base: DiffusionPolicy, tmp_path: Path) -> None:
    networks = {"unet": weights_of(base), "text_encoder": base.text_encoder.state_dict()}
    networks["unet"] |= trained(weights_of(base, *KEYS))
    whole_folder(networks | {"text_encoder_2": networks["text_encoder"]}, tmp_path)
    with pytest.raises(ValueError, match="has a second text encoder, which the base lacks"):
        Erasure.from_official(tmp_path, base=base, concept=NUDITY)


# Other folders.


def test_folder_with_one_file_of_weights_is_that_file(base: DiffusionPolicy, tmp_path: Path) -> None:
    delta_bin(trained(weights_of(base, *KEYS)), tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert Erasure.from_official(tmp_path, base=base, concept=NUDITY).method == "AC (official file)"
    safetensors(trained(weights_of(base, *KEYS)), tmp_path)
    with pytest.raises(ValueError, match=r"or one file of weights, and .* holds 2 of them"):
        Erasure.from_official(tmp_path, base=base, concept=NUDITY)


# LoRAs.


def kohya(layers: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    state = {}
    for name, (down, up) in layers.items():
        module = "lora_unet_" + name.replace(".", "_")
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return state


def processors(layers: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    """As diffusers wrote LoRAs until 2023, without an alpha."""
    state = {}
    for name, (down, up) in layers.items():
        layer, _, projection = name.replace("to_out.0", "to_out").rpartition(".")
        place = f"unet.{layer}.processor.{projection}_lora"
        state |= {f"{place}.down.weight": down, f"{place}.up.weight": up}
    return state


def dotted(layers: Mapping[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    state = {}
    for name, (down, up) in layers.items():
        state |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    return state


@pytest.mark.parametrize(("name_them", "scale"), [(kohya, 1.5), (processors, 1.0), (dotted, 1.0)])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_lora_is_fused(
    base: DiffusionPolicy, tmp_path: Path, name_them: Callable[..., dict[str, Tensor]], scale: float, suffix: str
) -> None:
    layers = {}
    for name, value in weights_of(base, *KEYS, "attn1.to_out.0.weight").items():
        layers[name.removesuffix(".weight")] = (torch.randn(2, value.shape[1]), torch.randn(value.shape[0], 2))
    state, path = name_them(layers, 3.0), tmp_path / f"pytorch_lora_weights{suffix}"
    if suffix == ".bin":
        torch.save(state, path)
    else:
        save_file(state, path)
    for source in (path, tmp_path):
        erasure = Erasure.from_official(source, base=base, concept=NUDITY)
        assert erasure.config["layout"] == "LoRA"
        assert erasure.delta.tensors.keys() == {f"{name}.weight" for name in layers}
        for name, (down, up) in layers.items():
            torch.testing.assert_close(erasure.delta.tensors[f"{name}.weight"], scale * up @ down, rtol=0, atol=1e-6)


def test_saved_lora_with_its_settings_and_convolutions_is_what_it_does_to_the_model(
    base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy = make_policy(lora=LoRAConfig(rank=2, alpha=5.0, targets=("to_k", "conv1", "proj_in")))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_()
    policy.save_lora(tmp_path)
    erasure = Erasure.from_official(tmp_path, base=base, concept=NUDITY)
    policy.merge_lora()
    erasure.apply(base)
    merged = weights_of(policy)
    assert {len(value.shape) for value in erasure.delta.tensors.values()} == {2, 4}
    for name, value in weights_of(base).items():
        torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-5)


def test_folder_of_peft_is_read_with_its_settings(base: DiffusionPolicy, tmp_path: Path) -> None:
    name = next(iter(weights_of(base, "attn2.to_k.weight"))).removesuffix(".weight")
    down, up = torch.randn(4, 16), torch.randn(8, 4)
    halves = {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
    save_file(halves, tmp_path / "adapter_model.safetensors")
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"to_k": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    erasure = Erasure.from_official(tmp_path, base=base, concept=NUDITY)
    torch.testing.assert_close(erasure.delta.tensors[f"{name}.weight"], 3.0 * up @ down, rtol=0, atol=1e-5)


def test_lora_that_is_no_plain_one_or_does_not_fit_is_refused(base: DiffusionPolicy, tmp_path: Path) -> None:
    name = next(iter(weights_of(base, "attn2.to_k.weight"))).removesuffix(".weight")
    fitting = {f"unet.{name}.lora_A.weight": torch.ones(2, 16), f"unet.{name}.lora_B.weight": torch.ones(8, 2)}
    half = {f"unet.{name}.lora_A.weight": torch.ones(2, 16)}
    text = {"text_encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 16)}
    cases = {
        "got a DoRA": fitting | {f"unet.{name}.lora_magnitude_vector": torch.ones(8)},
        "got a LoHa": {"lora_unet_mid_block_attentions_0.hada_w1_a": torch.ones(2, 2)},
        rf"lacks {name}\.lora_B\.weight": half,
        r"\(8, 16\), got \(8, 2\) times \(2, 15\)": fitting | {f"unet.{name}.lora_A.weight": torch.ones(2, 15)},
        "the text encoder": fitting | text,
        "has nowhere, which this UNet lacks": {f"unet.nowhere.lora_{half}.weight": torch.ones(2, 2) for half in "AB"},
        "NaN or infinity": fitting | {f"unet.{name}.lora_A.weight": torch.full((2, 16), torch.nan)},
        "changes nothing": fitting | {f"unet.{name}.lora_B.weight": torch.zeros(8, 2)},
    }
    path = tmp_path / "lora.safetensors"
    for message, state in cases.items():
        save_file(state, path)
        with pytest.raises(ValueError, match=message):
            Erasure.from_official(path, base=base, concept=NUDITY)


# Erasers.


def eraser_tensors(policy: DiffusionPolicy, rank: int = 4) -> dict[str, Tensor]:
    state = {}
    for name, layer in cross_attentions(policy.unet).items():
        attention: Any = layer
        width = attention.to_out[0].out_features
        state |= {f"{name}.down.weight": torch.randn(rank, width), f"{name}.down.bias": torch.randn(rank)}
        state |= {f"{name}.up.weight": torch.randn(width, rank), f"{name}.up.bias": torch.randn(width)}
    return state


@pytest.mark.parametrize("naming", ["flat", "wrapped", "nested", "original"])
def test_erasers_are_added_networks(base: DiffusionPolicy, tmp_path: Path, naming: str) -> None:
    wanted = eraser_tensors(base)
    state: dict[str, Any] = {}
    for name, value in wanted.items():
        layer, half = name.rsplit(".attn2.")
        if naming == "flat":
            state[name] = value
        elif naming == "wrapped":
            state[f"unet.{layer}.attn2.adapter.{half}"] = value
        elif naming == "nested":
            state.setdefault(f"{layer}.attn2", {})[half] = value
        else:
            state[f"model.diffusion_model.{ldm_name(name)}"] = value
    torch.save(state, tmp_path / "eraser_weights.pt")
    (tmp_path / "eraser_config.json").write_text("{}")
    erasure = Erasure.from_official(tmp_path, base=base, concept=NUDITY)
    assert erasure.method == "Receler (official file)"
    assert isinstance(erasure.change, AddedNetworks)
    assert erasure.change.tensors.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in erasure.change.tensors.items())
    erasure.apply(base)
    erasure.save(tmp_path / "saved")
    assert isinstance(Erasure.load(tmp_path / "saved").change, AddedNetworks)


def test_erasers_that_do_not_fit_are_refused(base: DiffusionPolicy, tmp_path: Path) -> None:
    wanted = eraser_tensors(base)
    bias = next(name for name in wanted if name.endswith("up.bias"))
    cases = {
        r"an eraser's up\.bias of shape .* got nothing": {n: v for n, v in wanted.items() if n != bias},
        r"of shape .* got \(3,\)": wanted | {bias: torch.ones(3)},
        "is none of them": {f"down_blocks.9.attn2.{half}.weight": torch.ones(2, 2) for half in ("down", "up")},
        r"erasers only .* and has 'scale'": wanted | {"scale": torch.ones(1)},
        "NaN or infinity": wanted | {bias: wanted[bias] * torch.nan},
        "changes nothing": {n: torch.zeros_like(v) if ".up." in n else v for n, v in wanted.items()},
    }
    for message, state in cases.items():
        torch.save(state, tmp_path / "eraser_weights.pt")
        with pytest.raises(ValueError, match=message):
            Erasure.from_official(tmp_path, base=base, concept=NUDITY)


# What is left out, and what is refused.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widened", [False, True])
def test_weights_that_were_only_rounded_count_as_unchanged(
    base: DiffusionPolicy, tmp_path: Path, dtype: torch.dtype, widened: bool
) -> None:
    before = weights_of(base)
    changed = next(iter(weights_of(base, *KEYS)))
    after = {name: value.to(dtype) for name, value in before.items()}
    assert any(not torch.equal(value.float(), before[name]) for name, value in after.items())
    after[changed] = (before[changed] + 0.1).to(dtype)
    if widened:
        after = {name: value.float() for name, value in after.items()}
    erasure = Erasure.from_official(safetensors(after, tmp_path), base=base, concept=NUDITY)
    assert erasure.delta.tensors.keys() == {changed}
    expected = after[changed].float() - before[changed]  # the erased weights are the file's, to the bit
    assert torch.equal(erasure.delta.tensors[changed], expected)


def test_base_in_half_precision_does_not_differ_by_its_own_rounding(
    base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    changed = next(iter(weights_of(base, *KEYS)))
    after = weights_of(base)
    after[changed] += 0.1
    erasure = Erasure.from_official(
        safetensors(after, tmp_path), base=make_policy(dtype=torch.bfloat16), concept=NUDITY
    )
    assert erasure.delta.tensors.keys() == {changed}


def test_two_half_precisions_of_one_model_do_not_differ(
    base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    changed = next(iter(weights_of(base, *KEYS)))
    erased = make_policy()
    with torch.no_grad():
        base_parameters(erased.unet)[changed].add_(0.1)
    erased.to_pipeline().to(torch.float16).save_pretrained(tmp_path)
    erasure = Erasure.from_official(tmp_path, base=make_policy(dtype=torch.bfloat16), concept=NUDITY)
    assert erasure.delta.tensors.keys() == {changed}


def test_small_changes_in_full_precision_are_no_rounding(base: DiffusionPolicy, tmp_path: Path) -> None:
    with torch.no_grad():  # a base that was stored in half precision
        for parameter in base_parameters(base.unet).values():
            parameter.copy_(parameter.half())
    before = weights_of(base, *KEYS)
    erasure = Erasure.from_official(safetensors(trained(before, 1e-6), tmp_path), base=base, concept=NUDITY)
    assert erasure.delta.tensors.keys() == before.keys()


def test_projections_that_are_convolutions_of_one_pixel_fit_linear_ones(
    make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path, tmp_path: Path
) -> None:
    for folder, convolutions in ((v_pipeline_dir, False), (None, True)):
        policy = make_policy(**({"path": folder} if folder else {}))
        before = weights_of(policy, "proj_in.weight", "attn1.to_q.weight")
        assert {value.ndim for value in before.values()} == ({2, 4} if convolutions else {2})
        after = trained(before)
        other = {name: value.squeeze() if value.ndim == 4 else value[..., None, None] for name, value in after.items()}
        erasure = Erasure.from_official(safetensors(other, tmp_path), base=policy, concept=NUDITY)
        for name, difference in erasure.delta.tensors.items():
            torch.testing.assert_close(difference, after[name] - before[name], rtol=0, atol=1e-6)


def test_foreign_names_and_shapes_are_named(base: DiffusionPolicy, tmp_path: Path) -> None:
    name, value = next(iter(weights_of(base, *KEYS).items()))
    cases = {
        "an SDXL": "down_blocks.1.attentions.0.transformer_blocks.9.attn2.to_k.weight",
        "a FLUX": "transformer_blocks.0.attn.add_k_proj.weight",
        "a Stable Diffusion 3": "joint_blocks.3.context_block.attn.qkv.weight",
        "a Stable Diffusion": "down_blocks.3.resnets.0.conv1.weight",
        "a CLIP text encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "a VAE": "decoder.conv_in.weight",
        "a ControlNet": "control_model.input_hint_block.0.weight",
        "another model": "fc.weight",
    }
    for kind, foreign in cases.items():
        path = safetensors({name: value + 1, foreign: torch.ones(2, 2)}, tmp_path)
        expected = rf"{re.escape(repr(foreign))} is none of them \(1 of its 2 names are not\); .* is of {kind}"
        with pytest.raises(ValueError, match=expected):
            Erasure.from_official(path, base=base, concept=NUDITY)
    path = safetensors({name: torch.ones(8, 32)}, tmp_path)
    with pytest.raises(ValueError, match=r"must have the shape \(8, 16\), got \(8, 32\)"):
        Erasure.from_official(path, base=base, concept=NUDITY)
    path = delta_ckpt({"down_blocks.3.resnets.0.conv1.weight": torch.ones(2)}, tmp_path)
    with pytest.raises(ValueError, match=r"'model\.diffusion_model\.input_blocks\.7\.0\.in_layers\.2\.weight' is none"):
        Erasure.from_official(path, base=base, concept=NUDITY)


class Opened:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was-run"),))


def test_pickles_that_run_code_are_refused_and_not_run(
    base: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": weights_of(base), "callbacks": Opened()}, "sa.ckpt")
    with pytest.raises(ValueError, match=r"must hold tensors, numbers and texts only.*weights_only=False"):
        Erasure.from_official("sa.ckpt", base=base, concept=NUDITY)
    assert not Path("was-run").exists()


def test_files_that_hold_no_weights_are_refused(base: DiffusionPolicy, tmp_path: Path) -> None:
    name, value = next(iter(weights_of(base, *KEYS).items()))
    contents: dict[str, Any] = {
        "is empty": {},
        "got list": [value],
        r"got int at 'epoch'": {name: value + 1, "epoch": 3},
        "changes nothing: is it the base's own file": weights_of(base),
        "NaN or infinity in": {name: value * torch.nan},
        r"has new tokens": {"unet": {name: value + 1}, "modifier_token": {"<new1>": torch.ones(16)}},
        "the base's text encoder": {
            "unet": {name: value + 1},
            "text_encoder": {key: item + 1 for key, item in base.text_encoder.state_dict().items()},
        },
        r"has new tokens \('embed'\)": {
            "state_dict": {f"model.diffusion_model.{ldm_name(name)}": value + 1, "embed": torch.ones(1, 16)}
        },
    }
    for message, content in contents.items():
        torch.save(content, tmp_path / "delta.bin")
        with pytest.raises(ValueError, match=message):
            Erasure.from_official(tmp_path / "delta.bin", base=base, concept=NUDITY)
    whole = safetensors(trained(weights_of(base)), tmp_path).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pt").write_bytes((tmp_path / "delta.bin").read_bytes()[:500])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    for file, message in (
        ("cut.safetensors", "must be a safetensors file"), ("cut.pt", r"must be a file of torch\.save"),
        ("page.pt", r"must be a file of torch\.save"), ("pointer.safetensors", "git lfs pull"),
        ("empty.pt", r"must be a file of torch\.save"), ("nowhere.pt", "that exists, got"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Erasure.from_official(tmp_path / file, base=base, concept=NUDITY)


# Where programs enter.


def test_a_saved_erasure_and_a_release_come_through_one_door(base: DiffusionPolicy, tmp_path: Path) -> None:
    saved = UCE().erase(base, STYLE)
    saved.save(tmp_path / "saved")
    loaded = load_erasure(tmp_path / "saved", base=base)
    assert (loaded.concept, loaded.method, loaded.base) == (STYLE, "UCE", saved.base)
    with pytest.raises(ValueError, match=r"concept must be what .* erased, 'van gogh', got 'nudity'"):
        load_erasure(tmp_path / "saved", base=base, concept=NUDITY)
    with pytest.raises(ValueError, match=r"use Erasure\.load"):
        Erasure.from_official(tmp_path / "saved", base=base, concept=STYLE)
    path = safetensors(trained(weights_of(base, *KEYS)), tmp_path)
    with pytest.raises(ValueError, match="concept must be given"):
        load_erasure(path, base=base)
    assert load_erasure(str(path), base=base, concept=STYLE, method="ESD, mine").method == "ESD, mine"


def test_a_release_is_read_for_a_pipeline_or_beneath_a_lora_and_belongs_to_its_base(
    base: DiffusionPolicy, policy: DiffusionPolicy, tmp_path: Path
) -> None:
    path = safetensors(trained(weights_of(base, *KEYS)), tmp_path)
    erasures = [load_erasure(path, base=each, concept=NUDITY) for each in (base, policy, base.to_pipeline())]
    assert len({erasure.base for erasure in erasures}) == 1
    erasures[0].apply(policy)
    with pytest.raises(ValueError, match="must have the weights that ESD"):
        erasures[0].apply(policy)
    pipeline = base.to_pipeline()
    pipeline.unet.add_adapter(__import__("peft").LoraConfig(r=1, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="must carry no adapter"):
        load_erasure(path, base=pipeline, concept=NUDITY)


def test_difference_of_two_models_in_memory(base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy]) -> None:
    erased = make_policy(lora=LoRAConfig())
    wanted = UCE().erase(erased, NUDITY)
    wanted.apply(erased)
    for pair in ((base, erased), (base.to_pipeline(), erased.to_pipeline())):
        erasure = Erasure.between(*pair, NUDITY)
        assert (erasure.method, erasure.concept) == ("none", NUDITY)
        assert isinstance(erasure.change, WeightChange)
        assert erasure.delta.tensors.keys() == wanted.delta.tensors.keys()
        for name, difference in erasure.delta.tensors.items():
            torch.testing.assert_close(difference, wanted.delta.tensors[name], rtol=0, atol=1e-6)
    with torch.no_grad():
        for name, parameter in erased.unet.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.1)
    assert len(Erasure.between(base, erased, NUDITY).delta.tensors) > len(wanted.delta.tensors)
    erasure.apply(base)


def test_models_that_differ_in_more_or_in_nothing_have_no_erasure_between_them(
    base: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path
) -> None:
    with pytest.raises(ValueError, match="changes nothing"):
        Erasure.between(base, make_policy(), NUDITY)
    other = make_policy()
    with torch.no_grad():
        next(other.vae.parameters()).add_(1)
    with pytest.raises(ValueError, match="the base's VAE"):
        Erasure.between(base, other, NUDITY)
    with pytest.raises(ValueError, match="prediction_type='epsilon', got 'v_prediction'"):
        Erasure.between(base, make_policy(path=v_pipeline_dir), NUDITY)
    guarded = make_policy()
    AddedNetworks(eraser_tensors(base)).apply(guarded)
    with pytest.raises(ValueError, match="has added networks or a guard"):
        Erasure.between(base, guarded, NUDITY)
