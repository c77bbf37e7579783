"""PickScore: which of two images people would pick for a prompt, learned from Pick-a-Pic.

Source: Kirstain et al. (2023), https://arxiv.org/abs/2305.01569, and yuvalkirstain/PickScore. It is a CLIP ViT-H/14
that was tuned on people's choices. Departure: the tokenizer's files are OpenAI's, which hold the same pieces as those
of laion/CLIP-ViT-H-14-laion2B-s32B-b79K that the authors name, and whose hashes are known.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from overpaint.policy.types import Images, PerSample

from .checkpoint import HubFiles
from .clip_encoder import BYTE_PAIRS, ClipEncoder, ClipTokenizer

WEIGHTS = HubFiles(
    repository="yuvalkirstain/PickScore_v1",
    revision="a4e4367c6dfa7288a00c550414478f865b875800",
    files={"config.json": None, "model.safetensors": None},
)
"""PickScore v1, 3.9 GB. No hash of its files is published outside the hub: the revision vouches."""


class PickScore(nn.Module):
    """Scores images by exp(logit_scale) cos, about 18 to 23; differentiable in the images.

    The probability that one image is preferred to another is the logistic function of their scores' difference.

    Args:
        encoder: The network.
    """

    differentiable = True

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "PickScore":
        """Loads frozen weights.

        Args:
            folder: Holds `config.json`, `model.safetensors` or `pytorch_model.bin`, and a CLIP tokenizer's files;
                PickScore v1 from the Hugging Face hub where it is not given.
        """
        if folder is not None:
            return cls(ClipEncoder.from_folder(folder))
        return cls(ClipEncoder.from_folder(WEIGHTS.fetch(), ClipTokenizer.from_folder(BYTE_PAIRS.fetch())))

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the score of each image; RGB in [0, 1], prompts are cut at 77 tokens."""
        return self.encoder.logit_scale * self.encoder.cosines(images, prompts)
