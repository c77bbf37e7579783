"""What an official release is: its layout and its tensors, told apart by what a file holds and never by its ending."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.checkpoint_files import weight_stems
from overpaint.policy.lora_files import LORA_FILE, lora_in
from overpaint.policy.parts import Pipeline
from overpaint.policy.tensor_names import LDM_TEXT_ENCODER, LDM_UNET, LDM_VAE, is_lora_file
from overpaint.policy.weight_files import (
    WEIGHT_SUFFIXES,
    Renamed,
    flat_tensors,
    read_weights,
    state_dict_of,
    weight_files,
)
from overpaint.text_files import read_json

from .erased import RECORD_FILE

OTHER_PART = re.compile(r"text_encoder(_\d+)?|vae")
"""Names of the networks beside the UNet in diffusers' layout."""

LDM_CLIP, LDM_OPEN_CLIP = f"{LDM_TEXT_ENCODER}transformer.", f"{LDM_TEXT_ENCODER}model."
"""What the names of a text encoder's weights begin with in the layout of the original Stable Diffusion."""

(UNET_WEIGHTS,) = weight_stems("unet")


class Release(NamedTuple):
    """What lies at a path, as far as its files tell."""

    layout: str
    """Which of the layouts it is, in words."""

    tensors: Mapping[str, Tensor]
    """Those of the UNet, by whatever names the release has for them."""

    parts: Mapping[str, Mapping[str, Tensor]]
    """Those of each text encoder and of `vae`, by the names of transformers and diffusers."""

    files: list[Path]
    """What was read."""

    whole: bool = False
    """Whether every weight of the UNet must be there."""

    prediction_type: str | None = None
    """What its network predicts, where a scheduler says it."""


def release_at(path: Path, base: DiffusionPolicy | Pipeline) -> Release:
    """Returns what lies at a path.

    Args:
        path: A file or a folder.
        base: The original model, by whose text encoder and VAE those of a whole checkpoint are named.

    Raises:
        ValueError: There is nothing, it cannot be read, or it is no single release of weights.
    """
    if not path.exists():
        raise ValueError(
            f"an erasure's path must be a file or a folder that exists, got {path}; load a model of the hub"
        )
    if path.is_file():
        return _of_content(read_weights([path]), [path], base, path)
    if (path / RECORD_FILE).is_file():
        raise ValueError(f"{path} must be a release of others, and is an erasure that was saved here: use Erasure.load")
    for folder in (path / "unet", path):
        if files := weight_files(folder, UNET_WEIGHTS):
            return _of_folder(path, files)
    lora = lora_in(path)
    found = [lora] if lora else sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if len(found) != 1:
        raise ValueError(
            f"a folder of an erased model must hold unet/{UNET_WEIGHTS}.safetensors, {UNET_WEIGHTS}.safetensors, "
            f"{LORA_FILE} or one file of weights, and {path} holds {len(found)} of them"
        )
    return _of_content(read_weights(found), found, base, path)


def _of_folder(path: Path, files: list[Path]) -> Release:
    """Reads a pipeline's folder or a UNet's."""
    parts: dict[str, Mapping[str, Tensor]] = {}
    pipeline = files[0].parent != path
    read, predicted = [*files], None
    if pipeline:
        for part in sorted(folder.name for folder in path.iterdir() if OTHER_PART.fullmatch(folder.name)):
            if found := next((each for stem in weight_stems(part) if (each := weight_files(path / part, stem))), []):
                parts[part] = flat_tensors(read_weights(found), path)
                read += found
        scheduler = path / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            predicted = read_json(scheduler).get("prediction_type", "epsilon")
    layout = "diffusers' pipeline" if pipeline else "diffusers' UNet"
    return Release(layout, flat_tensors(read_weights(files), path), parts, read, True, predicted)


def _of_content(content: Any, files: list[Path], base: DiffusionPolicy | Pipeline, path: Path) -> Release:
    """Tells the layouts of single files apart."""
    layout = "diffusers' weights"
    parts: dict[str, Mapping[str, Tensor]] = {}
    content = state_dict_of(content)
    if isinstance(content, Mapping) and isinstance(content.get("unet"), Mapping):
        layout = "concept ablation's delta"
        if content.get("modifier_token"):
            raise ValueError(f"{path} must change the UNet alone, as an erasure does, and it has new tokens")
        others = [name for name in content if isinstance(name, str) and OTHER_PART.fullmatch(name)]
        parts = {name: flat_tensors(content[name], path) for name in others}
        content = content["unet"]
    tensors = flat_tensors(content, path)
    if any(name.startswith(LDM_UNET) for name in tensors):
        return _of_ldm(tensors, files, base, path)
    if not is_lora_file(tensors):
        named: dict[str, dict[str, str]] = {}
        for name in tensors:
            part, _, own = name.partition(".")
            if OTHER_PART.fullmatch(part):
                named.setdefault(part, {})[own] = name
        parts |= {part: Renamed(tensors, names) for part, names in named.items()}
        tensors = Renamed(tensors, {name: name for name in tensors if name.partition(".")[0] not in named})
    return Release(layout, tensors, parts, files)


def _of_ldm(tensors: Mapping[str, Tensor], files: list[Path], base: DiffusionPolicy | Pipeline, path: Path) -> Release:
    """Reads a checkpoint of the original Stable Diffusion, or its UNet, without averaged weights (`model_ema.`)."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint

    if "embed" in tensors:
        raise ValueError(f"{path} must change the UNet alone, as an erasure does, and it has new tokens ('embed')")
    groups = {
        prefix: {name: name for name in tensors if name.startswith(prefix)}
        for prefix in (LDM_UNET, LDM_CLIP, LDM_OPEN_CLIP, LDM_VAE)
    }
    known = (*groups, "model_ema.", LDM_TEXT_ENCODER)
    # The tables of its noise schedule have names without a dot.
    unet = groups[LDM_UNET] | {name: name for name in tensors if "." in name and not name.startswith(known)}
    parts: dict[str, Mapping[str, Tensor]] = {}
    if clip := groups[LDM_CLIP]:
        parts["text_encoder"] = Renamed(tensors, {name.removeprefix(LDM_CLIP): name for name in clip})
    if open_clip := groups[LDM_OPEN_CLIP]:
        parts["text_encoder"] = convert_open_clip_checkpoint(base.text_encoder, Renamed(tensors, open_clip))
    if vae := groups[LDM_VAE]:
        parts["vae"] = convert_ldm_vae_checkpoint(Renamed(tensors, vae), base.vae.config)
    whole = bool(parts)
    layout = "original Stable Diffusion's checkpoint" if whole else "original Stable Diffusion's weights"
    return Release(layout, Renamed(tensors, unet), parts, files, whole)
