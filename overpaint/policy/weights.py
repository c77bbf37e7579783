"""What of a UNet is trained, and how what was learned is kept: parameter sets, LoRA, differences of weights.

Names of parameters are those of the bare UNet everywhere; where peft has wrapped a layer, its `.base_layer` is left
out of the name.
"""

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from overpaint.settings import Field, Seed, settings
from overpaint.text_files import read_json_object

from .added import is_added
from .atomic import atomic_file, write_text
from .parts import UNet
from .weight_files import SafeTensors

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Endings of the names of every projection of both attentions of a UNet."""

ADAPTER = "default"
"""Name of the one LoRA adapter."""

MAGNITUDE = "lora_magnitude_vector"
"""Name of the part of a layer that has DoRA's norms."""

DELTA_NAME, DELTA_FORMAT = "weight_delta", "overpaint.WeightDelta/1"


@settings
class LoRAConfig:
    """A low-rank adapter on the UNet (Hu et al. 2021, https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(4, ge=1)
    """Rank of each update. Source: 4 in kvablack/ddpo-pytorch and in diffusers' text-to-image LoRA example."""

    alpha: float = Field(4.0, gt=0)
    """The update is scaled by alpha / rank."""

    targets: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(None, min_length=1)
    """Endings of the names of the layers that get an update; None is every projection of attention, as the family of
    models names them."""

    seed: Seed = 0
    """Seed of the random half of the update; the other half starts at zero."""

    dora: bool = False
    """Learns the norm of each output's weights apart from their direction, which the low-rank update turns: DoRA (Liu
    et al. 2024, https://arxiv.org/abs/2402.09353), as peft computes it."""


def _is_cross_attention(name: str) -> bool:
    return ".attn2." in name


def _is_neither_cross_attention_nor_time_nor_output(name: str) -> bool:
    # "time_emb_proj" of the residual blocks does not match and is trained, as in the source.
    return not (_is_cross_attention(name) or "time_embed" in name or name.startswith(("conv_out.", "conv_norm_out.")))


def _is_norm(name: str) -> bool:
    return "norm" in name


PARAMETER_SETS: dict[str, Callable[[str], bool]] = {
    "xattn": _is_cross_attention,
    "xattn-kv": lambda name: _is_cross_attention(name) and (".to_k." in name or ".to_v." in name),
    "selfattn": lambda name: ".attn1." in name,
    "noxattn": _is_neither_cross_attention_nor_time_nor_output,
    "attn": lambda name: _is_cross_attention(name) or ".attn1." in name,
    "full": lambda name: True,
    "noxattn-layers": lambda name: not _is_cross_attention(name) and not _is_norm(name),
    "layers": lambda name: not _is_norm(name),
    "added": lambda name: False,
}
"""Which of a UNet's own parameters each named set holds; "added" is what `overpaint.policy.added` has put beside them.

Source of the names: rohitgandikota/erasing, whose newer code takes linear and convolutional layers only, which are
"noxattn-layers" (esd-u) and "layers" (esd-all) here; "attn" is nupurkmr9/concept-ablation's.
"""


TEXT_PROJECTIONS = (".add_q_proj.", ".add_k_proj.", ".add_v_proj.", ".to_add_out.")
"""What the names of the projections of the text's tokens hold in joint attention."""

TRANSFORMER_SETS: dict[str, Callable[[str], bool]] = {
    "attn": lambda name: ".attn." in name or ".attn2." in name,
    "text-attn": lambda name: any(part in name for part in TEXT_PROJECTIONS),
    "full": lambda name: True,
    "layers": lambda name: not _is_norm(name),
}
"""The same of a flow transformer, whose attention is joint: "text-attn" is what it does with the text's tokens."""


def is_transformer(network: nn.Module) -> bool:
    """Tells a flow transformer from a UNet."""
    return type(network).__name__.endswith("Transformer2DModel")


def plain_name(name: str) -> str:
    """Returns a parameter's name without the mark of a layer that peft has wrapped."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    """Tells whether a parameter belongs to a LoRA."""
    return any(f".{part}." in name for part in ("lora_A", "lora_B", MAGNITUDE))


def base_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the UNet's own parameters by their plain names, without those of a LoRA or of added networks."""
    return {
        plain_name(name): parameter
        for name, parameter in unet.named_parameters()
        if not is_lora(name) and not is_added(name)
    }


def select_parameters(unet: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Returns the parameters of a named set, by their plain names.

    Raises:
        ValueError: There is no such set, or this network has nothing in it.
    """
    if name not in PARAMETER_SETS and name not in TRANSFORMER_SETS:
        raise ValueError(f"the parameter set must be one of {', '.join(PARAMETER_SETS)}, got {name!r}")
    sets = TRANSFORMER_SETS if is_transformer(unet) else PARAMETER_SETS
    if name not in sets:
        kind = type(unet).__name__
        raise ValueError(f"the parameter set {name!r} must be one of the model's, and a {kind} has {', '.join(sets)}")
    if name == "added":
        chosen = {key: value for key, value in unet.named_parameters() if is_added(key)}
    else:
        chosen = {key: value for key, value in base_parameters(unet).items() if sets[name](key)}
    if not chosen:
        raise ValueError(f"the parameter set {name!r} must not be empty, and this UNet has nothing in it")
    return chosen


def attach_lora(unet: UNet, config: LoRAConfig) -> None:
    """Puts a fresh LoRA on a frozen UNet; what the UNet computes stays the same to the last bit.

    With DoRA it stays the same up to rounding: its norms are multiplied in and divided out again. The LoRA's weights
    are float32 even on a half-precision UNet, and the random ones are drawn on the CPU from the configuration's seed:
    every process and device starts from the same numbers.
    """
    import peft

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # ty: ignore[invalid-argument-type]  peft says int and takes any number
        target_modules=list(config.targets or ATTENTION),
        init_lora_weights="gaussian",
        use_dora=config.dora,
    )
    with torch.random.fork_rng(devices=[]):
        unet.add_adapter(settings, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if is_lora(name):
                parameter.data = parameter.data.float()
                if ".lora_A." in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / config.rank)
        for layer in lora_layers(unet).values():  # peft rounds the norms to the precision of the weights
            if _has_magnitude(layer):
                layer.lora_magnitude_vector[ADAPTER].weight.copy_(_norms(layer))


@torch.no_grad()
def merged_state(unet: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns the weights of a plain UNet that computes the same: base weights, with any LoRA added in.

    Args:
        unet: With a LoRA or without.
        dtype: Precision of the weights, to which sums are rounded once; None leaves each as it is. Tensors that no
            LoRA touches and that have it already share memory with the UNet's.
    """
    state: dict[str, Tensor] = {name: value.detach() for name, value in base_parameters(unet).items()}
    state |= {plain_name(name): value for name, value in unet.named_buffers()}
    for name, update in lora_updates(unet):
        state[name] = (state[name].float() + update).to(dtype or state[name].dtype)
    return state if dtype is None else {name: value.to(dtype) for name, value in state.items()}


@torch.no_grad()
def merge_lora(unet: UNet) -> None:
    """Adds the LoRA into the UNet's own weights and takes it off."""
    merged = merged_state(unet)
    for name, parameter in base_parameters(unet).items():
        parameter.copy_(merged[name])
    torch.clear_autocast_cache()
    unet.unload_lora()


def lora_layers(unet: nn.Module) -> dict[str, Any]:
    """Returns the layers that peft has wrapped, by their plain names."""
    if not getattr(unet, "peft_config", None):
        return {}
    from peft.tuners.lora import LoraLayer

    return {plain_name(name): module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def lora_updates(unet: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gives by how much a LoRA changes each weight, by the weight's plain name; with gradient where it is enabled.

    DoRA's change is m (V + BA) / |V + BA| - V over each output's weights, where the norm in the denominator carries no
    gradient, as in training (equation 5 and section 4.3 of its paper).
    """
    for name, layer in lora_layers(unet).items():
        update = layer.get_delta_weight(ADAPTER).float()
        if _has_magnitude(layer):
            weight = layer.base_layer.weight.float()
            scale = layer.lora_magnitude_vector[ADAPTER].weight / _norms(layer, update).detach()
            scale = scale.view(-1, *[1] * (weight.ndim - 1))
            update = (scale - 1) * weight + scale * update
        yield f"{name}.weight", update


def _has_magnitude(layer: Any) -> bool:
    return ADAPTER in layer.lora_magnitude_vector


def _norms(layer: Any, update: Tensor | None = None) -> Tensor:
    """Returns the norms of a layer's weights for each output, with an update added or without, in DoRA's shape."""
    weight = layer.base_layer.weight.float()
    magnitude = layer.lora_magnitude_vector[ADAPTER]
    return magnitude.get_weight_norm(weight, torch.zeros_like(weight) if update is None else update, scaling=1)


@contextmanager
def _norms_in_proportion(layer: Any) -> Generator[None]:
    """Multiplies DoRA's norms, where a layer has them, by how those of its weights grow within the `with` block."""
    if layer is None or not _has_magnitude(layer):
        yield
        return
    before = _norms(layer)
    yield
    layer.lora_magnitude_vector[ADAPTER].weight.mul_(_norms(layer) / before)


@dataclass(frozen=True)
class WeightDelta:
    """How a UNet's weights were changed: for each changed parameter, the difference to add."""

    tensors: dict[str, Tensor]
    """Differences by plain parameter name; float32, on the CPU."""

    @classmethod
    def between(cls, before: Mapping[str, Tensor], after: nn.Module) -> "WeightDelta":
        """Returns what leads from a state to a UNet, over the parameters that differ.

        Args:
            before: The earlier weights by plain name, such as `merged_state` of a copy; others are left out.
            after: The changed UNet; a LoRA that it carries counts.
        """
        changed = {}
        for name, value in merged_state(after).items():
            if name in before and not torch.equal(before[name].to(value.device), value):
                changed[name] = value.float().cpu() - before[name].float().cpu()
        return cls(changed)

    @torch.no_grad()
    def apply(self, unet: nn.Module, scale: float = 1.0) -> None:
        """Adds `scale` times the differences to the UNet's own weights, in place; -1 takes them back.

        A LoRA stays on top. The norms that DoRA has learned grow as those of the weights beneath do: else they would
        undo part of the change, and one that is fresh would no longer be without effect.

        Raises:
            ValueError: The UNet lacks a parameter, or has it in another shape; nothing is changed then.
        """
        parameters = base_parameters(unet)
        for name, difference in self.tensors.items():
            if name not in parameters:
                raise ValueError(f"the UNet must have every parameter of the weight delta, and lacks {name!r}")
            if parameters[name].shape != difference.shape:
                expected, got = tuple(difference.shape), tuple(parameters[name].shape)
                raise ValueError(f"{name!r} must have the weight delta's shape {expected}, got {got}")
        layers = {f"{name}.weight": layer for name, layer in lora_layers(unet).items()}
        for name, difference in self.tensors.items():
            parameter = parameters[name]
            with _norms_in_proportion(layers.get(name)):
                parameter.copy_(parameter.float() + scale * difference.to(parameter.device))
        torch.clear_autocast_cache()

    @contextmanager
    def applied(self, unet: nn.Module) -> Generator[None]:
        """Adds the differences for the length of a `with` block and puts back the very bits that were there."""
        named = {plain_name(name): value for name, value in unet.named_parameters()}
        norms = (f"{name.removesuffix('.weight')}.{MAGNITUDE}.{ADAPTER}.weight" for name in self.tensors)
        before = {name: named[name].detach().clone() for name in (*self.tensors, *norms) if name in named}
        self.apply(unet)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    named[name].copy_(value)
            torch.clear_autocast_cache()

    def save(self, folder: str | Path) -> None:
        """Writes the differences as safetensors, and their names and shapes as JSON."""
        save_parameters(Path(folder), DELTA_NAME, self.tensors, DELTA_FORMAT)

    @classmethod
    def load(cls, folder: str | Path) -> "WeightDelta":
        """Reads what `save` wrote.

        Raises:
            ValueError: The folder holds no weight delta, or its two files disagree.
        """
        return cls(load_parameters(Path(folder), DELTA_NAME, DELTA_FORMAT))


def save_parameters(folder: Path, name: str, tensors: Mapping[str, Tensor], record_format: str) -> None:
    """Writes parameters into a folder: `<name>.safetensors`, and their names and shapes in `<name>.json`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"{name}.safetensors") as partial:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
    record = {"format": record_format, "parameters": _shapes(tensors)}
    write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")


def load_parameters(folder: Path, name: str, record_format: str) -> dict[str, Tensor]:
    """Reads what `save_parameters` wrote.

    Raises:
        ValueError: A file is missing or of another format, or the two disagree.
    """
    tensor_file, record_file = f"{name}.safetensors", f"{name}.json"
    for file in (tensor_file, record_file):
        if not (folder / file).is_file():
            raise ValueError(f"the folder must hold {file}, and {folder} does not")
    record = read_json_object(folder / record_file)
    if record.get("format") != record_format:
        raise ValueError(f"{record_file} must be of format {record_format!r}, got {record.get('format')!r}")
    tensors = dict(SafeTensors([folder / tensor_file]))
    if _shapes(tensors) != record["parameters"]:
        raise ValueError(f"{tensor_file} must hold the parameters that {record_file} lists, in {folder}")
    return tensors


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
