"""Prompt filter: trigger tokens of a concept are found and projected out of a prompt's embedding.

The part of SAFREE that reads prompts: see `erasure.methods.safree`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from overpaint.policy.prompts import PromptEncoder

MASK = 0
"""Token that stands where a token is left out."""


class FilteredPrompt(NamedTuple):
    """What SAFREE makes of a prompt."""

    embedding: Float[Tensor, "tokens dim"]  # with the trigger tokens replaced; float32, on the CPU
    triggers: Bool[Tensor, " words"]  # which of the tokens between start and end are triggers
    change: float  # how much all of the prompt's tokens would change (the paper's beta); nan where it has none
    last_step: int  # index of the last of 50 steps that sees the filtered embedding (the paper's t'); -1 for none


class PromptFilter:
    """Finds the words that bring the concepts, once for each prompt.

    Args:
        prompts: Encodes prompts, and lends its text encoder and tokenizer.
        concepts: Texts of what is kept out; at least one.
        alpha: See `trigger_tokens`.
        last_step: From a prompt's change to the index of the last of 50 steps that sees it filtered.
    """

    def __init__(
        self, prompts: PromptEncoder, concepts: Sequence[str], *, alpha: float, last_step: Callable[[float], int]
    ) -> None:
        self.prompts = prompts
        self.concepts = projector(self.pooled(concepts))
        self.alpha = alpha
        self.last_step = last_step
        self._cached = lru_cache(maxsize=1024)(self._filter)  # prompts, in the CPU's memory

    def __call__(self, prompt: str) -> FilteredPrompt:
        """Returns what becomes of a prompt."""
        return self._cached(prompt)

    def without_each_token(self, prompt: str) -> Float[Tensor, "words dim"]:
        """Returns the pooled embeddings of a prompt with one of its tokens left out at a time, in one batch."""
        ids = self.ids(prompt)
        words = len(ids) - 2
        masked = [[*ids[: place + 1], MASK, *ids[place + 2 :]] for place in range(words)]
        return self._pooled(masked) if masked else self.concepts.new_zeros(0, len(self.concepts))

    def pooled(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Returns the pooled embeddings of texts, each encoded alone; float64, on the CPU."""
        return torch.cat([self._pooled([self.ids(text)]) for text in texts])

    def ids(self, text: str) -> list[int]:
        """Returns the tokens of a text from start to end, cut off where the context ends."""
        return self.prompts.read(text)

    def _filter(self, prompt: str) -> FilteredPrompt:
        embedding = self.prompts([prompt]).tokens[0].cpu().double()
        left_out = self.without_each_token(prompt)
        words = len(left_out)
        if words == 0:
            return FilteredPrompt(embedding.float(), torch.zeros(0, dtype=torch.bool), math.nan, -1)
        away = torch.eye(len(self.concepts), dtype=torch.float64) - self.concepts
        triggers = trigger_tokens((left_out @ away).norm(dim=1), self.alpha)
        projected = embedding @ (away @ projector(left_out)).T
        active = slice(0, words + 2)  # start, words, and the end token after them
        change = 1 - torch.cosine_similarity(projected[active], embedding[active], dim=1).mean().item()
        replaced = torch.zeros(len(embedding), dtype=torch.bool).index_fill(0, triggers.nonzero()[:, 0] + 1, True)
        filtered = torch.where(replaced[:, None], projected, embedding)
        last = self.last_step(change) if triggers.any() else -1
        return FilteredPrompt(filtered.float(), triggers, change, last)

    def _pooled(self, ids: list[list[int]]) -> Float[Tensor, "texts dim"]:
        tokens = torch.tensor(ids, device=self.prompts.text_encoder.device)
        return self.prompts.run(tokens).pooler_output.cpu().double()


def projector(vectors: Float[Tensor, "count dim"]) -> Float[Tensor, "dim dim"]:
    """Returns the orthogonal projector onto the span of vectors, which may be nearly or wholly dependent.

    Equal to `C (CᵀC)⁺ Cᵀ` with the vectors as columns of C; directions weaker than 1e-6 of the strongest, which
    float32 cannot tell from rounding, count as none.
    """
    _, strengths, directions = torch.linalg.svd(vectors, full_matrices=False)
    basis = directions[strengths > 1e-6 * strengths.max()]
    return basis.T @ basis


def trigger_tokens(distances: Float[Tensor, " words"], alpha: float) -> Bool[Tensor, " words"]:
    """Tells which tokens bring the concepts, from how far the prompt without each is from the span of the concepts.

    A token is safe if its distance is below (1 + alpha) times the mean of the other tokens'. The only token of a
    prompt has no others, hence no mean, and is a trigger.
    """
    others = (distances.sum() - distances) / (len(distances) - 1)  # 0 / 0 is nan for a single token
    return ~(distances < (1 + alpha) * others)


def last_filtered_step(change: float, *, limit: float, steepness: float, midpoint: float) -> int:
    """Returns the index of the last of 50 denoising steps that sees a prompt filtered (the paper's t').

    Args:
        change: How much the prompt would change (the paper's beta).
        limit: Index for a prompt that changes through and through.
        steepness: How sharply the index grows with the change (k).
        midpoint: Ten times the change at which it is half the limit (t0).
    """
    exponent = torch.tensor(2 * steepness * (10 * change - midpoint), dtype=torch.float64)
    return round(limit * torch.sigmoid(exponent).item())
