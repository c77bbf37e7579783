"""Which model it is: the SHA-256 of its tensors and what else decides its images, and the libraries it draws with."""

import hashlib
import platform
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .diffusion_policy import DiffusionPolicy


def tensors_hash(tensors: Mapping[str, Tensor], notes: Iterable[str] = ()) -> str:
    """Returns the SHA-256 of tensors, their names, types and shapes included, in whatever order they come.

    Args:
        tensors: By name, in memory.
        notes: What else decides what they do, in this order.
    """
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(memoryview(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    for note in notes:
        digest.update(f"{note}\n".encode())
    return digest.hexdigest()


def policy_record(policy: "DiffusionPolicy", *, untrained: bool = False) -> dict[str, Any]:
    """Returns what decides the images of a policy, beside how they are sampled.

    Args:
        policy: The policy.
        untrained: Whether it is about what training starts from, which it does not change: of the trained weights
            those of the reference count, and of a LoRA none.
    """
    trained: dict[str, Tensor] = {}
    notes: list[str] = []
    if untrained:
        trained = policy.trainable_state()
        with policy.reference():
            notes = [tensors_hash({} if policy.lora is not None else policy.trainable_state())]
    return {
        "class": class_name(policy),
        "weights": _together(network_digests(policy, without=trained), notes),
        "scheduler": {"class": "DDIM", **scheduler_settings(policy.scheduler)},
        "guard": guard_of(policy),
    }


def weights_digest(networks: Mapping[str, nn.Module]) -> str:
    """Returns the SHA-256 of all weights of networks by their names; see `network_digest`."""
    return _together({name: network_digest(network, name) for name, network in networks.items()})


def network_digests(policy: "DiffusionPolicy", *, without: Collection[str] = ()) -> dict[str, str]:
    """Returns the SHA-256 of each network of a policy by its name, of released text encoders as they were.

    Args:
        policy: The policy.
        without: Weights of the denoising network that do not count.
    """
    family = policy.family
    left_out = {family.network: without}
    here = {
        name: network_digest(one, name, without=left_out.get(name, ())) for name, one in family.named_networks.items()
    }
    return family.released | here


def network_digest(network: nn.Module, name: str, *, without: Collection[str] = ()) -> str:
    """Returns the SHA-256 of a network's weights, adapters and how strongly they act included.

    The weights of adapters that are switched off, as a LoRA is in the reference, do not count.

    Args:
        network: The network.
        name: What messages call it.
        without: Further weights that do not count.

    Raises:
        ValueError: Weights are not in memory, as with diffusers' sequential offloading.
    """
    values = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    if absent := sorted(key for key, value in values.items() if value.is_meta):
        raise ValueError(f"the weights of {name} must be in memory to tell models apart, got {absent[0]} on meta")
    adapters = _adapters(network)
    off = [(layer, one) for layer, one in adapters if one.disable_adapters]
    idle = tuple(f"{layer}.{kind}." for layer, one in off for kind in one.adapter_layer_names)
    counted = {key: value for key, value in values.items() if key not in without and not key.startswith(idle)}
    return tensors_hash(
        counted,
        [
            f"{layer} {sorted(one.scaling.items())} {one.active_adapters} {one.disable_adapters}"
            for layer, one in adapters
        ],
    )


def _together(digests: Mapping[str, str], notes: Sequence[str] = ()) -> str:
    """Returns one SHA-256 of those of several networks, and of what else decides."""
    return tensors_hash({}, [*(f"{name} {digest}" for name, digest in sorted(digests.items())), *notes])


def class_name(thing: object) -> str:
    """Returns the name of something's class, with its package."""
    package = re.match(r"(overpaint\.)?\w+", type(thing).__module__)
    return f"{package[0] if package else ''}.{type(thing).__qualname__}"


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Returns the settings of a scheduler of diffusers, without those about its file."""
    return {name: value for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}


def guard_of(holder: object) -> str | None:
    """Returns what keeps something out of a policy's pictures or a UNet's, with its settings; None for nothing."""
    guard = getattr(holder, "guard", None)
    return None if guard is None else repr(getattr(guard, "guard", guard))  # what is attached to a pipeline wraps it


def _adapters(network: nn.Module) -> list[tuple[str, Any]]:
    """Returns the layers of a network that peft has given adapters, with their names."""
    if not getattr(network, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = network.named_modules()
    return [(name, one) for name, one in modules if isinstance(one, BaseTunerLayer) and isinstance(one.scaling, dict)]


def library_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Returns the versions of Python and of those of the libraries that are installed."""
    versions = {"python": platform.python_version()}
    for name in libraries:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
