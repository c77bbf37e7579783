"""HPS v2: how much people prefer an image for a prompt, learned from the Human Preference Dataset v2.

Source: Wu et al. (2023), https://arxiv.org/abs/2306.09341, and tgxs002/HPSv2, `hpsv2/img_score.py`. It is a CLIP
ViT-H/14 tuned on people's choices. The score is the cosine; the authors' tables multiply it by 100. Departures: v2.1 is
the default here, and v2.0 in their function; an image whose long side already has the network's size is padded like any
other, where their code fails; `ClipTokenizer` says how the tokenizer differs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from overpaint.policy.types import Images, PerSample

from .checkpoint import HubFiles
from .clip_encoder import ClipEncoder, at_least_float32
from .clip_tokenizer import BYTE_PAIRS, ClipTokenizer
from .open_clip_layout import from_open_clip_names
from .types import check_pairs

Version = Literal["v2.1", "v2.0"]
REPOSITORY, REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
OFFICIAL = MappingProxyType(
    {
        "v2.1": HubFiles(
            repository=REPOSITORY,
            revision=REVISION,
            files={"HPS_v2.1_compressed.pt": "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"},
        ),
        "v2.0": HubFiles(repository=REPOSITORY, revision=REVISION, files={"HPS_v2_compressed.pt": None}),
    }
)
"""The authors' checkpoints, 2.0 GB each. No hash of the older one is published outside the hub."""
VIT_H_14: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "clip",
        "projection_dim": 1024,
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 77,
            "hidden_act": "gelu",
            "projection_dim": 1024,
        },
        "vision_config": {
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 1024,
        },
    }
)
"""Sizes of open_clip's ViT-H-14; its activation is the exact GELU, and not OpenAI's approximation."""


class HPSv2(nn.Module):
    """Scores images by the cosine with their prompts, about 0.2 to 0.35; differentiable in the images.

    Args:
        encoder: The network.
    """

    differentiable = True

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @classmethod
    def load(cls, folder: str | Path | None = None, version: Version = "v2.1") -> "HPSv2":
        """Loads frozen weights.

        Args:
            folder: Holds a CLIP tokenizer's files and the authors' checkpoint of that version, or is what
                `save_pretrained` wrote; both come from the Hugging Face hub where it is not given.
            version: Which of the authors' checkpoints. It does not matter for what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: The folder has neither.
        """
        if version not in get_args(Version):
            raise ValueError(f"version must be one of {', '.join(get_args(Version))}, got {version!r}")
        files = OFFICIAL[version]
        name = next(iter(files.files))
        if folder is None:
            return cls.from_official(files.fetch() / name, ClipTokenizer.from_folder(BYTE_PAIRS.fetch()))
        folder = Path(folder)
        if (folder / "config.json").is_file():
            return cls(ClipEncoder.from_folder(folder))
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"a folder of HPS {version} must hold {name}, or config.json and model.safetensors, and {folder} does "
                f"not. {files.by_hand()}"
            )
        return cls.from_official(folder / name, ClipTokenizer.from_folder(folder))

    @classmethod
    def from_official(
        cls, path: str | Path, tokenizer: ClipTokenizer, config: Mapping[str, Any] | None = None
    ) -> "HPSv2":
        """Loads a checkpoint with open_clip's names of tensors, every one of which must fit; frozen, in float32.

        Args:
            path: A file of `torch.save` with the tensors under the key `state_dict`; nothing else is unpickled.
            tokenizer: CLIP's.
            config: Sizes; those of ViT-H-14 where it is not given.

        Raises:
            ValueError: The file holds something else, or a tensor does not fit.
        """
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved.get("state_dict") if isinstance(saved, dict) else None
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise ValueError(f"a checkpoint of HPS v2 must map names to tensors under state_dict, and {path} does not")
        return cls(ClipEncoder.with_weights(config or VIT_H_14, tokenizer, from_open_clip_names(state)))

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json`, `model.safetensors` and the tokenizer, which `load` and transformers read."""
        self.encoder.save_pretrained(folder, dtype=dtype)

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the score of each image; RGB in [0, 1], prompts are cut at 77 tokens.

        The long side is scaled to the network's size, and the short one padded with black.
        """
        check_pairs(images, prompts)
        squares = resize_and_pad(at_least_float32(images), self.encoder.image_size)
        return (self.encoder.square_embeddings(squares) * self.encoder.text_embeddings(prompts)).sum(dim=1)


def resize_and_pad(images: Images, size: int) -> Float[Tensor, "batch 3 size size"]:
    """Scales the long side to `size` by antialiased bicubic interpolation and pads the short one with 0 on both sides.

    Where the padding is odd, the right or the bottom gets one more. Source: `ResizeMaxSize` in HPSv2's open_clip, which
    also works on tensors, before they are normalised.
    """
    height, width = images.shape[2:]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    if (new_height, new_width) != (height, width):
        images = functional.interpolate(
            images, size=(new_height, new_width), mode="bicubic", align_corners=False, antialias=True
        )
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return functional.pad(images, (left, size - new_width - left, top, size - new_height - top))
