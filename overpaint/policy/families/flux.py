"""FLUX.1: a CLIP and a T5, a transformer of packed latents that may read the scale of guidance, rectified flow."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from overpaint.policy.conditioning import Conditioning
from overpaint.policy.flow import Chain
from overpaint.policy.guidance import ClassifierFree, Embedded, Guidance, TrueGuidance
from overpaint.policy.process import Process, RectifiedFlow
from overpaint.policy.types import Latents

from .family import Family, TextPart, read
from .transformers import ATTENTION, check_flow


class Flux(Family):
    """FLUX.1 dev and schnell (Black Forest Labs 2024, https://github.com/black-forest-labs/flux).

    Latents are packed inside the call alone: [batch, 16, h, w] is [batch, (h / 2) (w / 2), 64] there, with the channel
    slowest within a token.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline")
    network: ClassVar[Literal["unet", "transformer"]] = "transformer"
    classes: ClassVar[Mapping[str, str]] = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    first_weight: ClassVar[str] = "x_embedder.weight"
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION
    text_maps: ClassVar[Mapping[TextPart, tuple[str, ...]]] = MappingProxyType(
        {"tokens": ("context_embedder.weight",), "pooled": ("text_embedder.linear_1.weight",)}
    )
    negative_prompts: ClassVar[bool] = False
    text_length: ClassVar[int | None] = 512

    @staticmethod
    def check_network(config: Mapping[str, Any]) -> None:
        """See `Family`; those of filling and of depth read more channels than they give."""
        channels, given = config.get("in_channels", 64), config.get("out_channels") or 64
        if channels != given:
            raise ValueError(
                f"the transformer must take {given} channels of packed latents and nothing else, got {channels}"
            )

    @staticmethod
    def check_scheduler(scheduler: Any) -> None:
        """See `Family`."""
        check_flow(scheduler)

    @property
    def sample_size(self) -> int:
        """See `Family`; no checkpoint says it, and 1024 pixels is what diffusers' pipeline draws."""
        return 128

    @property
    def reader(self) -> tuple[Any, Any]:
        """See `Family`; the T5, since CLIP's tokens are not read one by one."""
        return self.encoders[1], self.tokenizers[1]

    @property
    def patch(self) -> int:
        """See `Family`; the square that is packed."""
        return 2

    @property
    def room(self) -> int:
        """See `Family`."""
        assert self.max_sequence_length is not None, "the family has a length"
        return self.max_sequence_length

    def process(self, chain: Chain | None = None) -> Process:
        """See `Family`."""
        return RectifiedFlow(self.scheduler.config, chain=chain or "sde", patch=self.patch, even=True)

    def encode(self, text: str) -> Conditioning:
        """See `Family`; the scale of an embedded guidance is 1 where no guidance is asked for."""
        assert self.max_sequence_length is not None, "the family has a length"
        tokens = read(self.encoders[1], self.tokenizers[1], text, self.max_sequence_length)[0]
        pooled = read(self.encoders[0], self.tokenizers[0], text, self.tokenizers[0].model_max_length).pooler_output
        guidance = torch.ones(1, device=tokens.device) if self.guidance_embeds else None
        return Conditioning((text,), tokens, pooled=pooled.to(tokens.device), guidance=guidance)

    def guided(self, guidance: ClassifierFree) -> Guidance:
        """See `Family`; the network reads the scale, and there is one branch."""
        if isinstance(guidance, TrueGuidance):
            return guidance
        if guidance.negative is not None:
            raise ValueError(
                "guidance must have no negative prompt for a model with one branch, got one; pass "
                f"TrueGuidance({guidance.scale}, negative)"
            )
        if self.guidance_embeds:
            return Embedded(guidance.scale)
        if guidance.scale != 1:
            raise ValueError(
                f"guidance_scale must be 1 for a model without guidance embedding, got {guidance.scale}; pass "
                f"TrueGuidance({guidance.scale})"
            )
        return guidance

    @property
    def guidance_embeds(self) -> bool:
        """Whether the network reads the scale of guidance, as dev does and schnell does not."""
        return bool(self.model.config["guidance_embeds"])

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
        tokens = conditioning.tokens.to(dtype)
        velocity = network(
            hidden_states=packed(latents.to(dtype)),
            timestep=timesteps / 1000,
            guidance=conditioning.guidance,
            pooled_projections=conditioning.pooled.to(dtype),
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=tokens.device),
            img_ids=places(latents),
            return_dict=False,
        )[0]
        return unpacked(velocity, latents.shape)


def packed(latents: Latents) -> Float[Tensor, "batch tokens dim"]:
    """Returns each square of two by two latents as one token."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpacked(tokens: Float[Tensor, "batch tokens dim"], shape: torch.Size) -> Latents:
    """Returns the latents of a shape that were `packed`."""
    batch, channels, height, width = shape
    squares = tokens.view(batch, height // 2, width // 2, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def places(latents: Latents) -> Float[Tensor, "tokens 3"]:
    """Returns where each token lies: 0, row, column."""
    rows, columns = (torch.arange(side // 2, device=latents.device) for side in latents.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).view(-1, 3).float()
