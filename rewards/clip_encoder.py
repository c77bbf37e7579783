"""CLIP: tokenizer and two towers; the inner product of their unit vectors says how well image and prompt fit.

Source: Radford et al. (2021), https://arxiv.org/abs/2103.00020. The network is transformers' `CLIPModel`; checkpoints
of OpenAI, and any other in transformers' layout, are read as they are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Count, Index
from overpaint.text_files import read_json_object, read_text

from .blip_network import Tokens
from .checkpoint import HubFiles, check_folder, frozen_with, read_tensors, save_weights
from .preprocess import normalise, resize_and_crop
from .types import check_pairs

BYTE_PAIRS = HubFiles(
    repository="openai/clip-vit-large-patch14",
    revision="32bd64288804d66eefd0ccbe215aa642df71cc41",
    files={
        "vocab.json": "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
        "merges.txt": "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
    },
)
"""The 49,408 pieces that CLIP was trained with; open_clip's models, those of LAION among them, have the same ones."""
VIT_L_14 = replace(
    BYTE_PAIRS,
    files={
        "config.json": "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
        "model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        **BYTE_PAIRS.files,
    },
)
"""OpenAI's CLIP ViT-L/14, 1.7 GB."""
VIT_B_32 = HubFiles(
    repository="openai/clip-vit-base-patch32",
    revision="3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268",
    files={
        "config.json": "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770",
        "pytorch_model.bin": "a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f",
        "vocab.json": "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363",
        "merges.txt": "f526393189112391ce6f9795d4695f704121ce452c3aad1f5335cc41337eba85",
    },
)
"""OpenAI's CLIP ViT-B/32, 0.6 GB."""
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names that a folder's weights may have, in the order in which they are looked for."""
POSITION_IDS = ".embeddings.position_ids"
"""End of the names of CLIP's only buffers."""

START, END = "<|startoftext|>", "<|endoftext|>"
"""The first and the last token of every prompt."""

Vectors = Float[Tensor, "batch dim"]
"""One vector for each image or prompt."""


class ClipTokenizer:
    """Turns prompts into token ids: lower case, byte pairs, padded and cut to a fixed length.

    The released code of CLIP and open_clip also repairs broken Unicode and replaces HTML entities such as `&amp;`
    first. As in transformers, that is not done here.

    Args:
        vocabulary: Each piece's id.
        merges: Pairs of pieces that become one, the most important first.

    Raises:
        ValueError: The vocabulary lacks a token that is needed, or its ids are not 0, 1, 2, ...
    """

    def __init__(self, vocabulary: Mapping[str, Index], merges: Sequence[tuple[str, str]]) -> None:
        from transformers import CLIPTokenizer

        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(f"vocabulary must number its {len(vocabulary)} pieces 0, 1, 2, ..., got other ids")
        needed = {START, END}.union(*((left, right, left + right) for left, right in merges))
        missing = sorted(needed - set(vocabulary))
        if missing:
            found = f"one without {', '.join(missing[:4])}"
            raise ValueError(f"vocabulary must hold {START}, {END} and every piece of merges, got {found}")
        make: Any = CLIPTokenizer  # its annotations know merges as text only
        self.vocabulary = dict(vocabulary)
        self.merges = list(merges)
        self.byte_pairs = make(vocab=self.vocabulary, merges=self.merges)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ClipTokenizer":
        """Reads `vocab.json` and `merges.txt`, or `tokenizer.json` where one of them is missing.

        Raises:
            FileNotFoundError: The folder has neither.
        """
        folder = Path(folder)
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = read_json_object(folder / "vocab.json")
            lines = read_text(folder / "merges.txt").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").is_file():
            model = read_json_object(folder / "tokenizer.json")["model"]
            vocabulary, merges = model["vocab"], model["merges"]
        else:
            raise FileNotFoundError(
                "a folder of a CLIP tokenizer must hold vocab.json and merges.txt, or tokenizer.json, and "
                f"{folder} does not. {BYTE_PAIRS.by_hand()}"
            )
        # Older files write the two pieces as one string.
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        return cls(vocabulary, [(left, right) for left, right in pairs])

    def save(self, folder: str | Path) -> None:
        """Writes `vocab.json` and `merges.txt`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Returns the number of ids."""
        return len(self.vocabulary)

    @property
    def end_id(self) -> int:
        """Id of the token that ends every prompt."""
        return self.vocabulary[END]

    def __call__(self, prompts: Sequence[str], max_length: Count) -> Tokens:
        """Returns `max_length` token ids for each prompt; what is longer is cut, its last token is `END` all the same.

        Padding is `END` as well, so that a prompt is over at the first of them.
        """
        encoded = self.byte_pairs(list(prompts), padding="max_length", truncation=True, max_length=max_length)
        return Tokens(torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]))


class ClipEncoder(nn.Module):
    """Maps images and prompts to unit vectors; differentiable in the images.

    There is no dropout in CLIP, so `train()` and `eval()` are the same. A network made by the constructor has random
    weights and can be trained; one that was loaded has frozen weights.

    Args:
        config: What transformers' `CLIPConfig` takes, as `config.json` holds it.
        tokenizer: Turns prompts into ids below the config's vocabulary size.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: ClipTokenizer) -> None:
        from transformers import CLIPConfig, CLIPModel

        super().__init__()
        if config.get("model_type", "clip") != "clip":
            raise ValueError(f"model_type must be 'clip', got {config['model_type']!r}")
        # A config may say that a tower is made in half precision.
        model = CLIPModel(CLIPConfig.from_dict(dict(config))).float()
        vocab_size = model.text_model.embeddings.token_embedding.num_embeddings
        if len(tokenizer) > vocab_size:
            raise ValueError(f"vocab_size must cover the tokenizer's {len(tokenizer)} ids, got {vocab_size}")
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, tokenizer: ClipTokenizer | None = None) -> "ClipEncoder":
        """Loads `config.json` and the weights of a checkpoint in transformers' layout; frozen, in float32.

        Args:
            folder: Holds `config.json`, `model.safetensors` or `pytorch_model.bin` (of which nothing but tensors is
                unpickled), and the tokenizer's files.
            tokenizer: Takes the place of the folder's.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A tensor is missing, unknown or of another shape than the config says.
        """
        folder = Path(folder)
        weights = next((name for name in WEIGHTS if (folder / name).is_file()), WEIGHTS[0])
        check_folder(folder, ["config.json", weights], "a CLIP checkpoint")
        config = read_json_object(folder / "config.json")
        return cls.with_weights(config, tokenizer or ClipTokenizer.from_folder(folder), read_tensors(folder / weights))

    @classmethod
    def with_weights(
        cls, config: Mapping[str, Any], tokenizer: ClipTokenizer, state: Mapping[str, Tensor]
    ) -> "ClipEncoder":
        """Makes a frozen network of weights with the names of transformers' `CLIPModel`, every one of which must fit.

        Random numbers are not drawn, so that loading does not change a run's.
        """
        with torch.device("meta"):
            encoder = cls(config, tokenizer)
        encoder.to_empty(device="cpu")
        for name, positions in encoder.model.named_buffers():
            if not name.endswith(POSITION_IDS):
                raise ValueError(f"the buffers of a CLIP model must be position_ids, got {name!r}")
            positions.copy_(torch.arange(positions.shape[1])[None])
        # Old checkpoints carry 0, 1, 2, ... along, which transformers makes anew.
        frozen_with(encoder.model, {name: state[name] for name in state if not name.endswith(POSITION_IDS)})
        return encoder.eval()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and the tokenizer, which `from_folder` and transformers read."""
        folder = Path(folder)
        self.tokenizer.save(folder)
        (folder / "config.json").write_text(self.model.config.to_json_string(), encoding="utf-8")
        save_weights(self.model, folder / "model.safetensors", dtype)

    def image_embeddings(self, images: Images) -> Vectors:
        """Returns a unit vector for each image; RGB in [0, 1], of any size.

        The short side is scaled to the network's by antialiased bicubic interpolation, and the centre cropped.
        """
        return self.square_embeddings(resize_and_crop(at_least_float32(images), self.image_size))

    def square_embeddings(self, squares: Images) -> Vectors:
        """Returns a unit vector for each image that already has the network's size."""
        pixels = normalise(at_least_float32(squares))
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.model.visual_projection(pooled))

    def text_embeddings(self, prompts: Sequence[str]) -> Vectors:
        """Returns a unit vector for each prompt, read off at its first end token.

        The config's own `eos_token_id` does not matter: OpenAI's configs say 2, which is wrong and stands for the
        place of the largest id. That is the first end token as well.
        """
        tokens = self.tokenizer(prompts, self.model.text_model.embeddings.position_embedding.num_embeddings)
        ids = tokens.ids.to(self.device)
        hidden = self.model.text_model(input_ids=ids, attention_mask=tokens.mask.to(self.device)).last_hidden_state
        ends = (ids == self.tokenizer.end_id).int().argmax(dim=1)
        pooled = hidden[torch.arange(len(ids), device=ids.device), ends]
        return _unit(self.model.text_projection(pooled))

    def cosines(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the cosine between each image and its prompt, in [-1, 1]."""
        check_pairs(images, prompts)
        return (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(dim=1)

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by to give the logits that CLIP was trained with; about 100."""
        return at_least_float32(self.model.logit_scale).exp()

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower takes, in pixels."""
        return self.model.vision_model.embeddings.image_size

    @property
    def dim(self) -> int:
        """Number of components of an embedding."""
        return self.model.visual_projection.out_features

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.logit_scale.device


def at_least_float32(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Returns half precision in float32, and anything else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _unit(vectors: Vectors) -> Vectors:
    """Returns the vectors at length 1, in float32 at least."""
    return functional.normalize(at_least_float32(vectors), dim=1)
