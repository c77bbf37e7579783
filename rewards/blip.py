"""BLIP score: the cosine between an image and a prompt in the space that BLIP large was trained to match them in.

Source: Li et al. (2022), https://arxiv.org/abs/2201.12086, and THUDM/ImageReward, `ImageReward/models/BLIPScore.py`,
one of the baselines of the ImageReward paper. Image and prompt are encoded apart: the text encoder does not see the
image. BLIP has a second score, of a head that reads both at once (image-text matching); this is not that one.
Departures: images of a batch go through the network together, and a checkpoint with a tensor too many or too few is
refused.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field, settings

from .blip_network import (
    BlipConfig,
    BlipNetwork,
    BlipTokenizer,
    from_official_names,
    vision_tokens,
    without_training_parts,
)
from .checkpoint import read_tensors
from .preprocess import normalise, resize_and_crop
from .types import check_pairs, check_strings

OFFICIAL_URL = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large.pth"
"""Where the authors keep the weights. No hash of them is published, so they are not fetched without being asked for."""


@settings
class BLIPScoreConfig(BlipConfig):
    """Sizes of the two towers, and of the space that they meet in; those of BLIP large by default."""

    projection_size: int = Field(256, ge=1)
    """Number of dimensions of the space in which image and prompt are compared."""


class BLIPScore(BlipNetwork):
    """Scores images for prompts by a cosine, in [-1, 1]; differentiable in the images.

    There is no dropout, so `train()` and `eval()` give the same scores. A network made by the constructor can be
    trained, but for the text encoder's attention to the image, which the score does not use; one that was loaded has
    frozen weights. Precision and memory are those of `ImageReward`, which has the same towers.

    Args:
        config: Sizes.
        tokenizer: Turns prompts into ids below `config.vocab_size`.
    """

    config_class = BLIPScoreConfig

    def __init__(self, config: BLIPScoreConfig, tokenizer: BlipTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.config = config
        self.vision_proj = nn.Linear(config.vision_hidden_size, config.projection_size)
        self.text_proj = nn.Linear(config.hidden_size, config.projection_size)

    @classmethod
    def load(cls, path: str | Path | None = None, *, vocab: str | Path | None = None) -> "BLIPScore":
        """Loads frozen weights from BLIP's file `model_large.pth` or from a folder of `save_pretrained`.

        Args:
            path: The file or the folder. There is no default: no hash of the file is published that it could be
                checked by.
            vocab: Vocabulary of an official checkpoint, one word piece per line; bert-base-uncased's from the hub
                where it is not given.

        Raises:
            FileNotFoundError: No path was given, or there is nothing at it; the message says how to get the file.
        """
        if path is None or not Path(path).exists():
            missing = "BLIP's weights have to be given by their path" if path is None else f"there is nothing at {path}"
            raise FileNotFoundError(
                f"{missing}: save {OFFICIAL_URL} as model_large.pth, and give its path to BLIPScore.load. It is not "
                "fetched by itself, because its authors published no hash to check it by"
            )
        return cls.from_pretrained(path) if Path(path).is_dir() else cls.from_official(path, vocab=vocab)

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        config: BLIPScoreConfig | None = None,
        vocab: str | Path | Sequence[str] | None = None,
    ) -> "BLIPScore":
        """Loads a checkpoint with BLIP's own names of tensors; frozen.

        What serves BLIP's pretraining only is left out by name; every other tensor must fit.

        Args:
            path: A file of `torch.save` with tensors under the key `model` (nothing else is unpickled), or a
                `.safetensors` file.
            config: Sizes; those of BLIP large where it is not given.
            vocab: A file with one word piece per line, or the word pieces; bert-base-uncased's from the Hugging Face
                hub where it is not given.
        """
        state = without_training_parts(read_tensors(Path(path)))
        return cls.from_state(from_official_names(state), config, vocab)

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the cosine between each image and its prompt, in float32; gradients flow to the images.

        Args:
            images: RGB in [0, 1], of any size; the short side is scaled to the network's and the centre cropped.
            prompts: One for each image; what is longer than `config.max_length` tokens is cut.

        Raises:
            TypeError: A prompt is not a string, or the images are not floating point.
            ValueError: The images are not a batch of RGB images, or there is not one prompt for each.
        """
        check_pairs(images, prompts)
        return (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(dim=1)

    def image_embeddings(self, images: Images) -> Float[Tensor, "batch projection"]:
        """Returns a unit vector for each image in [0, 1], in float32."""
        squares = resize_and_crop(images.float(), self.config.image_size, antialias=self.config.antialias)
        pixels = normalise(squares, self.config.image_mean, self.config.image_std)
        tokens = vision_tokens(self.vision, pixels, checkpointing=self.gradient_checkpointing)
        return _unit_vectors(tokens[:, 0], self.vision_proj)

    def text_embeddings(self, prompts: Sequence[str]) -> Float[Tensor, "batch projection"]:
        """Returns a unit vector for each prompt, in float32."""
        check_strings(prompts)
        device = self.text_proj.weight.device
        tokens = self.tokenizer(prompts, self.config.max_length)
        output = self.text(input_ids=tokens.ids.to(device), attention_mask=tokens.mask.to(device), is_decoder=False)
        return _unit_vectors(output.last_hidden_state[:, 0], self.text_proj)


def _unit_vectors(features: Float[Tensor, "batch hidden"], projection: nn.Linear) -> Float[Tensor, "batch projection"]:
    """Projects and divides by the length, in float32 whatever the towers' precision."""
    with torch.autocast(features.device.type, enabled=False):
        projected = functional.linear(features.float(), projection.weight.float(), projection.bias.float())
        return functional.normalize(projected, dim=1)
