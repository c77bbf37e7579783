"""Prompts with free vectors among their tokens: what textual inversion learns, and what attacks move."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .conditioning import Conditioning
from .prompts import PromptEncoder, check_prompts

PLACE = "{}"
"""Where the vectors stand in a text; a text without it has them before its first word."""


def encode_soft(
    encoder: PromptEncoder, texts: Sequence[str], vectors: Float[Tensor, "texts vectors dim"]
) -> Conditioning:
    """Encodes texts whose free vectors go into the text encoder in the place of tokens, with gradient to the vectors.

    Args:
        encoder: Of the policy. Nothing of it is changed, and nothing is cached.
        texts: Such as "a photo of a {} star"; see `PLACE`.
        vectors: Of the width of the text encoder's token embeddings; some for each text.

    Raises:
        ValueError: There are no texts, not as many vectors as texts, a text has several places, or the text encoder has
            no room for all tokens.
    """
    texts, count = check_prompts(texts), vectors.shape[1]
    width = token_vectors(encoder).shape[1]
    if len(vectors) != len(texts) or vectors.shape[2] != width:
        raise ValueError(f"vectors must be [{len(texts)}, vectors, {width}], got {list(vectors.shape)}")
    rows, starts = zip(*(_ids_and_place(encoder, text, count) for text in texts), strict=True)
    device = encoder.text_encoder.device
    padded = encoder.tokenizer.pad(
        {"input_ids": list(rows)}, padding="max_length", max_length=encoder.room, return_tensors="pt"
    ).to(device)
    places = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
    mask = padded["attention_mask"] if getattr(encoder.text_encoder.config, "use_attention_mask", False) else None
    with _Placed(encoder, vectors, places), torch.autocast(device.type, enabled=False):
        tokens = encoder.text_encoder(padded["input_ids"], attention_mask=mask)[0]
    return Conditioning(tuple(texts), tokens)


def token_vectors(encoder: PromptEncoder) -> Float[Tensor, "vocabulary dim"]:
    """Returns what the text encoder's tokens are before its first layer, without gradient."""
    embedding = encoder.text_encoder.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.detach()


def _ids_and_place(encoder: PromptEncoder, text: str, count: int) -> tuple[list[int], int]:
    """Returns the tokens of a text with `count` of any in the place of the vectors, and where these begin."""
    before, *after = text.split(PLACE)
    if len(after) > 1:
        raise ValueError(f"a text must have at most one {PLACE}, got {text!r}")
    if not after:
        before, after = "", [text]
    first, last = encoder.ids(before), encoder.ids(after[0])
    ids = [*first[:-1], *[first[-1]] * count, *last[1:]]
    if len(ids) > encoder.room:
        raise ValueError(
            f"a text with {count} vectors must have at most {encoder.room} tokens, got {len(ids)}: {text!r}"
        )
    return ids, len(first) - 1


class _Placed:
    """Puts vectors in the place of what the token embedding gives, while in a `with` block."""

    def __init__(
        self, encoder: PromptEncoder, vectors: Float[Tensor, "texts vectors dim"], places: Int[Tensor, "texts vectors"]
    ) -> None:
        self.embedding = encoder.text_encoder.get_input_embeddings()
        self.vectors, self.places = vectors, places

    def __enter__(self) -> None:
        self.handle = self.embedding.register_forward_hook(self._place)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _place(self, module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        index = self.places[..., None].expand(-1, -1, embedded.shape[2])
        return embedded.scatter(1, index, self.vectors.to(embedded))
