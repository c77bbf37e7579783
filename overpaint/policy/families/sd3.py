"""Stable Diffusion 3 and 3.5: two CLIPs and a T5, a transformer of latents of 16 channels, rectified flow."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import pad

from overpaint.policy.conditioning import Conditioning
from overpaint.policy.flow import Chain
from overpaint.policy.process import Process, RectifiedFlow
from overpaint.policy.types import Latents

from .family import Family, inner_states, read
from .transformers import ATTENTION, check_flow


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024, https://arxiv.org/abs/2403.03206); also without its T5."""

    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    network: ClassVar[Literal["unet", "transformer"]] = "transformer"
    classes: ClassVar[Mapping[str, str]] = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
    }
    first_weight: ClassVar[str] = "pos_embed.proj.weight"
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    text_length: ClassVar[int | None] = 256

    @classmethod
    def optional(cls) -> frozenset[str]:
        """See `Family`; without its T5, which is larger than all else, zeros take the place of what it reads."""
        return frozenset({"text_encoder_3", "tokenizer_3"})

    @staticmethod
    def check_network(config: Mapping[str, Any]) -> None:
        """See `Family`; those of inpainting and of control read more channels than they give."""
        channels, given = config.get("in_channels", 16), config.get("out_channels", 16)
        if channels != given:
            raise ValueError(f"the transformer must take {given} channels of latents and nothing else, got {channels}")

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        """See `Family`."""
        check_flow(scheduler)

    @property
    def patch(self) -> int:
        """See `Family`."""
        return int(self.model.config["patch_size"])

    def process(self, chain: Chain | None = None) -> Process:
        """See `Family`."""
        return RectifiedFlow(self.scheduler.config, chain=chain or "sde", patch=self.patch, even=False)

    def encode(self, text: str) -> Conditioning:
        """See `Family`; CLIP's tokens first, filled up with zeros to the width of T5's, and then those."""
        tokens, whole = inner_states(self.encoders[:2], self.tokenizers[:2], text)
        long = self._long(text).to(tokens)
        tokens = torch.cat([pad(tokens, (0, long.shape[-1] - tokens.shape[-1])), long], dim=1)
        return Conditioning((text,), tokens, pooled=torch.cat(whole, dim=-1))

    def _long(self, text: str) -> Float[Tensor, "1 tokens dim"]:
        assert self.max_sequence_length is not None, "the family has a length"
        if self.encoders[2] is None:
            return torch.zeros(1, self.max_sequence_length, self.model.config["joint_attention_dim"])
        return read(self.encoders[2], self.tokenizers[2], text, self.max_sequence_length)[0]

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
        return network(
            hidden_states=latents.to(dtype),
            timestep=timesteps,
            encoder_hidden_states=conditioning.tokens.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            return_dict=False,
        )[0]
