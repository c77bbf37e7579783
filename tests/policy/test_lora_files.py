"""LoRAs of other tools as a starting point, written with the tools' own code where it is installed."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from overpaint.policy import DiffusionPolicy, LoRAConfig, WeightDelta, merged_state
from overpaint.policy.lora_files import LoRAFormat, base_hashes, read_lora, save_lora
from overpaint.policy.weights import attach_lora

Images = Callable[[DiffusionPolicy], Tensor]
Stir = Callable[[DiffusionPolicy], None]
FILE = "pytorch_lora_weights.safetensors"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def loss(policy: DiffusionPolicy) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy.predict_noise(latents, torch.tensor([900, 100]), policy.encode(["a", "cat"])).square().mean()


def peft_state(policy: DiffusionPolicy) -> dict[str, Tensor]:
    import peft

    return peft.get_peft_model_state_dict(policy.unet)


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def training_script(policy: DiffusionPolicy, folder: Path) -> Path:
    """As diffusers' scripts save it: without settings; they train with alpha = rank."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = convert_state_dict_to_diffusers(peft_state(policy))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    return folder


def with_settings(policy: DiffusionPolicy, folder: Path) -> Path:
    """As diffusers saves it with all of peft's settings."""
    policy.unet.save_lora_adapter(folder, adapter_name="default")
    return folder


def peft_folder(policy: DiffusionPolicy, folder: Path) -> Path:
    """As peft saves a model that it has wrapped."""
    import peft

    lora: Any = policy.lora
    plain: Any = policy.to_pipeline().unet
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), use_dora=lora.dora
    )
    model = peft.get_peft_model(plain, settings)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{n}": v for n, v in peft_state(policy).items()})
    model.save_pretrained(str(folder))
    return folder


def another_name(policy: DiffusionPolicy, folder: Path) -> Path:
    """Under another name, which is given."""
    with_settings(policy, folder)
    return (folder / FILE).rename(folder / "mine.safetensors")


def only_file(policy: DiffusionPolicy, folder: Path) -> Path:
    """Under another name, and the folder is given."""
    return another_name(policy, folder).parent


def old_pickle(policy: DiffusionPolicy, folder: Path) -> Path:
    """As diffusers' scripts saved it before peft: attention processors, by torch.save."""
    folder.mkdir()
    names = {".lora_A": "_lora.down", ".lora_B": "_lora.up", "to_out.0": "to_out", "attn1.": "attn1.processor."}
    names["attn2."] = "attn2.processor."
    state = {}
    for name, value in peft_state(policy).items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[f"unet.{name}"] = value
    torch.save(state, folder / "pytorch_lora_weights.bin")
    return folder / "pytorch_lora_weights.bin"


def kohya(policy: DiffusionPolicy, folder: Path) -> Path:
    """As kohya's scripts save it for Stable Diffusion 1, in half precision."""
    lora: Any = policy.lora
    state: dict[str, Tensor] = {}
    for name, value in peft_state(policy).items():
        layer, part = name.split(".lora_")
        layer = f"lora_unet_{layer.replace('.', '_')}"
        state[f"{layer}.lora_{'down' if part[0] == 'A' else 'up'}.weight"] = value
        state[f"{layer}.alpha"] = torch.tensor(lora.alpha)
    folder.mkdir()
    save_file(state, folder / "kohya.safetensors")
    return folder


def ldm_blocks(policy: DiffusionPolicy, folder: Path) -> Path:
    """As kohya's scripts save it for the original code's UNet, whose blocks are counted through."""
    file = kohya(policy, folder) / "kohya.safetensors"
    places = {"down_blocks_0_attentions_0": "input_blocks_1_1", "mid_block_attentions_0": "middle_block_1"}
    places |= {"up_blocks_1_attentions_0": "output_blocks_2_1", "up_blocks_1_attentions_1": "output_blocks_3_1"}
    state = {}
    for name, value in load_file(file).items():
        (theirs,) = (place for ours, place in places.items() if ours in name)
        (ours,) = (ours for ours in places if ours in name)
        state[name.replace(ours, theirs)] = value
    save_file(state, file)
    return file


WRITERS = [training_script, with_settings, peft_folder, another_name, only_file, old_pickle, kohya, ldm_blocks]


@pytest.mark.parametrize("write", WRITERS, ids=lambda writer: writer.__name__)
def test_learning_goes_on_from_a_lora_of_another_tool(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Stir,
    images: Images,
    tmp_path: Path,
    write: Callable[[DiffusionPolicy, Path], Path],
) -> None:
    alpha = 3.0 if write in (training_script, old_pickle) else 6.0
    trained = make_policy(lora=LoRAConfig(rank=3, alpha=alpha))
    stir(trained)
    path = write(trained, tmp_path / "lora")
    policy = make_policy()
    policy.load_lora(path)
    assert policy.lora == trained.lora
    state = policy.trainable_state()
    assert state.keys() == trained.trainable_state().keys()
    assert all(torch.equal(state[name], value) for name, value in trained.trainable_state().items())
    assert torch.equal(images(policy), images(trained))
    with policy.reference():
        assert torch.equal(images(policy), images(make_policy()))
    loss(policy).backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.trainable_parameters())
    policy.merge_lora()
    torch.testing.assert_close(images(policy), images(trained), rtol=0, atol=1e-4)
    policy.load_lora(path, check_base=False)  # on top of the first
    assert policy.lora == trained.lora


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(rank=2), r"LoRAConfig\(rank=4, alpha=4.0, targets=\('to_q', .*\).*; got rank=2"),
        (LoRAConfig(rank=8, alpha=8.0), "got rank=8, alpha=8.0"),
        (LoRAConfig(alpha=8.0), "got alpha=8.0. A policy that was made without a LoRA takes the file's settings"),
        (LoRAConfig(targets=("to_q",)), r"on 32 layers: .*; got 8 layers"),
        (LoRAConfig(dora=True), r"dora=False\); got dora=True"),
    ],
)
def test_a_lora_of_other_settings_is_refused(
    policy: DiffusionPolicy,
    make_policy: Callable[..., DiffusionPolicy],
    stir: Stir,
    tmp_path: Path,
    config: LoRAConfig,
    message: str,
) -> None:
    stir(policy)
    policy.save_lora(tmp_path)
    other = make_policy(lora=config)
    before = other.trainable_state()
    with pytest.raises(ValueError, match=message):
        other.load_lora(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in other.trainable_state().items())


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), ("attn2.to_k", "conv1"), ("proj_in",)])
def test_a_files_layers_are_said_by_the_shortest_endings(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, targets: tuple[str, ...]
) -> None:
    make_policy(lora=LoRAConfig(targets=targets)).save_lora(tmp_path)
    policy = make_policy()
    policy.load_lora(tmp_path)
    assert policy.lora is not None
    assert policy.lora.targets is not None
    assert set(policy.lora.targets) == set(targets)


def test_layers_of_different_ranks_and_scales_keep_their_product_and_learn(
    make_policy: Callable[..., DiffusionPolicy], images: Images, plain_images: Any, pipeline_dir: Path, tmp_path: Path
) -> None:
    ranks = {"attn2_to_k": (2, 1.0), "attn2_to_v": (4, 4.0), "attn1_to_q": (4, 4.0)}
    block = "down_blocks_0_attentions_0_transformer_blocks_0"
    generator = torch.Generator().manual_seed(0)
    state, expected = {}, {}
    before = merged_state(make_policy().unet)
    for layer, (rank, alpha) in ranks.items():
        name = f"down_blocks.0.attentions.0.transformer_blocks.0.{layer.replace('_', '.', 1)}.weight"
        down = torch.randn(rank, before[name].shape[1], generator=generator)
        up = torch.randn(len(before[name]), rank, generator=generator)
        key = f"lora_unet_{block}_{layer}"
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        expected[name] = before[name] + alpha / rank * up @ down
    save_file(state, tmp_path / "mixed.safetensors")
    policy = make_policy()
    policy.load_lora(tmp_path)
    assert policy.lora is not None
    assert (policy.lora.rank, policy.lora.alpha) == (4, 4.0)
    for name, value in merged_state(policy.unet).items():
        torch.testing.assert_close(value, expected.get(name, before[name]))
    loss(policy).backward()
    for parameter in policy.trainable_parameters():  # the filled-up part too: every row or every column has a gradient
        assert parameter.grad is not None
    small = policy.unet.get_submodule(LAYER).lora_B["default"].weight
    assert small.grad[:, 2:].any(dim=0).all()


@pytest.mark.parametrize("name", ["unet", "kohya"])
def test_what_a_file_has_for_the_text_encoder_is_not_dropped_unasked(
    policy: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, name: str
) -> None:
    policy.save_lora(tmp_path / "lora.safetensors", format="kohya" if name == "kohya" else "diffusers")
    state = load_file(tmp_path / "lora.safetensors")
    if name == "kohya":
        layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
        names = f"{layer}.lora_down.weight", f"{layer}.lora_up.weight"
    else:
        layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
        names = f"{layer}.down.weight", f"{layer}.up.weight"
    state |= {names[0]: torch.ones(2, 16), names[1]: torch.ones(16, 2)}
    save_file(state, tmp_path / "lora.safetensors")
    fresh = make_policy()
    with pytest.raises(ValueError, match=r"on the UNet alone, .* has 2 tensors for the text encoder, such as tex"):
        fresh.load_lora(tmp_path)
    assert fresh.lora is None
    fresh.load_lora(tmp_path, drop_text_encoder=True)
    assert fresh.lora == policy.lora


def test_what_is_no_lora_of_this_unet_is_refused(
    make_policy: Callable[..., DiffusionPolicy], policy: DiffusionPolicy, tmp_path: Path
) -> None:
    policy.save_lora(tmp_path / "good")
    good = load_file(tmp_path / "good" / FILE)
    key = f"unet.{LAYER}"
    kohya = f"lora_unet_{LAYER.replace('.', '_')}"
    down, up = torch.zeros(4, 16), torch.zeros(8, 4)
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "wider": ({f"{key}.lora_A.weight": torch.zeros(4, 1024), f"{key}.lora_B.weight": up}, "another kind of model"),
        "elsewhere": ({"unet.x.lora_A.weight": down, "unet.x.lora_B.weight": up}, "has x, which this UNet lacks"),
        "half": ({f"{key}.lora_A.weight": down}, f"lacks {LAYER}.lora_B.weight"),
        "whole weights": (
            {f"{key}.weight": torch.zeros(8, 16)},
            f"got something else, with names such as {key}.weight",
        ),
        "LoHa": ({f"{kohya}.hada_w1_a": down}, "must hold a LoRA, got a LoHa; merge it"),
        "LoKr": (good | {f"{key}.lokr_w1": down}, "must hold a LoRA, got a LoKr; merge it"),
        "kohya's DoRA": ({f"{kohya}.dora_scale": up}, "a LoRA with DoRA must be in diffusers' or peft's format"),
        "empty": ({"unet.step": torch.zeros(1)}, "must hold a LoRA, got something else, with names such as unet.step"),
    }
    fresh = make_policy()
    for name, (state, message) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*").replace(r"\ ", " ")):
            fresh.load_lora(tmp_path / f"{name}.safetensors")
    for name, content in (("cut.safetensors", b"\x08"), ("page.bin", b"<html>"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} must be a (safetensors file|file of torch.save), and "):
            fresh.load_lora(tmp_path / name)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt must hold tensors by name, got list"):
        fresh.load_lora(tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"must be a file or a folder, got .*nowhere"):
        fresh.load_lora(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold .* or one other .safetensors, and .* holds LoHa.safetensors, "):
        fresh.load_lora(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds none"):
        fresh.load_lora(tmp_path / "none")
    assert fresh.lora is None
    assert fresh.trainable_parameters() == []


@pytest.mark.parametrize("form", ["peft's pickle", "a training state", "parallel", "with the adapter's name"])
def test_a_lora_is_read_however_its_tensors_are_wrapped(
    form: str, policy: DiffusionPolicy, stir: Stir, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    stir(policy)
    policy.save_lora(tmp_path / "good")
    good = load_file(tmp_path / "good" / FILE)
    path = tmp_path / form
    path.mkdir()
    if form == "peft's pickle":
        torch.save(
            {f"base_model.model.{n.removeprefix('unet.')}": v for n, v in good.items()}, path / "adapter_model.bin"
        )
    elif form == "a training state":
        torch.save({"state_dict": good, "epoch": 3}, path / "last.ckpt")
    elif form == "parallel":
        save_file({f"module.{name}": value for name, value in good.items()}, path / "lora.safetensors")
    else:
        named = {n.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.") for n in good}
        save_file(dict(zip(sorted(named), (good[n] for n in sorted(good)), strict=True)), path / "lora.safetensors")
    other = make_policy()
    other.load_lora(path)
    for mine, theirs in zip(other.trainable_parameters(), policy.trainable_parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_policy_that_trains_something_else_takes_no_lora(
    policy: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy.save_lora(tmp_path)
    with pytest.raises(ValueError, match="the policy must have a LoRA"):
        make_policy(train="xattn").load_lora(tmp_path)


# Writing.


@pytest.mark.parametrize("config", [LoRAConfig(), LoRAConfig(rank=2, alpha=6.0, targets=("attn2.to_k", "conv1"))])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_saved_lora_draws_the_same_here_and_in_plain_diffusers(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Stir,
    images: Images,
    plain_images: Callable[..., Tensor],
    pipeline_dir: Path,
    tmp_path: Path,
    config: LoRAConfig,
    format: LoRAFormat,
) -> None:
    policy = make_policy(lora=config)
    untrained = images(policy)
    stir(policy)
    policy.save_lora(tmp_path, format=format)
    (file,) = tmp_path.iterdir()
    assert file.name == (FILE if format == "diffusers" else "lora.safetensors")
    drawn = plain_images(pipeline_dir, tmp_path)
    torch.testing.assert_close(drawn, images(policy), rtol=0, atol=1e-4)
    assert (drawn - untrained).abs().max() > 1e-3
    fresh = make_policy(lora=config)
    fresh.load_lora(file)
    assert torch.equal(images(fresh), images(policy))


@pytest.mark.parametrize("linear", [False, True], ids=["SD 1", "SD 2"])
@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_every_layer_of_stable_diffusions_unet_finds_its_name_again(
    linear: bool, format: LoRAFormat, tmp_path: Path
) -> None:
    from diffusers import UNet2DConditionModel

    def unet() -> Any:  # the blocks of the real one, and few channels
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(4, 8, 8, 8), layers_per_block=2, cross_attention_dim=8,
            attention_head_dim=2, norm_num_groups=2, use_linear_projection=linear,
        )  # fmt: skip

    attention = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
    residual = (
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
        "conv",
        "linear_1",
        "linear_2",
        "conv_in",
        "conv_out",
    )
    first, second = unet(), unet()
    config = LoRAConfig(
        rank=2, alpha=5.0, targets=(*attention, *residual, "linear_1", "linear_2", "conv_in", "conv_out")
    )
    attach_lora(first, config)
    for name, parameter in first.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter.data)
    save_lora(first, tmp_path, config, format)
    found = read_lora(tmp_path, second)
    assert (found.config.rank, found.config.alpha) == (2, 5.0)
    attach_lora(second, found.config)
    found.put_into(second, found.config)
    expected = {name: value for name, value in first.state_dict().items() if ".lora_" in name}
    state = {name: value for name, value in second.state_dict().items() if ".lora_" in name}
    assert state.keys() == expected.keys()
    layers = [name for name, layer in unet().named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
    assert {name.split(".lora_")[0] for name in state} == set(layers)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def test_kohyas_format_has_its_names_and_alpha(
    make_policy: Callable[..., DiffusionPolicy], stir: Stir, tmp_path: Path
) -> None:
    policy = make_policy(lora=LoRAConfig(rank=2, alpha=6.0))
    stir(policy)
    policy.save_lora(tmp_path / "new/mine.safetensors", format="kohya")
    state, metadata = load_file(tmp_path / "new/mine.safetensors"), header(tmp_path / "new/mine.safetensors")
    layer = f"lora_unet_{LAYER.replace('.', '_')}"
    own = policy.trainable_state()
    assert torch.equal(state[f"{layer}.lora_down.weight"], own[f"{LAYER}.lora_A.default.weight"])
    assert torch.equal(state[f"{layer}.lora_up.weight"], own[f"{LAYER}.lora_B.default.weight"])
    assert state[f"{layer}.alpha"].item() == 6.0
    assert {name.split(".", 1)[1] for name in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "6.0")


def test_what_cannot_be_written_is_refused(make_policy: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    policy = make_policy(lora=LoRAConfig(dora=True))
    with pytest.raises(ValueError, match="with DoRA must be saved in format 'diffusers', got 'kohya'"):
        policy.save_lora(tmp_path, format="kohya")
    assert list(tmp_path.iterdir()) == []


# The weights beneath.


@pytest.fixture
def erased(make_policy: Callable[..., DiffusionPolicy]) -> Callable[..., DiffusionPolicy]:
    """A policy some of whose cross-attention weights were changed."""

    def make(**options: Any) -> DiffusionPolicy:
        policy = make_policy(**options)
        WeightDelta({f"{LAYER}.weight": torch.full((8, 16), 0.01)}).apply(policy.unet)
        return policy

    return make


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_lora_recovered_on_an_erased_model_does_not_load_on_the_original(
    erased: Callable[..., DiffusionPolicy],
    make_policy: Callable[..., DiffusionPolicy],
    stir: Stir,
    images: Images,
    tmp_path: Path,
    format: LoRAFormat,
) -> None:
    recovered = erased(lora=LoRAConfig())
    stir(recovered)
    recovered.save_lora(tmp_path, format=format)
    original, fitting = make_policy(), erased()
    before = images(original)
    message = (
        r"must be the model that the LoRA was learned on \(SHA-256 .*would bring the concept back.*check_base=False"
    )
    with pytest.raises(ValueError, match=message):
        original.load_lora(tmp_path)
    assert original.lora is None
    assert torch.equal(images(original), before)
    fitting.load_lora(tmp_path)
    assert torch.equal(images(fitting), images(recovered))
    original.load_lora(tmp_path, check_base=False)
    assert all(
        torch.equal(a, b) for a, b in zip(original.trainable_parameters(), fitting.trainable_parameters(), strict=True)
    )


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float16])
def test_one_checkpoint_in_two_precisions_is_one_model(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, first: torch.dtype, second: torch.dtype
) -> None:
    make_policy(dtype=first, lora=LoRAConfig()).save_lora(tmp_path)
    policy = make_policy(dtype=second)
    if {first, second} == {torch.bfloat16, torch.float16}:  # neither is a rounding of the other
        with pytest.raises(ValueError, match="must be the model"):
            policy.load_lora(tmp_path)
    else:
        policy.load_lora(tmp_path)


def test_the_hash_is_of_all_weights_beneath_and_of_no_lora(policy: DiffusionPolicy, stir: Stir) -> None:
    from overpaint.policy.added import add_networks

    unet = policy.unet
    before = base_hashes(unet)
    stir(policy)
    assert base_hashes(unet) == before
    assert base_hashes(DiffusionPolicy(policy.to_pipeline(), device="cpu").unet) != before
    stirred = copy.deepcopy(unet)
    with torch.no_grad():
        stirred.conv_out.bias[0] += 1
    assert not set(base_hashes(stirred).values()) & set(before.values())
    add_networks(unet, {"mid_block": torch.nn.Linear(8, 8)})
    assert not set(base_hashes(unet).values()) & set(before.values())


def test_a_guard_is_part_of_the_model(
    policy: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    from erasure import NUDITY
    from erasure.methods.sld import SLD

    guarded = make_policy()
    for each in (policy, guarded):
        SLD().erase(make_policy(), NUDITY).apply(each)
    policy.save_lora(tmp_path)
    with pytest.raises(ValueError, match="must be the model"):
        make_policy().load_lora(tmp_path)
    guarded.load_lora(tmp_path)
    assert guarded.lora == policy.lora


def test_files_of_other_tools_say_no_base(
    policy: DiffusionPolicy, erased: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    training_script(policy, tmp_path)
    other = erased()
    other.load_lora(tmp_path)
    for mine, theirs in zip(other.trainable_parameters(), policy.trainable_parameters(), strict=True):
        assert torch.equal(mine, theirs)
