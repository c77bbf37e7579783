"""Small networks that are added to a UNet: each reads what one of its layers gives, and adds to it.

They are children of their layers, named `added`, and no part of the UNet's own weights: `base_parameters` and
`merged_state` leave them out.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

CHILD = "added"
"""Name of the child."""


def add_networks(unet: nn.Module, networks: Mapping[str, nn.Module]) -> None:
    """Gives layers their networks: from then on a layer gives `output + network(output)`.

    Args:
        unet: Changed in place.
        networks: By the name of the layer in the UNet.

    Raises:
        ValueError: The UNet lacks a layer, or a layer has a network already; nothing is changed then.
    """
    layers = dict(unet.named_modules())
    for name in networks:
        if name not in layers:
            raise ValueError(f"the UNet must have every layer that a network is added to, and lacks {name!r}")
        if hasattr(layers[name], CHILD):
            raise ValueError(f"a layer takes one added network, and {name!r} has one already")
    for name, network in networks.items():
        layers[name].add_module(CHILD, network)
        layers[name].register_forward_hook(_add)


def remove_networks(unet: nn.Module) -> None:
    """Takes off every added network."""
    for layer in list(unet.modules()):
        if hasattr(layer, CHILD):
            delattr(layer, CHILD)
            for key, hook in list(layer._forward_hooks.items()):
                if hook is _add:
                    del layer._forward_hooks[key]


def added_networks(unet: nn.Module) -> dict[str, nn.Module]:
    """Returns the added networks by the name of their layer."""
    return {name: layer.get_submodule(CHILD) for name, layer in unet.named_modules() if hasattr(layer, CHILD)}


def is_added(name: str) -> bool:
    """Tells whether a parameter belongs to an added network."""
    return f".{CHILD}." in name


def _add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + layer.get_submodule(CHILD)(output)
