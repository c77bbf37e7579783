"""Which model drew a folder's images, and how: `<root>/<model>/model.json`, written before the first of them.

A folder that another model began is refused, so that no folder ever holds images of two.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import write_text
from overpaint.policy.digest import tensors_hash

from .plan import DrawConfig

RECORD = "model.json"
LIBRARIES = ("overpaint", "torch", "diffusers", "transformers", "peft", "pillow")


@runtime_checkable
class Described(Protocol):
    """Something that draws and can say what decides its images."""

    def description(self) -> Mapping[str, Any]:
        """Returns its class, the hash of its weights, its scheduler and the like, as JSON can hold them."""
        ...


def model_record(drawable: object, config: DrawConfig) -> dict[str, Any]:
    """Returns what decides the images that something draws, and the versions of the libraries that it draws with.

    Whatever is neither a `DiffusionPolicy` nor `Described` is known by its class alone.
    """
    if isinstance(drawable, DiffusionPolicy):
        description = _describe_policy(drawable)
    elif isinstance(drawable, Described):
        description = dict(drawable.description())
    else:
        description = {"class": class_name(drawable), "weights": None}
    libraries = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    record = {"format": 1, **description, "drawing": asdict(config), "libraries": libraries}
    return json.loads(json.dumps(record, default=str))


def keep_record(folder: Path, record: Mapping[str, Any], *, writer: str = "") -> None:
    """Writes `model.json` into a folder that has no images, or checks that the one that is there says the same.

    Versions of libraries may differ: a run may go on after an upgrade.

    Raises:
        ValueError: The folder holds images of another model, or images of which nothing is known.
        OSError: The file cannot be written.
    """
    path = folder / RECORD
    # Looked at before the record: another process may be writing that and the first images just now.
    has_images = next(folder.glob("*.png"), None) is not None
    if not path.exists():
        if has_images:
            raise ValueError(
                f"model: {folder} must be empty or hold {RECORD}, got images without; "
                "choose another model name or folder"
            )
        write_text(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n", writer=writer)
        return
    there = read_record(folder)
    for name in (*record, *there):
        if name != "libraries" and there.get(name) != record.get(name):
            raise ValueError(
                f"model: {folder} was drawn by another model, with {name} {there.get(name)!r}, got "
                f"{record.get(name)!r}; choose another model name or folder"
            )


def read_record(folder: Path | str) -> dict[str, Any]:
    """Reads which model drew the images of a folder.

    Raises:
        ValueError: The folder does not say, or not in a way that can be read.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"folder must hold {RECORD}, which `generate` writes, got {folder} with {error!r}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} must hold an object, got {type(record).__name__}")
    return record


def weights_digest(networks: Mapping[str, nn.Module]) -> str:
    """Returns the SHA-256 of all weights of networks, adapters and how strongly they act included.

    Raises:
        ValueError: Weights are not in memory, as with diffusers' sequential offloading.
    """
    tensors: dict[str, Tensor] = {}
    adapters: list[str] = []
    for part, network in sorted(networks.items()):
        values = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
        if absent := sorted(name for name, value in values.items() if value.is_meta):
            raise ValueError(f"the weights of {part} must be in memory to tell models apart, got {absent[0]} on meta")
        tensors |= {f"{part}.{name}": value for name, value in values.items()}
        adapters += [f"{part}.{name} {settings}" for name, settings in _adapters(network)]
    return tensors_hash(tensors, adapters)


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Returns the settings of a scheduler of diffusers, without those about its file."""
    return {name: value for name, value in sorted(scheduler.config.items()) if not name.startswith("_")}


def class_name(thing: object) -> str:
    """Returns the name of something's class, with its package."""
    return f"{type(thing).__module__.split('.')[0]}.{type(thing).__qualname__}"


def safeguard_of(holder: object) -> str | None:
    """Returns what keeps something out of a policy's pictures or a UNet's, with its settings; None for nothing."""
    guard = getattr(holder, "guard", None)
    if guard is None:
        return None
    inner = getattr(guard, "guard", guard)  # what is attached to a pipeline wraps it
    return repr(inner)


def _describe_policy(policy: DiffusionPolicy) -> dict[str, Any]:
    networks = {"unet": policy.unet, "vae": policy.vae, "text_encoder": policy.text_encoder}
    return {
        "class": class_name(policy),
        "weights": weights_digest(networks),
        "scheduler": {"class": "DDIM", **settings_of(policy.scheduler)},
        "guard": safeguard_of(policy),
        "safety_checker": "none",
    }


def _adapters(network: nn.Module) -> list[tuple[str, str]]:
    """Returns what decides how adapters of peft act, besides their weights."""
    if not getattr(network, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (name, f"{sorted(layer.scaling.items())} {layer.active_adapters} {layer.disable_adapters}")
        for name, layer in network.named_modules()
        if isinstance(layer, BaseTunerLayer) and isinstance(layer.scaling, dict)
    ]
