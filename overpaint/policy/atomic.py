"""Atomic writes: a file is whole or not there, whenever the program is killed.

Each is written under a hidden name in the same folder, `.<name><writer>.partial`, and then renamed.
"""

import os
import platform
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_file(path: Path, *, writer: str = "") -> Generator[Path]:
    """Gives the name to write to, which becomes `path` when the block ends; if it fails, nothing is left of it.

    Args:
        path: The file; its folder is made.
        writer: Tells processes apart that may write the same file at the same time, as `this_process` does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path, writer)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_bytes(path: Path, content: bytes, *, writer: str = "") -> None:
    """Writes a file as `atomic_file` does.

    Raises:
        OSError: The disk is full, for example; the message names the file, and nothing of it is left.
    """
    try:
        with atomic_file(path, writer=writer) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """Writes a text file, in UTF-8; raises as `write_bytes`."""
    write_bytes(path, text.encode(), writer=writer)


def forget_partial(path: Path, *, writer: str = "") -> None:
    """Removes what the same writer left of a file when it was killed."""
    _partial(path, writer).unlink(missing_ok=True)


def this_process() -> str:
    """Returns a `writer` that no other process has at the same time, on whatever machine."""
    return f".{platform.node()}-{os.getpid()}"


def _partial(path: Path, writer: str) -> Path:
    return path.with_name(f".{path.name}{writer}.partial")
