"""What the names of a file's tensors tell: what wrappers put before them, and which kind of model they are of."""

import re
from collections.abc import Iterable, Mapping

LDM_UNET, LDM_TEXT_ENCODER, LDM_VAE = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
"""What the names of each network begin with in a whole checkpoint of the original Stable Diffusion."""

WRAPPERS = ("unet.", "module.", "_orig_mod.", "base_model.model.")
"""What wrappers put before a name: pipelines, data parallelism, torch.compile, peft."""

LORA = r"(^|[._])lora([._]|$)|dora_scale|hada_w|lokr_w"

AN_SDXL = "an SDXL"

FOREIGN = {
    "a LoRA": LORA,
    "a textual inversion": r"^emb_params$|^string_to_param\b",
    "a ControlNet": r"^control_model\.|^controlnet_\w+\.|input_hint_block\.",
    AN_SDXL: r"add_embedding\.|label_emb\.|\.\d+\.transformer_blocks\.[2-9]\.|^conditioner\.|^text_encoder_2\b",
    "a Stable Diffusion 3": r"joint_blocks\.",
    "a FLUX": r"double_blocks\.|single_blocks\.|(^|transformer\.)(single_)?transformer_blocks\.\d+\.",
}
"""Kinds that are no Stable Diffusion v1 or v2, the more particular first, and a pattern found in names of theirs."""


def kind_of(names: Iterable[str], kinds: Mapping[str, str]) -> str | None:
    """Returns the first kind whose pattern is found in a name; None where none is."""
    listed = list(names)
    return next((kind for kind, pattern in kinds.items() if any(re.search(pattern, name) for name in listed)), None)


def is_lora_file(names: Iterable[str]) -> bool:
    """Tells a LoRA, or a relative of it, from weights."""
    return kind_of(names, {"a LoRA": LORA}) is not None


def without_wrappers(name: str) -> str:
    """Returns a name without what wrappers put before it."""
    while prefix := next((each for each in WRAPPERS if name.startswith(each)), ""):
        name = name.removeprefix(prefix)
    return name
