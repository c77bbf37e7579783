"""Matrices that a text alone is multiplied with, and texts as these see them: what closed-form edits read.

Of a UNet they are the keys and values of cross-attention.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.families.family import TextPart
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.weights import base_parameters


def text_maps(policy: DiffusionPolicy, part: TextPart) -> dict[str, Float[Tensor, "out dim"]]:
    """Returns the matrices that one part of a text is multiplied with, on the CPU in float64."""
    endings = policy.family.text_maps.get(part, ())
    parameters = base_parameters(policy.model)
    return {name: value.detach().cpu().double() for name, value in parameters.items() if name.endswith(endings)}


def keys_and_values(policy: DiffusionPolicy) -> dict[str, Float[Tensor, "out dim"]]:
    """Returns the weights of all cross-attentions' keys and values, on the CPU in float64."""
    return text_maps(policy, "tokens")


class EmbeddedText(NamedTuple):
    """A text as the network reads it."""

    tokens: Float[Tensor, "positions dim"]  # outputs of the text encoder, float64
    last_word: int  # position of the text's last token before the end; 0 for an empty text: the start, or T5's end
    pooled: Float[Tensor, "whole dim"]  # the text as a whole, float64; no row in families that do not read it


class TextReader:
    """Encodes texts in float32, whatever the policy runs in: in half precision the solve amplifies the rounding."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self._prompts = policy.prompts
        if policy.text_encoder.dtype != torch.float32:
            self._prompts = PromptEncoder.of(policy.family.with_encoders_in_float32())

    def __call__(self, text: str) -> EmbeddedText:
        """Returns one text's embedding, on the CPU."""
        read = self._prompts([text])
        tokens = read.tokens[0].cpu().double()
        pooled = tokens[:0] if read.pooled is None else read.pooled.cpu().double()
        return EmbeddedText(tokens, max(0, len(self._prompts.read(text)) - 2), pooled)
