"""Texts together with the tensors that a network reads of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .types import Embeddings

_keys = count()


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A batch of encoded texts: indexable by rows, concatenable, movable.

    Whoever needs the words again, such as a guard that filters prompts, reads `texts`.
    """

    texts: tuple[str, ...]
    """The text of each row, as it was before anything was done to its tokens."""

    tokens: Embeddings
    """What cross-attention reads: [batch, tokens, dim]."""

    key: int = field(default_factory=lambda: next(_keys))
    """Number of this batch: the same for it on another device or in another precision, a new one for any other rows.
    What remembers something of a trajectory, which has one batch at all its steps, knows the trajectory by it."""

    def __post_init__(self) -> None:
        """Checks that there is a text for each row."""
        if len(self.texts) != len(self.tokens):
            raise ValueError(f"texts must be one for each of the {len(self.tokens)} rows, got {len(self.texts)}")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(
        self, rows: slice | Sequence[int] | Int[Tensor, " rows"] | Bool[Tensor, " batch"]
    ) -> "Conditioning":
        """Returns some rows, by a slice, by indices, or by a mask."""
        if isinstance(rows, slice):
            return Conditioning(self.texts[rows], self.tokens[rows])
        chosen = torch.as_tensor(rows)
        indices = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        texts = tuple(self.texts[index] for index in indices.tolist())
        return Conditioning(texts, self.tokens[indices.to(self.tokens.device)])

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Returns all rows of several batches, in their order."""
        return cls(tuple(text for part in parts for text in part.texts), torch.cat([part.tokens for part in parts]))

    def expand(self, batch: int) -> "Conditioning":
        """Returns a batch of that many rows from one row, without copying it, or itself where it has as many.

        Raises:
            ValueError: It has several rows, and another number is asked for.
        """
        if len(self) == batch:
            return self
        if len(self) > 1:
            raise ValueError(f"conditioning must have one row or {batch}, got {len(self)}")
        return Conditioning(self.texts * batch, self.tokens.expand(batch, -1, -1))

    def repeat_interleave(self, repeats: int) -> "Conditioning":
        """Returns each row that many times, one after the other."""
        texts = tuple(text for text in self.texts for _ in range(repeats))
        return Conditioning(texts, self.tokens.repeat_interleave(repeats, dim=0))

    def to(self, like: Tensor | torch.device | torch.dtype) -> "Conditioning":
        """Returns it on a device, in a precision, or in both of another tensor."""
        return replace(self, tokens=self.tokens.to(like))

    def with_tokens(self, tokens: Embeddings) -> "Conditioning":
        """Returns the same batch of texts with other tensors."""
        return replace(self, tokens=tokens)
