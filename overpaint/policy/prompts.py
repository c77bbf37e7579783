"""From prompts to what the UNet reads, once for each prompt."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .coined_words import CoinedWords
from .conditioning import Conditioning
from .families import Family
from .parts import TextEncoder, Tokenizer

CACHED_BYTES = 2**30
"""How much memory of the CPU encoded prompts may take: about 4,500 of Stable Diffusion v1 in float32, 250 of FLUX in
half precision."""


class TruncatedPromptWarning(UserWarning):
    """A prompt has more tokens than the text encoder reads: what comes after them is left out of the picture."""


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
    """Encodes prompts, and caches what came out.

    A prompt goes through the text encoder alone: its embedding is then the same to the last bit whatever it is
    encoded with and whether it was cached, so that a resumed run sees what an uninterrupted one sees. For the same
    reason the text encoder computes in the precision of its own weights, inside autocast as outside.

    Args:
        text_encoder: Of the words, one by one.
        tokenizer: Of that text encoder.
        encode: Encodes one text, on any device, where more than the states of the one text encoder are read of it.
        away: Makes of the encoded empty prompt what guidance leads away from; None leaves it as it is.
        room: How many tokens are read of a text; None is as many as the text encoder has places for.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        tokenizer: Tokenizer,
        *,
        encode: Callable[[str], Conditioning] | None = None,
        away: Callable[[Conditioning], Conditioning] | None = None,
        room: int | None = None,
    ) -> None:
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self._encode, self._away, self._room = encode, away, room
        self._cache: OrderedDict[str, Conditioning] = OrderedDict()
        self._cached_bytes, self._bounded = 0, True
        self._replaced: Mapping[str, Float[Tensor, "tokens dim"]] = {}
        self._coined: CoinedWords | None = None
        self._empty: Conditioning | None = None
        self._told: set[str] = set()
        self._closed = False
        """Whether the text encoder is released, and what was kept is all that there is."""

    @classmethod
    def of(cls, family: Family) -> "PromptEncoder":
        """Returns the encoder of a family's prompts."""
        alone = len(family.encoders) == 1
        return cls(
            *family.reader,
            encode=None if alone else family.encode,
            away=family.away,
            room=None if alone else family.room,
        )

    @property
    def room(self) -> int:
        """How many tokens the text encoder reads, start and end included."""
        if self._room is not None:
            return self._room
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Returns the prompts encoded, on the text encoder's device, or on the CPU once that is released.

        Gradients reach what is `replaced` or `coined`.
        """
        texts, device = check_prompts(prompts), torch.device("cpu") if self._closed else self.text_encoder.device
        free = [text for text in dict.fromkeys(texts) if self._coined is not None and text in self._coined]
        known = {**(dict(zip(free, self._encode_free(free), strict=True)) if free else {}), **self._replaced}
        rows = [self._with(text, known[text]) if text in known else self._row(text) for text in texts]
        return Conditioning.cat([row.to(device) for row in rows])

    def plain(self, prompt: str) -> Float[Tensor, "tokens dim"]:
        """Returns the tokens of a prompt's own words, whatever `replaced` puts in their place; on the CPU."""
        return self._row(prompt).tokens[0]

    def _row(self, prompt: str) -> Conditioning:
        """Returns one prompt's own encoding, on the CPU."""
        if prompt in self._cache:
            self._cache.move_to_end(prompt)
            return self._cache[prompt]
        if self._closed:
            raise ValueError(
                f"prompts must be among those that were encoded before the text encoder was released, got {prompt!r}"
            )
        self._tell_if_cut(prompt)
        if self._encode is None:
            row = Conditioning((prompt,), self.run(*self._padded([self.read(prompt)]))[0].cpu())
        else:
            row = self._encode(prompt).to(torch.device("cpu"))
        self._cache[prompt] = row
        self._cached_bytes += row.nbytes
        while self._bounded and self._cached_bytes > CACHED_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return row

    def _with(self, text: str, tokens: Float[Tensor, "tokens dim"]) -> Conditioning:
        """Returns one prompt with other tokens than those of its own words."""
        if self._encode is None:
            return Conditioning((text,), tokens[None])
        return self._row(text).to(tokens.device).with_tokens(tokens[None])

    def check_alone(self) -> None:
        """Checks that free vectors can stand among the words; a `ValueError` where several text encoders read these."""
        if self._encode is not None:
            raise ValueError("free vectors must be read by a model with one text encoder, and this one has several")

    @contextmanager
    def replaced(self, rows: Mapping[str, Float[Tensor, "tokens dim"]]) -> Generator[None]:
        """Gives some texts other encodings for the length of a `with` block, such as those that an attack has found.

        Whoever encodes such a text meets them, an objective or a rollout alike; gradients flow to them.
        """
        before = self._replaced
        self._replaced = {**before, **rows}
        try:
            yield
        finally:
            self._replaced = before

    @contextmanager
    def coined(self, words: Mapping[str, Float[Tensor, "vectors dim"]]) -> Generator[None]:
        """Lets made-up words stand for free vectors at the text encoder's input for the length of a `with` block.

        Whoever reads a text with such a word meets them, a guard alike; gradients flow to them. A word must not come
        again with other vectors: guards remember what they have read.

        Raises:
            ValueError: Vectors are not as wide as the text encoder's, other words are coined already, or the model has
                several text encoders.
        """
        self.check_alone()
        if self._coined is not None:
            raise ValueError(f"words must be coined all at once, got {sorted(words)} beside others")
        embedding = self.text_encoder.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        made = CoinedWords(embedding, words)
        try:
            with made:
                self._coined = made
                yield
        finally:
            self._coined = None

    @torch.no_grad()
    def run(self, ids: Int[Tensor, "texts tokens"], mask: Int[Tensor, "texts tokens"] | None = None) -> Any:
        """Returns the text encoder's own output for tokens, out of reach of autocast, as what is cached must be."""
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self.text_encoder(ids, attention_mask=mask)

    def ids(self, text: str) -> list[int]:
        """Returns all tokens of a text, start and end included, however many they are.

        A token that a textual inversion of several vectors stands behind becomes as many, as in diffusers' pipelines;
        so does a coined word.
        """
        if self._coined is not None and text in self._coined:
            start, end = self.ids("")
            parts = [part if isinstance(part, list) else self.ids(part)[1:-1] for part in self._coined.parts(text)]
            return [start, *(token for part in parts for token in part), end]
        tokenizer: Any = self.tokenizer
        added = tokenizer.added_tokens_encoder
        if any(token in text and f"{token}_1" in added for token in added):
            from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

            text = TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)
        found: list[int] = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return found

    def read(self, text: str) -> list[int]:
        """Returns the tokens of a text that the text encoder reads, the end always among them."""
        ids, room = self.ids(text), self.room
        return ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]

    def empty(self, like: Conditioning) -> Conditioning:
        """Returns what guidance leads away from, the empty prompt or what a family has for it, for each row of `like`.

        The copy on the device stays there, so that no step of a sampling loop waits for a transfer.
        """
        tokens = like.tokens
        if self._empty is None or (self._empty.tokens.device, self._empty.tokens.dtype) != (
            tokens.device,
            tokens.dtype,
        ):
            empty = self([""])
            self._empty = (empty if self._away is None else self._away(empty)).to(tokens)
        return self._empty.expand(len(like))

    def keep(self, prompts: Sequence[str]) -> None:
        """Encodes prompts and keeps them, whatever memory they take; from then on no others are encoded.

        Raises:
            ValueError: A prompt is no string, or there are none.
        """
        self._bounded = False
        for prompt in ("", *check_prompts(prompts)):
            self._row(prompt)
        self._closed = True

    def clear(self) -> None:
        """Empties the cache; needed after the text encoder's weights have changed."""
        self._cache.clear()
        self._cached_bytes = 0
        self._empty = None

    def _encode_free(self, texts: Sequence[str]) -> Float[Tensor, "texts tokens dim"]:
        """Encodes texts with coined words, all together and with gradient where it is enabled."""
        for text in texts:
            ids = self.ids(text)
            if min(ids[self.room - 1 :], default=0) < 0:
                raise ValueError(f"free vectors must be within {self.room} tokens, got {len(ids)} in {text!r}")
        tokens, mask = self._padded([self.read(text) for text in texts])
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self.text_encoder(tokens, attention_mask=mask)[0]

    def _padded(
        self, rows: Sequence[list[int]]
    ) -> tuple[Int[Tensor, "texts tokens"], Int[Tensor, "texts tokens"] | None]:
        """Returns the tokens of texts, on the text encoder's device, with the mask of those that read one."""
        padded = self.tokenizer.pad(
            {"input_ids": list(rows)}, padding="max_length", max_length=self.room, return_tensors="pt"
        ).to(self.text_encoder.device)
        mask = padded["attention_mask"] if getattr(self.text_encoder.config, "use_attention_mask", False) else None
        return padded["input_ids"], mask

    def _tell_if_cut(self, prompt: str) -> None:
        """Warns of a prompt that is cut off, once."""
        ids = self.ids(prompt)
        if len(ids) <= self.room or prompt in self._told:
            return
        self._told.add(prompt)
        unread = self.tokenizer.decode(ids[self.room - 1 : -1])
        warnings.warn(
            f"a prompt is cut off: the text encoder has room for {self.room} tokens, start and end included, and the "
            f"prompt has {len(ids)}; not read: {unread!r} of {prompt!r}",
            TruncatedPromptWarning,
            stacklevel=2,
        )
