"""Loading a text-to-image model: from a folder, the hub, or a single file; and refusing others before that."""

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch

from overpaint.settings import Count

from . import single_file
from .checkpoint_files import CheckpointFiles, fetch_configuration, of_folder, of_hub
from .families.sd import NO_SAFETY_CHECKER, StableDiffusion
from .flow import Chain
from .parts import Pipeline
from .weight_files import UnreadableError
from .weights import LoRAConfig


class PolicyOptions(TypedDict, total=False):
    """What `DiffusionPolicy` takes besides a pipeline."""

    lora: LoRAConfig | None
    train: str | None
    dtype: torch.dtype | None
    device: str | torch.device | None
    gradient_checkpointing: bool
    compile: bool
    tiling: bool
    max_sequence_length: Count | None
    chain: Chain | None


def load_pipeline(path: str | Path, dtype: torch.dtype | None, config: str | Path | None = None) -> Pipeline:
    """Loads a folder, a hub id or a single file with diffusers, without safety checker and without a word.

    Args:
        path: What to load.
        dtype: Precision of all weights; None is that of the files.
        config: For a single file: the folder or hub id whose configuration and tokenizer it takes.

    Raises:
        ValueError: There is no such checkpoint, or it is not a text-to-image pipeline of a known family.
    """
    path = _path(path)
    _check_config(path, config)
    load = _load_file if _is_file(path) else _load_parts
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    with _quiet_imports():
        import peft  # noqa: F401
        from diffusers import StableDiffusionPipeline  # noqa: F401
    with without_bars():
        pipeline = load(path, options, config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_checkpoint(path: str | Path, config: str | Path | None = None) -> None:
    """Checks a checkpoint without loading weights, for programs that have much to do before they load.

    Args:
        path: A folder, a hub id, or a single file.
        config: For a single file: the folder or hub id whose configuration and tokenizer it takes.

    Raises:
        ValueError: There is no such checkpoint, or it is not a text-to-image pipeline of a known family.
    """
    path = _path(path)
    _check_config(path, config)
    if _is_file(path):
        _layout_and_configuration(path, config)
    else:
        files = _files_of(path)
        files.check()
        files.variants()


def _load_parts(path: str | Path, options: dict[str, Any], config: str | Path | None) -> Pipeline:
    """Loads a folder or a hub id; a network that has its weights in half precision only is loaded from those."""
    import diffusers
    import transformers

    files = _files_of(path)
    files.check()
    if isinstance(_path(path), Path):
        files.check_weights()
    family = files.family
    parts: dict[str, Any] = dict.fromkeys(set(family.folders()) - set(files.parts()))
    for part, variant in files.variants().items():
        library: Any = transformers if part.startswith("text_encoder") else diffusers
        network = getattr(library, family.classes[part])
        parts[part] = network.from_pretrained(path, subfolder=part, variant=variant, **options)
    extras = NO_SAFETY_CHECKER if family is StableDiffusion else {}
    make: Any = getattr(diffusers, family.pipelines[0])
    return make.from_pretrained(path, **extras, **parts, **options)


def _load_file(path: str | Path, options: dict[str, Any], config: str | Path | None) -> Pipeline:
    """Loads a single file; one that cannot be read here is left to diffusers, which may know more formats."""
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.utils import logging as of_diffusers

    try:
        layout, folder = _layout_and_configuration(path, config)
    except UnreadableError:
        layout, folder = single_file.STABLE_DIFFUSION, None if config is None else _files_of(config).folder
    family = layout.family
    extras = NO_SAFETY_CHECKER if family is StableDiffusion else {}
    make: Any = getattr(diffusers, family.pipelines[0])
    where = None if folder is None else str(folder)
    lacking = f"{path} must hold every weight that its configuration has, and lacks some"
    try:
        with _errors_only(of_diffusers):  # which warns of layers to keep in float32, and names none
            pipeline = make.from_single_file(str(path), config=where, **extras, **options)
    except OSError as error:
        raise ValueError(f"the checkpoint must be a .safetensors or .ckpt file, and {path} is neither") from error
    except SingleFileComponentError as error:  # a text encoder under names that diffusers does not know
        raise ValueError(f"{path} must hold all of its networks under names that diffusers knows: {error}") from error
    except NotImplementedError as error:  # what the file does not hold has no data that could be converted
        raise ValueError(lacking) from error
    networks = (getattr(pipeline, name) for name in family.classes)
    if any(parameter.is_meta for network in networks for parameter in network.parameters()):
        raise ValueError(lacking)
    return pipeline


@contextmanager
def _quiet_imports() -> Generator[None]:
    """Keeps libraries that are imported from warning of what nothing here uses: torchvision, 4-bit kernels."""
    from transformers.utils import logging as of_transformers

    bitsandbytes = logging.getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with _errors_only(of_transformers):
            yield
    finally:
        bitsandbytes.setLevel(level)


@contextmanager
def _errors_only(library: Any) -> Generator[None]:
    """Keeps a library of Hugging Face, by its module of logging, from warning."""
    verbosity = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)


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


def default_device() -> torch.device:
    """Returns this process's GPU, or the CPU where there is none or `accelerate launch --cpu` asks for it."""
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _path(path: str | Path) -> str | Path:
    """Returns a local path with its `~` expanded, and a hub id as it is."""
    return Path(path).expanduser() if _is_local(path) else str(path)


def _is_local(path: str | Path) -> bool:
    """Tells a local path from a hub id, which is `owner/name` and not on disk."""
    text = str(path)
    named = text.startswith((".", "/", "~")) or text.endswith((".safetensors", ".ckpt")) or text.count("/") != 1
    return isinstance(path, Path) or named or Path(text).exists()


def _is_file(path: str | Path) -> bool:
    return isinstance(path, Path) and path.is_file()


def _files_of(path: str | Path) -> CheckpointFiles:
    path = _path(path)
    return of_folder(path) if isinstance(path, Path) else of_hub(path)


def _check_config(path: str | Path, config: str | Path | None) -> None:
    if config is None:
        return
    if not _is_file(path):
        raise ValueError(f"config must be given for a single file only, got {str(config)!r} for {path}")
    _files_of(config).check()


def _layout_and_configuration(path: str | Path, config: str | Path | None) -> tuple[single_file.Layout, Path]:
    """Returns of which family a single file is, and the folder with its configuration and tokenizers."""
    shapes = single_file.tensor_shapes(Path(path))
    layout = single_file.layout_of(shapes, str(path))
    kind = layout.family.pipelines[0]
    if config is not None:
        files = _files_of(config)
        if files.family is not layout.family:
            raise ValueError(f"config must be of a {kind}, as {path} is, got {config} of a {files.family.pipelines[0]}")
        return layout, files.folder
    words = f"config must be given for {path}: a folder in diffusers' layout whose configuration and tokenizer it takes"
    known = single_file.configuration_of(shapes, layout)
    if known is None:
        raise ValueError(f"{words}; its sizes are not those of a published {kind}")
    try:
        return layout, fetch_configuration(known)
    except ValueError as error:
        raise ValueError(
            f"{words}, as {known} has them; that is not in the hub's cache, nor the hub reached"
        ) from error
