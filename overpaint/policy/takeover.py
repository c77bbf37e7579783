"""Taking over a pipeline in memory: what its names and configuration do not show is undone, or refused in words.

What is undone draws the same picture without it: compiled wrappers, fused projections. What is refused would make the
policy draw another picture than the pipeline, or train weights that change none: adapters, FreeU, offloading, caches
and layers of other libraries, a scheduler that clips.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import ddim
from .added import is_added
from .ddim import PREDICTION_TYPES
from .parts import VAE, Pipeline, TextEncoder, Tokenizer, UNet

PIPELINE_CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionPipelineSafe",
)
"""Pipelines around the same five parts: text-to-image, and others that differ in how they sample."""

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""diffusers' ways of computing the one attention, equal up to rounding."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Whose layers the networks are made of."""

FREEU = ("s1", "s2", "b1", "b2")
"""What `enable_freeu` sets on the blocks on the way up."""


class Parts(NamedTuple):
    """The five parts of a Stable Diffusion."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    scheduler: Any


def take_over(pipeline: Pipeline) -> Parts:
    """Returns the parts of a pipeline, plain.

    Args:
        pipeline: Compiled wrappers are taken off its networks, and fused projections are parted again, in place.

    Raises:
        ValueError: The pipeline is no Stable Diffusion, or carries what a policy would draw or train without.
    """
    name = type(pipeline).__name__
    if name not in PIPELINE_CLASSES:
        raise ValueError(f"the pipeline must be a {PIPELINE_CLASSES[0]}, got a {name}")
    unet, vae, text_encoder = (plain_network(part) for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder))
    expected = {"UNet": (unet, "UNet2DConditionModel"), "VAE": (vae, "AutoencoderKL")}
    for part, (network, kind) in (expected | {"text encoder": (text_encoder, "CLIPTextModel")}).items():
        if kind not in [base.__name__ for base in type(network).__mro__]:
            raise ValueError(f"the {part} must be a {kind}, got a {type(network).__name__}")
        _check_network(part, network)
    check_unet(unet.config)
    check_scheduler(pipeline.scheduler)
    for block in unet.up_blocks:
        if any(getattr(block, factor, None) is not None for factor in FREEU):
            raise ValueError("the UNet must be without FreeU, which no saved model holds; disable_freeu() first")
    if getattr(pipeline, "_clip_skip", None):  # an argument of the pipeline's last call
        raise ValueError(
            f"the pipeline must have been called without clip_skip, got {pipeline._clip_skip}: a policy reads the text "
            "encoder to its last layer; leave layers out of text_encoder.encoder.layers instead"
        )
    return Parts(unet, vae, text_encoder, pipeline.tokenizer, pipeline.scheduler)


def plain_network(network: Any) -> Any:
    """Returns a network without compiled wrappers, its own or its layers', and without fused projections."""
    from torch._dynamo.eval_frame import OptimizedModule

    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, OptimizedModule):
                setattr(module, name, child._orig_mod)
    if any(type(module.processor).__name__ == "FusedAttnProcessor2_0" for module in _attentions(network)):
        network.unfuse_qkv_projections()
    for module in _attentions(network):
        for leftover in ("to_qkv", "to_kv"):  # diffusers leaves the copies of the weights behind
            if leftover in module._modules:
                delattr(module, leftover)
                module.fused_projections = False
    return network


def check_unet(config: Mapping[str, Any]) -> None:
    """Checks by its configuration that a UNet reads latents, a timestep and a prompt, and nothing else.

    Raises:
        ValueError: It reads more, as those of inpainting, of SDXL and of latent consistency do.
    """
    channels = config.get("in_channels", 4)
    if channels != 4:
        kind = {5: " (of a depth model)", 8: " (of an editing model)", 9: " (of an inpainting model)"}.get(channels, "")
        raise ValueError(f"the UNet must take 4 channels of latents and nothing else, got {channels}{kind}")
    for name, kind in (
        ("addition_embed_type", "SDXL's pooled text and sizes"),
        ("encoder_hid_dim_type", "an image or another text encoder, as IP-Adapter does"),
        ("class_embed_type", "a class"),
        ("num_class_embeds", "a class"),
        ("time_cond_proj_dim", "the scale of guidance, as latent consistency models do"),
    ):
        if config.get(name) is not None:
            raise ValueError(f"the UNet must take a prompt and nothing else, got one that reads {kind}: {name}")


def check_scheduler(scheduler: Any) -> None:
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
    if levels is None:
        raise ValueError(f"the scheduler must have cumulative alphas, as those of Stable Diffusion do, got {name}")
    if not torch.allclose(levels.float().cpu(), ddim.cumulative_alphas(config), rtol=1e-3, atol=1e-5):
        raise ValueError(f"the scheduler's cumulative alphas must be those of its configuration, got others in {name}")


def _check_network(part: str, network: nn.Module) -> None:
    """Checks that a network is what its class and configuration say."""
    for name, module in network.named_modules():
        if not is_added(f"{name}."):
            _check_layer(f"the {part}'s layer {name!r}" if name else f"the {part}", module)
    for module in _attentions(network):
        kind = type(module.processor).__name__
        if kind not in PROCESSORS:
            raise ValueError(
                f"the {part}'s attention must be diffusers' own, got {kind}; set_default_attn_processor() first"
            )
    for name, parameter in network.named_parameters():
        if parameter.is_meta or parameter.is_inference():
            where = "on the device meta" if parameter.is_meta else "made under torch.inference_mode()"
            raise ValueError(f"the {part}'s weights must be in memory and trainable, got {name!r} {where}")


def _check_layer(name: str, layer: nn.Module) -> None:
    """Checks that a layer is of a known library, and computes as its class does."""
    library = type(layer).__module__.split(".")[0]
    if library == "peft":
        raise ValueError(f"{name} must carry no adapter, got a LoRA; fuse_lora() and unload_lora_weights() first")
    if library not in LIBRARIES:
        raise ValueError(f"{name} must be of {' or '.join(LIBRARIES)}, got a {library}.{type(layer).__name__}")
    if "forward" in vars(layer):
        raise ValueError(
            f"{name} must compute as its class does, got a forward of its own, as offloading, caches and autocast put "
            "there; remove_all_hooks() first, or hand the pipeline over before"
        )
    for hook in (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()):
        source = str(getattr(hook, "__module__", ""))
        if not source.startswith(("transformers.", f"{__package__}.")):
            raise ValueError(f"{name} must compute as its class does, got a hook of {source or type(hook).__name__}")


def _attentions(network: nn.Module) -> list[Any]:
    """Returns the layers that have one of diffusers' attention processors."""
    return [module for module in network.modules() if hasattr(module, "processor")]
