"""Every reward at its full size with random weights: time and memory do not depend on what the weights say.

Nothing is downloaded. Vocabularies are short, which changes the number of known words and not of computed tokens:
prompts are padded to the network's length.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rewards import BlipTokenizer, Compressibility, ImageReward, ImageRewardConfig, NudeNet, OpenNSFW, Reward
from rewards.aesthetic import Aesthetic, AestheticHead
from rewards.alignment import Alignment
from rewards.bertscore import BertScore, BertScoreConfig
from rewards.blip import BLIPScore, BLIPScoreConfig
from rewards.clip import CLIPScore
from rewards.clip_encoder import END, START, ClipEncoder, ClipTokenizer
from rewards.hps import VIT_H_14, HPSv2
from rewards.pick import PickScore

ANSWER = "a red circle on a blue square " * 8
"""What the vision-language model is made to say: 56 words; DDPO's server stopped after 64 tokens."""
TEXT_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
TEXT_B = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def clip_sizes(dim: int, text: dict[str, Any], vision: dict[str, Any], **patches: int) -> dict[str, Any]:
    """Returns CLIP's configuration: width of the embeddings, both towers, patches."""
    return {
        "projection_dim": dim,
        "text_config": {**text, "projection_dim": dim},
        "vision_config": {**vision, **patches, "projection_dim": dim},
    }


VIT_L_14 = clip_sizes(768, TEXT_L, VISION_L, patch_size=14)
VIT_B_32 = clip_sizes(512, TEXT_B, VISION_B, patch_size=32)
SMALL_CLIP = clip_sizes(8, SMALL, SMALL, patch_size=8, image_size=16)
DEBERTA_XLARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}
SMALL_BLIP: dict[str, Any] = {
    "image_size": 32, "vision_hidden_size": 16, "vision_layers": 1, "vision_heads": 2, "vision_intermediate_size": 32,
    "hidden_size": 16, "text_layers": 1, "text_heads": 2, "text_intermediate_size": 32,
}  # fmt: skip


class Describer:
    """Stands for a vision-language model, whose cost is its own: it has the same answer to everything."""

    def answer(self, images: Tensor, questions: Sequence[str]) -> list[str]:
        """Returns one sentence for each image."""
        return [ANSWER] * len(images)


def blip_tokenizer() -> BlipTokenizer:
    """Makes a tokenizer of few words."""
    return BlipTokenizer(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(ANSWER.split())))


def clip_encoder(full: Mapping[str, Any], tiny: bool) -> ClipEncoder:
    """Makes CLIP's two towers."""
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {piece: index for index, piece in enumerate([*letters, START, END])}
    return ClipEncoder(SMALL_CLIP if tiny else full, ClipTokenizer(vocabulary, []))


def alignment(tiny: bool) -> Alignment:
    """Makes the text part of the alignment reward; the 40th layer of 48 is read, and the others are not built."""
    from transformers import DebertaConfig, DebertaModel

    layers = 1 if tiny else 40
    sizes: dict[str, Any] = DEBERTA_XLARGE | (SMALL if tiny else {}) | {"num_hidden_layers": layers}
    encoder = DebertaModel(DebertaConfig(**sizes))
    return Alignment(Describer(), BertScore(encoder, blip_tokenizer().bert, BertScoreConfig(layer=layers)))


def aesthetic(tiny: bool) -> Aesthetic:
    """Makes the aesthetic score."""
    encoder = clip_encoder(VIT_L_14, tiny)
    return Aesthetic(encoder, AestheticHead((encoder.dim, 1024, 128, 64, 16, 1)))


BUILDERS: Mapping[str, Callable[[bool], Reward]] = MappingProxyType(
    {
        "image-reward": lambda tiny: ImageReward(ImageRewardConfig(**SMALL_BLIP if tiny else {}), blip_tokenizer()),
        "blip": lambda tiny: BLIPScore(BLIPScoreConfig(**SMALL_BLIP if tiny else {}), blip_tokenizer()),
        "clip-vit-l-14": lambda tiny: CLIPScore(clip_encoder(VIT_L_14, tiny)),
        "clip-vit-b-32": lambda tiny: CLIPScore(clip_encoder(VIT_B_32, tiny)),
        "aesthetic": aesthetic,
        "pick": lambda tiny: PickScore(clip_encoder(VIT_H_14, tiny)),
        "hps": lambda tiny: HPSv2(clip_encoder(VIT_H_14, tiny)),
        "alignment-text": alignment,
        "compressibility": lambda tiny: Compressibility(),
        "nudenet": lambda tiny: NudeNet(),
        "opennsfw": lambda tiny: OpenNSFW(),
    }
)
"""What makes each reward, at its full size or tiny; networks of torch come without memory for their weights."""


def random_reward(name: str, device: torch.device, *, tiny: bool = False) -> Reward:
    """Makes a reward of that name, frozen, with random weights in float32; the detectors have their own.

    The weights are drawn once, into their final place, so that making them costs no more memory than having them.
    """
    with torch.device("meta"):
        reward = BUILDERS[name](tiny)
    if isinstance(reward, nn.Module):
        reward.requires_grad_(False).eval().to_empty(device=device)
        for module in reward.modules():
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=0.02)
            if isinstance(module, nn.LayerNorm):
                module.weight.fill_(1.0)
        for buffer_name, buffer in reward.named_buffers():
            if not buffer_name.endswith("position_ids"):
                raise ValueError(f"buffers must be position_ids, got {buffer_name!r} in {name}")
            buffer.copy_(torch.arange(buffer.shape[1])[None])
    return reward
