"""Stable Diffusion XL: two text encoders, a UNet that also reads the whole text and sizes, diffusion."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from overpaint.policy.autoencoder import scale_factor
from overpaint.policy.conditioning import Conditioning
from overpaint.policy.flow import Chain
from overpaint.policy.parts import Pipeline
from overpaint.policy.process import Process
from overpaint.policy.types import Latents
from overpaint.policy.weights import ATTENTION

from .family import Family, TextPart, inner_states
from .unets import TEXT_MAPS, check_diffusion, check_reads, diffusion


class StableDiffusionXL(Family):
    """Stable Diffusion XL without refiner (Podell et al. 2023, https://arxiv.org/abs/2307.01952).

    Where a conditioning has no sizes, the network is told those of its image, uncropped, as diffusers' pipeline does.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
    network: ClassVar[Literal["unet", "transformer"]] = "unet"
    classes: ClassVar[Mapping[str, str]] = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    }
    first_weight: ClassVar[str] = "conv_in.weight"
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    text_maps: ClassVar[Mapping[TextPart, tuple[str, ...]]] = TEXT_MAPS

    def __init__(self, pipeline: Pipeline, max_sequence_length: int | None = None) -> None:
        super().__init__(pipeline, max_sequence_length)
        parts: Any = pipeline
        self.zeros_for_empty = bool(parts.config.get("force_zeros_for_empty_prompt", True))

    @staticmethod
    def check_network(config: Mapping[str, Any]) -> None:
        """See `Family`; a latent consistency model reads more, and a refiner other sizes."""
        kind = config.get("addition_embed_type")
        if kind != "text_time":
            raise ValueError(f"the UNet must read pooled text and sizes, addition_embed_type text_time, got {kind!r}")
        check_reads(config, {})

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        """See `Family`."""
        check_diffusion(scheduler)

    def process(self, chain: Chain | None = None) -> Process:
        """See `Family`."""
        return diffusion(self.scheduler, chain)

    def encode(self, text: str) -> Conditioning:
        """See `Family`; the text as a whole is the second encoder's."""
        tokens, whole = inner_states(self.encoders, self.tokenizers, text)
        return Conditioning((text,), tokens, pooled=whole[-1])

    def away(self, empty: Conditioning) -> Conditioning:
        """See `Family`; zeros where the checkpoint was trained with them."""
        if not self.zeros_for_empty:
            return empty
        assert empty.pooled is not None, "this family's texts have it"
        return replace(empty, tokens=torch.zeros_like(empty.tokens), pooled=torch.zeros_like(empty.pooled))

    def call(
        self,
        network: Any,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        dtype: torch.dtype,
    ) -> Latents:
        """See `Family`."""
        assert conditioning.pooled is not None, "this family's texts have it"
        sizes = self._sizes_of(latents) if conditioning.sizes is None else conditioning.sizes
        return network(
            latents.to(dtype),
            timesteps,
            encoder_hidden_states=conditioning.tokens.to(dtype),
            added_cond_kwargs={"text_embeds": conditioning.pooled.to(dtype), "time_ids": sizes.to(dtype)},
            return_dict=False,
        )[0]

    def options(self) -> dict[str, Any]:
        """See `Family`."""
        return {"force_zeros_for_empty_prompt": self.zeros_for_empty, "add_watermarker": False}

    def _sizes_of(self, latents: Latents) -> Float[Tensor, "batch 6"]:
        height, width = (side * scale_factor(self.vae) for side in latents.shape[-2:])
        return latents.new_tensor([height, width, 0, 0, height, width]).expand(len(latents), 6)
