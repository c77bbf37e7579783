"""Cross-attention maps: where a UNet attends to words, recorded while it predicts and without changing it.

Queries and keys are caught as the layers' projections give them, so that a LoRA or edited weights are in, gradients
flow, and the prediction keeps every bit. Probabilities are computed from them when they are asked for.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy


class CrossAttention(NamedTuple):
    """What a cross-attention compared in one call of the UNet."""

    queries: Float[Tensor, "batch heads pixels dim"]  # one for each pixel of the layer's picture, row by row
    keys: Float[Tensor, "batch heads tokens dim"]
    scale: float  # factor of their products

    def probabilities(self) -> Float[Tensor, "batch heads pixels tokens"]:
        """Returns how much of each pixel's attention each token has, in float32 at least, inside autocast as well."""
        precision = torch.promote_types(self.queries.dtype, torch.float32)
        queries, keys = self.queries.to(precision), self.keys.to(precision)
        with torch.autocast(queries.device.type, enabled=False):
            return (self.scale * queries @ keys.transpose(-1, -2)).softmax(dim=-1)


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """Returns the cross-attention layers by their names in the UNet, in the order of its modules."""
    # Down the tree of a Stable Diffusion's UNet; looking at every module would take as long as a small UNet's layer.
    tree: Any = unet
    blocks = [
        (f"{part}.{k}", block) for part in ("down_blocks", "up_blocks") for k, block in enumerate(getattr(tree, part))
    ]
    return {
        f"{name}.attentions.{k}.transformer_blocks.{depth}.attn2": layer.attn2
        for name, block in (*blocks, ("mid_block", tree.mid_block))
        for k, attention in enumerate(getattr(block, "attentions", ()))
        for depth, layer in enumerate(attention.transformer_blocks)
    }


@contextmanager
def recorded_attention(unet: nn.Module) -> Generator[dict[str, CrossAttention]]:
    """Within the `with` block, keeps what the cross-attentions compared in the last call of the UNet.

    It yields the layers by name; none before the first call. Gradients flow where they are enabled. Memory is that of
    queries and keys, until `CrossAttention.probabilities` is called. A UNet that was compiled before records nothing.
    """
    record: dict[str, CrossAttention] = {}
    queries: dict[str, Tensor] = {}

    def note_queries(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        queries[name] = output

    def note(name: str, layer: Any, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        both = [part.unflatten(2, (layer.heads, -1)).transpose(1, 2) for part in (queries.pop(name), output)]
        record[name] = CrossAttention(*both, float(layer.scale))

    with ExitStack() as hooks:
        for name, layer in cross_attentions(unet).items():
            attention: Any = layer
            hooks.enter_context(attention.to_q.register_forward_hook(partial(note_queries, name)))
            hooks.enter_context(attention.to_k.register_forward_hook(partial(note, name, attention)))
        yield record


def words_of(policy: DiffusionPolicy, prompts: Sequence[str]) -> Bool[Tensor, "batch tokens"]:
    """Tells which positions of each prompt's embedding are its words: not the start token, nor the end and what pads.

    The result is on the policy's device; positions behind the text encoder's last are cut off, as in `encode`.
    """
    words = torch.zeros(len(prompts), policy.prompts.room, dtype=torch.bool)
    for row, prompt in zip(words, prompts, strict=True):
        row[1 : len(policy.prompts.read(prompt)) - 1] = True
    return words.to(policy.device)


def concept_map(
    record: Mapping[str, CrossAttention],
    words: Bool[Tensor, "batch tokens"],
    *,
    height: int,
    width: int,
    side: int = 16,
) -> Float[Tensor, "batch h w"]:
    """Returns where a picture attends to some words, from 0 to 1: the mean over words, heads and layers, stretched.

    Only layers of one size count: the smallest with at least `side` x `side` pixels, or the largest where all are
    smaller. Each sample is stretched so that its lowest pixel is 0 and its highest 1; a flat one is 0 everywhere.

    Args:
        record: From `recorded_attention`.
        words: From `words_of`; at least one in each row.
        height: Of the latents, as the width.
        width: Of the latents.
        side: 16 is a quarter of the latents' side for SD v1 at 512 px.

    Raises:
        ValueError: Nothing was recorded, or a row has no words.
    """
    if not record:
        raise ValueError("the record must hold a call of the UNet, got none; a compiled UNet records nothing")
    if not words.any(dim=1).all():
        raise ValueError("every prompt must have words to look for, and one has none")
    sizes = {attention.queries.shape[2] for attention in record.values()}
    count = min((size for size in sizes if size >= side**2), default=max(sizes))
    share = words / words.sum(dim=1, keepdim=True)
    found = []
    for attention in record.values():
        if attention.queries.shape[2] == count:
            probabilities = attention.probabilities()
            with torch.autocast(probabilities.device.type, enabled=False):
                found.append(torch.einsum("bhpt,bt->bhp", probabilities, share.to(probabilities)).mean(dim=1))
    mean = torch.stack(found).mean(dim=0)
    low, high = mean.amin(dim=1, keepdim=True), mean.amax(dim=1, keepdim=True)
    stretched = (mean - low) / (high - low).clamp_min(torch.finfo(mean.dtype).tiny)
    return stretched.unflatten(1, layer_shape(count, height, width))


def layer_shape(pixels: int, height: int, width: int) -> tuple[int, int]:
    """Returns height and width of a layer's picture from its number of pixels and the size of the latents.

    Raises:
        ValueError: Halving the latents' sides, rounding up, never gives that number.
    """
    high, wide = height, width
    while high * wide > pixels:
        high, wide = (high + 1) // 2, (wide + 1) // 2
    if high * wide != pixels:
        raise ValueError(f"a layer must have the latents' {height} x {width} pixels halved some times, got {pixels}")
    return high, wide
