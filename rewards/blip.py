"""BLIP score: the cosine between an image and a prompt in the space that BLIP large was trained to match them in.

Source: Li et al. (2022), https://arxiv.org/abs/2201.12086, and THUDM/ImageReward, `ImageReward/models/BLIPScore.py`,
one of the baselines of the ImageReward paper. Image and prompt are encoded apart: the text encoder does not see the
image. BLIP has a second score, of a head that reads both at once (image-text matching); this is not that one.
Departures: images of a batch go through the network together, and a checkpoint with a tensor too many or too few is
refused.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field, settings

from .blip_network import BlipConfig, BlipNetwork, BlipTokenizer, in_precision_of
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
    official_file = "model_large.pth"
    training_parts = (
        r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..+",  # averages of the weights over time
        r"text_decoder\..+",  # writes captions
        r"itm_head\..+",  # says whether image and text belong together, from both at once
        r"image_queue|text_queue|queue_ptr",  # features of earlier batches
        r"temp",  # temperature of the contrastive loss; the score is the bare cosine
    )

    def __init__(self, config: BLIPScoreConfig, tokenizer: BlipTokenizer) -> None:
        super().__init__(config, tokenizer)
        self.vision_proj = nn.Linear(config.vision_hidden_size, config.projection_size)
        self.text_proj = nn.Linear(config.hidden_size, config.projection_size)

    @classmethod
    def load(cls, path: str | Path | None = None, *, vocab: str | Path | None = None) -> "BLIPScore":
        """Loads frozen weights from BLIP's file `model_large.pth`, from a folder of it or of `save_pretrained`.

        Args:
            path: The file or the folder. There is no default: no hash of the file is published that it could be
                checked by.
            vocab: Vocabulary of an official checkpoint: BERT's `vocab.txt` or `tokenizer.json`, or a folder that holds
                one of them. Where it is not given, it is looked for beside the checkpoint, and then on the hub.

        Raises:
            FileNotFoundError: No path was given, or there is nothing at it; the message says how to get the file.
        """
        if path is None or not Path(path).expanduser().exists():
            missing = "BLIP's weights have to be given by their path" if path is None else f"there is nothing at {path}"
            raise FileNotFoundError(
                f"{missing}: save {OFFICIAL_URL} as model_large.pth, and give its path to BLIPScore.load. It is not "
                "fetched by itself, because its authors published no hash to check it by"
            )
        return cls.from_path(path, vocab=vocab)

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the cosine between each image and its prompt, in float32; gradients flow to the images.

        Args:
            images: RGB in [0, 1], of any size; the short side is scaled to the network's and the centre cropped.
            prompts: One for each image; what is longer than `config.max_length` tokens is cut.
        """
        check_pairs(images, prompts)
        return (self.image_embeddings(images) * self.text_embeddings(prompts)).sum(dim=1)

    def image_embeddings(self, images: Images) -> Float[Tensor, "batch projection"]:
        """Returns a unit vector for each image in [0, 1], in float32."""
        tokens = self.image_tokens(self.to_squares(images))
        return functional.normalize(in_precision_of(tokens[:, 0].float(), self.vision_proj), dim=1)

    def text_embeddings(self, prompts: Sequence[str]) -> Float[Tensor, "batch projection"]:
        """Returns a unit vector for each prompt, in float32."""
        check_strings(prompts)
        return functional.normalize(in_precision_of(self.text_features(prompts).float(), self.text_proj), dim=1)
