"""Unified concept editing: other answers to the words of a concept, solved for in closed form.

Source: Gandikota et al. (2023), https://arxiv.org/abs/2308.14761, written from its equations. The authors' code is
rohitgandikota/unified-concept-editing (MIT): commit 35e91e2 is the paper's, commit 28c81ed the newer one, which edits
one token per phrase; commit 81f4950 edits FLUX. See docs/methods/uce.md for each departure.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from erasure.changes import WeightChange
from erasure.concept import Concept
from erasure.erased import Erasure
from overpaint.policy import DiffusionPolicy, WeightDelta
from overpaint.policy.families.family import TextPart
from overpaint.settings import Field, NonNegative, settings

from .keys_and_values import EmbeddedText, TextReader, text_maps


@settings
class UCEConfig:
    """Settings of UCE; those of the paper's code by default. How strongly to erase is an argument of `UCE.erase`."""

    variant: Literal["paper", "released"] = "paper"
    """Which tokens are edited. ``paper``: all positions from the phrase's last word on, and the empty text is always
    preserved. ``released``: the last word alone, and nothing preserved unasked, as in the newer code; much weaker."""

    preserve_scale: float | None = Field(None, ge=0)
    """Weight of each preserved text. None takes the variant's: max(0.1, 1 / number of texts), or 1 for ``released``."""

    regularization: float = Field(0.5, gt=0)
    """Pull towards the original weights (lambda); above zero, so that the system has one solution."""


class UCE:
    """Erases a concept by editing the matrices that texts are multiplied with: of a UNet, the keys and values.

    Each phrase's text embeddings are answered as the anchor's are, while those of the preserved texts stay. Of FLUX,
    the projections of T5's tokens and of CLIP's pooled text are edited, each by a system of its own.
    """

    name = "UCE"

    def __init__(self, config: UCEConfig | None = None) -> None:
        self.config = config or UCEConfig()

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: NonNegative = 1.0) -> Erasure:
        """Computes the erasure of a concept. The policy is not changed: see `Erasure.apply`.

        Weights and text embeddings are read from the policy as it is: a second concept, erased after the first was
        applied, takes the edited weights for the originals. A LoRA is left out of account.

        Args:
            policy: Whose weights are edited.
            concept: Its phrases are replaced by its anchor; its preserved texts are kept.
            strength: Weight of the phrases (the authors' erase scale): 0 changes nothing, 1 is the authors' setting.

        Raises:
            ValueError: The strength is negative or not finite, or the model has no such matrices.
        """
        pairs = [(phrase, concept.anchor) for phrase in concept.phrases]
        delta = self.edit(policy, pairs, preserve=concept.preserve, strength=strength)
        settings = {**asdict(self.config), "strength": strength}
        return Erasure.of(policy, self.name, settings, concept, WeightChange(delta))

    def __call__(self, policy: DiffusionPolicy, concept: Concept) -> WeightDelta:
        """Returns the change of weights that erases a concept at the authors' strength."""
        return self.erase(policy, concept).delta

    def edit(
        self,
        policy: DiffusionPolicy,
        pairs: Sequence[tuple[str, str]],
        *,
        preserve: Sequence[str],
        strength: NonNegative = 1.0,
    ) -> WeightDelta:
        """Computes the change of weights that makes each text behave as its own replacement.

        The general form of `erase`, for several concepts with different anchors in one solve.

        Args:
            policy: Whose weights are edited; it is not changed.
            pairs: Texts to replace, each with its replacement.
            preserve: Texts to keep.
            strength: Weight of the replacements, as in `erase`.

        Raises:
            ValueError: There is no pair, the strength is negative or not finite, or the model has no such matrices.
        """
        if not pairs:
            raise ValueError("pairs must hold at least one text and its replacement, got none")
        if not policy.family.text_maps:
            raise ValueError(
                "UCE must be given a model whose texts pass matrices of their own, a UNet's cross-attention or FLUX's "
                f"projections, got a {policy.family.pipelines[0]}"
            )
        paper = self.config.variant == "paper"
        texts = list(dict.fromkeys(["", *preserve] if paper else preserve))
        if (preserve_scale := self.config.preserve_scale) is None:
            preserve_scale = max(0.1, 1 / len(texts)) if paper else 1.0

        read = TextReader(policy)
        replaced = [(read(text), read(replacement)) for text, replacement in pairs]
        kept = [read(text) for text in texts]
        delta: dict[str, Tensor] = {}
        for part, endings in policy.family.text_maps.items():
            old, new, preserved = vectors(part, replaced, kept, whole=paper)
            factor = editing_factor(
                old,
                new,
                preserved,
                erase_scale=strength,
                preserve_scale=preserve_scale,
                regularization=self.config.regularization,
            )
            weights = text_maps(policy, part)
            if not weights:
                raise ValueError(f"UCE needs a network with weights whose names end in {' or '.join(endings)}")
            rows = [len(weight) for weight in weights.values()]  # one product for all of them, rows stacked
            changes = (torch.cat(list(weights.values())) @ factor).float().split(rows)
            delta |= {name: change.clone() for name, change in zip(weights, changes, strict=True)}
        return WeightDelta(delta)


def vectors(
    part: TextPart, replaced: Sequence[tuple[EmbeddedText, EmbeddedText]], kept: Sequence[EmbeddedText], *, whole: bool
) -> tuple[Float[Tensor, "pairs dim"], Float[Tensor, "pairs dim"], Float[Tensor, "preserved dim"]]:
    """Returns what is replaced, by what, and what is preserved, of one part of the texts; the last may have no rows.

    A pooled text is one vector. Of tokens, `whole` takes all positions from a text's last word on, and all of a
    preserved text; otherwise it is the last word's alone.
    """
    if part == "pooled":
        spans = [(old.pooled, new.pooled) for old, new in replaced]
        preserved = [text.pooled for text in kept]
    else:
        spans = [aligned_spans(old, new, whole=whole) for old, new in replaced]
        preserved = [text.tokens if whole else text.tokens[text.last_word].unsqueeze(0) for text in kept]
    old = torch.cat([old for old, _ in spans])
    return old, torch.cat([new for _, new in spans]), torch.cat([old[:0], *preserved])


def aligned_spans(
    old: EmbeddedText, new: EmbeddedText, *, whole: bool
) -> tuple[Float[Tensor, "span dim"], Float[Tensor, "span dim"]]:
    """Pairs the token vectors of a text with those of its replacement.

    Whole: from each text's last word on, to the end of the longer one; otherwise the two last words alone.
    """
    span = len(old.tokens) - max(old.last_word, new.last_word) if whole else 1
    return old.tokens[old.last_word :][:span], new.tokens[new.last_word :][:span]


def editing_factor(
    old: Float[Tensor, "pairs dim"],
    new: Float[Tensor, "pairs dim"],
    preserved: Float[Tensor, "preserved dim"],
    *,
    erase_scale: float,
    preserve_scale: float,
    regularization: float,
) -> Float[Tensor, "dim dim"]:
    """Returns the matrix E for which the edited weights are W + W E, whatever the original W.

    The paper's solution, with c the old vectors, g the new ones and k the preserved ones,
    `W' = (λW + s_e Σ W g cᵀ + s_p Σ W k kᵀ) A⁻¹` with `A = λI + s_e Σ c cᵀ + s_p Σ k kᵀ`, is
    `W + W · s_e Σ (g - c) cᵀ A⁻¹`: one system for all layers, and exactly no change where the scale is zero.
    """
    identity = torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    system = regularization * identity + erase_scale * old.T @ old + preserve_scale * preserved.T @ preserved
    change = erase_scale * (new - old).T @ old
    # A is symmetric and positive definite, so that E = change A⁻¹ is the transpose of A⁻¹ changeᵀ.
    return torch.cholesky_solve(change.T, torch.linalg.cholesky(system)).T
