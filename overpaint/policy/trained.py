"""The weights that training may change, and the way back to what they were."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .guidance import SamplingGuard
from .lora_files import LoRAFormat, base_hashes, read_lora, save_lora
from .parts import UNet
from .weights import LoRAConfig, attach_lora, merge_lora, plain_name, select_parameters


class TrainedWeights:
    """Chooses what of a frozen UNet is trained: a fresh LoRA, a named set of its own parameters, or nothing.

    Args:
        unet: Frozen; a LoRA is attached to it.
        lora: The LoRA to train.
        names: The named parameter set to train, see `PARAMETER_SETS`.

    Raises:
        ValueError: Both are given, or `names` for a UNet in half precision.
    """

    def __init__(self, unet: UNet, lora: LoRAConfig | None, names: str | None) -> None:
        if lora is not None and names is not None:
            raise ValueError(f"lora and train exclude each other, got {lora} and train={names!r}")
        self.unet = unet
        self.lora = lora
        self.parameters: dict[str, nn.Parameter] = {}
        if names is not None:
            self.parameters = select_parameters(unet, names)
            for name, parameter in self.parameters.items():
                if parameter.dtype != torch.float32:
                    raise ValueError(
                        f"train={names!r} needs weights in float32, as half precision loses small updates, got "
                        f"{name} in {parameter.dtype}; a training run can still compute in half precision"
                    )
                parameter.requires_grad_(True)
        if lora is not None:
            self._attach(lora)
        self._reference: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._at_reference = False
        self._base: dict[str, str] | None = None
        """Hashes of the weights beneath the LoRA, where they are spread over processes and can no longer be read."""
        self.remember()

    def state(self) -> dict[str, Tensor]:
        """Returns a copy of the weights, by their names in the UNet."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `state` gave.

        Raises:
            ValueError: The names or a shape differ; nothing is changed then.
        """
        differing = sorted(state.keys() ^ self.parameters.keys())
        if differing:
            raise ValueError(f"the state must hold the trained parameters and no others, differs in {differing[:3]}")
        for name, parameter in self.parameters.items():
            if state[name].shape != parameter.shape:
                expected, got = tuple(parameter.shape), tuple(state[name].shape)
                raise ValueError(f"{name} must have shape {expected}, got {got}")
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        torch.clear_autocast_cache()

    def remember(self, others: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Makes the present weights the reference; they are copied to the CPU's memory unless a LoRA is trained.

        Args:
            others: Values that some of the UNet's weights, trained or not, have in the reference instead of the present
                ones, by their plain names.

        Raises:
            ValueError: The UNet lacks one of them, or it has another shape; the reference stays what it was.
        """
        values = {} if self.lora is not None else {name: value.cpu() for name, value in self.state().items()}
        known = {plain_name(name): value for name, value in self.unet.named_parameters()} if others else self.parameters
        for name, value in others.items():
            if name not in known or known[name].shape != value.shape:
                found = "which the UNet lacks" if name not in known else f"not {tuple(known[name].shape)}"
                raise ValueError(f"the reference's {name} must fit the UNet, got shape {tuple(value.shape)}, {found}")
        self._reference = {name: (known[name], value) for name, value in {**values, **others}.items()}

    @contextmanager
    def at_reference(self) -> Generator[None, None, None]:
        """Puts the reference in place, without gradients: the LoRA is switched off, and weights change places."""
        with torch.no_grad():
            if self._at_reference:
                yield
                return
            self._at_reference = True
            present = [(parameter, parameter.data) for parameter, _ in self._reference.values()]
            try:
                if self.lora is not None:
                    self.unet.disable_adapters()
                _put([(parameter, value.to(parameter)) for parameter, value in self._reference.values()])
                yield
            finally:
                self._at_reference = False
                _put(present)
                if self.lora is not None:
                    self.unet.enable_adapters()

    @contextmanager
    def at(self, state: Mapping[str, Tensor]) -> Generator[None, None, None]:
        """Puts other trained weights in place, all of them and by name, without gradients."""
        present = [(parameter, parameter.data) for parameter in self.parameters.values()]
        with torch.no_grad():
            try:
                _put([(parameter, state[name].to(parameter)) for name, parameter in self.parameters.items()])
                yield
            finally:
                _put(present)

    def save_lora(self, path: str | Path, format: LoRAFormat, guard: SamplingGuard | None) -> None:
        """Writes the LoRA; arguments and errors as in `lora_files.save_lora`.

        Raises:
            ValueError: There is no LoRA.
        """
        save_lora(self.unet, path, self._lora(), format, guard, base=self._base)

    def load_lora(
        self, path: str | Path, guard: SamplingGuard | None, *, check_base: bool, drop_text_encoder: bool
    ) -> None:
        """Reads a file into the LoRA; where nothing is trained yet, a LoRA of the file's settings is made.

        Raises:
            ValueError: A named set is trained, or the file is none of a LoRA for this UNet, or of other settings than
                the LoRA's, or learned on other weights; nothing is changed then.
        """
        if self.parameters:
            self._lora()
        found = read_lora(path, self.unet, drop_text_encoder=drop_text_encoder)
        if check_base:
            found.check_base(self.unet, guard)
        if self.lora is None:
            self._attach(found.config)
            self.lora = found.config
        found.put_into(self.unet, self._lora())

    def shard(
        self, blocks: Sequence[nn.Module], processes: int, device: torch.device, guard: SamplingGuard | None
    ) -> None:
        """Spreads the frozen weights over processes with torch's `fully_shard`, block by block; once is enough.

        Raises:
            ValueError: There is no LoRA, which alone stays whole.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._lora()
        if self._base is not None:
            return
        self._base = base_hashes(self.unet, guard)
        mesh, whole = init_device_mesh(device.type, (processes,)), set(self.parameters.values())
        for module in (*blocks, self.unet):
            fully_shard(module, mesh=mesh, ignored_params=whole, reshard_after_forward=True)

    def check_whole(self) -> None:
        """Checks that the network's own weights are all in this process; a `ValueError` where they are sharded."""
        if self._base is not None:
            raise ValueError("the network must be whole to be copied or saved, and is sharded: save its LoRA")

    def merge_lora(self) -> None:
        """Adds the LoRA into the UNet's own weights; nothing is trained any more.

        Raises:
            ValueError: There is no LoRA.
        """
        self._lora()
        self.check_whole()
        merge_lora(self.unet)
        self.lora = None
        self.parameters = {}

    def _attach(self, lora: LoRAConfig) -> None:
        attach_lora(self.unet, lora)
        self.parameters = {name: value for name, value in self.unet.named_parameters() if value.requires_grad}

    def _lora(self) -> LoRAConfig:
        if self.lora is None:
            raise ValueError("the policy must have a LoRA, and this one was made without; pass lora=LoRAConfig()")
        return self.lora


def _put(values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Puts tensors in the parameters' place.

    Autocast keeps its half-precision copy of a weight by the parameter, not by what is in it, and has to forget it
    whenever that changes.
    """
    for parameter, value in values:
        parameter.data = value
    if values:
        torch.clear_autocast_cache()
