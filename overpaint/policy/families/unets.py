"""What the families with a UNet have in common: what it may read, and diffusion's schedulers."""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from overpaint.policy import ddim
from overpaint.policy.ddim import PREDICTION_TYPES
from overpaint.policy.flow import Chain
from overpaint.policy.process import Diffusion

from .family import TextPart

TEXT_MAPS: Mapping[TextPart, tuple[str, ...]] = MappingProxyType({"tokens": ("attn2.to_k.weight", "attn2.to_v.weight")})
"""Keys and values of every cross-attention."""

OTHER_INPUTS = {
    "encoder_hid_dim_type": "an image or another text encoder, as IP-Adapter does",
    "class_embed_type": "a class",
    "num_class_embeds": "a class",
    "time_cond_proj_dim": "the scale of guidance, as latent consistency models do",
}
"""What a UNet may read besides latents, a timestep and a prompt, by the setting that says so."""


def check_reads(config: Mapping[str, Any], others: Mapping[str, str]) -> None:
    """Checks by its configuration that a UNet reads latents of 4 channels, a timestep and a text, and nothing else.

    Args:
        config: Of the UNet.
        others: What else it must not read, by the setting that says so.

    Raises:
        ValueError: It does.
    """
    channels = config.get("in_channels", 4)
    if channels != 4:
        kind = {5: " (of a depth model)", 8: " (of an editing model)", 9: " (of an inpainting model)"}.get(channels, "")
        raise ValueError(f"the UNet must take 4 channels of latents and nothing else, got {channels}{kind}")
    for name, kind in {**others, **OTHER_INPUTS}.items():
        if config.get(name) is not None:
            raise ValueError(f"the UNet must take a prompt and nothing else, got one that reads {kind}: {name}")


def check_diffusion(scheduler: Any) -> None:
    """Checks that a scheduler's noise levels are those of its configuration, and that its steps clip nothing.

    Raises:
        ValueError: They are not, or it predicts something unknown.
    """
    config, name = scheduler.config, type(scheduler).__name__
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise ValueError(f"the scheduler's prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {kind!r}")
    for setting in ("clip_sample", "thresholding"):
        if config.get(setting) and setting in inspect.signature(type(scheduler)).parameters:
            raise ValueError(
                f"the scheduler's {setting} must be False, as a policy's steps clip nothing, got {config[setting]} in "
                f"{name}; set it in scheduler_config.json, or by {name}.from_config(scheduler.config, {setting}=False)"
            )
    levels = getattr(scheduler, "alphas_cumprod", None)
    if levels is None or name.startswith("EDM"):
        raise ValueError(f"the scheduler must have cumulative alphas, as those of Stable Diffusion do, got {name}")
    if not torch.allclose(levels.float().cpu(), ddim.cumulative_alphas(config), rtol=1e-3, atol=1e-5):
        raise ValueError(f"the scheduler's cumulative alphas must be those of its configuration, got others in {name}")


def diffusion(scheduler: Any, chain: Chain | None) -> Diffusion:
    """Returns the process of a checkpoint with a scheduler.

    Raises:
        ValueError: There is a chain, which only a flow has several of.
    """
    if chain is not None:
        raise ValueError(
            f"chain must be left out for a diffusion model, whose steps have one kind of noise, got {chain!r}"
        )
    return Diffusion(scheduler.config)
