"""Adapters on cross-attentions ("erasers"): residual networks that are trained, saved and applied on their own."""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from erasure.changes import change_kind, weights_hash
from erasure.methods.attention_maps import cross_attentions
from overpaint.policy import DiffusionPolicy
from overpaint.policy.added import CHILD, add_networks, added_networks, remove_networks
from overpaint.policy.parts import Pipeline, UNet
from overpaint.policy.weights import base_parameters, load_parameters, save_parameters

FILE_NAME, FILE_FORMAT = "erasers", "overpaint.Erasers/1"


class Eraser(nn.Module):
    """Adds `up(GELU(down(x)))` to what a cross-attention gives, of `width` channels; nothing before it is trained."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, output: Float[Tensor, "batch pixels width"]) -> Float[Tensor, "batch pixels width"]:
        """Returns what is added."""
        return self.up(nn.functional.gelu(self.down(output)))


def fresh_erasers(unet: nn.Module, rank: int, seed: int) -> dict[str, Eraser]:
    """Returns an eraser for every cross-attention, by its name; the random half follows from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: Eraser(_width(layer), rank) for name, layer in cross_attentions(unet).items()}


def check_free(unet: nn.Module) -> None:
    """Raises a `ValueError` where something was added to a UNet already."""
    if added := added_networks(unet):
        raise ValueError(
            f"erasers must be the first networks that are added to a UNet, and this one has {len(added)}; to erase a "
            "second concept with erasers, erase both at once, as one concept with the phrases of both"
        )


@contextmanager
def recorded_erasers(unet: nn.Module) -> Generator[dict[str, Tensor]]:
    """Within the `with` block, keeps what the erasers gave in the last call of the UNet, by their layers' names."""
    record: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        record[name] = output

    with ExitStack() as hooks:
        for name, network in added_networks(unet).items():
            hooks.enter_context(network.register_forward_hook(partial(note, name)))
        yield record


@change_kind
@dataclass(frozen=True)
class AddedNetworks:
    """Erasers beside a UNet's cross-attentions. The UNet's own weights stay as they are."""

    tensors: dict[str, Tensor]
    """Weights of the erasers, by their names in the UNet without `added`; float32, on the CPU."""

    kind: ClassVar[str] = "added-networks"

    @classmethod
    def of(cls, unet: nn.Module) -> "AddedNetworks":
        """Returns a copy of the erasers that a UNet has."""
        return cls(
            {
                f"{layer}.{name}": value.detach().float().cpu().clone()
                for layer, eraser in added_networks(unet).items()
                for name, value in eraser.state_dict().items()
            }
        )

    def apply(self, policy: DiffusionPolicy) -> None:
        """Adds the erasers, frozen; from then on they are part of the policy's reference. A LoRA stays on top."""
        add_networks(policy.unet, self._networks(policy.unet))

    def apply_to_pipeline(self, pipeline: Pipeline) -> None:
        """Adds the erasers. A folder that the pipeline is saved in is without them."""
        add_networks(pipeline.unet, self._networks(pipeline.unet))

    @contextmanager
    def applied(self, policy: DiffusionPolicy) -> Generator[None]:
        """Adds the erasers and takes them off again."""
        self.apply(policy)
        try:
            yield
        finally:
            remove_networks(policy.unet)

    def original(self, unet: nn.Module) -> dict[str, Tensor]:
        """Returns erasers that add zero."""
        halves = [(layer, name) for layer in self._layers() for name in ("up.weight", "up.bias")]
        return {f"{layer}.{CHILD}.{name}": torch.zeros_like(self.tensors[f"{layer}.{name}"]) for layer, name in halves}

    def base(self, unet: nn.Module) -> str:
        """Returns the hash of the cross-attentions that the erasers read."""
        layers = tuple(f"{layer}." for layer in self._layers())
        return weights_hash(unet, [name for name in base_parameters(unet) if name.startswith(layers)])

    def save(self, folder: Path) -> None:
        """Writes the weights as safetensors, and their names and shapes as JSON."""
        save_parameters(folder, FILE_NAME, self.tensors, FILE_FORMAT)

    @classmethod
    def load(cls, folder: Path) -> "AddedNetworks":
        """Reads what `save` wrote.

        Raises:
            ValueError: The folder holds no erasers, or its two files disagree.
        """
        return cls(load_parameters(folder, FILE_NAME, FILE_FORMAT))

    def _layers(self) -> list[str]:
        return sorted({name.rsplit(".", 2)[0] for name in self.tensors})

    def _networks(self, unet: UNet) -> dict[str, nn.Module]:
        """Returns the erasers, on the UNet's device and in its precision.

        Raises:
            ValueError: They do not fit the UNet, or it has some already.
        """
        check_free(unet)
        found = cross_attentions(unet)
        networks: dict[str, nn.Module] = {}
        for name in self._layers():
            if name not in found:
                raise ValueError(f"the UNet must have every cross-attention that an eraser is for, and lacks {name!r}")
            rank, width = self.tensors[f"{name}.down.weight"].shape
            if width != _width(found[name]):
                raise ValueError(f"{name!r} must have the eraser's {width} channels, got {_width(found[name])}")
            with torch.device("meta"):
                eraser = Eraser(width, rank)
            # Copied, so that training the model's erasers would not change the erasure.
            state = {key: self.tensors[f"{name}.{key}"].clone() for key in eraser.state_dict()}
            eraser.load_state_dict(state, assign=True)
            networks[name] = eraser.to(unet.conv_in.weight).requires_grad_(False).eval()
        return networks


def _width(layer: Any) -> int:
    """Returns the channels of what a cross-attention gives."""
    return layer.to_out[0].out_features
