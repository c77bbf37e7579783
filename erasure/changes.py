"""What an erasure does to a model: the three kinds of change, behind one protocol.

| kind | what it is | methods |
|---|---|---|
| `WeightChange` | differences that are added to the UNet's weights | AC, ANT, ESD, MACE, SA, UCE |
| `AddedNetworks` | small networks beside the UNet's cross-attentions | Receler |
| `GuardChange` | another way to sample, no weights | SAFREE, SLD |
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy, WeightDelta
from overpaint.policy.digest import tensors_hash
from overpaint.policy.parts import Pipeline, network_of
from overpaint.policy.weights import base_parameters


@runtime_checkable
class Change(Protocol):
    """A change that can be kept, carried and applied."""

    kind: ClassVar[str]
    """Its name in `KINDS`."""

    def apply(self, policy: DiffusionPolicy) -> None:
        """Changes a policy in place.

        Raises:
            ValueError: The change does not fit the policy; nothing is changed then.
        """
        ...

    def apply_to_pipeline(self, pipeline: Pipeline) -> None:
        """Changes a plain diffusers pipeline in place, so that it draws what the policy draws."""
        ...

    def applied(self, policy: DiffusionPolicy) -> AbstractContextManager[None]:
        """Changes a policy for the length of a `with` block, then makes it what it was, to the bit."""
        ...

    def original(self, unet: nn.Module) -> dict[str, Tensor]:
        """Returns the weights that undo the change where they stand in the changed UNet, of one not yet changed."""
        ...

    def base(self, unet: nn.Module) -> str | None:
        """Returns the hash of the weights that the change builds on; None where any will do."""
        ...

    def save(self, folder: Path) -> None:
        """Writes everything into a folder that exists."""
        ...

    @classmethod
    def load(cls, folder: Path) -> "Change":
        """Reads what `save` wrote."""
        ...


KINDS: dict[str, type[Change]] = {}
"""The class of each kind of change, by the name that a saved erasure has for it; `change_kind` adds to it."""

AnyClass = TypeVar("AnyClass", bound=type)


def change_kind(cls: AnyClass) -> AnyClass:
    """Makes a class one of `KINDS`, the only ones that a saved erasure can name."""
    change: Any = cls
    KINDS[change.kind] = change
    return cls


@change_kind
@dataclass(frozen=True)
class WeightChange:
    """Differences that are added to the UNet's weights."""

    delta: WeightDelta
    """The differences."""

    kind: ClassVar[str] = "weights"

    def apply(self, policy: DiffusionPolicy) -> None:
        """Adds the differences; from then on the changed policy is its reference. A LoRA stays on top."""
        self.delta.apply(policy.model)
        policy.remember_reference()

    def apply_to_pipeline(self, pipeline: Pipeline) -> None:
        """Adds the differences."""
        self.delta.apply(network_of(pipeline))

    def applied(self, policy: DiffusionPolicy) -> AbstractContextManager[None]:
        """Adds the differences and puts back the very bits that were there; the reference is not touched."""
        return self.delta.applied(policy.model)

    def original(self, unet: nn.Module) -> dict[str, Tensor]:
        """Returns copies of the weights that will be changed, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in _own_weights(unet, self.delta.tensors).items()}

    def base(self, unet: nn.Module) -> str:
        """Returns the hash of the weights that are changed."""
        return weights_hash(unet, self.delta.tensors)

    def save(self, folder: Path) -> None:
        """Writes the weight delta."""
        self.delta.save(folder)

    @classmethod
    def load(cls, folder: Path) -> "WeightChange":
        """Reads the weight delta."""
        return cls(WeightDelta.load(folder))


def weights_hash(unet: nn.Module, names: Iterable[str]) -> str:
    """Returns the SHA-256 of some of a UNet's own weights, by their plain names, in the precision that they have.

    Raises:
        ValueError: The UNet lacks one.
    """
    return tensors_hash(_own_weights(unet, names))


def _own_weights(unet: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    parameters = base_parameters(unet)
    names = set(names)
    if missing := sorted(names - parameters.keys()):
        raise ValueError(f"the UNet must have every parameter that the erasure changes, and lacks {missing[0]!r}")
    return {name: parameters[name] for name in names}
