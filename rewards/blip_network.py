"""BLIP's network: sizes, tokenizer, vision tower and text encoder of transformers, and the files of a checkpoint.

ImageReward and the BLIP score share it. A checkpoint of ours is a folder with `config.json`, `vocab.txt` and
`model.safetensors`. Official checkpoints of BLIP and ImageReward convert by renaming their tensors, whose shapes are
those of transformers' BLIP classes (the fused query, key and value matrix too).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from overpaint.policy.types import Embeddings, Images
from overpaint.settings import Count, Field, settings
from overpaint.text_files import read_json, read_json_object, read_text

from .checkpoint import HubFiles, check_folder, frozen_with, read_tensors, renamed, save_weights
from .preprocess import CLIP_MEAN, CLIP_STD, normalise, resize_and_crop

Config = TypeVar("Config", bound="BlipConfig")
Network = TypeVar("Network", bound="BlipNetwork")
Positive = Annotated[float, Field(gt=0)]


@settings
class BlipConfig:
    """Sizes of BLIP large's towers by default, which ImageReward and the BLIP score share.

    Numbers of attention heads cannot be read off a checkpoint, and a wrong one loads without an error, so they belong
    to the checkpoint as much as its weights do.
    """

    image_size: int = Field(224, ge=1)
    """Side of the square that the vision tower takes, in pixels."""
    patch_size: int = Field(16, ge=1)
    """Side of one patch, in pixels; divides the image size."""
    vision_hidden_size: int = Field(1024, ge=1)
    """Width of the vision tower (ViT-L)."""
    vision_layers: int = Field(24, ge=1)
    """Number of blocks of the vision tower."""
    vision_heads: int = Field(16, ge=1)
    """Number of attention heads of the vision tower; divides its width."""
    vision_intermediate_size: int = Field(4096, ge=1)
    """Width of the hidden layer in each block of the vision tower."""
    vision_layer_norm_eps: float = Field(1e-6, gt=0)
    """Added to the variance in the vision tower's layer norms (timm's value, not transformers' 1e-5)."""

    vocab_size: int = Field(30524, ge=1)
    """Number of token ids, `[DEC]` and `[ENC]` included."""
    hidden_size: int = Field(768, ge=1)
    """Width of the text encoder."""
    text_layers: int = Field(12, ge=1)
    """Number of layers of the text encoder; each can also attend to the image."""
    text_heads: int = Field(12, ge=1)
    """Number of attention heads of the text encoder (med_config.json; transformers has 8); divides its width."""
    text_intermediate_size: int = Field(3072, ge=1)
    """Width of the hidden layer in each layer of the text encoder."""
    text_layer_norm_eps: float = Field(1e-12, gt=0)
    """Added to the variance in the text encoder's layer norms (med_config.json)."""
    max_positions: int = Field(512, ge=1)
    """Number of learned positions of the text encoder."""
    max_length: int = Field(35, ge=2)
    """Number of tokens that a prompt is padded or cut to, `[CLS]` and `[SEP]` included."""

    image_mean: tuple[float, float, float] = CLIP_MEAN
    """Subtracted from each colour channel, in [0, 1]."""
    image_std: tuple[Positive, Positive, Positive] = CLIP_STD
    """Divides each colour channel."""
    antialias: bool = True
    """Whether tensors are antialiased when they shrink (torchvision >= 0.17; older ones did not). PIL always does."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of fresh weights in both towers. A small network learns with 0.08 and hardly with 0.02."""

    def __post_init__(self) -> None:
        """Checks the fields that belong together."""
        divisors = (("patch_size", "image_size"), ("vision_heads", "vision_hidden_size"), ("text_heads", "hidden_size"))
        for part, whole in divisors:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} must divide {whole}, got {getattr(self, part)} and {getattr(self, whole)}")
        if self.max_length > self.max_positions:
            raise ValueError(f"max_length must be at most max_positions={self.max_positions}, got {self.max_length}")

    @classmethod
    def from_file(cls: type[Config], path: str | Path) -> Config:
        """Reads what `save` wrote."""
        read = read_json_object(Path(path))
        values: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in read.items()}
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes the fields as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED_TOKENS = ("[DEC]", "[ENC]")


class Tokens(NamedTuple):
    """Prompts as numbers; the mask is 1 for tokens and 0 for padding."""

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]


class BlipTokenizer:
    """Turns prompts into token ids: lower case, word pieces, padded and cut to a fixed length.

    `[DEC]` and `[ENC]` follow the vocabulary, as in BLIP; they matter only for a prompt that has them literally.

    Args:
        vocabulary: Word pieces in the order of their ids; `[PAD]` first, and BERT's other special tokens anywhere.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        from transformers import BertTokenizer

        words = tuple(word for word in vocabulary if word not in ADDED_TOKENS)
        missing = [token for token in SPECIAL_TOKENS if token not in words]
        if missing:
            raise ValueError(f"vocabulary must hold {', '.join(SPECIAL_TOKENS)}, got one without {', '.join(missing)}")
        if words[0] != "[PAD]":
            raise ValueError(f"vocabulary must begin with [PAD], got {words[0]!r}")
        ids = {word: index for index, word in enumerate(words)}
        if len(ids) != len(words):
            raise ValueError(f"vocabulary must not repeat a word, got {len(words) - len(ids)} repeated")
        self.vocabulary = words
        self.bert = BertTokenizer(vocab=ids)
        self.bert.add_special_tokens({"bos_token": ADDED_TOKENS[0], "additional_special_tokens": [ADDED_TOKENS[1]]})

    @classmethod
    def from_file(cls, path: str | Path) -> "BlipTokenizer":
        """Reads BERT's `vocab.txt`, one word piece per line, or its `tokenizer.json`, or the one that a folder holds.

        Raises:
            FileNotFoundError: There is no such file, or the folder holds neither.
            ValueError: A JSON file is not that of a tokenizer of word pieces.
        """
        path = Path(path).expanduser()
        file = vocabulary_in(path) if path.is_dir() else path
        if file is None or not file.is_file():
            needed = f"BERT's vocabulary must be {' or '.join(VOCABULARY_FILES)}, or a folder that holds one of them"
            raise FileNotFoundError(f"{needed}, got {path}. {VOCABULARY.by_hand()}")
        if file.suffix != ".json":
            return cls(read_text(file).rstrip("\n").split("\n"))
        try:
            ids: dict[str, int] = read_json(file)["model"]["vocab"]
            return cls(sorted(ids, key=ids.__getitem__))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} must be the tokenizer.json of a BERT, got {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Writes the vocabulary, without the two added tokens, one word piece per line."""
        Path(path).write_text("\n".join(self.vocabulary) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """Returns the number of ids, the two added tokens included."""
        return len(self.vocabulary) + len(ADDED_TOKENS)

    def __call__(self, prompts: Sequence[str], max_length: Count) -> Tokens:
        """Returns `max_length` token ids for each prompt; what is longer is cut, `[CLS]` and `[SEP]` stay."""
        encoded = self.bert(list(prompts), padding="max_length", truncation=True, max_length=max_length)
        return Tokens(torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"]))


def in_precision_of(features: Float[Tensor, "batch wide"], layers: nn.Module) -> Float[Tensor, "batch narrow"]:
    """Applies layers in the precision of the features, whatever that of the weights or of autocast."""
    weights = {name: weight.to(features) for name, weight in layers.named_parameters()}
    with torch.autocast(features.device.type, enabled=False):
        return functional_call(layers, weights, (features,))


RENAMINGS = (
    (r"visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.norm\.(weight|bias)", r"vision.post_layernorm.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(weight|bias)", r"vision.encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"vision.encoder.layers.\1.self_attn.qkv.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"vision.encoder.layers.\1.self_attn.projection.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.fc([12])\.(weight|bias)", r"vision.encoder.layers.\1.mlp.fc\2.\3"),
    (r"text_encoder\.(.+)", r"text.\1"),
    (r"(vision|text)_proj\.(weight|bias)", r"\1_proj.\2"),
    # The official head has dropouts between its linear layers, hence the gaps in the numbers.
    *((rf"mlp\.layers\.{theirs}\.(weight|bias)", rf"head.{ours}.\1") for ours, theirs in enumerate((0, 2, 4, 6, 7))),
)
"""Pattern of an official name, without the prefix `blip.`, and the name that takes its place."""

POSITION_IDS = "text_encoder.embeddings.position_ids"
"""A buffer 0, 1, 2, ... that old checkpoints carry; transformers makes it anew."""
VOCABULARY = HubFiles(
    repository="google-bert/bert-base-uncased",
    revision="86b5e0934494bd15c9632b12f734a8a67f723594",
    files={"vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"},
    given_as="the folder as `vocab`, or to a program as --vocab; or put vocab.txt beside the checkpoint",
)
"""The word pieces that BLIP and ImageReward were trained with."""
VOCABULARY_FILES = ("vocab.txt", "tokenizer.json")
"""Names that a folder's vocabulary of BERT may have, in the order in which they are looked for."""


def vocabulary_in(folder: Path) -> Path | None:
    """Returns the vocabulary of BERT that a folder holds, or None."""
    return next((folder / name for name in VOCABULARY_FILES if (folder / name).is_file()), None)


class BlipNetwork(nn.Module):
    """BLIP's two towers and the files of a folder, which `ImageReward` and `BLIPScore` add a head to."""

    config_class: type[BlipConfig] = BlipConfig
    official_file = ""
    """Name of the file that the authors published."""
    training_parts: tuple[str, ...] = ()
    """Patterns of official names of tensors that serve the pretraining only."""
    differentiable = True
    gradient_checkpointing = False
    """Whether the vision tower's blocks are computed anew in the backward pass, to save memory; set it at any time.

    Scores and gradients stay bit-identical. It costs one more forward of the vision tower.
    """

    config: Any  # of `config_class`

    def __init__(self, config: BlipConfig, tokenizer: BlipTokenizer) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"vocab_size must cover the tokenizer's {len(tokenizer)} ids, got {config.vocab_size}")
        self.config = config
        self.tokenizer = tokenizer
        vision_config = BlipVisionConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.vision_hidden_size,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_heads,
            intermediate_size=config.vision_intermediate_size,
            layer_norm_eps=config.vision_layer_norm_eps,
            initializer_range=config.initializer_range,
        )
        text_config = BlipTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            encoder_hidden_size=config.vision_hidden_size,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_intermediate_size,
            max_position_embeddings=config.max_positions,
            layer_norm_eps=config.text_layer_norm_eps,
            initializer_range=config.initializer_range,
            bos_token_id=None,  # for generation only; the defaults lie outside a small vocabulary
            eos_token_id=None,
            sep_token_id=None,
            is_decoder=True,  # gives the layers their attention to the image; the calls are not causal
        )
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)

    @classmethod
    def from_official(
        cls: type[Network],
        path: str | Path,
        config: BlipConfig | None = None,
        vocab: str | Path | Sequence[str] | None = None,
    ) -> Network:
        """Loads a checkpoint with the official names of tensors, every one of which must fit; frozen.

        What serves BLIP's pretraining only is left out by name.

        Args:
            path: A file of `torch.save` with the tensors, also under the key `model` (nothing else is unpickled), or a
                `.safetensors` file. The prefix `module.` of distributed training is dropped.
            config: Sizes; the default ones where it is not given.
            vocab: What `BlipTokenizer.from_file` reads, or the word pieces. Where it is not given, a file that lies
                beside the checkpoint, or else bert-base-uncased's from the Hugging Face hub.

        Raises:
            OSError: The vocabulary could not be fetched; the message says how to get it.
            ValueError: A tensor is missing, unknown or of another shape, or the vocabulary is another one.
        """
        state = {}
        for name, tensor in read_tensors(Path(path)).items():
            plain = name.removeprefix("module.").removeprefix("blip.")
            if plain != POSITION_IDS and not re.fullmatch("|".join(cls.training_parts), plain):
                state[renamed(plain, RENAMINGS, "in the official layout of ImageReward or BLIP")] = tensor
        config = config or cls.config_class()
        if vocab is None:
            vocab = vocabulary_in(Path(path).parent) or VOCABULARY.fetch() / "vocab.txt"
        tokenizer = BlipTokenizer.from_file(vocab) if isinstance(vocab, str | Path) else BlipTokenizer(vocab)
        if len(tokenizer) != config.vocab_size:
            raise ValueError(
                f"vocab must hold the {config.vocab_size - len(ADDED_TOKENS)} word pieces that the weights were "
                f"trained with, got {len(tokenizer) - len(ADDED_TOKENS)}; bert-base-uncased has 30522"
            )
        return frozen_with(cls(config, tokenizer), state)

    @classmethod
    def from_path(
        cls: type[Network], path: str | Path, config: BlipConfig | None = None, vocab: str | Path | None = None
    ) -> Network:
        """Loads an official checkpoint's file, a folder that holds it, or a folder of `save_pretrained`; frozen.

        Config and vocabulary are those of `from_official`; a folder of `save_pretrained` has its own.

        Raises:
            FileNotFoundError: A folder holds neither; or as the two.
        """
        path = Path(path).expanduser()
        official = path / cls.official_file if path.is_dir() else path
        if official.is_file():
            return cls.from_official(official, config, vocab)
        if not (path / "config.json").is_file():
            found = f"got {path}, which has neither"
            raise FileNotFoundError(f"a folder must hold {cls.official_file}, or what save_pretrained wrote, {found}")
        return cls.from_pretrained(path)

    @classmethod
    def from_pretrained(cls: type[Network], folder: str | Path) -> Network:
        """Loads what `save_pretrained` wrote; frozen, in float32 whatever the precision of the file.

        Raises:
            FileNotFoundError: A file is missing.
        """
        folder = Path(folder)
        check_folder(folder, ("config.json", "vocab.txt", "model.safetensors"), f"{cls.__name__}.save_pretrained")
        network = cls(cls.config_class.from_file(folder / "config.json"), BlipTokenizer.from_file(folder / "vocab.txt"))
        return frozen_with(network, read_tensors(folder / "model.safetensors"))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json`, `vocab.txt` and `model.safetensors`, in the weights' own precision or in `dtype`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save(folder / "config.json")
        self.tokenizer.save(folder / "vocab.txt")
        save_weights(self, folder / "model.safetensors", dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def to_squares(self, images: Images) -> Float[Tensor, "batch 3 size size"]:
        """Returns images of any size at the network's: the short side scaled, the centre cropped; in float32."""
        return resize_and_crop(images.float(), self.config.image_size, antialias=self.config.antialias)

    def image_tokens(self, squares: Float[Tensor, "batch 3 size size"]) -> Embeddings:
        """Returns the vision tower's output for images of its size, in [0, 1]: the class token, then all patches.

        The tower's `pooler_output` is something else: there transformers applies the last layer norm twice.
        """
        pixels = normalise(squares, self.config.image_mean, self.config.image_std)
        if not self.gradient_checkpointing:
            return self.vision(pixels).last_hidden_state
        # transformers' own switch acts in training mode only and was renamed within version 5; this needs neither.
        hidden = self.vision.embeddings(pixels)
        for layer in self.vision.encoder.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
        return self.vision.post_layernorm(hidden)

    def text_features(
        self, prompts: Sequence[str], image_tokens: Embeddings | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """Returns the text encoder's [CLS] position, after it has attended to the images where they are given."""
        tokens = self.tokenizer(prompts, self.config.max_length)
        output = self.text(
            input_ids=tokens.ids.to(self.device),
            attention_mask=tokens.mask.to(self.device),
            encoder_hidden_states=image_tokens,
            is_decoder=False,
        )
        return output.last_hidden_state[:, 0]
