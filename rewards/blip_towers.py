"""BLIP's vision tower and text encoder, put together from transformers' own classes."""

from typing import TYPE_CHECKING

from torch.utils.checkpoint import checkpoint

from overpaint.policy.types import Embeddings, Images

from .blip_config import BlipConfig
from .blip_tokenizer import BlipTokenizer

if TYPE_CHECKING:
    from transformers import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel


def check_tokenizer(config: BlipConfig, tokenizer: BlipTokenizer) -> None:
    """Checks that the text encoder knows every id of the tokenizer."""
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"vocab_size must cover the tokenizer's {len(tokenizer)} ids, got {config.vocab_size}")


def vision_tower(config: BlipConfig) -> "BlipVisionModel":
    """Builds the vision tower with fresh weights; no dropout."""
    from transformers import BlipVisionConfig, BlipVisionModel

    return BlipVisionModel(
        BlipVisionConfig(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.vision_hidden_size,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.vision_heads,
            intermediate_size=config.vision_intermediate_size,
            layer_norm_eps=config.vision_layer_norm_eps,
            initializer_range=config.initializer_range,
        )
    )


def text_tower(config: BlipConfig) -> "BlipTextModel":
    """Builds the text encoder with fresh weights; no dropout.

    Call it with `is_decoder=False`: the words see each other both ways. With `encoder_hidden_states` they also attend
    to the image, without they do not.
    """
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    return BlipTextModel(
        BlipTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            encoder_hidden_size=config.vision_hidden_size,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.text_heads,
            intermediate_size=config.text_intermediate_size,
            max_position_embeddings=config.max_positions,
            layer_norm_eps=config.text_layer_norm_eps,
            initializer_range=config.initializer_range,
            bos_token_id=None,  # for generation only; the defaults lie outside a small vocabulary
            eos_token_id=None,
            sep_token_id=None,
            is_decoder=True,  # gives the layers their attention to the image; the call itself is not causal
        ),
        add_pooling_layer=False,
    )


def vision_tokens(tower: "BlipVisionModel", pixels: Images, *, checkpointing: bool) -> Embeddings:
    """Returns the vision tower's output for normalised images: the class token, then one token for each patch.

    The tower's `pooler_output` is something else: there transformers applies the last layer norm twice.

    Args:
        tower: The vision tower.
        pixels: Normalised images of the tower's size.
        checkpointing: Whether blocks are computed anew in the backward pass.
    """
    if not checkpointing:
        return tower(pixels).last_hidden_state
    # transformers' own switch acts in training mode only and was renamed within version 5; this one needs neither.
    hidden = tower.embeddings(pixels)
    for layer in tower.encoder.layers:
        hidden = checkpoint(layer, hidden, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
    return tower.post_layernorm(hidden)
