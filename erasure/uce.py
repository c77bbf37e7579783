"""Unified concept editing: new keys and values for the words of a concept, in closed form.

Source: Gandikota et al. (2023), https://arxiv.org/abs/2308.14761, written from its equations. The authors' code is
rohitgandikota/unified-concept-editing (MIT): commit 35e91e2 is the paper's, commit 28c81ed the newer one, which edits
one token per phrase. See docs/erasure.md for each departure.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy, WeightDelta
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.weights import base_parameters

from .changes import WeightChange
from .concept import Concept
from .erased import Erasure

MATRICES = ("attn2.to_k.weight", "attn2.to_v.weight")
"""Endings of the names of the edited weights: keys and values of every cross-attention."""


@dataclass(frozen=True, kw_only=True)
class UCEConfig:
    """Settings of UCE; those of the paper's code by default. How strongly to erase is an argument of `UCE.erase`."""

    variant: Literal["paper", "released"] = "paper"
    """Which tokens are edited. ``paper``: all positions from the phrase's last word on, and the empty text is always
    preserved. ``released``: the last word alone, and nothing preserved unasked, as in the newer code; much weaker."""

    preserve_scale: float | None = None
    """Weight of each preserved text. None takes the variant's: max(0.1, 1 / number of texts), or 1 for ``released``."""

    regularization: float = 0.5
    """Pull towards the original weights (lambda); above zero, so that the system has one solution."""

    @classmethod
    def tiny_world(cls) -> "UCEConfig":
        """Returns the settings for the tiny world's stripes, which are the paper's."""
        return cls()

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"UCEConfig.variant must be 'paper' or 'released', got {self.variant!r}")
        if self.preserve_scale is not None and not 0 <= self.preserve_scale < math.inf:
            raise ValueError(f"UCEConfig.preserve_scale must be finite and at least 0, got {self.preserve_scale}")
        if not 0 < self.regularization < math.inf:
            raise ValueError(f"UCEConfig.regularization must be finite and above 0, got {self.regularization}")


class UCE:
    """Erases a concept by editing the keys and values of cross-attention.

    Each phrase's text embeddings are made to attend as the anchor's do, while those of the preserved texts stay.

    Args:
        config: Settings; those of the paper's code by default.
    """

    name = "UCE"

    def __init__(self, config: UCEConfig | None = None) -> None:
        self.config = config or UCEConfig()

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: float = 1.0) -> Erasure:
        """Computes the erasure of a concept. The policy is not changed: see `Erasure.apply`.

        Weights and text embeddings are read from the policy as it is: a second concept, erased after the first was
        applied, takes the edited weights for the originals. A LoRA is left out of account.

        Args:
            policy: Whose weights are edited.
            concept: Its phrases are replaced by its anchor; its preserved texts are kept.
            strength: Weight of the phrases (the authors' erase scale): 0 changes nothing, 1 is the authors' setting.

        Raises:
            ValueError: The strength is negative or not finite, or the UNet has no cross-attention.
        """
        pairs = [(phrase, concept.anchor) for phrase in concept.phrases]
        delta = self.edit(policy, pairs, preserve=concept.preserve, strength=strength)
        settings = {**asdict(self.config), "strength": strength}
        return Erasure.of(policy, self.name, settings, concept, WeightChange(delta))

    def __call__(self, policy: DiffusionPolicy, concept: Concept) -> WeightDelta:
        """Returns the change of weights that erases a concept at the authors' strength."""
        pairs = [(phrase, concept.anchor) for phrase in concept.phrases]
        return self.edit(policy, pairs, preserve=concept.preserve)

    def edit(
        self,
        policy: DiffusionPolicy,
        pairs: Sequence[tuple[str, str]],
        *,
        preserve: Sequence[str],
        strength: float = 1.0,
    ) -> WeightDelta:
        """Computes the change of weights that makes each text behave as its own replacement.

        The general form of `erase`, for several concepts with different anchors in one solve.

        Args:
            policy: Whose weights are edited; it is not changed.
            pairs: Texts to replace, each with its replacement.
            preserve: Texts to keep.
            strength: Weight of the replacements, as in `erase`.

        Raises:
            ValueError: There is no pair, the strength is negative or not finite, or the UNet has no cross-attention.
        """
        if not pairs:
            raise ValueError("pairs must hold at least one text and its replacement, got none")
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0, got {strength}")
        paper = self.config.variant == "paper"
        kept = list(dict.fromkeys(["", *preserve] if paper else preserve))
        preserve_scale = self.config.preserve_scale
        if preserve_scale is None:
            preserve_scale = max(0.1, 1 / len(kept)) if paper else 1.0

        embed = TextReader(policy)
        spans = [aligned_spans(embed(text), embed(replacement), whole=paper) for text, replacement in pairs]
        preserved = [text.tokens if paper else text.tokens[text.last_word].unsqueeze(0) for text in map(embed, kept)]
        factor = editing_factor(
            torch.cat([old for old, _ in spans]),
            torch.cat([new for _, new in spans]),
            torch.cat([spans[0][0][:0], *preserved]),  # no rows where nothing is preserved
            erase_scale=strength,
            preserve_scale=preserve_scale,
            regularization=self.config.regularization,
        )
        return WeightDelta(_differences(policy, factor))


class EmbeddedText(NamedTuple):
    """A text as the UNet's cross-attention reads it."""

    tokens: Float[Tensor, "positions dim"]
    """Outputs of the text encoder, float64."""

    last_word: int
    """Position of the text's last token before the end; 0, the start token, for an empty text."""


class TextReader:
    """Encodes texts in float32, whatever the policy runs in: in half precision the solve amplifies the rounding.

    Args:
        policy: Whose tokenizer and text encoder are used.
    """

    def __init__(self, policy: DiffusionPolicy) -> None:
        self._tokenizer = policy.tokenizer
        if policy.text_encoder.dtype == torch.float32:
            self._encode: Callable[[Sequence[str]], Tensor] = policy.encode
        else:
            self._encode = PromptEncoder(copy.deepcopy(policy.text_encoder).float(), policy.tokenizer)

    def __call__(self, text: str) -> EmbeddedText:
        """Returns one text's embedding, on the CPU."""
        tokens = self._encode([text])[0]
        ids = self._tokenizer(text, truncation=True, max_length=len(tokens))["input_ids"]
        return EmbeddedText(tokens.cpu().double(), last_word=len(ids) - 2)


def aligned_spans(
    old: EmbeddedText, new: EmbeddedText, *, whole: bool
) -> tuple[Float[Tensor, "span dim"], Float[Tensor, "span dim"]]:
    """Pairs the token vectors of a text with those of its replacement.

    Args:
        old: The text.
        new: Its replacement.
        whole: From each text's last word on, to the end of the longer one; otherwise the two last words alone.
    """
    span = len(old.tokens) - max(old.last_word, new.last_word) if whole else 1
    return old.tokens[old.last_word :][:span], new.tokens[new.last_word :][:span]


def editing_factor(
    old: Float[Tensor, "pairs dim"],
    new: Float[Tensor, "pairs dim"],
    kept: Float[Tensor, "preserved dim"],
    *,
    erase_scale: float,
    preserve_scale: float,
    regularization: float,
) -> Float[Tensor, "dim dim"]:
    """Returns the matrix E for which the edited weights are W + W E, whatever the original W.

    The paper's solution, with c the old vectors, g the new ones and k the kept ones,
    `W' = (λW + s_e Σ W g cᵀ + s_p Σ W k kᵀ) A⁻¹` with `A = λI + s_e Σ c cᵀ + s_p Σ k kᵀ`, is
    `W + W · s_e Σ (g - c) cᵀ A⁻¹`: one system for all layers, and exactly no change where the scale is zero.
    """
    identity = torch.eye(old.shape[1], dtype=old.dtype, device=old.device)
    system = regularization * identity + erase_scale * old.T @ old + preserve_scale * kept.T @ kept
    change = erase_scale * (new - old).T @ old
    # A is symmetric and positive definite, so that E = change A⁻¹ is the transpose of A⁻¹ changeᵀ.
    return torch.cholesky_solve(change.T, torch.linalg.cholesky(system)).T


@torch.no_grad()
def _differences(policy: DiffusionPolicy, factor: Float[Tensor, "dim dim"]) -> dict[str, Tensor]:
    """Returns W E for every edited weight: one product for all of them, rows stacked."""
    weights = {
        name: parameter.detach().cpu().double()
        for name, parameter in base_parameters(policy.unet).items()
        if name.endswith(MATRICES)
    }
    if not weights:
        raise ValueError(f"UCE needs a UNet with cross-attention, whose weights end in {' or '.join(MATRICES)}")
    rows = [len(weight) for weight in weights.values()]
    changes = (torch.cat(list(weights.values())) @ factor).float().split(rows)
    return {name: change.clone() for name, change in zip(weights, changes, strict=True)}
