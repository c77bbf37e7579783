"""Other people's weight files, read without unpickling anything but tensors, and each tensor only when it is used."""

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.text_files import read_json

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that hold weights, the safer first."""

VARIANTS = ("fp16", "bf16")
"""Names under which weights in half precision are published beside those in float32, or instead of them."""


class UnreadableError(ValueError):
    """A file is in none of the formats that weights have, or is damaged."""


class SafeTensors(Mapping[str, Tensor]):
    """The tensors of safetensors files by name; each is read from the disk when it is asked for.

    Args:
        files: The shards of one state dict.

    Raises:
        UnreadableError: A file is not of this format.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._opened: dict[str, Any] = {}
        self.header: dict[str, str] = {}
        """What the files say about themselves besides the tensors."""
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UnreadableError(
                    f"{file} must be a safetensors file, and cannot be read as one: {error}"
                ) from error
            self._opened |= dict.fromkeys(opened.keys(), opened)
            self.header |= opened.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._opened[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened)

    def __len__(self) -> int:
        return len(self._opened)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each tensor, without reading any."""
        return {name: tuple(opened.get_slice(name).get_shape()) for name, opened in self._opened.items()}


class Renamed(Mapping[str, Tensor]):
    """Some of a file's tensors under other names, which are read as late as the file's own.

    Args:
        tensors: Of the file.
        names: The name there of each of these.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_pickle(file: Path, device: str = "cpu") -> Any:
    """Reads what `torch.save` wrote, as far as it is made of tensors, numbers and texts; the tensors stay on the disk.

    Raises:
        UnreadableError: The file is damaged, or of another format.
        ValueError: It needs code to be run.
    """
    try:  # older pickles cannot be mapped into memory
        return torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{file} must hold tensors, numbers and texts only, as unpickling anything else runs code, and it "
                f"needs {needed[1]}. If you trust it, read it once with torch.load(file, weights_only=False), save its "
                "state dict alone with torch.save, and give that file"
            ) from error
        raise UnreadableError(f"{file} must be a file of torch.save, and is none, or is damaged") from error
    except Exception as error:  # bytes that are something else can make it raise anything
        raise UnreadableError(f"{file} must be a file of torch.save, and is none, or is damaged: {error}") from error


def read_weights(files: Sequence[Path], device: str = "cpu") -> Any:
    """Reads the shards of one file: what `torch.save` was given, or the tensors of safetensors files by name.

    Args:
        files: The shards.
        device: "meta" leaves the tensors of a pickle unread for good; those of safetensors are unread anyway.

    Raises:
        ValueError: As `read_pickle` and `SafeTensors`.
    """
    for file in files:
        with file.open("rb") as content:
            if content.read(16) == b"version https://":
                raise ValueError(f"{file} must hold weights, and is a pointer to them; fetch it with `git lfs pull`")
    if files[0].suffix == ".safetensors":
        return SafeTensors(files)
    if len(files) == 1:
        return read_pickle(files[0], device)
    return {name: tensor for file in files for name, tensor in read_pickle(file, device).items()}


def weight_files(folder: Path, name: str) -> list[Path]:
    """Returns the files of a model in diffusers' or transformers' layout, `name` being that of the weights.

    The plain ones are preferred to those in half precision, and safetensors to pickles. Empty where there are none.
    """
    for suffix in (".safetensors", ".bin"):
        for variant in ("", *(f".{variant}" for variant in VARIANTS)):
            if (whole := folder / f"{name}{variant}{suffix}").is_file():
                return [whole]
            for index in (
                folder / f"{name}{suffix}.index{variant}.json",
                folder / f"{name}{variant}{suffix}.index.json",
            ):
                if index.is_file():
                    shards = read_json(index)["weight_map"].values()
                    return [folder / shard for shard in sorted(set(shards))]
    return []


def state_dict_of(content: Any) -> Any:
    """Returns what a training program put into its file as the model, and a file's whole content where it did not."""
    while isinstance(content, Mapping) and isinstance(inner := content.get("state_dict"), Mapping):
        content = inner
    return content


def flat_tensors(content: Any, source: Path) -> Mapping[str, Tensor]:
    """Returns the tensors of nested mappings, the names of which are joined by dots.

    Raises:
        ValueError: It is no mapping, is empty, or holds something else.
    """
    if isinstance(content, SafeTensors):
        found: Mapping[str, Tensor] = content
    else:
        found = dict(_leaves("", content, source))
    if not found:
        raise ValueError(f"{source} must hold tensors by name, and is empty")
    return found


def _leaves(prefix: str, content: Any, source: Path) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix, content
    elif isinstance(content, Mapping):
        for name, value in content.items():
            yield from _leaves(f"{prefix}.{name}" if prefix else str(name), value, source)
    else:
        where = f" at {prefix!r}" if prefix else ""
        raise ValueError(f"{source} must hold tensors by name, got {type(content).__name__}{where}")
