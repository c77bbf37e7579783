"""Prompt alignment: what a vision-language model sees in an image, compared with what the prompt asked for.

Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, section 5.1, and kvablack/ddpo-pytorch,
`ddpo_pytorch/rewards.py`, `llava_bertscore` and `llava_strict_satisfaction`. The question is the code's; the paper
prints "what is happening in this image?". Departures: any vision-language model stands in for the first LLaVA, and is
asked in its own chat format; in process it sees the image itself and not a JPEG of quality 80; nothing travels
pickled; and a prompt without questions is an error.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Count, Field, settings

from .bertscore import BertScore, BertScores
from .types import check_pairs
from .vlm import LocalVLM, VisionLanguageModel, answers_of

Part = Literal["precision", "recall", "f1"]
"""Which of BERTScore's three numbers."""


@settings
class AlignmentConfig:
    """What is asked, and how the answer is compared; as in kvablack/ddpo-pytorch by default."""

    question: str = Field("Answer concisely: what is going on in this image?", pattern=r"\S")
    """What the model is asked about every image."""
    template: str = Field("The image contains {prompt}", pattern=r"\{prompt\}")
    """What the answer is compared with; `{prompt}` stands for the prompt."""
    part: Part = "recall"
    """Which of BERTScore's numbers is the reward. Recall asks for all of the prompt, whatever else the answer holds."""


TextScorer = Callable[[Sequence[str], Sequence[str]], BertScores]
"""Says how alike each candidate and its reference are, as `BertScore` does."""


class ScoredAnswer(NamedTuple):
    """Why an image got its score."""

    answer: str
    """What the model said of it."""
    score: float
    """How well that fits the prompt."""


class Alignment(nn.Module):
    """BERTScore between what a vision-language model says of an image and the prompt; hardly ever outside [0, 1].

    Not differentiable. `.to(device)` moves the model and the scorer where they run in this process.

    Args:
        vlm: Describes the images.
        scorer: Compares texts.
        config: What is asked, and how the answer is compared.
    """

    differentiable = False

    def __init__(self, vlm: VisionLanguageModel, scorer: TextScorer, config: AlignmentConfig | None = None) -> None:
        super().__init__()
        self.vlm = vlm
        self.scorer = scorer
        self.config = config or AlignmentConfig()

    @classmethod
    def load(
        cls,
        vlm_folder: str | Path | None = None,
        bertscore_folder: str | Path | None = None,
        bertscore_layer: Count | None = None,
    ) -> "Alignment":
        """Loads both models into this process, frozen, on the CPU.

        Args:
            vlm_folder: A checkpoint for `LocalVLM.load`; LLaVA 1.5 from the Hugging Face hub if it is not given.
            bertscore_folder: An encoder for `BertScore.load`; deberta-xlarge-mnli from the hub if it is not given.
            bertscore_layer: The encoder's layer that is read; the 40th, that of deberta-xlarge-mnli, if not given.
        """
        return cls(LocalVLM.load(vlm_folder), BertScore.load(bertscore_folder, bertscore_layer))

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the score of each image for its prompt, in float32 on the images' device."""
        return self._scored(images, prompts)[1]

    def describe(self, images: Images, prompts: Sequence[str]) -> list[ScoredAnswer]:
        """Returns the score of each image together with the answer that it was computed from, for a log."""
        answers, scores = self._scored(images, prompts)
        return [ScoredAnswer(answer, score) for answer, score in zip(answers, scores.tolist(), strict=True)]

    def _scored(self, images: Images, prompts: Sequence[str]) -> tuple[list[str], PerSample]:
        """Returns what the model says of each image, and how that compares."""
        check_pairs(images, prompts)
        answers = answers_of(self.vlm, images, [self.config.question] * len(images))
        references = [self.config.template.replace("{prompt}", prompt) for prompt in prompts]
        scores = getattr(self.scorer(answers, references), self.config.part)
        return answers, scores.to(images.device, torch.float32)


class Question(NamedTuple):
    """Something to ask about an image."""

    question: str
    """What is asked, such as "How many cats are there in this image?"."""
    answer: str
    """What the response has to contain, such as "two"."""


class StrictAlignment(nn.Module):
    """The share of a prompt's questions that a vision-language model answers as expected, in [0, 1].

    An answer counts where it occurs in the response, letter by letter and in the same case, also inside a longer word,
    as in kvablack/ddpo-pytorch, `llava_strict_satisfaction`. Not differentiable.

    Args:
        vlm: Answers the questions.
        questions: The questions of every prompt that will come.

    Raises:
        ValueError: A prompt has no questions, or a question or an answer is empty.
    """

    differentiable = False

    def __init__(self, vlm: VisionLanguageModel, questions: Mapping[str, Sequence[Question]]) -> None:
        super().__init__()
        self.vlm = vlm
        self.questions = {prompt: tuple(its_questions) for prompt, its_questions in questions.items()}
        for prompt, its_questions in self.questions.items():
            if not its_questions:
                raise ValueError(f"questions must hold at least one for each prompt, got none for {prompt!r}")
            if not all(all(question) for question in its_questions):
                raise ValueError(
                    f"questions must have no empty question or answer, got one for {prompt!r}: {its_questions!r}"
                )

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the share for each image, in float32 on the images' device; the model is called once.

        Raises:
            ValueError: A prompt has no questions.
        """
        check_pairs(images, prompts)
        unknown = sorted({prompt for prompt in prompts if prompt not in self.questions})
        if unknown:
            raise ValueError(f"prompts must be among those that have questions, got {unknown[0]!r}")
        per_image = [self.questions[prompt] for prompt in prompts]
        counts = torch.tensor([len(questions) for questions in per_image], dtype=torch.long, device=images.device)
        flat = [question for questions in per_image for question in questions]
        repeated = images.repeat_interleave(counts, dim=0)
        responses = answers_of(self.vlm, repeated, [question.question for question in flat])
        right = iter([question.answer in response for question, response in zip(flat, responses, strict=True)])
        shares = [sum(next(right) for _ in questions) / len(questions) for questions in per_image]
        return torch.tensor(shares, dtype=torch.float32, device=images.device)
