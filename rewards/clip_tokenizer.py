"""CLIP's tokenizer: pieces of words, merged from bytes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .blip_tokenizer import Tokens
from .checkpoint import HubFiles

BYTE_PAIRS = HubFiles(
    repository="openai/clip-vit-large-patch14",
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
    files={
        "vocab.json": "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
        "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    },
)
"""The 49,408 pieces that CLIP was trained with; open_clip's models, those of LAION among them, have the same ones."""
START, END = "<|startoftext|>", "<|endoftext|>"
"""The first and the last token of every prompt."""


class ClipTokenizer:
    """Turns prompts into token ids: lower case, byte pairs, padded and cut to a fixed length.

    The released code of CLIP and open_clip also repairs broken Unicode and replaces HTML entities such as `&amp;`
    first. As in transformers, that is not done here.

    Args:
        vocabulary: Each piece's id.
        merges: Pairs of pieces that become one, the most important first.

    Raises:
        ValueError: The vocabulary lacks a token that is needed, or its ids are not 0, 1, 2, ...
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> None:
        from transformers import CLIPTokenizer

        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"vocabulary must number its {len(vocabulary)} pieces 0, 1, 2, ..., got other ids")
        needed = {START, END}.union(*((left, right, left + right) for left, right in merges))
        missing = sorted(needed - set(vocabulary))
        if missing:
            found = f"one without {', '.join(missing[:4])}"
            raise ValueError(f"vocabulary must hold {START}, {END} and every piece of merges, got {found}")
        make: Any = CLIPTokenizer  # its annotations know merges as text only
        self.vocabulary = dict(vocabulary)
        self.merges = [(left, right) for left, right in merges]
        self.byte_pairs = make(vocab=self.vocabulary, merges=self.merges)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ClipTokenizer":
        """Reads `vocab.json` and `merges.txt`, or `tokenizer.json` where one of them is missing.

        Raises:
            FileNotFoundError: The folder has neither.
        """
        folder = Path(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocabulary, merges = model["vocab"], model["merges"]
        else:
            raise FileNotFoundError(
                "a folder of a CLIP tokenizer must hold vocab.json and merges.txt, or tokenizer.json, and "
                f"{folder} does not. {BYTE_PAIRS.by_hand()}"
            )
        return cls(vocabulary, [_pair(merge) for merge in merges])

    def save(self, folder: str | Path) -> None:
        """Writes `vocab.json` and `merges.txt`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Returns the number of ids."""
        return len(self.vocabulary)

    @property
    def end_id(self) -> int:
        """Id of the token that ends every prompt."""
        return self.vocabulary[END]

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tokens:
        """Returns `max_length` token ids for each prompt; what is longer is cut, its last token is `END` all the same.

        Padding is `END` as well, so that a prompt is over at the first of them.
        """
        encoded = self.byte_pairs(list(prompts), padding="max_length", truncation=True, max_length=max_length)
        return Tokens(torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]))


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """Returns the two pieces of a merge, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
