"""LoRA files of diffusers, peft and kohya, as the differences that they make in a UNet's weights."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.policy.parts import UNet
from overpaint.policy.weights import base_parameters

from .unet_names import check_known, without_wrappers
from .weight_files import SafeTensors

NOT_LOW_RANK = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
"""Parts of names that belong to adapters which are no plain LoRA."""


def is_lora_file(names: Mapping[str, Tensor]) -> bool:
    """Tells a LoRA, or a relative of it, from weights."""
    return any(mark in name for name in names for mark in ("lora", *NOT_LOW_RANK))


def lora_settings(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Returns peft's settings of a LoRA: from the header of its file, or from beside it; empty where there are none."""
    header = tensors.header.get("lora_adapter_metadata") if isinstance(tensors, SafeTensors) else None
    if header:
        return {name.removeprefix("unet."): value for name, value in json.loads(header).items()}
    beside = folder / "adapter_config.json"
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


@torch.no_grad()
def lora_differences(
    tensors: Mapping[str, Tensor], unet: UNet, settings: Mapping[str, Any], source: Path
) -> dict[str, Tensor]:
    """Returns what a LoRA adds to the weights of a UNet, by parameter: scale · B A, with scale alpha / rank.

    Args:
        tensors: As the file has them.
        unet: What the LoRA must fit.
        settings: Of `lora_settings`; a file of kohya's carries its alphas itself, and without either alpha is the rank.
        source: The file, for messages.

    Raises:
        ValueError: It is another kind of adapter, changes a text encoder as well, or does not fit the UNet.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    kinds = {kind for mark, kind in NOT_LOW_RANK.items() if any(mark in name for name in tensors)}
    if settings.get("use_dora"):
        kinds.add("DoRA")
    if kinds:
        raise ValueError(
            f"{source} must hold a plain LoRA, got a {' and '.join(sorted(kinds))}; merge it into its model"
        )
    named = {without_wrappers(name): value for name, value in tensors.items()}
    if encoders := [name for name in named if name.startswith(("text_encoder", "lora_te"))]:
        raise ValueError(
            f"{source} must change the UNet alone, as an erasure does, and it changes the text encoder "
            f"({encoders[0]!r}); merge it into its model, and give that as the base"
        )
    try:
        state, alphas = StableDiffusionPipeline.lora_state_dict(named, unet_config=unet.config)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source} must hold a LoRA that diffusers can read, and it cannot: {error}") from error
    converted = {name.removeprefix("unet."): value for name, value in convert_unet_state_dict_to_peft(state).items()}
    scales = {
        re.sub(r"(\.lora_A\.weight)?\.alpha$", "", name.removeprefix("unet.")): value
        for name, value in convert_unet_state_dict_to_peft(alphas or {}).items()
    }
    halves = {name.replace(".default.", "."): value for name, value in converted.items()}
    layers = {name: re.sub(r"\.lora_[AB]\.weight$", "", name) for name in halves}
    check_known({name: f"{layer}.weight" for name, layer in layers.items()}, base_parameters(unet), source)
    differences = {}
    for layer in dict.fromkeys(layers.values()):
        if f"{layer}.lora_A.weight" not in halves or f"{layer}.lora_B.weight" not in halves:
            raise ValueError(f"{source} must hold both halves of its LoRA, and lacks one of {layer!r}")
        down, up = halves[f"{layer}.lora_A.weight"].float(), halves[f"{layer}.lora_B.weight"].float()
        scale = scales[layer] / len(down) if layer in scales else _scale(layer, len(down), settings)
        update = up.flatten(1) @ down.flatten(1)
        shape = base_parameters(unet)[f"{layer}.weight"].shape
        if update.numel() != shape.numel() or len(update) != shape[0]:
            raise ValueError(f"{source} must fit {layer!r} of shape {tuple(shape)}, got {tuple(update.shape)}")
        differences[f"{layer}.weight"] = scale * update.view(shape)
    return differences


def _scale(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Returns the factor that peft's settings give a layer."""
    from peft.utils.other import get_pattern_key

    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), settings.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
