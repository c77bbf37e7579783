"""Checkpoints in a single file, as they were published first: `.safetensors`, or `.ckpt`, which is a pickle.

What such a file holds is told from the names and shapes of its tensors, without reading any.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .takeover import check_unet

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
NETWORKS = {
    "a UNet": ("model.diffusion_model.input_blocks.",),
    "a VAE": ("first_stage_model.", "vae."),
    "a text encoder": ("cond_stage_model.",),
}
"""What the names of each network's tensors begin with."""

OTHER_KINDS = {
    "a LoRA": r"lora_(unet|te\d?)_|\.lora_(A|B|up|down)\b|\.lora\.(up|down)\.|hada_w1|lokr_w1",
    "a textual inversion": r"^emb_params$|^string_to_param\b",
    "a ControlNet": r"^control_model\.|^controlnet_cond_embedding\.|input_hint_block\.",
    "an SDXL": r"^conditioner\.embedders\.",
    "a Stable Diffusion 3": r"joint_blocks\.",
    "a FLUX": r"double_blocks\.|single_blocks\.",
    "one network of a folder in diffusers' layout": r"^(down_blocks|encoder\.down_blocks)\.|^text_model\.",
    "a VAE alone": r"^(encoder|decoder)\.(conv_in|mid)\b",
    "a UNet alone": r"^input_blocks\.",
}
"""What else people keep in such files, by what the names of its tensors hold."""

CONFIGURATIONS = {768: "stable-diffusion-v1-5/stable-diffusion-v1-5", 1024: "stabilityai/stable-diffusion-2-1"}
"""Whose configuration a file has, by the width of the embedded prompts that its UNet reads: v1, v2."""


class UnreadableError(ValueError):
    """A file is in none of the formats that checkpoints have."""


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors by name, without reading them.

    Raises:
        UnreadableError: It is no such file.
        ValueError: It is a pickle that holds more than tensors and plain values.
    """
    read = _of_safetensors if file.suffix == ".safetensors" else _of_pickle
    try:
        state = read(file)
    except Exception as error:  # bytes that are something else can make either library raise anything
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is None:
            raise UnreadableError(
                f"the checkpoint must be a .safetensors or .ckpt file, and {file} is neither"
            ) from error
        raise ValueError(
            "the checkpoint must hold tensors and plain values only, as anything else in a pickle can run code, and "
            f"{file} holds {code[1]}; get it as .safetensors"
        ) from error
    while isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint must hold tensors by name, and {file} holds a {type(state).__name__}")
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def check_tensors(shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Checks by the names and shapes of its tensors that a file is a Stable Diffusion v1 or v2 for text-to-image.

    Raises:
        ValueError: It is something else, which is named.
    """
    for kind, pattern in OTHER_KINDS.items():
        if any(re.search(pattern, tensor) for tensor in shapes):
            raise ValueError(f"the checkpoint must be a Stable Diffusion v1 or v2 in one file, and {name} is {kind}")
    for network, prefixes in NETWORKS.items():
        if not any(tensor.startswith(prefixes) for tensor in shapes):
            raise ValueError(f"a checkpoint in one file must hold all three networks, and {name} lacks {network}")
    first = shapes.get(FIRST_CONVOLUTION, ())
    if len(first) != 4:
        raise ValueError(f"a checkpoint in one file must hold {FIRST_CONVOLUTION}, and {name} does not")
    check_unet({"in_channels": first[1]})


def configuration_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns the hub id whose configuration and tokenizer a file of those shapes has, if it is one of the known."""
    read = [shape[-1] for tensor, shape in shapes.items() if tensor.endswith("attn2.to_k.weight")]
    return CONFIGURATIONS.get(read[0]) if read else None


def _of_safetensors(file: Path) -> Any:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _of_pickle(file: Path) -> Any:
    mapped = zipfile.is_zipfile(file)  # older pickles cannot be mapped into memory
    return torch.load(file, map_location="meta", weights_only=True, mmap=mapped or None)
