"""ImageReward: how much people would like an image for a prompt, learned from ranked images.

Source: Xu et al. (2023), https://arxiv.org/abs/2304.05977, and THUDM/ImageReward, `ImageReward/ImageReward.py`. The
network is put together from transformers' own BLIP classes; a head reads the text encoder's [CLS] position, which has
attended to every patch of the image. Departures from the released code are listed in docs/rewards.md.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field, settings

from .blip_network import BlipConfig, BlipNetwork, BlipTokenizer, in_precision_of
from .checkpoint import HubFiles
from .preprocess import ImageFile, open_image, pil_to_square
from .types import check_pairs, check_strings

WEIGHTS = HubFiles(
    repository="THUDM/ImageReward",
    revision="5736be03b2652728fb87788c9797b0570450ab72",
    files={"ImageReward.pt": None},
    given_as="the folder to `ImageReward.load`, or to a program as --reward-weights",
)
"""The official weights, 1.8 GB. We have seen no hash of them published: the revision alone vouches for them."""
OFFICIAL_NAME = "ImageReward-v1.0"
"""The name that `ImageReward.load` and the package image-reward know the official weights by."""
IMAGES_PER_CALL = 32
"""Number of images that `score` and `inference_rank` push through the network at once."""


@settings
class ImageRewardConfig(BlipConfig):
    """Sizes of the two towers, and of the head that reads them; those of the official checkpoint by default."""

    head_widths: tuple[Annotated[int, Field(ge=1)], ...] = (1024, 128, 64, 16)
    """Widths of the head's hidden layers, which are linear as in the released code."""
    mean: float = 0.16717362830052426
    """Mean of the head's output over the authors' validation data; subtracted from it."""
    std: float = Field(1.0333394966054072, gt=0)
    """Standard deviation of the head's output over the same data; divides it."""


class ImageReward(BlipNetwork):
    """Scores images for prompts; differentiable in the images.

    There is no dropout, so `train()` and `eval()` give the same scores. A network made by the constructor can be
    trained; one that was loaded has frozen weights.

    The weights keep the precision they have, whatever the policy's: images are taken in float32 and meet the network in
    its own. `reward.to(torch.bfloat16)` halves 1.7 GiB of weights. On a small network compared with the authors' code,
    that moved scores of about 1 by at most 0.11, float16 by 0.005 and bfloat16 autocast over float32 weights by 0.04;
    gradients to the images kept their direction (cosine above 0.9998). The head is always computed in float32.

    `gradient_checkpointing`: at the official size, forward and backward to one image of 512 x 512 pixels took on a CPU,
    above the weights: in float32 353 MiB without and 161 MiB with it (1,364 and 521 MiB for 4 images), in bfloat16 182
    and 85 MiB.

    Args:
        config: Sizes and constants. Replace it (`reward.config = dataclasses.replace(...)`) to change the constants.
        tokenizer: Turns prompts into ids below `config.vocab_size`.
    """

    config_class = ImageRewardConfig
    official_file = "ImageReward.pt"
    training_parts = (r"(vision|text)_proj\.(weight|bias)",)

    def __init__(self, config: ImageRewardConfig, tokenizer: BlipTokenizer) -> None:
        super().__init__(config, tokenizer)
        layers = [nn.Linear(*pair) for pair in pairwise((config.hidden_size, *config.head_widths, 1))]
        for layer in layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(*layers)

    @classmethod
    def load(
        cls,
        name: str | Path | None = None,
        *,
        vocab: str | Path | None = None,
        config: ImageRewardConfig | None = None,
    ) -> "ImageReward":
        """Loads frozen weights by name or from a path.

        Args:
            name: None or "ImageReward-v1.0" (1.8 GB from the Hugging Face hub, cached there), a checkpoint file in the
                official layout, a folder that holds `ImageReward.pt`, or one written by `save_pretrained`.
            vocab: Vocabulary of an official checkpoint: BERT's `vocab.txt` or `tokenizer.json`, or a folder that holds
                one of them. Where it is not given, it is looked for beside the checkpoint, and then on the hub.
            config: Sizes of an official checkpoint; the official ones where they are not given.

        Raises:
            ValueError: There is no such name and no such path.
            OSError: The hub could not be reached; the message says how to get the file by other means.
        """
        if name is None or str(name) == OFFICIAL_NAME:
            return cls.from_official(WEIGHTS.fetch() / cls.official_file, config, vocab)
        if Path(name).expanduser().exists():
            return cls.from_path(name, config, vocab)
        raise ValueError(f"name must be {OFFICIAL_NAME}, or a path that exists, got {str(name)!r}")

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the standardised score of each image for its prompt, in float32; gradients flow to the images.

        Images of any size have their short side scaled to the network's and the centre cropped; prompts are cut at
        `config.max_length` tokens.
        """
        return self.standardise(self.raw_score(self.features(images, prompts)))

    def features(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, "batch hidden"]:
        """Returns what the head reads: the text encoder's [CLS] position after it has attended to the image."""
        check_pairs(images, prompts)
        return self.text_features(prompts, self.image_tokens(self.to_squares(images)))

    def raw_score(self, features: Float[Tensor, "batch hidden"]) -> PerSample:
        """Returns the head's output before it is standardised; always computed in float32."""
        return in_precision_of(features.float(), self.head)[:, 0]

    def standardise(self, raw_scores: PerSample) -> PerSample:
        """Subtracts the mean of the config and divides by its standard deviation."""
        return (raw_scores - self.config.mean) / self.config.std

    def score(self, prompt: str, image: ImageFile | Sequence[ImageFile]) -> float | list[float]:
        """Returns the score of one image, or the scores of a list of images, for one prompt.

        Takes and returns what the method of that name does in the package image-reward.
        """
        if isinstance(image, Image.Image | str | Path):
            return self.inference_rank(prompt, [image])[1][0]
        return self.inference_rank(prompt, image)[1]

    def inference_rank(self, prompt: str, generations_list: Sequence[ImageFile]) -> tuple[list[int], list[float]]:
        """Returns the rank of each image among all, 1 being the best, and the scores, in the order of the images.

        Takes and returns what the method of that name does in the package image-reward, but for a list of one image,
        for which that package returns bare numbers and this returns lists of one.
        """
        check_strings([prompt])
        if len(generations_list) == 0:
            raise ValueError("generations_list must hold at least one image, got none")
        scores = []
        for start in range(0, len(generations_list), IMAGES_PER_CALL):
            opened = [open_image(image) for image in generations_list[start : start + IMAGES_PER_CALL]]
            squares = torch.stack([pil_to_square(image, self.config.image_size) for image in opened])
            with torch.no_grad():
                features = self.text_features([prompt] * len(opened), self.image_tokens(squares.to(self.device)))
                scores.append(self.standardise(self.raw_score(features)))
        rewards = torch.cat(scores).cpu()
        ranks = rewards.argsort(descending=True, stable=True).argsort() + 1
        return ranks.tolist(), rewards.tolist()
