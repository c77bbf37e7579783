"""Erased models of the official releases, and of anybody, as an erasure of the model that they were made of.

Their files hold whole weights, not what was changed, and do not say which concept was erased: they are compared with
the original model, and the concept is given.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy, WeightDelta
from overpaint.policy.added import added_networks
from overpaint.policy.lora_files import read_lora
from overpaint.policy.parts import Pipeline, UNet
from overpaint.policy.takeover import TITLES, take_over
from overpaint.policy.tensor_names import is_lora_file
from overpaint.policy.weights import base_parameters, merged_state
from rewards.public_files import sha256_of

from .changes import Change, WeightChange
from .concept import Concept
from .erased import RECORD_FILE, Erasure
from .methods.attention_maps import cross_attentions
from .methods.receler.erasers import AddedNetworks
from .releases import Release, release_at
from .unet_names import unet_names

ERASER = re.compile(r"(?P<layer>.*\.attn2)\.(.*\.)?(?P<weight>(down|up)\.(weight|bias))")
"""Name of an eraser's weight: its cross-attention, whatever wraps the eraser there, and its half."""

FILE_NAMES = {"ESD": r"esd-.+[-_]from[-_].+|.+-ESD[xu]\d.*", "UCE": r"erased-.+-towards_.+|uce_.+"}
"""How the code of a method's authors names its files, where it does so as nobody else would."""

METHOD_OF = {"concept ablation's delta": "AC (official file)", "erasers": "Receler (official file)"}
"""Methods whose files nobody else writes."""


def official_erasure(
    path: str | Path, *, base: DiffusionPolicy | Pipeline, concept: Concept, method: str | None = None
) -> Erasure:
    """Reads an erased model that others have released, as what it changes in the original model.

    Args:
        path: A file, or a folder with a pipeline, a UNet, a LoRA, erasers or one file of weights. Nothing but tensors
            is unpickled.
        base: The original model, which the release was made of. It is not changed.
        concept: What was erased; the files do not say it.
        method: What erased it, for tables; None is what the layout or the path's name says.

    Returns:
        The erasure, of float32 differences, or of erasers. Its settings say which layout was recognised and the SHA-256
        of what was read. A weight that is the base's but for rounding to half precision counts as unchanged.

    Raises:
        ValueError: There is nothing, or it cannot be read, is damaged, does not fit the base, changes nothing in it, or
            changes a text encoder or the VAE as well.
    """
    path = Path(path).expanduser()
    if not isinstance(base, DiffusionPolicy):
        take_over(base)
    release = release_at(path, base)
    change: Change
    if is_lora_file(release.tensors):
        layout, change = "LoRA", _weight_change(_lora_differences(release.files[0], base.unet), path)
    elif any(ERASER.fullmatch(name) for name in release.tensors):
        layout, change = "erasers", _erasers(release.tensors, base.unet, path)
    else:
        layout, change = release.layout, _weight_change(_differences(release, base.unet, path), path)
    _check_other_parts(release, base, path)
    config = {
        "source": path.name,
        "layout": layout,
        "sha256": {
            str(file.relative_to(path)) if path.is_dir() else file.name: sha256_of(file) for file in release.files
        },
    }
    return _erasure(base, method or _method(path, layout), config, concept, change)


def erasure_between(
    original: DiffusionPolicy | Pipeline, erased: DiffusionPolicy | Pipeline, concept: Concept, method: str = "none"
) -> Erasure:
    """Returns what leads from a model to one that is erased already; both are loaded, and neither is changed.

    A LoRA that the erased policy carries counts.

    Raises:
        ValueError: They differ in more than the weights of their UNets, or in nothing.
    """
    for model in (original, erased):
        if not isinstance(model, DiffusionPolicy):
            take_over(model)
    source = Path("the erased model")
    if added_networks(erased.unet) or (isinstance(erased, DiffusionPolicy) and erased.guard is not None):
        raise ValueError(f"{source} must differ from the original in weights, and has added networks or a guard")
    parts = {name: module.state_dict() for name, module in _other_parts(erased).items()}
    weights = {name: value for name, value in merged_state(erased.unet).items() if name in base_parameters(erased.unet)}
    predicted = erased.scheduler.config.get("prediction_type", "epsilon")
    release = Release("two models in memory", weights, parts, [], True, predicted)
    _check_other_parts(release, original, source)
    change = _weight_change(_differences(release, original.unet, source), source)
    return _erasure(original, method, {"layout": release.layout}, concept, change)


def load_erasure(
    path: str | Path,
    *,
    base: DiffusionPolicy | Pipeline,
    concept: Concept | None = None,
    method: str | None = None,
) -> Erasure:
    """Loads an erasure from wherever it comes: a folder of `Erasure.save`, or a release of others.

    Args:
        path: As for `official_erasure`, or a folder of `Erasure.save`.
        base: The original model.
        concept: What was erased. A saved erasure says it itself, and no other may be given then.
        method: As for `official_erasure`; a saved erasure says it itself.

    Raises:
        ValueError: The concept is missing or another one than the saved erasure's; and as `official_erasure`.
    """
    path = Path(path).expanduser()
    if (path / RECORD_FILE).is_file():
        saved = Erasure.load(path)
        if concept is not None and concept.name != saved.concept.name:
            raise ValueError(f"concept must be what {path} erased, {saved.concept.name!r}, got {concept.name!r}")
        return saved
    if concept is None:
        raise ValueError(f"concept must be given, as the files of {path} do not say what was erased, got None")
    return official_erasure(path, base=base, concept=concept, method=method)


def _erasure(
    base: DiffusionPolicy | Pipeline, method: str, config: dict[str, Any], concept: Concept, change: Change
) -> Erasure:
    return Erasure(method=method, config=config, concept=concept, change=change, base=change.base(base.unet))


def _method(path: Path, layout: str) -> str:
    """Returns the method that a layout or a name gives away, and otherwise the name alone."""
    if layout in METHOD_OF:
        return METHOD_OF[layout]
    for method, pattern in FILE_NAMES.items():
        if path.is_file() and re.fullmatch(pattern, path.name):
            return f"{method} (official file)"
    return f"{'folder' if path.is_dir() else 'file'} {path.name}"


# What it changes.


@torch.no_grad()
def _differences(release: Release, unet: UNet, source: Path) -> dict[str, Tensor]:
    """Returns the differences of the parameters that the release changes."""
    parameters = base_parameters(unet)
    names = unet_names(release.tensors, unet, source)
    if release.whole and (missing := sorted(parameters.keys() - names.values())):
        raise ValueError(f"{source} must hold every weight of the base's UNet, and lacks {missing[0]!r}")
    changed = {}
    for name, parameter in names.items():
        original, value = parameters[parameter].detach().cpu(), release.tensors[name].cpu()
        if _without_ones(value) != _without_ones(original):  # a convolution of one pixel is a linear layer
            got, expected = tuple(value.shape), tuple(original.shape)
            raise ValueError(f"{source} must fit the base: {parameter!r} must have the shape {expected}, got {got}")
        value = value.reshape(original.shape)
        if not same_but_for_rounding(original, value):
            changed[parameter] = value.float() - original.float()
    return changed


def _lora_differences(file: Path, unet: UNet) -> dict[str, Tensor]:
    """Returns the differences that a LoRA makes: those that it has, as diffusers would fuse it."""
    lora = read_lora(file, unet, drop_text_encoder=True)
    if lora.dropped:
        raise ValueError(
            f"{file} must change the UNet alone, as an erasure does, and it changes the text encoder "
            f"({lora.dropped[0]!r}); merge it into its model, and give that as the base"
        )
    return lora.differences()


def _weight_change(differences: Mapping[str, Tensor], source: Path) -> WeightChange:
    for name, value in differences.items():
        if not value.isfinite().all():
            raise ValueError(f"{source} must hold finite numbers only, and has NaN or infinity in {name!r}")
    changed = {name: value for name, value in differences.items() if value.any()}
    if not changed:
        raise ValueError(f"{source} must change a weight of the base, and changes nothing: is it the base's own file?")
    return WeightChange(WeightDelta(changed))


def same_but_for_rounding(original: Tensor, value: Tensor) -> bool:
    """Tells whether a weight is the original's, as it is or rounded to half precision when either was saved.

    A weight that was trained in half precision differs from the rounded original in some of its numbers at least.
    """
    theirs, halves = value.float(), {torch.float16, torch.bfloat16}
    if {original.dtype, value.dtype} == halves:  # each is the original's, rounded in its own way
        tolerance, smallest = sum(torch.finfo(dtype).eps for dtype in halves) / 2, 2.0**-24  # float16's
        return torch.allclose(original.float(), theirs, rtol=tolerance, atol=smallest)
    rounded = (original.to(dtype).float() for dtype in (value.dtype, *halves))
    return any(torch.equal(ours, theirs) for ours in rounded) or torch.equal(theirs.to(original.dtype), original)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _erasers(tensors: Mapping[str, Tensor], unet: UNet, source: Path) -> AddedNetworks:
    """Returns a release's erasers, whose layers may be named as in diffusers or as in the original Stable Diffusion."""
    found = {name: match for name in tensors if (match := ERASER.fullmatch(name))}
    if foreign := [name for name in tensors if name not in found]:
        raise ValueError(f"{source} must hold erasers only (<cross-attention>.down and .up), and has {foreign[0]!r}")
    # A weight that every cross-attention has stands for its layer, which has no name of a parameter itself.
    layers = {f"{match['layer']}.to_q.weight": match["layer"] for match in found.values()}
    named = {
        layers[name]: parameter.removesuffix(".to_q.weight")
        for name, parameter in unet_names(layers, unet, source).items()
    }
    erasers = {
        f"{named[match['layer']]}.{match['weight']}": tensors[name].float().cpu().clone()
        for name, match in found.items()
    }
    attentions: dict[str, Any] = cross_attentions(unet)
    for layer in dict.fromkeys(named.values()):
        width, rank = attentions[layer].to_out[0].out_features, len(erasers.get(f"{layer}.down.weight", ()))
        shapes = {"down.weight": (rank, width), "down.bias": (rank,), "up.weight": (width, rank), "up.bias": (width,)}
        for weight, shape in shapes.items():
            got = erasers.get(f"{layer}.{weight}")
            if got is None or tuple(got.shape) != shape:
                said = "nothing" if got is None else tuple(got.shape)
                raise ValueError(f"{source} must hold an eraser's {weight} of shape {shape} for {layer!r}, got {said}")
            if not got.isfinite().all():
                raise ValueError(f"{source} must hold finite numbers only, and has NaN or infinity in {layer!r}")
    if not any(erasers[name].any() for name in erasers if ".up." in name):
        raise ValueError(f"{source} must change a prediction of the base, and changes nothing: its erasers add zero")
    return AddedNetworks(erasers)


# What it must not change.


def _other_parts(model: DiffusionPolicy | Pipeline) -> dict[str, nn.Module]:
    """Returns the VAE and the text encoders by their names; a `ValueError` where these have been released."""
    family = model.family if isinstance(model, DiffusionPolicy) else take_over(model)
    if family.released:
        raise ValueError("the text encoders must be there to be compared with another model's, and were released")
    return {name: part for name, part in family.named_networks.items() if name != family.network}


def _check_other_parts(release: Release, base: DiffusionPolicy | Pipeline, source: Path) -> None:
    """Raises a `ValueError` where anything but the UNet is not the base's."""
    predicted = base.scheduler.config.get("prediction_type", "epsilon")
    if release.prediction_type not in (None, predicted):
        raise ValueError(
            f"{source} must predict what the base does, prediction_type={predicted!r}, got {release.prediction_type!r}"
        )
    others = _other_parts(base) if release.parts else {}
    for part, tensors in release.parts.items():
        words = TITLES.get(part, part)
        if part not in others:
            raise ValueError(f"{source} must have the base's networks, and has a {words}, which the base lacks")
        expected = {_part_name(name): value for name, value in others[part].state_dict().items()}
        theirs = {_part_name(name): name for name in tensors}
        shared = [name for name in expected if name in theirs and expected[name].is_floating_point()]
        differing = [name for name in shared if not _is_same(expected[name], tensors[theirs[name]])]
        if differing or not shared:
            where = f"{len(differing)} of {len(shared)} weights, such as {differing[0]!r}" if shared else "every name"
            raise ValueError(
                f"{source} must have the base's {words}, as an erasure changes the UNet alone, and differs in {where}; "
                f"put its {words} into the base's pipeline first"
            )


def _is_same(original: Tensor, value: Tensor) -> bool:
    if _without_ones(value) != _without_ones(original):
        return False
    return same_but_for_rounding(original.detach().cpu(), value.detach().cpu().reshape(original.shape))


OLD_ATTENTION = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
"""What a VAE's attention was called by diffusers once, and is called now."""


def _part_name(name: str) -> str:
    """Returns one name for what versions of the libraries call differently."""
    name = name.removeprefix("text_model.")
    for old, new in OLD_ATTENTION:
        name = name.replace(f".{old}.", f".{new}.")
    return name
