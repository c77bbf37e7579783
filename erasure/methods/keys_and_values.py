"""Keys and values of cross-attention, and texts as these see them: what closed-form edits read."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.weights import base_parameters

MATRICES = ("attn2.to_k.weight", "attn2.to_v.weight")
"""Endings of the names of the edited weights: keys and values of every cross-attention."""


def keys_and_values(policy: DiffusionPolicy) -> dict[str, Float[Tensor, "out dim"]]:
    """Returns the weights of all cross-attentions' keys and values, on the CPU in float64."""
    parameters = base_parameters(policy.unet)
    return {name: value.detach().cpu().double() for name, value in parameters.items() if name.endswith(MATRICES)}


class EmbeddedText(NamedTuple):
    """A text as the UNet's cross-attention reads it."""

    tokens: Float[Tensor, "positions dim"]  # outputs of the text encoder, float64
    last_word: int  # position of the text's last token before the end; 0, the start token, for an empty text


class TextReader:
    """Encodes texts in float32, whatever the policy runs in: in half precision the solve amplifies the rounding."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self._prompts = policy.prompts
        if policy.text_encoder.dtype != torch.float32:
            self._prompts = PromptEncoder.of(policy.family.with_encoders_in_float32())

    def __call__(self, text: str) -> EmbeddedText:
        """Returns one text's embedding, on the CPU."""
        tokens = self._prompts([text]).tokens[0]
        return EmbeddedText(tokens.cpu().double(), last_word=len(self._prompts.read(text)) - 2)
