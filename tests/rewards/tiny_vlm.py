"""Vision-language models of a few thousand random weights, with everything that a checkpoint's folder holds."""

import json
import string
from pathlib import Path
from typing import Any

import torch

IMAGE_SIZE = 28
"""Side of the square that the tiny LLaVA scales images to, in pixels."""
PATCH = 14
"""Side of a patch of both models, in pixels."""

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""How the tiny LLaVA is asked; the real one's is of the same form."""
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""How the tiny Qwen-VL is asked; the real one's is of the same form."""
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def write_llava(folder: Path, seed: int = 0) -> Path:
    """Writes a LLaVA, in the layout of files that its checkpoints on the hub have."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tokenizer = _tokenizer(bos="<s>", eos="</s>", pad="<pad>", extra=("<image>",))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **_text_sizes(), **_special_ids(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
    )
    _write(folder, LlavaForConditionalGeneration, config, tokenizer, seed)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    settings = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
    }
    _write_json(folder / "processor_config.json", settings)
    named = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor"}
    _write_json(folder / "preprocessor_config.json", image_processor.to_dict() | named)
    _write_json(folder / "chat_template.json", {"chat_template": LLAVA_TEMPLATE})
    return folder


def write_qwen(folder: Path, seed: int = 0) -> Path:
    """Writes a Qwen3-VL, in the layout of files that its checkpoints on the hub have."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = _tokenizer(bos=None, eos="<|im_end|>", pad="<|endoftext|>", extra=QWEN_TOKENS)
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            **_text_sizes(),
            **_special_ids(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    _write(folder, Qwen3VLForConditionalGeneration, config, tokenizer, seed)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (4 * PATCH) ** 2}
    )
    named = {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    _write_json(folder / "preprocessor_config.json", image_processor.to_dict() | named)
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    _write_json(folder / "video_preprocessor_config.json", video)
    _write_json(folder / "chat_template.json", {"chat_template": QWEN_TEMPLATE})
    return folder


def _text_sizes() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }


def _special_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _tokenizer(*, bos: str | None, eos: str, pad: str, extra: tuple[str, ...]) -> Any:
    """Makes a tokenizer that has a token for every byte, so that it takes any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [token for token in dict.fromkeys((pad, bos, eos, *extra)) if token is not None]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


@torch.no_grad()
def _write(folder: Path, model_class: Any, config: Any, tokenizer: Any, seed: int) -> None:
    """Saves a model whose answers are of letters and blanks, end at times, and vary with image and question."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    letters = tokenizer.convert_tokens_to_ids(["Ġ", *string.ascii_letters])
    silent = torch.ones(len(tokenizer), dtype=torch.bool)
    silent[[*letters, tokenizer.eos_token_id]] = False
    model.lm_head.weight[silent] = 0
    model.lm_head.weight[[tokenizer.eos_token_id, letters[0]]] *= 2.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
