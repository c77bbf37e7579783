"""Whole pipelines, in diffusers' layout and readable by others: older transformers, and a plain `from_pretrained`."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .added import add_networks, added_networks
from .atomic import naming
from .families import Family
from .guidance import SamplingGuard
from .loading import without_bars
from .parts import Pipeline
from .weights import merged_state


def plain_pipeline(family: Family, dtype: torch.dtype | None = None) -> Pipeline:
    """Returns a pipeline around a family's parts, whose network is plain: a LoRA is added in, wrappers are left behind.

    Networks that were added to the denoising network are added to the plain one too.

    Args:
        family: With all parts; of its scheduler a new one of its configuration is made.
        dtype: Precision of all networks, which are copies then; None leaves each as it is.
    """
    named = dict(family.named_networks)
    model = named.pop(family.network)
    if dtype is not None:
        named = {name: copy.deepcopy(part).to(dtype=dtype) for name, part in named.items()}
    return family.pipeline(plain_network(model, dtype), named)


def plain_network(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Returns a denoising network with the same weights and no LoRA, which is added in; with its added networks."""
    with torch.device("meta"):
        plain: Any = type(model).from_config(model.config)
    plain.load_state_dict(merged_state(model, dtype), assign=True)
    add_networks(plain, added_networks(model))
    return plain.requires_grad_(False).eval()


def check_plain(model: nn.Module, guard: SamplingGuard | None) -> None:
    """Checks that a pipeline's folder can hold all that a policy draws with.

    Raises:
        ValueError: There is a guard, or networks were added to the UNet.
    """
    for name, found in (("networks added to the UNet", added_networks(model)), ("a guard", guard)):
        if found:
            raise ValueError(f"a pipeline's folder cannot hold {name}, and the policy has {found!r}")


def write_pipeline(pipeline: Pipeline, folder: str | Path) -> None:
    """Saves a pipeline so that it draws after a plain `from_pretrained(folder)`, also with transformers 4.

    That call loads UNet and VAE as float32 whatever the files hold, and text encoders in the precision that their
    config.json says: it says float32, and only the weights are as small as they were. transformers 4 reads CLIP's
    tokenizer from vocab.json and merges.txt, and its text encoder by names that begin with `text_model.`, without
    which it would draw from random weights.
    """
    folder = Path(folder)
    with naming(folder):
        _write_pipeline(pipeline, folder)


def _write_pipeline(pipeline: Pipeline, folder: Path) -> None:
    """Does what `write_pipeline` says."""
    with without_bars():
        pipeline.save_pretrained(folder)
    for name, part in pipeline.components.items():
        kind = type(part).__name__
        if name.startswith("text_encoder") and part is not None:
            _as_float32(folder / name / "config.json")
        if kind == "CLIPTextModel":
            _with_old_names(folder / name / "model.safetensors")
        if kind.startswith("CLIPTokenizer"):
            _with_old_files(part, folder / name)


def _as_float32(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _with_old_names(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    if not any(name.startswith("text_model.") for name in tensors):
        named = {f"text_model.{name}": value for name, value in tensors.items()}
        save_file(named, path, metadata={"format": "pt"})


def _with_old_files(tokenizer: Any, folder: Path) -> None:
    tokenizer.backend_tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    added = {token: index for token, index in tokenizer.get_added_vocab().items() if token not in vocabulary}
    if added:
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")
