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

from .checkpoint import HubFiles, read_tensors, renamed
from .clip_encoder import BYTE_PAIRS, ClipEncoder, ClipTokenizer, at_least_float32
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
TOWER = {"num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}
"""What both towers of ViT-H-14 have; its activation is the exact GELU, and not OpenAI's approximation."""
VIT_H_14: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "clip",
        "projection_dim": 1024,
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "max_position_embeddings": 77,
            **TOWER,
        },
        "vision_config": {
            "image_size": 224,
            "patch_size": 14,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            **TOWER,
        },
    }
)
"""Sizes of open_clip's ViT-H-14."""
RENAMINGS_IN_BLOCK = (
    (r"ln_([12])\.(weight|bias)", r"layer_norm\2.\3"),
    (r"attn\.in_proj_(weight|bias)", r"self_attn.{}_proj.\2"),
    (r"attn\.out_proj\.(weight|bias)", r"self_attn.out_proj.\2"),
    (r"mlp\.c_fc\.(weight|bias)", r"mlp.fc1.\2"),
    (r"mlp\.c_proj\.(weight|bias)", r"mlp.fc2.\2"),
)
"""As `RENAMINGS`, for what follows the number of a block; `{}` stands for query, key and value, which are split."""
RENAMINGS = (
    (r"logit_scale", "logit_scale"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    *(
        (rf"{tower}transformer\.resblocks\.(\d+)\.{theirs}", rf"{model}.encoder.layers.\1.{ours}")
        for tower, model in (("", "text_model"), (r"visual\.", "vision_model"))
        for theirs, ours in RENAMINGS_IN_BLOCK
    ),
)
"""Pattern of a name, and the name that takes its place."""
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""Matrices that open_clip multiplies from the right, and transformers' linear layers from the left."""


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
        state = read_tensors(Path(path), "state_dict")
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


def from_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict of open_clip; query, key and value are split, and the two projections transposed.

    Raises:
        ValueError: A tensor has a name that open_clip's CLIP does not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in TRANSPOSED:
            ours[TRANSPOSED[name]] = tensor.T.contiguous()
            continue
        new = renamed(name, RENAMINGS, "of open_clip's CLIP")
        if "{}" in new:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                ours[new.format(part)] = values.contiguous()
        else:
            ours[new] = tensor
    return ours
