"""Checkpoints: files on the Hugging Face hub at one revision, state dicts of tensors only, strict loading."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from torch import Tensor, nn

from overpaint.settings import Field, settings

from .public_files import sha256_of

Network = TypeVar("Network", bound=nn.Module)


@settings
class HubFiles:
    """Some files of a repository on the hub, as they were at one commit."""

    repository: str
    """Owner and name, such as "openai/clip-vit-large-patch14"."""
    revision: str = Field(pattern="^[0-9a-f]{40}$")
    """The commit, 40 lower-case hexadecimal digits; what lies there does not change."""
    files: Mapping[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None]
    """Each file's SHA-256, or None for one whose hash we have not seen published: the revision alone vouches for it."""

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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict without unpickling anything but tensors; one under the key `model` is taken from there.

    Args:
        path: A `.safetensors` file, or a file of `torch.save`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"a checkpoint must map names to tensors, and {path} does not")
    return state


def frozen_with(network: Network, state: Mapping[str, Tensor]) -> Network:
    """Gives the network its weights, every one of which must be there and fit, and freezes it.

    Raises:
        ValueError: Some are missing, unknown or of another shape; the first four are named.
    """
    expected = network.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} has shape {list(state[name].shape)} and not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"weights must fit the config, got {len(problems)} that do not: {'; '.join(problems[:4])}")
    network.load_state_dict(dict(state))
    return network.requires_grad_(False).eval()
