"""The folders and the vocabulary of networks that BLIP's towers are part of.

A checkpoint of ours is a folder with `config.json`, `vocab.txt` and
`model.safetensors`; `checkpoint` reads the files of others.
"""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from .blip_config import BlipConfig
from .blip_tokenizer import BlipTokenizer
from .checkpoint import HubFiles, check_folder

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


def tokenizer_from(vocab: str | Path | Sequence[str] | None) -> BlipTokenizer:
    """Makes the tokenizer from a file, from word pieces, or from bert-base-uncased's on the hub where there is None."""
    if vocab is None:
        vocab = VOCABULARY.fetch() / "vocab.txt"
    return BlipTokenizer.from_file(vocab) if isinstance(vocab, str | Path) else BlipTokenizer(vocab)


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
