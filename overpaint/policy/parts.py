"""Names for the parts of a pipeline: their classes to a type checker, plain modules at run time.

diffusers and transformers take seconds to import; whoever only needs the arithmetic does not wait for them.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as VAE
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel as UNet
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline as Pipeline
    from transformers import CLIPTextModel as TextEncoder
    from transformers import CLIPTokenizer as Tokenizer
else:
    UNet = VAE = TextEncoder = nn.Module
    Tokenizer = Pipeline = Any


__all__ = ["VAE", "Pipeline", "TextEncoder", "Tokenizer", "UNet", "network_of"]


def network_of(holder: object) -> nn.Module:
    """Returns the denoising network of a pipeline or of a policy: its UNet or its transformer."""
    name = next(name for name in ("model", "unet", "transformer") if hasattr(holder, name))
    network: nn.Module = getattr(holder, name)
    return network
