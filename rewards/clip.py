"""CLIP score: the cosine between an image and its prompt, in each of the conventions that papers use."""

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from torch import nn

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field, settings

from .clip_encoder import VIT_B_32, VIT_L_14, ClipEncoder
from .types import check_pairs

Checkpoint = Literal["ViT-L/14", "ViT-B/32"]
CHECKPOINTS = MappingProxyType({"ViT-L/14": VIT_L_14, "ViT-B/32": VIT_B_32})
"""OpenAI's checkpoint of each name."""


@settings
class CLIPScoreConfig:
    """What is done to the cosine, and with which network; the convention of ImageReward's paper by default."""

    checkpoint: Checkpoint = "ViT-L/14"
    """OpenAI's network that `CLIPScore.load` fetches; scores of different networks cannot be compared."""
    scale: Annotated[float, Field(gt=0)] | Literal["logit"] = 1.0
    """What the cosine is multiplied by; "logit" is the scale that the network learned, about 100."""
    clamp: bool = False
    """Whether a negative score becomes 0, image by image; such an image gets no gradient."""
    prefix: str = ""
    """Put before every prompt, with its own space at the end."""

    @classmethod
    def image_reward(cls) -> "CLIPScoreConfig":
        """The plain cosine of ViT-L/14, about 0.2 to 0.3.

        Source: THUDM/ImageReward, `ImageReward/models/CLIPScore.py`; Table 1 of Xu et al. (2023).
        """
        return cls()

    @classmethod
    def torchmetrics(cls) -> "CLIPScoreConfig":
        """max(100 cos, 0) of ViT-L/14.

        Source: Lightning-AI/torchmetrics, `functional/multimodal/clip_score.py`. Departure: torchmetrics clamps the
        average over its images, and here each image is clamped by itself.
        """
        return cls(scale=100.0, clamp=True)

    @classmethod
    def hessel(cls) -> "CLIPScoreConfig":
        """2.5 max(cos, 0) of ViT-B/32, with "A photo depicts " before the prompt.

        Source: Hessel et al. (2021), https://arxiv.org/abs/2104.08718, and jmhessel/clipscore, `clipscore.py`.
        """
        return cls(checkpoint="ViT-B/32", scale=2.5, clamp=True, prefix="A photo depicts ")

    @classmethod
    def mace(cls) -> "CLIPScoreConfig":
        """exp(logit_scale) cos of ViT-B/32, about 31.

        Source: Shilin-LU/MACE, `evaluate_clip_score.py`, which fails where a prompt has more than 77 tokens;
        here it is cut. DDPO's consistency reward is the same.
        """
        return cls(checkpoint="ViT-B/32", scale="logit")


class CLIPScore(nn.Module):
    """Scores how well an image fits its prompt; differentiable in the images.

    Args:
        encoder: The network; one for `config.checkpoint`, if the scores are to be compared with published ones.
        config: The convention.
    """

    differentiable = True

    def __init__(self, encoder: ClipEncoder, config: CLIPScoreConfig | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config or CLIPScoreConfig()

    @classmethod
    def load(cls, folder: str | Path | None = None, config: CLIPScoreConfig | None = None) -> "CLIPScore":
        """Loads frozen weights.

        Args:
            folder: A checkpoint in transformers' layout with its tokenizer, taken whatever `config.checkpoint` says;
                that checkpoint from the Hugging Face hub where it is not given.
            config: The convention.
        """
        config = config or CLIPScoreConfig()
        return cls(ClipEncoder.from_folder(folder or CHECKPOINTS[config.checkpoint].fetch()), config)

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the score of each image; RGB in [0, 1], prompts are cut at 77 tokens."""
        check_pairs(images, prompts)
        scale = self.encoder.logit_scale if self.config.scale == "logit" else self.config.scale
        scores = scale * self.encoder.cosines(images, [self.config.prefix + prompt for prompt in prompts])
        return scores.clamp(min=0) if self.config.clamp else scores
