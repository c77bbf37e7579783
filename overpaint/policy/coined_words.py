"""Made-up words whose tokens are free vectors: what textual inversion learns, and what attacks move."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class CoinedWords:
    """Some words that no tokenizer knows. Their tokens have negative numbers, so that no other token is one of them.

    In a `with` block the token embedding knows these numbers: gradients flow to the vectors, and its weights are as
    they were.

    Args:
        embedding: The text encoder's, of its tokens.
        vectors: Those of each word, as wide as the embedding's; a word becomes as many tokens as it has vectors.
    """

    def __init__(self, embedding: nn.Embedding, vectors: Mapping[str, Float[Tensor, "vectors dim"]]) -> None:
        for word, own in vectors.items():
            if own.shape[1] != embedding.embedding_dim:
                raise ValueError(f"vectors of {word} must be {embedding.embedding_dim} wide, got {own.shape[1]}")
        self.embedding = embedding
        self.table = torch.cat(list(vectors.values()))
        last, self._ids = 0, {}
        for word, own in vectors.items():
            self._ids[word] = list(range(last - 1, last - 1 - len(own), -1))
            last -= len(own)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, sorted(vectors, key=len, reverse=True)))})")

    def parts(self, text: str) -> list[str | list[int]]:
        """Returns a text cut into what a tokenizer reads and the tokens of coined words, in turn."""
        return [self._ids.get(part, part) for part in self._pattern.split(text)]

    def __contains__(self, text: str) -> bool:
        """Tells whether one of the words stands in a text."""
        return self._pattern.search(text) is not None

    def __enter__(self) -> None:
        self._asked: Int[Tensor, "texts tokens"] | None = None
        self._hooks = (
            self.embedding.register_forward_pre_hook(self._before),
            self.embedding.register_forward_hook(self._after),
        )

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (self._asked,) = inputs
        return (self._asked.clamp(min=0),)

    def _after(self, module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        assert self._asked is not None
        own = self.table.to(embedded)[(-1 - self._asked).clamp(min=0)]
        return torch.where((self._asked < 0)[..., None], own, embedded)
