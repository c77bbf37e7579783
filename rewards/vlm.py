"""Vision-language models: what a reward asks of one, and one in this process by transformers' own classes.

The weights are read from safetensors and no code of a checkpoint is run. Images are prepared by transformers' PIL
processors, whether torchvision is installed or not, so that a model sees the same pixels everywhere.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import nn

from overpaint.policy.types import Images
from overpaint.settings import Field, settings

from .checkpoint import LOCAL, HubFiles, check_folder, load_auto
from .preprocess import to_pixels
from .types import check_pairs

OFFICIAL = HubFiles(
    repository="llava-hf/llava-1.5-7b-hf",
    revision="b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
    files={
        "config.json": None,
        "generation_config.json": None,
        "preprocessor_config.json": None,
        "processor_config.json": None,
        "chat_template.json": None,
        "tokenizer.json": None,
        "tokenizer_config.json": None,
        "special_tokens_map.json": None,
        "model.safetensors.index.json": None,
        "model-00001-of-00003.safetensors": "c11dbf016ee7d35ee130c19b67e20eb04873996006f424b7bcbd453b6517ee66",
        "model-00002-of-00003.safetensors": "46df6c6e5fad297fe7fbca4963dcf180cb1d0528cabc884d1f603311fed01328",
        "model-00003-of-00003.safetensors": "4f06177c37ca13944e73b57dd6d051767b950dffc12400c700dfa2509c24c697",
    },
)
"""LLaVA 1.5 with 7 billion weights, 14 GB in half precision; Llama 2 community licence."""


@runtime_checkable
class VisionLanguageModel(Protocol):
    """Answers questions about images; in this process (`LocalVLM`) or behind a server (`ServedVLM`)."""

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Returns the answer to each question about its image, in order, without white space around it.

        Args:
            images: RGB in [0, 1]; rounded to 8 bits, and values outside clamped.
            questions: One for each image.

        Raises:
            TypeError: A question is not a string, or the images are not floating point.
            ValueError: The images are not a batch of finite RGB images, or there is not one question for each.
        """
        ...


def check_questions(images: Images, questions: Sequence[str]) -> None:
    """Checks that images and questions form pairs that a model can answer.

    Raises:
        TypeError: The images are not floating point, or a question is not a string.
        ValueError: The images are not a batch of finite RGB images, or there is not one question for each.
    """
    check_pairs(images, questions, "questions")
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")


def answers_of(model: VisionLanguageModel, images: Images, questions: Sequence[str]) -> list[str]:
    """Returns a model's answer to each question about its image.

    Raises:
        ValueError: There is not one string for each question.
    """
    answers, count = model.answer(images, questions), len(questions)
    if len(answers) != count or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"a vision-language model must give one string for each of {count} questions, got {answers!r}")
    return answers


@settings
class LocalVLMConfig:
    """How answers are generated; always by taking the likeliest token."""

    max_new_tokens: int = Field(64, ge=1)
    """Longest answer, in tokens. 64 is what kvablack/LLaVA-server gives at most."""
    batch_size: int = Field(16, ge=1)
    """Number of questions that are answered at once."""


class LocalVLM(nn.Module):
    """Answers questions about images by greedy decoding, with the chat template of the checkpoint.

    A question's answer does not depend on what else is in the batch, up to rounding: in half precision, two tokens of
    almost the same likelihood may change places. Control tokens in a question, such as `<image>`, are read as text.

    Args:
        model: A model of transformers that generates text from images and text. It is frozen and made greedy; what
            its checkpoint says about generation otherwise (such as a penalty on repetition) holds.
        processor: Its processor, with a chat template.
        config: How answers are generated.
    """

    def __init__(self, model: Any, processor: Any, config: LocalVLMConfig | None = None) -> None:
        super().__init__()
        if processor.chat_template is None:
            raise ValueError("processor must have a chat template, which says how the model is asked, got none")
        self.config = config or LocalVLMConfig()
        self.processor = processor
        self.model = model.eval().requires_grad_(False)
        generation = copy.deepcopy(model.generation_config)
        generation.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        generation.pad_token_id = processor.tokenizer.pad_token_id
        self.model.generation_config = generation

    @classmethod
    def load(
        cls,
        folder: str | Path | None = None,
        config: LocalVLMConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> "LocalVLM":
        """Loads frozen weights onto the CPU; `.to(device)` moves them.

        Args:
            folder: Where a checkpoint lies in transformers' layout; LLaVA 1.5 from the Hugging Face hub (14 GB, cached
                there) if it is not given.
            config: How answers are generated.
            dtype: Precision of the weights; that of the file if it is not given.

        Raises:
            FileNotFoundError: The folder lacks a file.
            ValueError: The folder holds no vision-language model, or its file lacks weights.
            OSError: The model could not be fetched, or there are no weights in the folder.
        """
        from transformers import AutoModelForImageTextToText

        path = OFFICIAL.fetch() if folder is None else Path(folder)
        processor = load_processor(path)
        model = load_auto(AutoModelForImageTextToText, path, "model", dtype=dtype or "auto", use_safetensors=True)
        return cls(model, processor, config)

    def train(self, mode: bool = True) -> "LocalVLM":
        """Stays in evaluation mode, also as a part of something that is trained."""
        return super().train(False)

    @torch.no_grad()
    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Returns the answers, as `VisionLanguageModel.answer` says."""
        check_questions(images, questions)
        size = self.config.batch_size
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        return [answer for part in parts for answer in self._answer_batch(images[part], questions[part])]

    def _answer_batch(self, images: Images, questions: Sequence[str]) -> list[str]:
        pictures = [Image.fromarray(pixels) for pixels in to_pixels(images)]
        inputs = self.processor.apply_chat_template(
            [
                [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
                for picture, question in zip(pictures, questions, strict=True)
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
            # On the left, so that every answer begins right after its own question.
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        inputs = inputs.to(self.model.device)
        tokens = self.model.generate(**inputs, max_new_tokens=self.config.max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def load_processor(folder: Path) -> Any:
    """Loads what prepares images and text for a model, without the part for videos.

    `AutoProcessor` would load that part of Qwen-VL's too, which needs torchvision
    (https://github.com/huggingface/transformers/issues/48558).

    Raises:
        FileNotFoundError: The folder lacks a file.
        ValueError: The folder holds no vision-language model.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    check_folder(folder, ["config.json"], "a vision-language model", vocabulary=True, hint=OFFICIAL.by_hand())
    settings = AutoConfig.from_pretrained(folder, **LOCAL)
    if type(settings) not in PROCESSOR_MAPPING:
        raise ValueError(f"{folder} must hold a model of images and text, got one of type {settings.model_type!r}")
    processor_class: Any = PROCESSOR_MAPPING[type(settings)]

    class WithoutVideos(processor_class):
        """The checkpoint's processor for images and text only."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    names = WithoutVideos.get_attributes()
    if sorted(names) != ["image_processor", "tokenizer"]:
        raise ValueError(f"{folder} must hold a model of images and text, got one of type {settings.model_type!r}")
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCAL),
        "tokenizer": AutoTokenizer.from_pretrained(folder, **LOCAL),
    }
    processor_settings, _ = WithoutVideos.get_processor_dict(folder, local_files_only=True)
    return WithoutVideos.from_args_and_dict([parts[name] for name in names], processor_settings)
