"""Names of tensors: from the official checkpoints of BLIP and ImageReward to transformers' BLIP classes.

Shapes are equal on both sides (the fused query, key and value matrix too), so that a checkpoint converts by renaming.
"""

import re
from collections.abc import Mapping

from torch import Tensor

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
    (r"mlp\.layers\.0\.(weight|bias)", r"head.0.\1"),
    (r"mlp\.layers\.2\.(weight|bias)", r"head.1.\1"),
    (r"mlp\.layers\.4\.(weight|bias)", r"head.2.\1"),
    (r"mlp\.layers\.6\.(weight|bias)", r"head.3.\1"),
    (r"mlp\.layers\.7\.(weight|bias)", r"head.4.\1"),
)
"""Pattern of an official name, without the prefix `blip.`, and the name that takes its place."""

TRAINING_PARTS = (
    r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\..+",  # averages of the weights over time
    r"text_decoder\..+",  # writes captions
    r"itm_head\..+",  # says whether image and text belong together, from both at once
    r"image_queue|text_queue|queue_ptr",  # features of earlier batches
    r"temp",  # temperature of the contrastive loss; the score is the bare cosine
)
"""Patterns of the names in BLIP's checkpoint, `model_large.pth`, that a score does not need."""

POSITION_IDS = "text_encoder.embeddings.position_ids"
"""A buffer 0, 1, 2, ... that old checkpoints carry; transformers makes it anew."""


def without_training_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what BLIP's checkpoint holds for its pretraining only, by name; every other tensor stays."""
    left_out = re.compile("|".join(TRAINING_PARTS))
    return {name: tensor for name, tensor in state.items() if not left_out.fullmatch(name.removeprefix("module."))}


def from_official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames an official state dict; the prefix `module.` of distributed training is dropped.

    Raises:
        ValueError: A tensor has a name that official checkpoints do not have.
    """
    renamed = {}
    for name, tensor in state.items():
        plain = name.removeprefix("module.").removeprefix("blip.")
        if plain == POSITION_IDS:
            continue
        for pattern, replacement in RENAMINGS:
            match = re.fullmatch(pattern, plain)
            if match:
                renamed[match.expand(replacement)] = tensor
                break
        else:
            raise ValueError(f"a checkpoint in the official layout of ImageReward or BLIP has no tensor {name!r}")
    return renamed
