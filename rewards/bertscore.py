"""BERTScore: how alike two texts are, by matching the contextual embeddings of their tokens.

Source: Zhang et al. (2020), https://arxiv.org/abs/1904.09675, eq. for R, P and F, without idf weights and without
rescaling by a baseline, as the package bert-score 0.3.13 computes it. Departures from that package: padding cannot be
matched (there it counts as a similarity of 0), a text without any scored token gives three zeros, and the length that
texts are cut to is a setting.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from overpaint.policy.types import PerSample
from overpaint.settings import Count, Field, settings

from .checkpoint import LOCAL, HubFiles, check_folder, load_auto
from .types import check_strings

OFFICIAL = HubFiles(
    repository="microsoft/deberta-xlarge-mnli",
    revision="5b07a9086c1dbb79981ff7b05b4d1ad83b3af51c",
    files=dict.fromkeys(("config.json", "tokenizer_config.json", "vocab.json", "merges.txt", "pytorch_model.bin")),
)
"""The encoder that follows human judgement best by bert-score's table, and that DDPO's alignment reward used; MIT."""


@settings
class BertScoreConfig:
    """Which embeddings are compared."""

    layer: int = Field(40, ge=1)
    """The encoder's layer that is read, counted from 1. bert-score's table gives 40 of 48 for deberta-xlarge-mnli."""
    max_length: int = Field(512, ge=3)
    """Tokens that a text is cut to, with its marks of beginning and end. The official tokenizer names no limit."""
    batch_size: int = Field(64, ge=1)
    """Texts that are encoded at once."""


class BertScores(NamedTuple):
    """How alike each pair is; 1 where the texts are equal, and hardly ever below 0."""

    precision: PerSample
    """How much of the candidate is in the reference."""
    recall: PerSample
    """How much of the reference is in the candidate."""
    f1: PerSample
    """The harmonic mean of both."""


class EmbeddedText(NamedTuple):
    """One text as the encoder reads it."""

    vectors: Float[Tensor, "tokens dim"]
    """Embedding of each token, of length 1."""
    scored: Bool[Tensor, " tokens"]
    """Which tokens count: all but the marks of beginning and end, which can still be matched."""


class BertScore(nn.Module):
    """Compares candidates with references; the scores of a pair do not depend on the rest of the batch.

    No gradients. There is no training mode: dropout stays off.

    Args:
        encoder: An encoder of transformers, as deep as `config.layer`.
        tokenizer: Its tokenizer, which puts a mark before a text (CLS) and one after it (SEP). RoBERTa's has to be made
            with `add_prefix_space=True` for bert-score's numbers.
        config: Which embeddings are compared.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, config: BertScoreConfig | None = None) -> None:
        super().__init__()
        self.config = config or BertScoreConfig()
        settings: Any = encoder.config
        if settings.num_hidden_layers != self.config.layer:
            raise ValueError(
                f"layer must be the encoder's depth, {settings.num_hidden_layers}, got {self.config.layer}; "
                "`BertScore.load` cuts an encoder to the layer that is read"
            )
        self.encoder = encoder.requires_grad_(False)
        self.tokenizer = tokenizer
        self.eval()

    @classmethod
    def load(cls, folder: str | Path | None = None, layer: Count | None = None) -> "BertScore":
        """Loads an encoder in float32, without the layers above the one that is read; frozen.

        Args:
            folder: Where an encoder and its tokenizer lie in transformers' layout; microsoft/deberta-xlarge-mnli from
                the Hugging Face hub (cached there) if it is not given.
            layer: Which layer is read, counted from 1; the 40th if it is not given.

        Raises:
            FileNotFoundError: The folder holds no configuration or no vocabulary.
            ValueError: The encoder has no such layer, or the file lacks weights.
            OSError: The encoder could not be fetched, or there are no weights in the folder.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        path = OFFICIAL.fetch() if folder is None else Path(folder)
        check_folder(path, ["config.json"], "an encoder for BERTScore", vocabulary=True)
        config = BertScoreConfig() if layer is None else BertScoreConfig(layer=layer)
        settings = AutoConfig.from_pretrained(path, **LOCAL)
        if settings.num_hidden_layers < config.layer:
            raise ValueError(f"layer must be from 1 to {settings.num_hidden_layers} in {path}, got {config.layer}")
        settings.num_hidden_layers = config.layer
        encoder = load_auto(
            AutoModel,
            path,
            "encoder",
            optional="pooler.",
            config=settings,
            dtype=torch.float32,  # the file may be in half precision, which transformers would keep
            weights_only=True,
        )
        return cls(encoder, AutoTokenizer.from_pretrained(path, **LOCAL), config)

    def train(self, mode: bool = True) -> "BertScore":
        """Stays in evaluation mode, also as a part of something that is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, candidates: Sequence[str], references: Sequence[str]) -> BertScores:
        """Returns the scores of each candidate for its reference, in float32 on the encoder's device.

        White space around a text does not count. An empty text gives zeros.

        Raises:
            TypeError: One of the two is a string, or holds something else than strings.
            ValueError: There is not one reference for each candidate.
        """
        for name, texts in (("candidates", candidates), ("references", references)):
            if isinstance(texts, str):
                raise TypeError(f"{name} must be a sequence of strings, got the string {texts!r}")
            check_strings(texts, name)
        if len(candidates) != len(references):
            raise ValueError(
                f"references must hold one string for each candidate, got {len(references)} for {len(candidates)}"
            )
        embedded = self.embed([*candidates, *references])
        rows = [matched(embedded[left], embedded[right]) for left, right in zip(candidates, references, strict=True)]
        scores = torch.stack(rows) if rows else torch.zeros(0, 3, device=next(self.encoder.parameters()).device)
        return BertScores(*scores.unbind(dim=1))

    def embed(self, texts: Sequence[str]) -> dict[str, EmbeddedText]:
        """Returns the embeddings of each distinct text; texts of about the same length are encoded together."""
        device = next(self.encoder.parameters()).device
        marks = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id], device=device)
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        embedded = {}
        for start in range(0, len(distinct), self.config.batch_size):
            batch = distinct[start : start + self.config.batch_size]
            tokens = self.tokenizer(
                [text.strip() for text in batch],
                padding=True,
                truncation=True,
                max_length=self.config.max_length,
                padding_side="right",
                return_tensors="pt",
            )
            ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
            vectors = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            vectors = nn.functional.normalize(vectors, dim=-1)
            for text, length, row, its_ids in zip(batch, mask.sum(dim=1).tolist(), vectors, ids, strict=True):
                embedded[text] = EmbeddedText(row[:length], ~torch.isin(its_ids[:length], marks))
        return embedded


def matched(candidate: EmbeddedText, reference: EmbeddedText) -> Float[Tensor, "3"]:
    """Returns precision, recall and F1 of one pair: each scored token takes its best match in the other text.

    All are 0 where one of the texts has no scored token.
    """
    if not (candidate.scored.any() and reference.scored.any()):
        return candidate.vectors.new_zeros(3)
    similarity = candidate.vectors @ reference.vectors.T
    precision = similarity.amax(dim=1)[candidate.scored].mean()
    recall = similarity.amax(dim=0)[reference.scored].mean()
    total = precision + recall
    f1 = torch.where(total == 0, total, 2 * precision * recall / total)
    return torch.stack([precision, recall, f1])
