"""Other people's weight files, read without unpickling anything but tensors, and each tensor only when it is used.

What a file claims is checked before memory is spent on it: no tensor is larger than the bytes that the file has for it,
nothing is decompressed, and the shards that an index names lie beside it.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.text_files import read_json_object

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that hold weights, the safer first."""

VARIANTS = ("fp16", "bf16")
"""Names under which weights in half precision are published beside those in float32, or instead of them."""


SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Name of a file that may be one of several shards: one of its own folder."""

MOST_WRAPPERS = 8
"""How many times a state dict may lie in another one under the name `state_dict`."""


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
            except (SafetensorError, OSError) as error:
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


def read_pickle(file: Path, device: str = "cpu", *, mapped: bool = True) -> Any:
    """Reads what `torch.save` wrote, as far as it is made of tensors, numbers and texts.

    Args:
        file: The file.
        device: Where the tensors are put; "meta" leaves them unread.
        mapped: Whether tensors stay on the disk until they are used, where the file's format allows it.

    Raises:
        UnreadableError: The file is damaged, or of another format.
        ValueError: It needs code to be run, or claims to hold more than its bytes.
    """
    zipped = zipfile.is_zipfile(file)  # older pickles cannot be mapped into memory
    _check_records(file, zipped)
    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=mapped and zipped)
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
    storages: dict[int, int] = {}
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or (
            tensor.numel() * tensor.element_size() > (size := tensor.untyped_storage().nbytes())
        ):
            raise ValueError(f"{file} must hold its tensors whole, got one of shape {tuple(tensor.shape)} in part")
        storages[tensor.untyped_storage()._cdata] = size
    if (claimed := sum(storages.values())) > (held := file.stat().st_size):
        raise ValueError(f"{file} must hold its tensors whole, got {held} bytes that claim to be {claimed} of tensors")
    return content


BYTEARRAY = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")
"""What makes a pickle fill as much memory as it likes; no tensor needs it."""


def _check_records(file: Path, zipped: bool) -> None:
    """Checks that reading a file of `torch.save` takes no more memory than it has bytes; a ValueError where it may."""
    if zipped:
        try:
            with zipfile.ZipFile(file) as archive:
                for record in archive.infolist():
                    if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                        raise ValueError(
                            f"{file} must hold its records uncompressed, as torch.save writes them, got "
                            f"{record.filename!r} of {record.file_size} bytes in {record.compress_size}"
                        )
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
            raise UnreadableError(
                f"{file} must be a file of torch.save, and is none, or is damaged: {error}"
            ) from error
    if not file.stat().st_size:  # which cannot be mapped
        return
    with file.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
        if BYTEARRAY.search(content):
            raise ValueError(f"{file} must hold tensors, numbers and texts only, and needs builtins.bytearray")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yields the tensors of nested containers, each container once."""
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, Mapping) else value)


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
    return {name: tensor for file in files for name, tensor in flat_tensors(read_pickle(file, device), file).items()}


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
                    return [folder / shard for shard in shards_of(index)]
    return []


def shards_of(index: Path) -> list[str]:
    """Returns the names of the files that the index of a model in shards lists.

    Raises:
        ValueError: It is no such index, or names a file that does not lie beside it.
    """
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} must map weights to files under weight_map, got {type(names).__name__}")
    shards = {str(name) for name in names.values()}
    if foreign := sorted(name for name in shards if not SHARD.fullmatch(name)):
        raise ValueError(f"{index} must name files that lie beside it, got {foreign[0]!r}")
    return sorted(shards)


def state_dict_of(content: Any) -> Any:
    """Returns what a training program put into its file as the model, and a file's whole content where it did not."""
    for _ in range(MOST_WRAPPERS):
        if not isinstance(content, Mapping) or not isinstance(inner := content.get("state_dict"), Mapping):
            break
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
        found = dict(_leaves(content, source))
    if not found:
        raise ValueError(f"{source} must hold tensors by name, and is empty")
    return found


def _leaves(content: Any, source: Path) -> Iterator[tuple[str, Tensor]]:
    left, seen = [("", content)], set()
    while left:
        name, value = left.pop()
        where = f" at {name!r}" if name else ""
        if isinstance(value, Tensor):
            yield name, value
        elif not isinstance(value, Mapping):
            raise ValueError(f"{source} must hold tensors by name, got {type(value).__name__}{where}")
        elif id(value) in seen:
            raise ValueError(f"{source} must hold every mapping once, got one again{where}")
        else:
            seen.add(id(value))
            inner = [(f"{name}.{key}" if name else str(key), value[key]) for key in value]
            left.extend(reversed(inner))
