"""Finding out whether a checkpoint is a Stable Diffusion before any of it is loaded."""

import json
import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch

from .ddim import PREDICTION_TYPES
from .parts import Pipeline
from .weights import LoRAConfig

PIPELINE_CLASS = "StableDiffusionPipeline"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS = "diffusion_pytorch_model"


class PolicyOptions(TypedDict, total=False):
    """What `DiffusionPolicy` takes besides a pipeline."""

    lora: LoRAConfig | None
    train: str | None
    dtype: torch.dtype | None
    device: str | torch.device | None
    gradient_checkpointing: bool
    compile: bool


def load_pipeline(path: str | Path, dtype: torch.dtype | None) -> Pipeline:
    """Loads a folder or a hub id with diffusers, without safety checker and without a word.

    Args:
        path: What to load.
        dtype: Precision of all weights; None is that of the files.

    Raises:
        ValueError: There is no such checkpoint, or it is not a Stable Diffusion v1 or v2 text-to-image pipeline.
    """
    check_checkpoint(path)
    with _quiet_imports():
        import peft  # noqa: F401
        from diffusers import StableDiffusionPipeline
    variant = _variant(Path(path)) if _names_a_folder(path) else None
    options: dict[str, Any] = {"variant": variant} if variant else {}
    if dtype is not None:
        options["dtype"] = dtype
    with without_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(
            path, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **options
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def _quiet_imports() -> Generator[None]:
    """Keeps libraries that are imported from warning of what nothing here uses: torchvision, 4-bit kernels."""
    from transformers.utils import logging as of_transformers

    bitsandbytes, verbosity = logging.getLogger("bitsandbytes"), of_transformers.get_verbosity()
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        bitsandbytes.setLevel(level)
        of_transformers.set_verbosity(verbosity)


@contextmanager
def without_bars() -> Generator[None]:
    """Keeps diffusers and transformers from drawing a bar for every few weights."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [each for each in (of_diffusers, of_transformers) if each.is_progress_bar_enabled()]
    for each in shown:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()


def check_checkpoint(path: str | Path) -> None:
    """Checks a folder or a hub id without loading weights, for programs that have much to do before they load.

    Raises:
        ValueError: There is no such checkpoint, or it is not a Stable Diffusion v1 or v2 text-to-image pipeline.
    """
    if _names_a_folder(path):
        _check_folder(Path(path))
    else:
        _check_index(_hub_index(str(path)), str(path))


def check_pipeline(pipeline: Any) -> None:
    """Checks that a pipeline in memory is one that a policy can be made of.

    Raises:
        ValueError: It is of another class, its UNet takes more than latents, or it predicts something unknown.
    """
    name = type(pipeline).__name__
    if name != PIPELINE_CLASS:
        raise ValueError(f"the pipeline must be a {PIPELINE_CLASS}, got a {name}")
    unet, scheduler = pipeline.unet, pipeline.scheduler
    if getattr(unet, "peft_config", None):
        raise ValueError("the UNet must carry no adapter, got one with a LoRA; fuse_lora() and unload_lora() first")
    if unet.config.in_channels != 4:
        raise ValueError(f"the UNet must take 4 channels of latents and nothing else, got {unet.config.in_channels}")
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"the scheduler's prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {kind!r}")


def default_device() -> torch.device:
    """Returns this process's GPU, or the CPU where there is none or `accelerate launch --cpu` asks for it."""
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _names_a_folder(path: str | Path) -> bool:
    """Tells a local path from a hub id, which is `owner/name` and not on disk."""
    text = str(path)
    return isinstance(path, Path) or Path(text).exists() or text.startswith((".", "/", "~")) or text.count("/") != 1


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"the checkpoint must be a folder in diffusers' layout or a hub id owner/name, got {folder}")
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"a checkpoint's folder must hold model_index.json, and {folder} does not")
    _check_index(json.loads(index.read_text(encoding="utf-8")), str(folder))
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ValueError(f"a checkpoint's folder must hold {part}/, and {folder} does not")


def _check_index(index: Mapping[str, Any], path: str) -> None:
    name = index.get("_class_name")
    if name != PIPELINE_CLASS:
        raise ValueError(f"the checkpoint must be a {PIPELINE_CLASS}, and {path} is a {name}")


def _hub_index(name: str) -> Mapping[str, Any]:
    from diffusers import DiffusionPipeline

    try:
        index: Any = DiffusionPipeline.load_config(name)
    except OSError as error:
        raise ValueError(f"the checkpoint must be a folder or a hub id of a pipeline, got {name!r}") from error
    return index


def _variant(folder: Path) -> str | None:
    """Returns "fp16" for a folder that has its weights under that name only."""
    names = {file.name.removeprefix(WEIGHTS) for file in (folder / "unet").glob(f"{WEIGHTS}*")}
    plain = {".safetensors", ".safetensors.index.json", ".bin"} & names
    half = {".fp16.safetensors", ".fp16.bin"} & names
    return "fp16" if half and not plain else None
