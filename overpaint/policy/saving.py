"""LoRAs and whole pipelines, in the formats of diffusers."""

import json
from pathlib import Path
from typing import Any

import torch

from .added import add_networks, added_networks
from .parts import VAE, Pipeline, TextEncoder, Tokenizer, UNet
from .weights import ADAPTER, merged_state

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "unet."


def save_lora(unet: UNet, folder: str | Path) -> None:
    """Writes the UNet's LoRA so that `StableDiffusionPipeline.load_lora_weights(folder)` takes it.

    Rank, alpha and targets go into the file's header, as diffusers writes and reads them.
    """
    import peft
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet, adapter_name=ADAPTER))
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name: tensor.cpu().contiguous() for name, tensor in layers.items()},
        unet_lora_adapter_metadata=_settings(unet),
    )


def load_lora(unet: UNet, folder: str | Path) -> None:
    """Reads what `save_lora` wrote into the UNet's LoRA.

    Raises:
        ValueError: There is no such file, or its LoRA is of other settings or layers; nothing is changed then.
    """
    import peft
    from diffusers.utils import convert_unet_state_dict_to_peft
    from safetensors import safe_open

    file = Path(folder) / LORA_FILE
    if not file.is_file():
        raise ValueError(f"a LoRA's folder must hold {LORA_FILE}, and {folder} does not")
    with safe_open(file, framework="pt") as opened:
        header = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        saved = {name.removeprefix(PREFIX): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    settings = _settings(unet)
    for name in ("r", "lora_alpha"):
        if header.get(PREFIX + name) != settings[name]:
            raise ValueError(f"the LoRA must have {name}={settings[name]}, and {file} has {header.get(PREFIX + name)}")
    state = convert_unet_state_dict_to_peft(saved)
    expected = peft.get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    differing = sorted(state.keys() ^ expected.keys())
    if differing:
        raise ValueError(f"the LoRA must be on the same layers as the policy's, {file} differs in {differing[:3]}")
    peft.set_peft_model_state_dict(unet, state, adapter_name=ADAPTER)
    torch.clear_autocast_cache()


def plain_pipeline(
    unet: UNet,
    vae: VAE,
    text_encoder: TextEncoder,
    tokenizer: Tokenizer,
    scheduler: Any,
) -> Pipeline:
    """Returns a pipeline around the parts, whose UNet is plain: any LoRA is added in, any wrapper left behind.

    Networks that were added to the UNet are added to the plain one too.
    """
    import diffusers

    with torch.device("meta"):
        plain: Any = type(unet).from_config(unet.config)
    plain.load_state_dict(merged_state(unet), assign=True)
    add_networks(plain, added_networks(unet))
    plain.requires_grad_(False).eval()
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


def _settings(unet: UNet) -> dict[str, Any]:
    """Returns peft's settings of the LoRA as JSON can hold them."""
    settings = unet.peft_config[ADAPTER].to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
