"""Texts together with the tensors that a network reads of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from overpaint.settings import Count, Index

from .types import Embeddings, PerSample

_keys = count()

ROUNDED = ("tokens", "pooled")
"""Tensors that may be in a network's precision; the others hold sizes and scales, which it would round."""
TENSORS = (*ROUNDED, "sizes", "guidance")


@dataclass(frozen=True, eq=False)
class Conditioning:
    """A batch of encoded texts: indexable by rows, concatenable, movable.

    Whoever needs the words again, such as a guard that filters prompts, reads `texts`. Which tensors there are besides
    the tokens is a matter of the family of models.
    """

    texts: tuple[str, ...]
    """The text of each row, as it was before anything was done to its tokens."""

    tokens: Embeddings
    """What attention reads: [batch, tokens, dim]."""

    pooled: Float[Tensor, "batch pooled"] | None = None
    """What modulation reads of the whole text."""

    sizes: Float[Tensor, "batch 6"] | None = None
    """Original size, top left corner of the crop, and target size, in pixels, each height first; where a network that
    reads them gets none, they are those of its image, uncropped."""

    guidance: PerSample | None = None
    """Scale of an embedded guidance."""

    key: Index = field(default_factory=lambda: next(_keys))
    """Number of this batch: the same for it on another device or in another precision, a new one for any other rows.
    What remembers something of a trajectory, which has one batch at all its steps, knows the trajectory by it."""

    def __post_init__(self) -> None:
        """Checks that there is a text for each row."""
        for name in TENSORS:
            rows = getattr(self, name)
            if rows is not None and len(self.texts) != len(rows):
                raise ValueError(f"texts must be one for each of the {len(rows)} rows of {name}, got {len(self.texts)}")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(
        self, rows: slice | Sequence[int] | Int[Tensor, " rows"] | Bool[Tensor, " batch"]
    ) -> "Conditioning":
        """Returns some rows, by a slice, by indices, or by a mask."""
        if isinstance(rows, slice):
            return self._of(self.texts[rows], lambda tensor: tensor[rows])
        chosen = torch.as_tensor(rows)
        indices = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
        texts = tuple(self.texts[index] for index in indices.tolist())
        return self._of(texts, lambda tensor: tensor[indices.to(tensor.device)])

    @classmethod
    def cat(cls, parts: Sequence["Conditioning"]) -> "Conditioning":
        """Returns all rows of several batches, in their order.

        Raises:
            ValueError: Some have a tensor that others lack.
        """
        tensors: dict[str, Any] = {}
        for name in TENSORS:
            found = [getattr(part, name) for part in parts]
            known = [tensor for tensor in found if tensor is not None]
            if known and len(known) < len(found):
                raise ValueError(f"parts must all have {name} or none of them, got {len(known)} of {len(found)}")
            tensors[name] = torch.cat(known) if known else None
        return cls(tuple(text for part in parts for text in part.texts), **tensors)

    def expand(self, batch: Count) -> "Conditioning":
        """Returns a batch of that many rows from one row, without copying it, or itself where it has as many.

        Raises:
            ValueError: It has several rows, and another number is asked for.
        """
        if len(self) == batch:
            return self
        if len(self) > 1:
            raise ValueError(f"conditioning must have one row or {batch}, got {len(self)}")
        return self._of(self.texts * batch, lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat_interleave(self, repeats: Count) -> "Conditioning":
        """Returns each row that many times, one after the other."""
        texts = tuple(text for text in self.texts for _ in range(repeats))
        return self._of(texts, lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def to(self, like: Tensor | torch.device | torch.dtype) -> "Conditioning":
        """Returns it on a device, in a precision, or in both of another tensor; sizes and scales stay float32."""
        if not isinstance(like, torch.dtype):
            device = like.device if isinstance(like, Tensor) else like
            moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        else:
            moved = self._tensors()
        moved |= {name: moved[name].to(like) for name in ROUNDED if name in moved}
        return replace(self, **moved)

    def with_tokens(self, tokens: Embeddings) -> "Conditioning":
        """Returns the same batch of texts with other tensors in the tokens' place."""
        return replace(self, tokens=tokens)

    @property
    def nbytes(self) -> int:
        """How much memory its tensors take."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name in TENSORS if (tensor := getattr(self, name)) is not None}

    def _of(self, texts: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Returns other rows, which `change` makes of each tensor."""
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in self._tensors().items()}
        return Conditioning(texts, **changed)
