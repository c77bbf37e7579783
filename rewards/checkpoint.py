"""Checkpoints: files on the Hugging Face hub at one revision, state dicts of tensors only, strict loading."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor, nn

from overpaint.policy.atomic import atomic_file
from overpaint.policy.weight_files import SafeTensors, flat_tensors, read_weights, shards_of
from overpaint.settings import Field, settings
from overpaint.text_files import read_json

from .public_files import sha256_of

Network = TypeVar("Network", bound=nn.Module)
LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}
"""How transformers loads what lies in a folder."""
BUSY = (429, 500, 502, 503, 504)
"""Answers of a hub that is worth asking again."""
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Files that transformers reads weights from."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
"""Files that a tokenizer's vocabulary may be in. Without any, transformers makes a tokenizer that knows no word."""


@settings
class HubFiles:
    """Some files of a repository on the hub, as they were at one commit."""

    repository: str
    """Owner and name, such as "openai/clip-vit-large-patch14"."""
    revision: str = Field(pattern="^[0-9a-f]{40}$")
    """The commit, 40 lower-case hexadecimal digits; what lies there does not change."""
    files: Mapping[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None]
    """Each file's SHA-256, or None for one whose hash we have not seen published: the revision alone vouches for it."""
    given_as: str = "the folder"
    """What to do with the folder that they were downloaded to by hand."""

    def fetch(self) -> Path:
        """Returns the folder that holds the files, fetching first those that the hub's cache does not have.

        Raises:
            OSError: A file could not be fetched; the message says why, and how to get it by other means.
            ValueError: A file has other content than expected.
        """
        from httpx2 import RequestError
        from huggingface_hub import hf_hub_download

        path = Path()
        for name, sha256 in self.files.items():
            try:
                self._check_hub(name)
                path = Path(hf_hub_download(self.repository, name, revision=self.revision))
            except (OSError, RequestError) as error:  # most of huggingface_hub's own errors are of the first kind
                raise OSError(
                    f"could not get {name} of {self.repository} from the Hugging Face hub: {self._reason(name, error)}"
                ) from error
            found = sha256_of(path) if sha256 is not None else None
            if found != sha256:
                raise ValueError(
                    f"{path} has other content than {name} of {self.repository}: its SHA-256 is {found}, expected "
                    f"{sha256}. Delete it to have it fetched again"
                )
        return path.parent

    def _check_hub(self, name: str) -> None:
        """Asks the hub once for a file that its cache does not have; `hf_hub_download` would try for 23 s.

        Raises:
            OSError: The hub does not have the file, or does not let this user have it.
            RequestError: There is no connection to it.
        """
        from httpx2 import ReadTimeout
        from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
        from huggingface_hub.constants import is_offline_mode
        from huggingface_hub.errors import HfHubHTTPError

        cached = try_to_load_from_cache(self.repository, name, revision=self.revision)
        if is_offline_mode() or isinstance(cached, str):
            return
        try:
            get_hf_file_metadata(hf_hub_url(self.repository, name, revision=self.revision))
        except ReadTimeout:
            pass  # a busy hub, as below: worth the tries of hf_hub_download
        except HfHubHTTPError as error:
            if error.response.status_code not in BUSY:
                raise

    def _reason(self, name: str, error: Exception) -> str:
        """Returns why a file could not be fetched, and what to do about it."""
        from httpx2 import RequestError
        from huggingface_hub.constants import ENDPOINT, is_offline_mode
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        page = f"{ENDPOINT}/{self.repository}"
        match error:
            case GatedRepoError():
                return f"it is gated: accept its terms at {page}, and log in by `hf auth login`"
            case RepositoryNotFoundError():
                return f"there is no repository {page}, or it is private and `hf auth login` has not been run"
            case RevisionNotFoundError():
                return f"the repository has no revision {self.revision}"
            case LocalEntryNotFoundError() if is_offline_mode():
                return f"HF_HUB_OFFLINE is set, and the hub's cache does not have it. {self.by_hand()}"
            case LocalEntryNotFoundError() | RequestError():
                return f"there is no connection to {ENDPOINT} ({error.__cause__ or error}). {self.by_hand()}"
            case EntryNotFoundError():
                return f"the repository has no file {name} at revision {self.revision}"
        return f"{error}. {self.by_hand()}"

    def by_hand(self) -> str:
        """Returns how to get the files where there is no network."""
        names = " ".join(self.files)
        return (
            f"Where there is a network, run `hf download {self.repository} {names} --revision {self.revision} "
            f"--local-dir FOLDER`, and give {self.given_as}"
        )


def check_folder(folder: Path, names: Iterable[str], what: str, *, vocabulary: bool = False, hint: str = "") -> None:
    """Checks that a folder holds the files of a checkpoint.

    Args:
        folder: The folder.
        names: Names of the files.
        what: What the files make up, for the message.
        vocabulary: Whether there must be a tokenizer's vocabulary as well.
        hint: How to get the files.

    Raises:
        FileNotFoundError: One is missing.
    """
    missing = ", ".join(name for name in names if not (folder / name).is_file())
    if not missing and vocabulary and not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        missing = f"one of {', '.join(VOCABULARIES)}"
    if missing:
        raise FileNotFoundError(f"a folder of {what} must hold {missing}, and {folder} does not. {hint}".strip())


def read_tensors(path: Path, under: str | None = None) -> dict[str, Tensor]:
    """Reads a state dict without unpickling anything but tensors.

    Args:
        path: A `.safetensors` file, or a file of `torch.save`.
        under: Key that a file of `torch.save` must have the state dict under; None takes it from `model` where it is
            there, and else the whole file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    state = read_weights([path])
    if isinstance(state, SafeTensors):
        return dict(state)
    inner = state.get(under or "model") if isinstance(state, dict) else None
    if under or isinstance(inner, dict):
        state = inner
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        where = f" under {under}" if under else ""
        raise ValueError(f"a checkpoint must map names to tensors{where}, and {path} does not")
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


def renamed(name: str, renamings: Iterable[tuple[str, str]], what: str) -> str:
    """Returns what the first pattern that matches all of a tensor's name turns it into.

    Raises:
        ValueError: None does.
    """
    for pattern, replacement in renamings:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    raise ValueError(f"a checkpoint {what} has no tensor {name!r}")


def load_auto(auto: Any, folder: Path, what: str, *, optional: str = "", **options: Any) -> Any:
    """Loads a model by one of transformers' auto classes, without network and without code of the checkpoint.

    Args:
        auto: The class.
        folder: Where the checkpoint lies.
        what: What the model is, for the message.
        optional: Beginning of the names of tensors that may be missing.
        options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: The file lacks weights.
    """
    for file in folder.glob("*.json"):
        read_json(file)  # before libraries do, which bound neither size nor depth
    for index in folder.glob("*.index*.json"):
        shards_of(index)
    for pattern in WEIGHTS:
        for file in folder.glob(pattern):
            flat_tensors(read_weights([file], device="meta"), file)
    model, report = auto.from_pretrained(folder, output_loading_info=True, **LOCAL, **options)
    missing = sorted(name for name in report["missing_keys"] if not (optional and name.startswith(optional)))
    if missing:
        raise ValueError(f"the weights in {folder} must have every tensor of the {what}, and lack {missing[0]}")
    return model


def save_weights(network: nn.Module, path: Path, dtype: torch.dtype | None) -> None:
    """Writes a safetensors file, which transformers reads too, in the weights' own precision or in another."""
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }
    with atomic_file(path) as partial:
        save_file(state, partial, metadata={"format": "pt"})
