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
from overpaint.policy.types import Embeddings

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
        self._away = torch.eye(len(self.concepts), dtype=torch.float64) - self.concepts
        self._cached = lru_cache(maxsize=1024)(self._filter)  # prompts, in the CPU's memory
        self._projection = lru_cache(maxsize=16)(self._project_again)  # 5 MB each for Stable Diffusion v1

    def __call__(self, prompt: str) -> FilteredPrompt:
        """Returns what becomes of a prompt."""
        return self._cached(prompt)

    def of(self, prompts: Sequence[str], embeddings: Embeddings) -> Embeddings:
        """Returns the embeddings of prompts filtered; gradients flow where they are others than those of the words.

        Such as those with free vectors behind the words: which tokens are triggers, and what is taken from them, follow
        from the words, and what is no word stays as it is.
        """
        own = torch.stack([self.prompts.plain(prompt) for prompt in prompts]).to(embeddings)
        # An attack begins at the words' own embeddings, and has a gradient from there.
        plain = (own == embeddings).flatten(1).all(dim=1) & (not embeddings.requires_grad)
        rows = []
        for prompt, embedding, known in zip(prompts, embeddings, plain.tolist(), strict=True):
            filtered = self(prompt)
            if known:
                embedding = filtered.embedding.to(embedding)
            elif filtered.triggers.any():
                projected = embedding @ self._projection(prompt).T.to(embedding)
                embedding = torch.where(
                    _replaced(filtered.triggers, len(embedding)).to(embedding.device), projected, embedding
                )
            rows.append(embedding)
        return torch.stack(rows)

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
        embedding = self.prompts.plain(prompt).double()
        left_out = self.without_each_token(prompt)
        words = len(left_out)
        if words == 0:
            return FilteredPrompt(embedding.float(), torch.zeros(0, dtype=torch.bool), math.nan, -1)
        triggers = trigger_tokens((left_out @ self._away).norm(dim=1), self.alpha)
        projected = embedding @ self._without_concepts(left_out).T
        active = slice(0, words + 2)  # start, words, and the end token after them
        change = 1 - torch.cosine_similarity(projected[active], embedding[active], dim=1).mean().item()
        filtered = torch.where(_replaced(triggers, len(embedding)), projected, embedding)
        last = self.last_step(change) if triggers.any() else -1
        return FilteredPrompt(filtered.float(), triggers, change, last)

    def _without_concepts(self, left_out: Float[Tensor, "words dim"]) -> Float[Tensor, "dim dim"]:
        """Returns what keeps of an embedding what the prompt says without one of its words, and not the concepts."""
        return self._away @ projector(left_out)

    def _project_again(self, prompt: str) -> Float[Tensor, "dim dim"]:
        """Returns the same of a prompt, which is too large to be kept for every one."""
        return self._without_concepts(self.without_each_token(prompt))

    def _pooled(self, ids: list[list[int]]) -> Float[Tensor, "texts dim"]:
        tokens = torch.tensor(ids, device=self.prompts.text_encoder.device)
        return self.prompts.run(tokens).pooler_output.cpu().double()


def _replaced(triggers: Bool[Tensor, " words"], tokens: int) -> Bool[Tensor, "tokens 1"]:
    """Returns which tokens of a text are triggers; the first word stands after the start."""
    return torch.zeros(tokens, 1, dtype=torch.bool).index_fill(0, triggers.nonzero()[:, 0] + 1, True)


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
