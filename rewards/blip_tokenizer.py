"""BLIP's tokenizer: BERT's word pieces and two tokens of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED_TOKENS = ("[DEC]", "[ENC]")


class Tokens(NamedTuple):
    """Prompts as numbers; the mask is 1 for tokens and 0 for padding."""

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]


class BlipTokenizer:
    """Turns prompts into token ids: lower case, word pieces, padded and cut to a fixed length.

    `[DEC]` and `[ENC]` follow the vocabulary, as in BLIP; they matter only for a prompt that has them literally.

    Args:
        vocabulary: Word pieces in the order of their ids; `[PAD]` first, and BERT's other special tokens anywhere.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        from transformers import BertTokenizer

        words = tuple(word for word in vocabulary if word not in ADDED_TOKENS)
        missing = [token for token in SPECIAL_TOKENS if token not in words]
        if missing:
            raise ValueError(f"vocabulary must hold {', '.join(SPECIAL_TOKENS)}, got one without {', '.join(missing)}")
        if words[0] != "[PAD]":
            raise ValueError(f"vocabulary must begin with [PAD], got {words[0]!r}")
        ids = {word: index for index, word in enumerate(words)}
        if len(ids) != len(words):
            raise ValueError(f"vocabulary must not repeat a word, got {len(words) - len(ids)} repeated")
        self.vocabulary = words
        self.bert = BertTokenizer(vocab=ids)
        self.bert.add_special_tokens({"bos_token": ADDED_TOKENS[0], "additional_special_tokens": [ADDED_TOKENS[1]]})

    @classmethod
    def from_file(cls, path: str | Path) -> "BlipTokenizer":
        """Reads a `vocab.txt` with one word piece per line."""
        return cls(Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n"))

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary, without the two added tokens, one word piece per line."""
        Path(path).write_text("\n".join(self.vocabulary) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Returns the number of ids, the two added tokens included."""
        return len(self.vocabulary) + len(ADDED_TOKENS)

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tokens:
        """Returns `max_length` token ids for each prompt; what is longer is cut, `[CLS]` and `[SEP]` stay."""
        encoded = self.bert(list(prompts), padding="max_length", truncation=True, max_length=max_length)
        return Tokens(torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]))
