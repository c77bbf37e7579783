"""Checkpoints in a single file, as they were published first: `.safetensors`, or `.ckpt`, which is a pickle.

What such a file holds is told from the names and shapes of its tensors, without reading any.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from .families import StableDiffusion
from .tensor_names import FOREIGN, LDM_TEXT_ENCODER, LDM_UNET, LDM_VAE, kind_of
from .weight_files import SafeTensors, read_weights, state_dict_of

FIRST_CONVOLUTION = f"{LDM_UNET}input_blocks.0.0.weight"
NETWORKS = {
    "a UNet": (f"{LDM_UNET}input_blocks.",),
    "a VAE": (LDM_VAE, "vae."),
    "a text encoder": (LDM_TEXT_ENCODER,),
}
"""What the names of each network's tensors begin with."""

OTHER_KINDS = FOREIGN | {
    "one network of a folder in diffusers' layout": r"^(down_blocks|encoder\.down_blocks)\.|^text_model\.",
    "a VAE alone": r"^(encoder|decoder)\.(conv_in|mid)\b",
    "a UNet alone": r"^input_blocks\.",
}
"""What else people keep in such files, by what the names of its tensors hold."""

CONFIGURATIONS = {768: "stable-diffusion-v1-5/stable-diffusion-v1-5", 1024: "stabilityai/stable-diffusion-2-1"}
"""Whose configuration a file has, by the width of the embedded prompts that its UNet reads: v1, v2."""


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a file's tensors by name, without reading them.

    Raises:
        ValueError: It is no such file, or a pickle that holds more than tensors and plain values.
    """
    state = state_dict_of(read_weights([file], device="meta"))
    if isinstance(state, SafeTensors):
        return state.shapes()
    if not isinstance(state, Mapping):
        raise ValueError(f"the checkpoint must hold tensors by name, and {file} holds a {type(state).__name__}")
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, torch.Tensor)}


def check_tensors(shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Checks by the names and shapes of its tensors that a file is a Stable Diffusion v1 or v2 for text-to-image.

    Raises:
        ValueError: It is something else, which is named.
    """
    if kind := kind_of(shapes, OTHER_KINDS):
        raise ValueError(f"the checkpoint must be a Stable Diffusion v1 or v2 in one file, and {name} is {kind}")
    for network, prefixes in NETWORKS.items():
        if not any(tensor.startswith(prefixes) for tensor in shapes):
            raise ValueError(f"a checkpoint in one file must hold all three networks, and {name} lacks {network}")
    first = shapes.get(FIRST_CONVOLUTION, ())
    if len(first) != 4:
        raise ValueError(f"a checkpoint in one file must hold {FIRST_CONVOLUTION}, and {name} does not")
    StableDiffusion.check_network({"in_channels": first[1]})


def configuration_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns the hub id whose configuration and tokenizer a file of those shapes has, if it is one of the known."""
    read = [shape[-1] for tensor, shape in shapes.items() if tensor.endswith("attn2.to_k.weight")]
    return CONFIGURATIONS.get(read[0]) if read else None
