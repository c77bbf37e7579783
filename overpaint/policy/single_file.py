"""Checkpoints in a single file, as they were published first: `.safetensors`, or `.ckpt`, which is a pickle.

What such a file holds is told from the names and shapes of its tensors, without reading any.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .families import Family, StableDiffusion, StableDiffusionXL
from .families.unets import check_reads
from .tensor_names import AN_SDXL, FOREIGN, LDM_TEXT_ENCODER, LDM_UNET, LDM_VAE, kind_of
from .weight_files import SafeTensors, read_weights, state_dict_of

FIRST_CONVOLUTION = f"{LDM_UNET}input_blocks.0.0.weight"
UNET_AND_VAE = {"a UNet": (f"{LDM_UNET}input_blocks.",), "a VAE": (LDM_VAE, "vae.")}


class Layout(NamedTuple):
    """How the checkpoints of one family lie in a single file."""

    family: type[Family]

    networks: Mapping[str, tuple[str, ...]]
    """What the names of each network's tensors begin with."""

    configurations: Mapping[int, str]
    """Whose configuration and tokenizers a file has on the hub, by the width of the texts that its UNet reads."""


STABLE_DIFFUSION = Layout(
    StableDiffusion,
    UNET_AND_VAE | {"a text encoder": (LDM_TEXT_ENCODER,)},
    {768: "stable-diffusion-v1-5/stable-diffusion-v1-5", 1024: "stabilityai/stable-diffusion-2-1"},
)
SDXL = Layout(
    StableDiffusionXL,
    UNET_AND_VAE
    | {
        "its first text encoder": ("conditioner.embedders.0.transformer.",),
        "its second text encoder": ("conditioner.embedders.1.model.",),
    },
    {2048: "stabilityai/stable-diffusion-xl-base-1.0"},
)

OTHER_KINDS = {kind: pattern for kind, pattern in FOREIGN.items() if kind != AN_SDXL} | {
    "one network of a folder in diffusers' layout": r"^(down_blocks|encoder\.down_blocks)\.|^text_model\.",
    "a VAE alone": r"^(encoder|decoder)\.(conv_in|mid)\b",
    "a UNet alone": r"^input_blocks\.",
}
"""What else people keep in such files, by what the names of its tensors hold."""


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


def layout_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> Layout:
    """Tells by the names and shapes of its tensors of which family a file is, and checks that it is for text-to-image.

    Raises:
        ValueError: It is none of Stable Diffusion v1, v2 and XL, and what it is is named.
    """
    if kind := kind_of(shapes, OTHER_KINDS):
        raise ValueError(f"the checkpoint must be a Stable Diffusion v1, v2 or XL in one file, and {name} is {kind}")
    layout = SDXL if kind_of(shapes, {AN_SDXL: FOREIGN[AN_SDXL]}) else STABLE_DIFFUSION
    for network, prefixes in layout.networks.items():
        if not any(tensor.startswith(prefixes) for tensor in shapes):
            raise ValueError(f"a checkpoint in one file must hold all of its networks, and {name} lacks {network}")
    first = shapes.get(FIRST_CONVOLUTION, ())
    if len(first) != 4:
        raise ValueError(f"a checkpoint in one file must hold {FIRST_CONVOLUTION}, and {name} does not")
    check_reads({"in_channels": first[1]}, {})
    return layout


def configuration_of(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> str | None:
    """Returns the hub id whose configuration and tokenizers a file of those shapes has, if it is one of the known."""
    read = [shape[-1] for tensor, shape in shapes.items() if tensor.endswith("attn2.to_k.weight")]
    return layout.configurations.get(read[0]) if read else None
