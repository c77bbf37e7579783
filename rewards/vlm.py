"""What every vision-language model is to a reward: something that answers a question about each image."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from overpaint.policy.types import Images

from .types import check_pairs


@runtime_checkable
class VisionLanguageModel(Protocol):
    """Answers questions about images; in this process (`LocalVLM`) or behind a server (`ServedVLM`)."""

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Returns the answer to each question about its image, in order; images are RGB in [0, 1]."""
        ...


def check_questions(images: Images, questions: Sequence[str]) -> None:
    """Checks that images and questions form pairs that a model can answer.

    Raises:
        TypeError: The images are not floating point, or a question is not a string.
        ValueError: The images are not a batch of finite RGB images, or there is not one question for each.
    """
    check_pairs(images, [""] * len(images))
    if isinstance(questions, str):
        raise TypeError(f"questions must be a sequence with one string for each image, got the string {questions!r}")
    if len(questions) != len(images):
        raise ValueError(
            f"questions must hold one string for each image, got {len(questions)} for {len(images)} images"
        )
    for index, question in enumerate(questions):
        if not isinstance(question, str):
            raise TypeError(f"questions must be strings, got {question!r} at index {index}")
    if not torch.isfinite(images).all():
        raise ValueError("images must be finite, got NaN or infinity")


def check_answers(answers: Sequence[str], count: int) -> None:
    """Checks that a model gave as many answers as it was asked questions.

    Raises:
        ValueError: It did not, or an answer is no string.
    """
    if len(answers) != count or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"a vision-language model must give one string for each of {count} questions, got {answers!r}")
