"""Every family of models with random weights, at its full size or small: speed does not depend on what the weights say.

Nothing is downloaded. Vocabularies are those of the tiny world, which changes the number of known words and not of
computed tokens. What is left out at full size is said beside each function.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch

from benchmarks.random_rewards import TEXT_L
from overpaint.policy.families import Flux, StableDiffusion3, StableDiffusionXL
from overpaint.policy.families.family import build
from overpaint.policy.families.sd import stable_diffusion_of
from overpaint.policy.parts import Pipeline
from overpaint.tinyworld import components

FamilyName = Literal["sd", "sdxl", "sd3", "flux"]

TEXT_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}
SMALL_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL_VAE: dict[str, Any] = {"block_out_channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}
FULL_VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}


def stable_diffusion(device: torch.device, *, tiny: bool) -> Pipeline:
    """Builds the pipeline of Stable Diffusion v1.4's sizes, or the tiny world's."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet: Any
    with device:
        if tiny:
            tokenizer = components.build_tokenizer()
            vae, unet = components.build_vae(), components.build_unet()
            text_encoder = components.build_text_encoder(tokenizer)
        else:
            tokenizer = _clip_tokenizer()
            unet = UNet2DConditionModel(
                sample_size=64,
                block_out_channels=(320, 640, 1280, 1280),
                cross_attention_dim=768,
                attention_head_dim=8,
            )
            vae = _vae(FULL_VAE, channels=4, sample_size=512, scaling_factor=0.18215)
            text_encoder = CLIPTextModel(_clip_config(tokenizer, TEXT_L))
    return stable_diffusion_of(unet, vae, text_encoder, tokenizer, components.scheduler())


def sdxl(device: torch.device, *, tiny: bool) -> Pipeline:
    """Builds the pipeline of Stable Diffusion XL's sizes, or a small one with every kind of layer."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    texts = (SMALL_TEXT, SMALL_TEXT) if tiny else (TEXT_L, TEXT_BIG_G)
    pooled = texts[1]["hidden_size"]
    sizes: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "addition_time_embed_dim": 256,
    }
    if tiny:
        sizes = {
            "sample_size": 8,
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 4),
            "addition_time_embed_dim": 8,
            "norm_num_groups": 16,
        }
    with device:
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=sum(text["hidden_size"] for text in texts),
            addition_embed_type="text_time",
            projection_class_embeddings_input_dim=pooled + 6 * sizes["addition_time_embed_dim"],
            use_linear_projection=True,
            **sizes,
        )
        vae = _vae(SMALL_VAE if tiny else FULL_VAE, channels=4, sample_size=1024, scaling_factor=0.13025)
        first = CLIPTextModel(_clip_config(tokenizer, texts[0]))
        second = CLIPTextModelWithProjection(_clip_config(tokenizer, texts[1], projection_dim=pooled))
    scheduler = EulerDiscreteScheduler.from_config(
        {**components.scheduler().config, "timestep_spacing": "leading", "clip_sample": False}
    )
    networks: dict[str, Any] = {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second}
    options = {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    return build(StableDiffusionXL, networks, [tokenizer, tokenizer], scheduler, options)


def sd3(device: torch.device, *, tiny: bool) -> Pipeline:
    """Builds the pipeline of Stable Diffusion 3.5 medium's sizes without its T5, or a small one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    tokenizer = _clip_tokenizer()
    texts = (SMALL_TEXT, SMALL_TEXT) if tiny else (TEXT_L, TEXT_BIG_G)
    pooled = sum(text["hidden_size"] for text in texts)
    sizes: dict[str, Any] = {
        "sample_size": 128,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "dual_attention_layers": tuple(range(13)),
        "pos_embed_max_size": 384,
    }
    if tiny:
        sizes = {
            "sample_size": 8,
            "num_layers": 3,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "joint_attention_dim": pooled,
            "caption_projection_dim": 64,
            "dual_attention_layers": (0,),
            "pos_embed_max_size": 16,
        }
    with device:
        transformer = SD3Transformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            pooled_projection_dim=pooled,
            qk_norm="rms_norm",
            **sizes,
        )
        vae = _vae(SMALL_VAE if tiny else FULL_VAE, channels=16, sample_size=1024, scaling_factor=1.5305, shift=0.0609)
        encoders = [
            CLIPTextModelWithProjection(_clip_config(tokenizer, text, projection_dim=text["hidden_size"]))
            for text in texts
        ]
    networks: dict[str, Any] = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
    }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return build(StableDiffusion3, networks, [tokenizer, tokenizer, None], scheduler, {})


def flux(device: torch.device, *, tiny: bool) -> Pipeline:
    """Builds the pipeline of FLUX.1 dev's sizes, with a T5 of the full width and one layer, or a small one."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5Tokenizer

    tokenizer, words = _clip_tokenizer(), sorted(set(components.WORDS))
    t5_tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)], extra_ids=0
    )
    text, width = (SMALL_TEXT, 64) if tiny else (TEXT_L, 4096)
    sizes: dict[str, Any] = {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
    }
    if tiny:
        sizes = {
            "num_layers": 2,
            "num_single_layers": 2,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        }
    with device:
        transformer = FluxTransformer2DModel(
            in_channels=64,
            joint_attention_dim=width,
            pooled_projection_dim=text["hidden_size"],
            guidance_embeds=True,
            **sizes,
        )
        vae = _vae(SMALL_VAE if tiny else FULL_VAE, channels=16, sample_size=1024, scaling_factor=0.3611, shift=0.1159)
        clip = CLIPTextModel(_clip_config(tokenizer, text))
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer), d_model=width, d_kv=64, num_heads=width // 64, num_layers=1,
                d_ff=2 * width, feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096
    )
    networks: dict[str, Any] = {"transformer": transformer, "vae": vae, "text_encoder": clip, "text_encoder_2": t5}
    return build(Flux, networks, [tokenizer, t5_tokenizer], scheduler, {})


BUILDERS: Mapping[FamilyName, Callable[..., Pipeline]] = MappingProxyType(
    {"sd": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "flux": flux}
)
"""What builds the pipeline of each family on a device, `tiny` or not."""


def _clip_tokenizer() -> Any:
    tokenizer = components.build_tokenizer()
    tokenizer.model_max_length = 77
    return tokenizer


def _clip_config(tokenizer: Any, sizes: Mapping[str, Any], **options: Any) -> Any:
    from transformers import CLIPTextConfig

    ids: Sequence[str] = ("bos_token_id", "eos_token_id", "pad_token_id")
    return CLIPTextConfig(**sizes, **options, **{name: getattr(tokenizer, name) for name in ids})


def _vae(
    sizes: Mapping[str, Any], *, channels: int, sample_size: int, scaling_factor: float, shift: float | None = None
) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
        shift_factor=shift,
        **sizes,
    )
