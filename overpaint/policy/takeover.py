"""Taking over a pipeline in memory: what its names and configuration do not show is undone, or refused in words.

What is undone draws the same picture without it: compiled wrappers, fused projections. What is refused would make the
policy draw another picture than the pipeline, or train weights that change none: adapters, FreeU, offloading, caches
and layers of other libraries, a scheduler that clips.
"""

from typing import Any

from torch import nn

from .added import is_added
from .families import Family, family_named, supported
from .parts import Pipeline

PROCESSORS = (
    *("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor"),
    *("JointAttnProcessor2_0", "FluxAttnProcessor"),
)
"""diffusers' ways of computing the one attention, equal up to rounding."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Whose layers the networks are made of."""

TITLES = {
    "unet": "UNet",
    "transformer": "transformer",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
}
"""What errors call the networks of a pipeline."""

FREEU = ("s1", "s2", "b1", "b2")
"""What `enable_freeu` sets on the blocks on the way up."""


def take_over(pipeline: Pipeline, max_sequence_length: int | None = None) -> Family:
    """Returns the parts of a pipeline, plain, and the family that they are of.

    Args:
        pipeline: Compiled wrappers are taken off its networks, and fused projections are parted again, in place.
        max_sequence_length: See `Family`.

    Raises:
        ValueError: The pipeline is of no known family, or carries what a policy would draw or train without.
    """
    family = family_named(name := type(pipeline).__name__)
    if family is None:
        raise ValueError(f"the pipeline must be one of {supported()}, got a {name}")
    holder: Any = pipeline
    for part, kind in family.classes.items():
        network = getattr(holder, part)
        if network is None and part in family.optional():
            continue
        plain = plain_network(network)
        if plain is not network:
            setattr(holder, part, plain)
        title = TITLES[part]
        if kind not in [base.__name__ for base in type(plain).__mro__]:
            raise ValueError(f"the {title} must be a {kind}, got a {type(plain).__name__}")
        _check_network(title, plain)
    family.check_network(getattr(holder, family.network).config)
    family.check_scheduler(holder.scheduler)
    for block in getattr(getattr(holder, family.network), "up_blocks", ()):
        if any(getattr(block, factor, None) is not None for factor in FREEU):
            raise ValueError("the UNet must be without FreeU, which no saved model holds; disable_freeu() first")
    if getattr(pipeline, "_clip_skip", None):  # an argument of the pipeline's last call
        raise ValueError(
            f"the pipeline must have been called without clip_skip, got {pipeline._clip_skip}: a policy reads the text "
            "encoder to its last layer; leave layers out of text_encoder.encoder.layers instead"
        )
    return family(pipeline, max_sequence_length)


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
