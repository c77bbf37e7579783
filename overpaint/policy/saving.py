"""Whole pipelines, in diffusers' layout and readable by others: older transformers, and a plain `from_pretrained`."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from .added import add_networks, added_networks
from .guidance import SamplingGuard
from .loading import without_bars
from .parts import VAE, Pipeline, TextEncoder, Tokenizer, UNet
from .weights import merged_state


def plain_pipeline(
    unet: UNet,
    vae: VAE,
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    scheduler: Any,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """Returns a pipeline around the parts, whose UNet is plain: any LoRA is added in, any wrapper left behind.

    Networks that were added to the UNet are added to the plain one too.

    Args:
        unet: With a LoRA or without.
        vae: The image decoder.
        text_encoder: Of the prompts.
        tokenizer: Of the text encoder.
        scheduler: A new one of its configuration is made.
        dtype: Precision of all networks, which are copies then; None leaves each as it is.
    """
    import diffusers

    with torch.device("meta"):
        plain: Any = type(unet).from_config(unet.config)
    plain.load_state_dict(merged_state(unet, dtype), assign=True)
    add_networks(plain, added_networks(unet))
    plain.requires_grad_(False).eval()
    if dtype is not None:
        vae, text_encoder = copy.deepcopy(vae).to(dtype=dtype), copy.deepcopy(text_encoder).to(dtype=dtype)
    make: Any = diffusers.StableDiffusionPipeline  # its annotations do not know that parts may be None
    return make(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=plain,
        scheduler=type(scheduler).from_config(scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def check_plain(unet: UNet, guard: SamplingGuard | None) -> None:
    """Checks that a pipeline's folder can hold all that a policy draws with.

    Raises:
        ValueError: There is a guard, or networks were added to the UNet.
    """
    for name, found in (("networks added to the UNet", added_networks(unet)), ("a guard", guard)):
        if found:
            raise ValueError(f"a pipeline's folder cannot hold {name}, and the policy has {found!r}")


def write_pipeline(pipeline: Pipeline, folder: str | Path) -> None:
    """Saves a pipeline so that it draws after a plain `from_pretrained(folder)`, also with transformers 4.

    That call loads UNet and VAE as float32 whatever the files hold, and the text encoder in the precision that its
    config.json says: it says float32, and only the weights are as small as they were. transformers 4 reads CLIP's
    tokenizer from vocab.json and merges.txt, and its text encoder by names that begin with `text_model.`, without
    which it would draw from random weights.
    """
    from safetensors.torch import load_file, save_file

    folder = Path(folder)
    with without_bars():
        pipeline.save_pretrained(folder)
    encoder = folder / "text_encoder"
    config = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    (encoder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    tensors = load_file(encoder / "model.safetensors")
    if not any(name.startswith("text_model.") for name in tensors):
        named = {f"text_model.{name}": value for name, value in tensors.items()}
        save_file(named, encoder / "model.safetensors", metadata={"format": "pt"})
    tokenizer: Any = pipeline.tokenizer
    tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    added = {token: index for token, index in tokenizer.get_added_vocab().items() if token not in vocabulary}
    if added:
        (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")
