"""Writes a Stable Diffusion in the layout of a single file: CompVis's of the first ones, Stability's of XL."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}

VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int, attends: Mapping[int, bool]) -> str:
    """The name that a parameter of diffusers' UNet has in a single file.

    `layers` is the number of residual blocks on each level on the way down; `attends` tells the levels on the way up
    that have attention, after which the upsampler takes the next place.
    """
    layer, _, ending = name.rpartition(".")
    if layer in UNET_ENDS:
        return f"{UNET_ENDS[layer]}.{ending}"
    kind, _, rest = name.partition(".")
    if kind == "mid_block":
        part, index, inner = rest.split(".", 2)
        place = f"middle_block.{2 * int(index) if part == 'resnets' else 1}"
        return f"{place}.{_resnet(inner) if part == 'resnets' else inner}"
    level, part, index, inner = rest.split(".", 3)
    down, block = kind == "down_blocks", int(level)
    start = 1 + block * (layers + 1) if down else block * (layers + 1)
    side = "input_blocks" if down else "output_blocks"
    if part == "downsamplers":
        return f"{side}.{start + layers}.0.{inner.replace('conv.', 'op.')}"
    if part == "upsamplers":
        return f"{side}.{start + layers}.{2 if attends[block] else 1}.{inner}"
    return (
        f"{side}.{start + int(index)}.{0 if part == 'resnets' else 1}.{_resnet(inner) if part == 'resnets' else inner}"
    )


def _resnet(inner: str) -> str:
    layer, _, ending = inner.rpartition(".")
    return f"{RESNET[layer]}.{ending}"


def vae_name(name: str, levels: int) -> str:
    """The name that a parameter of diffusers' VAE has in a single file."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    up = re.match(r"decoder\.up_blocks\.(\d+)\.", name)
    if up:
        name = name.replace(up[0], f"decoder.up.{levels - 1 - int(up[1])}.")
        name = name.replace("resnets.", "block.").replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for theirs, ldm in VAE_ATTENTION.items():
            name = name.replace(f".{theirs}.", f".{ldm}.")
    return name


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text encoder with projection under the names of OpenCLIP, queries, keys and values in one."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    file = {there: state[here] for here, there in names.items()}
    file["text_projection"] = state["text_projection.weight"].T
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts |= {"self_attn.out_proj": "attn.out_proj"}
    for layer in range(len({name for name in state if name.endswith("self_attn.q_proj.weight")})):
        here, there = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for part, its_name in parts.items():
                file[f"{there}.{its_name}.{kind}"] = state[f"{here}.{part}.{kind}"]
            read = [state[f"{here}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            file[f"{there}.attn.in_proj_{kind}"] = torch.cat(read)
    return file


def in_one_file(unet: Any, vae: Any, text_encoder: Any, text_encoder_2: Any = None) -> dict[str, Tensor]:
    """The weights of all networks under the names of a single file, and in its shapes."""
    file: dict[str, Tensor] = {}
    attends = dict(enumerate("CrossAttn" in kind for kind in unet.config.up_block_types))
    for name, value in unet.state_dict().items():
        file[f"model.diffusion_model.{unet_name(name, unet.config.layers_per_block, attends)}"] = value
    for name, value in vae.state_dict().items():
        convolution = ".attentions.0.to_" in name and name.endswith("weight")
        stored = value[:, :, None, None] if convolution else value
        file[f"first_stage_model.{vae_name(name, len(vae.config.block_out_channels))}"] = stored
    first = "cond_stage_model" if text_encoder_2 is None else "conditioner.embedders.0"
    for name, value in text_encoder.state_dict().items():
        file[f"{first}.transformer.text_model.{name}"] = value
    if text_encoder_2 is not None:
        for name, value in open_clip(text_encoder_2.state_dict()).items():
            file[f"conditioner.embedders.1.model.{name}"] = value
    return {name: value.contiguous() for name, value in file.items()}
