"""Names of a UNet's parameters in other people's files: diffusers', the original Stable Diffusion's, foreign ones."""

import re
from collections.abc import Iterable
from pathlib import Path

from overpaint.policy.parts import UNet
from overpaint.policy.tensor_names import FOREIGN, LDM_UNET, kind_of, without_wrappers
from overpaint.policy.weights import base_parameters

LDM = re.compile(r"(^|\.)(input_blocks|middle_block|output_blocks|time_embed|out)\.\d+\.")

KINDS = FOREIGN | {
    "a Stable Diffusion": r"(down|up|input|output)_blocks\.\d+\.|mid(dle)?_block\.|attn2\.",
    "a CLIP text encoder": r"text_model\.|token_embedding|self_attn\.[qkv]_proj|resblocks",
    "a VAE": r"(encoder|decoder)\.(down|up|mid|conv)|quant_conv",
}
"""Kinds of models that foreign names may be of, a Stable Diffusion with other layers being one."""


def unet_names(names: Iterable[str], unet: UNet, source: Path) -> dict[str, str]:
    """Returns the parameter of a UNet that each name of a file stands for.

    Args:
        names: In diffusers' naming or in that of the original Stable Diffusion, with or without a prefix.
        unet: What the names must fit.
        source: The file, for the message.

    Raises:
        ValueError: A name stands for no parameter of this UNet; the first is named.
    """
    plain = {without_wrappers(name): name for name in names}
    if any(LDM.search(name) for name in plain):
        converted = _from_ldm(plain, unet)
    else:
        converted = dict(zip(plain, plain, strict=True))
    found = {plain[name]: parameter for name, parameter in converted.items()}
    known = base_parameters(unet)
    if foreign := [name for name in plain.values() if found.get(name) not in known]:
        raise ValueError(
            f"{source} must hold weights of the base's UNet, and {foreign[0]!r} is none of them ({len(foreign)} of its "
            f"{len(plain)} names are not); by this name it is of {kind_of(foreign, KINDS) or 'another model'}"
        )
    return found


def _from_ldm(names: Iterable[str], unet: UNet) -> dict[str, str]:
    """Returns diffusers' names for those of the original Stable Diffusion, without those that have none.

    diffusers' converter counts a file's blocks, and a file of an erasure may have the attentions of some blocks only:
    every block is given one name more, which the converter does not take over.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = unet.config
    layers = config["layers_per_block"] + 1
    counts = {"input_blocks": layers * len(config["down_block_types"]), "middle_block": 3}
    counts["output_blocks"] = layers * len(config["up_block_types"])
    values = {f"{LDM_UNET}{block}.{k}.counted": "" for block, count in counts.items() for k in range(count)}
    values |= {LDM_UNET + re.sub(r"^(model\.)?diffusion_model\.", "", name): name for name in names}
    converted = convert_ldm_unet_checkpoint(values, config)
    return {name: parameter for parameter, name in converted.items() if name and not parameter.endswith(".counted")}
