"""Names of the tensors that travel between packages."""

from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "batch channels h w"]
"""Latent images, scaled as the network sees them. Always float32, whatever the networks run in."""

Images = Float[Tensor, "batch 3 H W"]
"""RGB in [0, 1]."""

PerSample = Float[Tensor, " batch"]
"""One number for each sample."""

Embeddings = Float[Tensor, "batch tokens dim"]
"""Prompts as the UNet's cross-attention reads them."""
