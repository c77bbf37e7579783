"""From prompts to what the UNet reads, once for each prompt."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .parts import TextEncoder, Tokenizer
from .types import Embeddings

CACHED_PROMPTS = 4096
"""How many encoded prompts are kept, in the CPU's memory; about 1 GB for Stable Diffusion v1 in float32."""


def check_prompts(prompts: object) -> list[str]:
    """Returns the prompts as a list.

    Raises:
        ValueError: They are not a sequence, there are none, or one is not a string.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a sequence of strings, got {prompts!r}")
    if not prompts:
        raise ValueError("prompts must not be empty, got no prompt")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"prompts must be strings, got {prompt!r} at index {index}")
    return list(prompts)


class PromptEncoder:
    """Encodes prompts and remembers them.

    A prompt goes through the text encoder alone: its embedding is then the same to the last bit whatever it is
    encoded with and whether it was remembered, so that a resumed run sees what an uninterrupted one sees. For the same
    reason the text encoder computes in the precision of its own weights, inside autocast as outside.
    """

    def __init__(self, text_encoder: TextEncoder, tokenizer: Tokenizer) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self._cache: OrderedDict[str, Float[Tensor, "tokens dim"]] = OrderedDict()
        self._texts: dict[bytes, str] = {}
        self._empty: Embeddings | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Embeddings:
        """Returns the embeddings of the prompts, on the text encoder's device."""
        rows = [self._encode(prompt) for prompt in check_prompts(prompts)]
        return torch.stack(rows).to(self.text_encoder.device)

    @torch.no_grad()
    def run(self, ids: Int[Tensor, "texts tokens"], mask: Int[Tensor, "texts tokens"] | None = None) -> Any:
        """Returns the text encoder's own output for tokens, out of reach of autocast, as what is kept must be."""
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self.text_encoder(ids, attention_mask=mask)

    def empty(self, like: Embeddings) -> Embeddings:
        """Returns the empty prompt's embedding, once for each row of `like` and on its device.

        The copy on the device stays there, so that no step of a sampling loop waits for a transfer.
        """
        if self._empty is None or self._empty.device != like.device or self._empty.dtype != like.dtype:
            self._empty = self([""]).to(like)
        return self._empty.expand_as(like)

    def texts(self, embeddings: Embeddings) -> list[str]:
        """Returns the prompts that embeddings are of, for what has to read the words again.

        Raises:
            ValueError: One was not encoded here, or so long ago that it was forgotten.
        """
        try:
            return [self._texts[_fingerprint(row)] for row in embeddings]
        except KeyError:
            raise ValueError(
                f"embeddings must be some of the last {CACHED_PROMPTS} that this policy encoded, got one that is not"
            ) from None

    def clear(self) -> None:
        """Forgets every prompt; needed after the text encoder's weights have changed."""
        self._cache.clear()
        self._texts.clear()
        self._empty = None

    def _encode(self, prompt: str) -> Float[Tensor, "tokens dim"]:
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        config = self.text_encoder.config
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            max_length=min(self.tokenizer.model_max_length, config.max_position_embeddings),
            truncation=True,
            return_tensors="pt",
        ).to(self.text_encoder.device)
        mask = tokens["attention_mask"] if getattr(config, "use_attention_mask", False) else None
        embedding = self.run(tokens["input_ids"], mask)[0][0].cpu()
        self._cache[prompt] = embedding
        self._texts[_fingerprint(embedding)] = prompt
        if len(self._cache) > CACHED_PROMPTS:
            _, forgotten = self._cache.popitem(last=False)
            self._texts.pop(_fingerprint(forgotten), None)
        return embedding


def _fingerprint(embedding: Float[Tensor, "tokens dim"]) -> bytes:
    """Returns what tells one embedding from another, in whatever precision and on whatever device it is."""
    return hashlib.blake2b(embedding.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
