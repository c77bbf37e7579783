"""Names of tensors: from open_clip's CLIP, with vision transformers only, to transformers' `CLIPModel`."""

import re
from collections.abc import Mapping

from torch import Tensor

BLOCK = r"(visual\.)?transformer\.resblocks\.(\d+)\."
"""How the tensors of a block begin; those of the vision tower have the prefix."""
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
)
"""Pattern of a name, and the name that takes its place; the tensor stays."""
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
"""Matrices that open_clip multiplies from the right, and transformers' linear layers from the left."""
BLOCK_RENAMINGS = (
    (r"ln_([12])\.(weight|bias)", r"layer_norm\1.\2"),
    (r"attn\.out_proj\.(weight|bias)", r"self_attn.out_proj.\1"),
    (r"mlp\.c_fc\.(weight|bias)", r"mlp.fc1.\1"),
    (r"mlp\.c_proj\.(weight|bias)", r"mlp.fc2.\1"),
)
"""The same within a block."""


def from_open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames a state dict of open_clip; query, key and value are split, and the two projections transposed.

    Raises:
        ValueError: A tensor has a name that open_clip's CLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed |= _transposed(name, tensor) or _split(name, tensor) or _renamed(name, tensor)
    return renamed


def _transposed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {TRANSPOSED[name]: tensor.T.contiguous()} if name in TRANSPOSED else {}


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Cuts a fused matrix or bias of query, key and value, in this order, in three."""
    match = re.fullmatch(BLOCK + r"attn\.in_proj_(weight|bias)", name)
    if match is None:
        return {}
    begin = _block(match)
    parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
    return {f"{begin}.self_attn.{part}.{match[3]}": values.contiguous() for part, values in parts}


def _renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    for pattern, replacement in RENAMINGS:
        match = re.fullmatch(pattern, name)
        if match:
            return {match.expand(replacement): tensor}
    in_block = re.fullmatch(BLOCK + "(.+)", name)
    for pattern, replacement in BLOCK_RENAMINGS:
        match = re.fullmatch(pattern, in_block[3]) if in_block else None
        if in_block and match:
            return {f"{_block(in_block)}.{match.expand(replacement)}": tensor}
    raise ValueError(f"a checkpoint of open_clip's CLIP has no tensor {name!r}")


def _block(match: re.Match[str]) -> str:
    """Returns the name of the block that a name was found to be in."""
    return f"{'vision' if match[1] else 'text'}_model.encoder.layers.{match[2]}"
