"""Public data that is not part of this project: fetched when first used, and trusted by its hash alone."""

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from overpaint.settings import Field, settings

CACHE_VARIABLE = "OVERPAINT_CACHE"
"""Environment variable that says where fetched files are kept."""
DEFAULT_CACHE = "~/.cache/overpaint"
"""Where they are kept if it does not."""
TIMEOUT = 30.0
"""Seconds that a server may keep silent."""


@settings
class PublicFile:
    """One file that others have published, at one version."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]*$")
    """Name that the file has here."""
    url: str = Field(pattern="^https?://")
    """Where it is fetched; an address that names a version, so that what lies there does not change."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 of its content, 64 lower-case hexadecimal digits."""
    licence: str
    """Licence that it was published under."""
    source: str
    """Who made it, for citation."""


def fetch(file: PublicFile, folder: Path | None = None) -> Path:
    """Returns the path of a file whose content has just been checked, fetching it first where there is none.

    Args:
        file: What is wanted.
        folder: Where a file of that name already lies; nothing is fetched then, and nothing cached.

    Raises:
        FileNotFoundError: There is no such file in `folder`.
        ValueError: The file in `folder` has other content.
        OSError: The file could not be fetched, or what came has other content.
    """
    if folder is None:
        path = cached_path(file)
        if not path.is_file() or sha256_of(path) != file.sha256:
            _download(file, path)
        return path
    path = folder / file.name
    if not path.is_file():
        raise FileNotFoundError(f"folder must hold {file.name}, got {folder}, which does not. {_by_hand(file)}")
    found = sha256_of(path)
    if found != file.sha256:
        raise ValueError(f"{path} has other content than expected: its SHA-256 is {found}. {_by_hand(file)}")
    return path


def cached_path(file: PublicFile) -> Path:
    """Returns where a fetched file is kept, whether it is there or not; versions of one name do not meet."""
    cache = Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()
    return cache / file.sha256[:16] / file.name


def _download(file: PublicFile, path: Path) -> None:
    """Fetches by pooch, which renames what has the right content; processes may do this at the same time."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    quiet: Any = pooch.HTTPDownloader(progressbar=False, timeout=TIMEOUT)
    try:
        pooch.retrieve(file.url, f"sha256:{file.sha256}", fname=path.name, path=path.parent, downloader=quiet)
    except OSError as error:
        response = getattr(error, "response", None)
        if response is not None:
            response.close()  # it holds its connection
        raise OSError(f"could not fetch {file.name}: {_reason(file, error)}. {_by_hand(file)}") from error
    except ValueError as error:
        raise OSError(
            f"what was fetched as {file.name} has other content than expected: {error}. {_by_hand(file)}"
        ) from error
    path.chmod(0o644)  # pooch leaves it readable for its owner alone, and a cache may be shared


def _reason(file: PublicFile, error: OSError) -> str:
    """Returns why a file could not be fetched: there is no network, nothing at its address, or something else."""
    response = getattr(error, "response", None)  # of requests, by which pooch fetches; its errors have no number
    if response is not None and response.status_code in (404, 410):
        return f"there is nothing at its address any more ({response.status_code})"
    if response is None and error.errno is None:
        return f"there is no connection to {urlsplit(file.url).netloc} ({type(error).__name__})"
    return str(error)


def _by_hand(file: PublicFile) -> str:
    return (
        f"To get it by hand, save {file.url} (SHA-256 {file.sha256}) as {cached_path(file)}, "
        "or under its name in a folder that is given as `folder`"
    )


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
