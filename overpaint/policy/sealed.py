"""Sealed files: tensors and records that carry the SHA-256 of their content, so that damage shows when they are read.

For what work leaves for later work. A file that was cut short, changed by one byte, or written without a seal is
damaged; what is damaged is made anew, or refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from overpaint.text_files import parsed_json

from .atomic import atomic_file
from .digest import tensors_hash

SEAL = "sha256"


class DamagedFileError(ValueError):
    """A file that is not what was written; the message names it."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] = MappingProxyType({}), *, writer: str = ""
) -> None:
    """Writes a safetensors file, whole or not at all.

    Args:
        path: The file.
        tensors: By name.
        about: Texts that go into its header.
        writer: See `atomic_file`.
    """
    from safetensors.torch import save_file

    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_file(path, writer=writer) as partial:
        save_file(whole, partial, metadata={**about, SEAL: _seal_of(whole, about)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of a file and its texts.

    Raises:
        DamagedFileError: It is not what `write_tensors` wrote.
    """
    from .weight_files import SafeTensors

    try:
        content = SafeTensors([path])
        tensors, about = dict(content), dict(content.header)
    except ValueError as error:
        raise DamagedFileError(str(error)) from error
    if about.pop(SEAL, None) != _seal_of(tensors, about):
        raise DamagedFileError(f"{path} is damaged: its content is not what its {SEAL} says")
    return tensors, about


def sealed(record: Mapping[str, Any]) -> bytes:
    """Returns a line of JSON that holds a record and its seal."""
    text = json.dumps(dict(record), ensure_ascii=False)
    return json.dumps({**record, SEAL: _hash(text)}, ensure_ascii=False).encode() + b"\n"


def unsealed(line: bytes, name: str) -> dict[str, Any]:
    """Returns the record of a line that `sealed` made.

    Args:
        line: With the line feed at its end.
        name: What messages call it.

    Raises:
        DamagedFileError: It is not what `sealed` made.
    """
    try:
        record = parsed_json(line, "it") if line.endswith(b"\n") else None
    except ValueError as error:
        raise DamagedFileError(f"{name} is damaged: {error}") from error
    if not isinstance(record, dict) or record.pop(SEAL, None) != _hash(json.dumps(record, ensure_ascii=False)):
        raise DamagedFileError(f"{name} is damaged: it must be a whole line with the {SEAL} of its content")
    return record


def _seal_of(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    return tensors_hash(tensors, [json.dumps(sorted(about.items()))])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
