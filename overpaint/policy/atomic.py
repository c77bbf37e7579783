"""Atomic writes: a file is whole or not there, whenever the program is killed or the disk is full.

Each is written under a hidden name in the same folder, `.<name><writer>.partial`, and then renamed.
"""

import io
import os
import platform
import re
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Gives the block in which `path` is written: an error of the disk names it, whichever library met the error.

    Raises:
        OSError: The disk is full, for example; the message has the reason and the path.
    """
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def atomic_file(path: Path, *, writer: str = "") -> Generator[Path]:
    """Gives the name to write to, which becomes `path` when the block ends; if it fails, nothing is left of it.

    Args:
        path: The file; its folder is made.
        writer: Tells processes apart that may write the same file at the same time, as `this_process` does.

    Raises:
        OSError: The disk is full, for example; the message names the file.
    """
    partial = _partial(path, writer)
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_bytes(path: Path, content: bytes, *, writer: str = "") -> None:
    """Writes a file as `atomic_file` does, and raises as it."""
    with atomic_file(path, writer=writer) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str, *, writer: str = "") -> None:
    """Writes a text file, in UTF-8; raises as `atomic_file`."""
    write_bytes(path, text.encode(), writer=writer)


def append(file: io.FileIO, content: bytes) -> None:
    """Adds to the end of a file that was opened without a buffer, all or nothing.

    Raises:
        OSError: The disk is full, for example; the message names the file, and nothing is added to it.
    """
    begin, written = file.seek(0, os.SEEK_END), 0
    with naming(Path(str(file.name))):
        try:
            while written < len(content):  # an unbuffered file may take a part, and complain about the rest only
                written += file.write(content[written:]) or 0
        except OSError:
            with suppress(OSError):
                file.truncate(begin)
            raise


def forget_partial(path: Path, *, writer: str = "") -> None:
    """Removes what the same writer left of a file when it was killed."""
    _partial(path, writer).unlink(missing_ok=True)


def this_process() -> str:
    """Returns a `writer` that no other process has at the same time, on whatever machine."""
    return f".{platform.node()}-{os.getpid()}"


def _errno(error: BaseException) -> int | None:
    """Returns the operating system's number of an error, or of the one behind it; None where the disk met none.

    safetensors has it in its text alone; torch, which writes into a file of Python's, hides it behind an error of its
    own that this one led to.
    """
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    if told:
        return int(told[1])
    behind = error.__context__ if type(error) is RuntimeError else None
    return behind.errno if isinstance(behind, OSError) else None


def _partial(path: Path, writer: str) -> Path:
    return path.with_name(f".{path.name}{writer}.partial")
