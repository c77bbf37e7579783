"""The tiny model's parts, untrained: Stable Diffusion's own classes at a thousandth of the size."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from .caption import WORDS

CONTEXT_LENGTH = 24
"""Tokens of a prompt, start and end included."""

LATENT_SCALE = 0.18215
"""Stable Diffusion v1's latent scaling factor; the tiny autoencoder is whitened so that it holds here too."""


def build_vae():
    """Builds the autoencoder: 64 x 64 pixels to 8 x 8 x 4 latents, a factor of 8 as in Stable Diffusion."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=LATENT_SCALE,
    )


def build_unet(cross_attention_dim: int = 96):
    """Builds the noise predictor, with cross-attention on every level."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 96, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Learns byte-pair merges that make each word one token: the commonest pair first, as long as there is one.

    Source: Sennrich et al. (2016), https://arxiv.org/abs/1508.07909, algorithm 1.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            k = 0
            while k < len(word) - 1:
                if (word[k], word[k + 1]) == best:
                    word[k : k + 2] = ["".join(best)]
                k += 1
    return merges


def build_tokenizer():
    """Builds CLIP's byte-level tokenizer with merges that make every word of the world one token.

    Words of other worlds fall back to bytes, so any prompt can be encoded.
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    merges = learn_merges(WORDS)
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *(first + second for first, second in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    make: Any = CLIPTokenizer  # its annotations know merges as text only
    tokenizer = make(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    tokenizer.model_max_length = CONTEXT_LENGTH
    return tokenizer


def build_text_encoder(tokenizer, width: int = 96):
    """Builds CLIP's text model, two layers deep."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def scheduler():
    """Builds the noise schedule of Stable Diffusion v1.4."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_pipeline(folder: Path, vae, text_encoder, tokenizer, unet) -> None:
    """Saves the parts as a diffusers pipeline in half precision."""
    import torch

    from overpaint.policy.families.sd import stable_diffusion_of
    from overpaint.policy.saving import write_pipeline

    for network in (vae, text_encoder, unet):
        network.to(torch.float16)
    write_pipeline(stable_diffusion_of(unet, vae, text_encoder, tokenizer, scheduler()), folder)


# The same world for a rectified-flow transformer.

FLOW_WIDTH = 192
"""Width of the text that the transformer reads: both text encoders side by side."""


def build_transformer():
    """Builds the velocity predictor: Stable Diffusion 3's transformer, five joint blocks of 128 channels."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=FLOW_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=FLOW_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def projected(text_encoder):
    """Returns a text encoder with a projection of the whole text that changes nothing, as Stable Diffusion 3 wants."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    width = text_encoder.config.hidden_size
    config = CLIPTextConfig(**text_encoder.config.to_dict() | {"projection_dim": width})
    made = CLIPTextModelWithProjection(config)
    made.text_model.load_state_dict(getattr(text_encoder, "text_model", text_encoder).state_dict())
    with torch.no_grad():
        made.text_projection.weight.copy_(torch.eye(width))
    return made


def flow_scheduler():
    """Builds the levels of rectified flow, without a shift, which is for larger pictures."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def save_flow_pipeline(folder: Path, vae, text_encoders, tokenizer, transformer) -> None:
    """Saves the parts as a pipeline of Stable Diffusion 3 without T5, in half precision."""
    import torch

    from overpaint.policy.families import StableDiffusion3
    from overpaint.policy.families.family import build
    from overpaint.policy.saving import write_pipeline

    networks = {
        "vae": vae,
        "transformer": transformer,
        "text_encoder": text_encoders[0],
        "text_encoder_2": text_encoders[1],
    }
    for network in networks.values():
        network.to(torch.float16)
    # Which diffusers' pipeline adds; and where the autoencoder was loaded from is nobody's business.
    vae.register_to_config(shift_factor=0.0, _name_or_path="")
    tokenizers = [tokenizer, tokenizer, None]
    write_pipeline(build(StableDiffusion3, networks, tokenizers, flow_scheduler(), {}), folder)
