"""Stable Diffusion v1 and v2: one text encoder, a UNet of latents of 4 channels, diffusion."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from overpaint.policy.conditioning import Conditioning
from overpaint.policy.flow import Chain
from overpaint.policy.parts import Pipeline
from overpaint.policy.process import Process
from overpaint.policy.types import Latents
from overpaint.policy.weights import ATTENTION

from .family import Family, TextPart, build
from .unets import TEXT_MAPS, check_diffusion, check_reads, diffusion

NO_SAFETY_CHECKER: Mapping[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
"""What diffusers is given instead of one."""


class StableDiffusion(Family):
    """Stable Diffusion v1 and v2 (Rombach et al. 2022, https://arxiv.org/abs/2112.10752), and what was made of them."""

    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionPipelineSafe",
    )
    network: ClassVar[Literal["unet", "transformer"]] = "unet"
    classes: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    }
    first_weight: ClassVar[str] = "conv_in.weight"
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    text_maps: ClassVar[Mapping[TextPart, tuple[str, ...]]] = TEXT_MAPS

    @staticmethod
    def check_network(config: Mapping[str, Any]) -> None:
        """See `Family`; those of inpainting, of SDXL and of latent consistency read more."""
        check_reads(config, {"addition_embed_type": "SDXL's pooled text and sizes"})

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        """See `Family`."""
        check_diffusion(scheduler)

    def vae_precision(self, dtype: torch.dtype | None) -> torch.dtype | None:
        """See `Family`; the same as all others: the VAE works in float16, whatever its settings say."""
        return dtype

    def process(self, chain: Chain | None = None) -> Process:
        """See `Family`."""
        return diffusion(self.scheduler, chain)

    def call(
        self,
        network: Any,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        dtype: torch.dtype,
    ) -> Latents:
        """See `Family`."""
        tokens = conditioning.tokens.to(dtype)
        return network(latents.to(dtype), timesteps, encoder_hidden_states=tokens, return_dict=False)[0]

    def options(self) -> dict[str, Any]:
        """See `Family`; without safety checker."""
        return dict(NO_SAFETY_CHECKER)


def stable_diffusion_of(
    unet: nn.Module, vae: nn.Module, text_encoder: nn.Module, tokenizer: Any, scheduler: Any
) -> Pipeline:
    """Returns a pipeline of the five parts of a Stable Diffusion v1 or v2."""
    networks = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return build(StableDiffusion, networks, [tokenizer], scheduler, NO_SAFETY_CHECKER)
