"""Reading and writing the checkpoints of networks that BLIP's towers are part of.

A checkpoint is a file in the layout of its authors, or a folder of ours with `config.json`, `vocab.txt` and
`model.safetensors`. Nothing but tensors is unpickled, and every tensor must fit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor, nn

from .blip_config import BlipConfig
from .blip_tokenizer import BlipTokenizer
from .hub import HubFiles, check_folder

VOCABULARY = HubFiles(
    repository="google-bert/bert-base-uncased",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    files={"vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"},
)
"""The word pieces that BLIP and ImageReward were trained with."""
FOLDER = MappingProxyType(
    {"config.json": "sizes", "vocab.txt": "one word piece per line", "model.safetensors": "weights"}
)
"""The files of a folder that `write_folder` writes, and what is in them."""

Network = TypeVar("Network", bound=nn.Module)


def tokenizer_from(vocab: str | Path | Sequence[str] | None) -> BlipTokenizer:
    """Makes the tokenizer from a file, from word pieces, or from bert-base-uncased's on the hub where there is None."""
    if vocab is None:
        vocab = VOCABULARY.fetch() / "vocab.txt"
    return BlipTokenizer.from_file(vocab) if isinstance(vocab, str | Path) else BlipTokenizer(vocab)


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


def write_folder(
    folder: str | Path, network: nn.Module, config: BlipConfig, tokenizer: BlipTokenizer, dtype: torch.dtype | None
) -> None:
    """Writes the files of `FOLDER`, with the weights in their own precision or in `dtype`."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / "config.json")
    tokenizer.save(folder / "vocab.txt")
    state = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in network.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


def check_our_folder(folder: str | Path, what: str) -> Path:
    """Returns the folder as a path once it is seen to hold the files of `FOLDER`.

    Raises:
        FileNotFoundError: A file is missing.
    """
    check_folder(Path(folder), FOLDER, what)
    return Path(folder)
