"""LoRAs in files: those of diffusers, peft and kohya are read, those of diffusers and kohya are written.

Names are brought to peft's by diffusers' own converters. The SHA-256 of the UNet beneath goes into the file's header,
where diffusers and others pass over it.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overpaint.text_files import parsed_json, read_json_object

from .atomic import atomic_file
from .digest import tensors_hash
from .guidance import SamplingGuard
from .parts import UNet
from .tensor_names import FOREIGN, is_lora_file, kind_of, without_wrappers
from .weight_files import WEIGHT_SUFFIXES, SafeTensors, flat_tensors, read_weights, state_dict_of
from .weights import ADAPTER, MAGNITUDE, LoRAConfig, is_lora, is_transformer, lora_layers, plain_name

LORA_FILE, KOHYA_FILE = "pytorch_lora_weights.safetensors", "lora.safetensors"
LORA_NAMES = (LORA_FILE, "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")
"""Names of a LoRA's file in a folder: those of diffusers, and those of peft."""

SETTINGS, BASE = "lora_adapter_metadata", "overpaint.base."
TEXT_ENCODER, KOHYA = "text_encoder", ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
DOWN, UP, NORMS = ".lora_A.weight", ".lora_B.weight", f".{MAGNITUDE}"

NOT_LOW_RANK = {"a LoHa": r"hada_w", "a LoKr": r"lokr_w"}
"""Relatives of a LoRA that are no product of two matrices, by what their names hold."""

MODELS = {kind: pattern for kind, pattern in FOREIGN.items() if kind != "a LoRA"}

UNET = "unet."

PLAIN_NAME = re.compile(r"\^?[\w.-]+")
"""Name of a layer, or its ending, as peft's patterns have them."""

LoRAFormat = Literal["diffusers", "kohya"]


@dataclass(frozen=True)
class LoRAFile:
    """The UNet's part of a LoRA's file."""

    path: Path
    config: LoRAConfig
    """The least settings under which a policy's LoRA can hold it, on the very layers that it is on."""
    tensors: dict[str, Tensor]
    """By peft's names without the adapter's; float32."""
    alphas: dict[str, float]
    """Alpha of each layer, by the layer's name."""
    base: dict[str, str]
    """Hash of the weights beneath, by the precision that they were rounded to; empty where the file does not say."""
    dropped: tuple[str, ...] = ()
    """Names of what the file has for the text encoder, which is left out."""

    def check_base(self, unet: nn.Module, guard: SamplingGuard | None = None) -> None:
        """Checks that a UNet is the one that the LoRA was learned on, under the same kind of guard.

        Raises:
            ValueError: The file says that it is another one.
        """
        found = base_hashes(unet, guard) if self.base else {}
        if self.base and not any(found.get(dtype) == value for dtype, value in self.base.items()):
            raise ValueError(
                f"the policy must be the model that the LoRA was learned on (SHA-256 {_short(self.base)}), got another "
                f"({_short(found)}) for {self.path}. What was recovered on an erased model belongs on that model only: "
                "on the original it would bring the concept back. Apply the erasure first; to load the LoRA all the "
                "same, pass check_base=False"
            )

    def differences(self) -> dict[str, Tensor]:
        """Returns what a LoRA adds to a UNet's weights, by parameter: alpha / rank · B A.

        Raises:
            ValueError: It is one with DoRA, which scales the weights as well.
        """
        if self.config.dora:
            raise ValueError(f"{self.path} must hold a plain LoRA, got a DoRA; merge it into its model")
        found = {}
        for layer, alpha in self.alphas.items():
            down, up = self.tensors[layer + DOWN], self.tensors[layer + UP]
            product = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
            found[f"{layer}.weight"] = alpha / len(down) * product
        return found

    def put_into(self, unet: nn.Module, config: LoRAConfig) -> None:
        """Puts the weights into the LoRA of a UNet, which has these settings.

        A layer of smaller rank than the others is filled up: with the random numbers that are there, times zeros.

        Raises:
            ValueError: Rank, alpha, DoRA or the layers differ; nothing is changed then.
        """
        import peft

        state = peft.get_peft_model_state_dict(unet, adapter_name=ADAPTER)
        wanted, layers = self.config, set(lora_layers(unet))
        differing = [name for name in ("rank", "alpha", "dora") if getattr(config, name) != getattr(wanted, name)]
        if differing or layers != self.alphas.keys():
            found = ", ".join(f"{name}={getattr(config, name)!r}" for name in differing) or f"{len(layers)} layers"
            raise ValueError(
                f"the policy's LoRA must be that of {self.path}, on {len(self.alphas)} layers: {wanted!r}; got {found}"
                ". A policy that was made without a LoRA takes the file's settings"
            )
        for layer, alpha in self.alphas.items():
            down, up = self.tensors[layer + DOWN], self.tensors[layer + UP]
            rank = len(down)
            state[layer + DOWN] = torch.cat([down, state[layer + DOWN][rank:].cpu()])
            rest = torch.zeros_like(state[layer + UP][:, rank:], device="cpu")
            # The same scale where all layers have it; then no number is changed.
            scale = (alpha / rank) / (config.alpha / config.rank) if (rank, alpha) != (config.rank, config.alpha) else 1
            state[layer + UP] = torch.cat([up * scale, rest], dim=1)
            if config.dora:
                state[layer + NORMS] = self.tensors[layer + NORMS]
        peft.set_peft_model_state_dict(unet, state, adapter_name=ADAPTER)
        torch.clear_autocast_cache()


def read_lora(path: str | Path, unet: UNet, *, drop_text_encoder: bool = False) -> LoRAFile:
    """Reads the UNet's part of a LoRA.

    Args:
        path: A file, or a folder with one of `LORA_NAMES`, with one `.safetensors` alone, or with one other file of
            weights. Files of other endings are read as PyTorch's, tensors only.
        unet: The UNet that it is for.
        drop_text_encoder: Whether to leave out what it has for the text encoder, which a policy cannot hold.

    Raises:
        ValueError: There is no such file, or it is no LoRA, or it is not for this UNet; or it has a part for the text
            encoder, which is not to be dropped.
    """
    file = _find(Path(path).expanduser())
    state, header = _load(file)
    named, alphas = _diffusers_names(file, state, unet)
    texts = tuple(name for name in named if name.startswith(TEXT_ENCODER))
    if texts and not drop_text_encoder:
        raise ValueError(
            f"a policy's LoRA must be on the UNet alone, and {file} has {len(texts)} tensors for the text encoder, "
            f"such as {texts[0]}; without them it draws something else. To leave them out, pass drop_text_encoder=True"
        )
    tensors = {name: value.float() for name, value in named.items() if name not in texts}
    layers = _layers(file, tensors, unet)
    prefix = f"{kind_of_network(unet)}."
    settings = {name.removeprefix(prefix): value for name, value in _header_settings(header, file).items()}
    if not settings and (beside := file.parent / "adapter_config.json").is_file():
        settings = read_json_object(beside)
    ranks = {layer: len(tensors[layer + DOWN]) for layer in layers}
    _check_settings(settings, file)
    found = {layer: alphas.get(layer, _alpha(settings, layer, ranks[layer])) for layer in layers}
    rank = max(ranks.values())
    if len(set(ranks.values())) == len(set(found.values())) == 1:
        alpha = next(iter(found.values()))
    else:
        alpha = rank * Counter(found[layer] / ranks[layer] for layer in layers).most_common(1)[0][0]
    config = LoRAConfig(
        rank=rank, alpha=alpha, targets=_targets(unet, layers), dora=any(n.endswith(NORMS) for n in tensors)
    )
    return LoRAFile(file, config, tensors, found, _base(header), texts)


def _header_settings(header: Mapping[str, str], file: Path) -> dict[str, Any]:
    """Returns what peft's settings a file's header holds, by their names with the network's before them."""
    settings = parsed_json(header.get(SETTINGS, "{}"), f"{SETTINGS} of {file}")
    if not isinstance(settings, dict):
        raise ValueError(f"{SETTINGS} of {file} must be an object, got {type(settings).__name__}")
    return settings


def recorded_base(path: str | Path) -> dict[str, str]:
    """Returns the hashes of the weights beneath that a LoRA's file or folder records, as `base_hashes` gives them.

    Raises:
        ValueError: There is no such file, or it cannot be read.
    """
    return _base(_load(_find(Path(path).expanduser()))[1])


def save_lora(
    unet: UNet,
    path: str | Path,
    config: LoRAConfig,
    format: LoRAFormat = "diffusers",
    guard: SamplingGuard | None = None,
    *,
    base: Mapping[str, str] | None = None,
) -> None:
    """Writes the UNet's LoRA, whole or not at all.

    Args:
        unet: With a LoRA.
        path: The file, where it ends in `.safetensors`; else its folder.
        config: The LoRA's settings.
        format: "diffusers" is what `StableDiffusionPipeline.load_lora_weights` takes, with peft's settings in the
            header. "kohya" is what A1111, ComfyUI and kohya's scripts take, and diffusers too.
        guard: What the LoRA was learned under; see `base_hashes`.
        base: What `base_hashes` gave of a network that is sharded by now; None asks it.

    Raises:
        ValueError: There is no such format, or it has no DoRA or is not for this kind of model.
    """
    import peft
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from safetensors.torch import save_file

    check_format(unet, config, format)
    header = {BASE + dtype: value for dtype, value in (base or base_hashes(unet, guard)).items()}
    state = peft.get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    if format == "diffusers":
        prefix = f"{kind_of_network(unet)}."
        # Of a transformer's LoRA diffusers reads peft's names, and leaves out without a word what has its own.
        named = convert_state_dict_to_diffusers(state) if prefix == UNET else state
        state = {prefix + name: value for name, value in named.items()}
        # Of peft's many settings only these, which diffusers reads: an older peft refuses what it does not know.
        settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": config.targets}
        settings |= {"use_dora": config.dora, "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {}}
        header[SETTINGS] = json.dumps({prefix + name: value for name, value in settings.items()})
    else:
        alpha = torch.tensor(config.alpha)
        state = convert_state_dict_to_kohya({UNET + name: value for name, value in state.items()})
        state = {name: alpha.clone() if name.endswith(".alpha") else value for name, value in state.items()}
        header |= {"ss_network_module": "networks.lora"}
        header |= {"ss_network_dim": str(config.rank), "ss_network_alpha": str(config.alpha)}
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / (LORA_FILE if format == "diffusers" else KOHYA_FILE)
    with atomic_file(file) as partial:
        tensors = {name: value.cpu().contiguous() for name, value in state.items()}
        save_file(tensors, partial, metadata={"format": "pt", **header})


def check_format(unet: nn.Module, config: LoRAConfig, format: LoRAFormat) -> None:
    """Checks that a LoRA can be saved in a format, before it is trained.

    Raises:
        ValueError: There is no such format, or kohya's is asked for a LoRA of another family or one with DoRA.
    """
    if format == "diffusers":
        return
    if format != "kohya":
        raise ValueError(f"the format of a LoRA must be diffusers or kohya, got {format!r}")
    if not is_stable_diffusion(unet):
        raise ValueError(
            "a LoRA must be saved in format 'diffusers', got 'kohya', for Stable Diffusion v1 and v2 alone"
        )
    if config.dora:
        raise ValueError("a LoRA with DoRA must be saved in format 'diffusers', got 'kohya', which few programs read")


def base_hashes(unet: nn.Module, guard: SamplingGuard | None = None) -> dict[str, str]:
    """Returns the SHA-256 of all weights beneath a UNet's LoRA, those of added networks included.

    They are rounded to a half precision first, once to each: one checkpoint, loaded in float32 and in half precision,
    has a hash in common with itself. Loaded in bfloat16 and in float16 it has none, since neither is a rounding of the
    other. A guard changes no weights but what is drawn: the name of its class counts too.
    """
    weights = {plain_name(name): value for name, value in unet.named_parameters() if not is_lora(name)}
    notes = () if guard is None else (type(guard).__name__,)
    return {
        str(dtype).removeprefix("torch."): tensors_hash(
            {}, (*(tensors_hash({name: weights[name].to(dtype)}) for name in sorted(weights)), *notes)
        )
        for dtype in (torch.bfloat16, torch.float16)
    }


def kind_of_network(network: nn.Module) -> Literal["unet", "transformer"]:
    """Returns what LoRAs' files and pipelines call a denoising network."""
    return "transformer" if is_transformer(network) else "unet"


def is_stable_diffusion(network: Any) -> bool:
    """Tells a UNet of Stable Diffusion v1 or v2 from other networks."""
    return kind_of_network(network) == "unet" and network.config.get("addition_embed_type") is None


def _base(header: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(BASE): value for name, value in header.items() if name.startswith(BASE)}


def lora_in(folder: Path) -> Path | None:
    """Returns the file of a folder that has a LoRA's name."""
    return next((folder / name for name in LORA_NAMES if (folder / name).is_file()), None)


def _find(path: Path) -> Path:
    """Returns the file at a path."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"a LoRA must be a file or a folder, got {path}")
    if named := lora_in(path):
        return named
    weights = [f for f in sorted(path.iterdir()) if f.suffix in WEIGHT_SUFFIXES and not f.name.startswith(".")]
    files = [file for file in weights if file.suffix == ".safetensors"] or weights
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"a LoRA's folder must hold {LORA_FILE} or one other .safetensors, and {path} holds {names}")
    return files[0]


def _load(file: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file and its header."""
    content = read_weights([file])
    header = content.header if isinstance(content, SafeTensors) else {}
    return flat_tensors(state_dict_of(content), file), header


def _diffusers_names(file: Path, state: Mapping[str, Tensor], unet: UNet) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns tensors by peft's names, and what alphas there are by layer; the text encoder's begin with its name."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_unet_state_dict_to_peft

    if other := kind_of(state, NOT_LOW_RANK):
        raise ValueError(f"{file} must hold a LoRA, got {other}; merge it into its model")
    if not is_lora_file(state):
        kind = kind_of(state, FOREIGN) or "something else"
        raise ValueError(f"{file} must hold a LoRA, got {kind}, with names such as {next(iter(state))}")
    alphas: dict[str, float] = {}
    if kind_of_network(unet) == "transformer":
        return _peft_names(file, state)
    if any(name.startswith(KOHYA) for name in state):
        if any("dora_scale" in name for name in state):
            raise ValueError(f"a LoRA with DoRA must be in diffusers' or peft's format, got kohya's: {file}")
        try:
            state, alphas = StableDiffusionPipeline.lora_state_dict(dict(state), unet_config=unet.config)
        except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:
            told = str(error)[:200]
            raise ValueError(f"diffusers must know every name of a LoRA of kohya's format, {file}: {told}") from error
    # In a model's own state dict, peft's names hold the adapter's too.
    names = {name: without_wrappers(name).replace(f".{ADAPTER}.", ".") for name in state}
    names = {name: plain.removesuffix(".weight") if NORMS in plain else plain for name, plain in names.items()}
    alphas = {without_wrappers(name): _number(value, name, file) for name, value in (alphas or {}).items()}
    alphas |= {names[n]: _number(v, n, file) for n, v in state.items() if n.endswith(".alpha")}
    tensors = {names[n]: value for n, value in state.items() if not n.endswith(".alpha")}
    # Of a layer that kohya's converter splits otherwise, the alpha has the name of a tensor in front.
    by_layer = convert_unet_state_dict_to_peft({name.removesuffix(".alpha"): value for name, value in alphas.items()})
    return convert_unet_state_dict_to_peft(tensors), {n.removesuffix(DOWN): v for n, v in by_layer.items()}


def _peft_names(file: Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Returns tensors by peft's names, and alphas by layer, of a transformer's LoRA, which has peft's names already."""
    if any(name.startswith(KOHYA) for name in state):
        raise ValueError(f"a transformer's LoRA must be in diffusers' or peft's format, got kohya's: {file}")
    names = {name: without_wrappers(name.removeprefix("transformer.")) for name in state}
    names = {name: plain.replace(f".{ADAPTER}.", ".") for name, plain in names.items()}
    alphas = {names[n].removesuffix(".alpha"): _number(v, n, file) for n, v in state.items() if n.endswith(".alpha")}
    return {names[n]: value for n, value in state.items() if not n.endswith(".alpha")}, alphas


def _layers(file: Path, tensors: dict[str, Tensor], unet: nn.Module) -> set[str]:
    """Returns the layers that a LoRA is on, checked against a UNet, and gives the tensors the shapes of its layers.

    A convolution of one pixel is a linear layer: either's LoRA is one for the other.
    """
    modules, noun = _modules(unet), "UNet" if kind_of_network(unet) == "unet" else "transformer"
    dora = any(name.endswith(NORMS) for name in tensors)
    layers: set[str] = set()
    for name in tensors:
        layer, ending = next(((name.removesuffix(e), e) for e in (DOWN, UP, NORMS) if name.endswith(e)), (name, ""))
        if not ending:
            raise ValueError(f"a LoRA must hold pairs of matrices and nothing else, and {file} has {name}")
        layers.add(layer)
    for layer in sorted(layers):
        if missing := [e for e in (DOWN, UP, *[NORMS] * dora) if layer + e not in tensors]:
            raise ValueError(f"a LoRA must have every part of a layer, and {file} lacks {layer}{missing[0]}")
        module = modules.get(layer)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            kind = f"; it is for {found}" if (found := kind_of(layers, MODELS)) else ""
            raise ValueError(
                f"a LoRA must be on layers of the {noun}, and {file} has {layer}, which this {noun} lacks{kind}"
            )
        down, up, weight = tensors[layer + DOWN], tensors[layer + UP], module.weight
        fits = (
            down.ndim > 1
            and len(down) > 0
            and down[0].numel() == weight[0].numel()
            and up.numel() == len(weight) * len(down)
        )
        if not fits or (dora and tensors[layer + NORMS].numel() != len(weight)):
            raise ValueError(
                f"a LoRA must fit the {noun}'s {layer}, {tuple(weight.shape)}, got {tuple(up.shape)} times "
                f"{tuple(down.shape)} in {file}, which is for another kind of model"
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"a LoRA must hold finite numbers only, and {file} has NaN or infinity in {layer}")
        tensors[layer + DOWN] = down.reshape(len(down), *weight.shape[1:])
        tensors[layer + UP] = up.reshape(len(weight), len(down), *[1] * (weight.ndim - 2))
    if not layers:
        raise ValueError(f"a LoRA must be on at least one layer of the {noun}, and {file} has none")
    return layers


def _modules(unet: nn.Module) -> dict[str, nn.Module]:
    """Returns the UNet's own modules by their plain names; one that peft has wrapped is the layer inside."""
    named = ((f"{name}.", module) for name, module in unet.named_modules())
    return {plain_name(name)[:-1]: module for name, module in named if not is_lora(name)}


def _alpha(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """Returns the alpha of a layer by peft's settings; where there are none it is the rank, as in diffusers."""
    from peft.utils.other import get_pattern_key

    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), layer), settings.get("lora_alpha", rank))
    return float(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)


def _check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Checks peft's settings of a LoRA as far as they are read.

    Raises:
        ValueError: An alpha is no number, or is for a pattern that is no layer's name: peft matches it as a regular
            expression, and some take forever.
    """
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(PLAIN_NAME.fullmatch(name) for name in patterns):
        raise ValueError(f"alpha_pattern of {file} must map names of layers to numbers, got {str(patterns)[:200]}")
    for name, value in {"lora_alpha": settings.get("lora_alpha", 1), **patterns}.items():
        _number(value, name, file)


def _number(value: Any, name: str, file: Path) -> float:
    """Returns one number of a file; a ValueError where it is none, or not finite."""
    one = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, float | int)
    if not one or not math.isfinite(float(value)):
        raise ValueError(f"{name} of {file} must be one finite number, got {str(value)[:200]}")
    return float(value)


def _targets(unet: nn.Module, layers: set[str]) -> tuple[str, ...]:
    """Returns the shortest endings of names that say these layers and no others, in the order of the UNet."""
    names = _modules(unet)
    targets: dict[str, None] = {}
    for layer in (name for name in names if name in layers):
        parts = layer.split(".")
        endings = (".".join(parts[k:]) for k in reversed(range(len(parts))))
        targets[next(e for e in endings if {n for n in names if f".{n}".endswith(f".{e}")} <= layers)] = None
    return tuple(targets)


def _short(hashes: Mapping[str, str]) -> str:
    return " or ".join(value[:12] for value in hashes.values())
