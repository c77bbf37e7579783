"""Prompts with free vectors among their tokens."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import count

from jaxtyping import Float
from torch import Tensor, nn

from .conditioning import Conditioning
from .prompts import PromptEncoder, check_prompts

PLACE = "{}"
"""Where the vectors stand in a text; a text without it has them before its first word."""

_numbers = count()


@contextmanager
def soft_texts(
    encoder: PromptEncoder, texts: Sequence[str], vectors: Float[Tensor, "texts vectors dim"]
) -> Generator[list[str]]:
    """Yields texts with words in the places of free vectors, which stand for these for the length of a `with` block.

    Whoever encodes or reads such a text in the block meets the vectors, a sampling guard alike; gradients flow to them.

    Args:
        encoder: Of the policy. Nothing of it is changed, and nothing is cached.
        texts: Such as "a photo of a {} star"; see `PLACE`.
        vectors: Of the width of the text encoder's token embeddings; some for each text.

    Raises:
        ValueError: There are no texts, not as many vectors as texts, a text has several places, or, when it is encoded,
            the text encoder has no room for its vectors.
    """
    texts, width = check_prompts(texts), token_vectors(encoder).shape[1]
    if len(vectors) != len(texts) or vectors.shape[2] != width:
        raise ValueError(f"vectors must be [{len(texts)}, vectors, {width}], got {list(vectors.shape)}")
    for text in texts:
        if text.count(PLACE) > 1:
            raise ValueError(f"a text must have at most one {PLACE}, got {text!r}")
    words = [f"<free-{next(_numbers)}>" for _ in texts]
    with encoder.coined(dict(zip(words, vectors, strict=True))):
        yield [
            text.replace(PLACE, word) if PLACE in text else f"{word} {text}"
            for text, word in zip(texts, words, strict=True)
        ]


def check_room(encoder: PromptEncoder, texts: Sequence[str], count: int, setting: str) -> None:
    """Checks that free vectors have room in every text.

    Args:
        encoder: Of the policy.
        texts: Plain ones.
        count: Vectors.
        setting: What says how many they are, for the error.

    Raises:
        ValueError: They do not, a text has a place for vectors of its own, or several text encoders read the texts.
    """
    encoder.check_alone()
    room = encoder.room - count
    for text in texts:
        if PLACE in text:
            raise ValueError(f"prompts under attack must be without {PLACE}, got {text!r}")
        if (length := len(encoder.ids(text))) > room:
            raise ValueError(
                f"prompts under attack must leave room for {setting}={count} and have at most {room} tokens, start and "
                f"end included, got {length}: {text!r}"
            )


def encode_soft(
    encoder: PromptEncoder, texts: Sequence[str], vectors: Float[Tensor, "texts vectors dim"]
) -> Conditioning:
    """Encodes texts with free vectors in the place of tokens, with gradient to the vectors; see `soft_texts`.

    A guard that reads words, such as SAFREE, does not meet the vectors of what this returns: predict and draw within
    `soft_texts` where there may be one.
    """
    with soft_texts(encoder, texts, vectors) as words:
        return Conditioning(tuple(texts), encoder(words).tokens)


def token_vectors(encoder: PromptEncoder) -> Float[Tensor, "vocabulary dim"]:
    """Returns what the text encoder's tokens are before its first layer, without gradient."""
    embedding = encoder.text_encoder.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.weight.detach()


def initial_vectors(encoder: PromptEncoder, text: str, count: int) -> Float[Tensor, "vectors dim"]:
    """Returns vectors to begin with: those of a text's tokens, again from the first where there are fewer."""
    ids = encoder.ids(text)[1:-1]
    return token_vectors(encoder)[[ids[place % len(ids)] for place in range(count)]].float()
