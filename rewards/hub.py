"""Checkpoints on the Hugging Face hub: each at one revision, its files checked by their hashes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .public_files import sha256_of


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """Some files of a repository on the hub, as they were at one commit."""

    repository: str
    """Owner and name, such as "openai/clip-vit-large-patch14"."""
    revision: str
    """The commit, 40 lower-case hexadecimal digits; what lies there does not change."""
    files: Mapping[str, str | None]
    """Each file's SHA-256, or None for one whose hash we have not seen published: the revision alone vouches for it."""

    def __post_init__(self) -> None:
        """Checks the revision and the hashes."""
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be 40 lower-case hexadecimal digits, got {self.revision!r}")
        for name, sha256 in self.files.items():
            if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise ValueError(f"files[{name!r}] must be 64 lower-case hexadecimal digits or None, got {sha256!r}")

    def fetch(self) -> Path:
        """Returns the folder that holds the files, fetching first those that the hub's cache does not have.

        Raises:
            OSError: A file could not be fetched; the message says how to get it by other means.
            ValueError: A file has other content than expected.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        path = Path()
        for name, sha256 in self.files.items():
            try:
                path = Path(hf_hub_download(self.repository, name, revision=self.revision))
            except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
                raise OSError(
                    f"could not get {name} of {self.repository} from the Hugging Face hub: {error}. {self.by_hand()}"
                ) from error
            found = sha256_of(path) if sha256 is not None else None
            if found != sha256:
                raise ValueError(
                    f"{path} has other content than {name} of {self.repository}: its SHA-256 is {found}, expected "
                    f"{sha256}. Delete it to have it fetched again"
                )
        return path.parent

    def by_hand(self) -> str:
        """Returns how to get the files where there is no network."""
        names = " ".join(self.files)
        return (
            f"Where there is a network, run `hf download {self.repository} {names} --revision {self.revision} "
            "--local-dir FOLDER`, and give the folder"
        )


def check_folder(folder: Path, names: Mapping[str, object], what: str) -> None:
    """Checks that a folder holds the files of a checkpoint.

    Args:
        folder: The folder.
        names: Names of the files, as keys.
        what: What the files make up, for the message.

    Raises:
        FileNotFoundError: One is missing.
    """
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"a folder of {what} must hold {', '.join(missing)}, and {folder} does not")
