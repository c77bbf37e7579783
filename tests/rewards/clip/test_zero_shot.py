"""CLIP as a zero-shot classifier: the probability that an image shows a concept."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from rewards import CLIPZeroShot, CLIPZeroShotConfig, NudeNet, Reward, as_reward, concept_measure, measures
from rewards.clip_encoder import ClipEncoder
from rewards.combine import reads_prompts
from rewards.named import FACTORIES

PHRASES = ("red cat", "the red cat")


@pytest.fixture
def measure(encoder: ClipEncoder) -> CLIPZeroShot:
    with torch.no_grad():
        encoder.model.logit_scale.fill_(1.5)  # a random network's cosines are far apart
    return CLIPZeroShot(encoder, PHRASES, ["blue dog"])


def test_it_is_a_differentiable_reward_that_reads_no_prompts(measure: CLIPZeroShot) -> None:
    assert isinstance(measure, Reward)
    assert measure.differentiable
    assert not reads_prompts(measure)


def test_it_is_the_softmax_over_the_mean_of_the_phrases_the_anchors_and_anything_else(
    encoder: ClipEncoder, measure: CLIPZeroShot, pictures: Tensor, prompts: list[str]
) -> None:
    captions = ["a photo of red cat", "a photo of the red cat", "a photo of blue dog", "a photo"]
    concept_1, concept_2, anchor, neutral = encoder.text_embeddings(captions)
    concept = (concept_1 + concept_2) / (concept_1 + concept_2).norm()
    logits = torch.e**1.5 * encoder.image_embeddings(pictures) @ torch.stack([concept, anchor, neutral]).T
    expected = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    scores = measure(pictures, prompts)
    torch.testing.assert_close(scores, expected[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measure.probabilities(pictures), expected, rtol=1e-5, atol=1e-6)
    assert 0 < scores.min() < scores.max() < 1


def test_two_classes_without_the_neutral_one(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    config = CLIPZeroShotConfig(template="{} on a table", neutral=None)
    measure = CLIPZeroShot(encoder, ["cat"], ["dog", " dog", ""], config)
    cat, dog = encoder.text_embeddings(["cat on a table", "dog on a table"])
    images = encoder.image_embeddings(pictures)
    expected = (encoder.logit_scale * (images @ cat - images @ dog)).sigmoid()
    torch.testing.assert_close(measure(pictures, prompts), expected, rtol=1e-5, atol=1e-6)
    # What the concept is, and what takes its place, are two sides of one probability.
    other = CLIPZeroShot(encoder, ["dog"], ["cat"], config)
    torch.testing.assert_close(measure(pictures, prompts) + other(pictures, prompts), torch.ones(5))


def test_the_number_of_phrases_does_not_matter(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    once, often = (CLIPZeroShot(encoder, ["red cat"] * count, ["dog"]) for count in (1, 20))
    torch.testing.assert_close(often(pictures, prompts), once(pictures, prompts), rtol=1e-5, atol=1e-6)


def test_a_blank_anchor_is_none(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    without, blank = CLIPZeroShot(encoder, ["cat"]), CLIPZeroShot(encoder, ["cat"], [" "])
    assert torch.equal(without(pictures, prompts), blank(pictures, prompts))
    assert without.probabilities(pictures).shape == (5, 2)


def test_batch_order_and_prompts_do_not_matter(
    measure: CLIPZeroShot, pictures: Tensor, check_batches: Callable[[nn.Module], None]
) -> None:
    check_batches(measure)
    assert torch.equal(measure(pictures, ["a"] * 5), measure(pictures, ["b"] * 5))


def test_gradient_to_the_images_agrees_with_differences(
    measure: CLIPZeroShot, check_gradient: Callable[[nn.Module], None]
) -> None:
    check_gradient(measure)


def test_its_classes_move_with_it_and_are_not_saved(measure: CLIPZeroShot) -> None:
    assert not any(name.startswith("classes") for name in measure.state_dict())
    assert measure.to("meta").get_buffer("classes").device.type == "meta"


@pytest.mark.parametrize(
    ("phrases", "anchors", "changes", "message"),
    [
        ([], ["a"], {}, r"phrases must hold at least one and none that is blank, got \[\]"),
        (["a", " "], [], {}, r"phrases must hold at least one and none that is blank, got \['a', ' '\]"),
        (["a"], [" "], {"neutral": None}, "anchors must hold at least one where config.neutral is None"),
        (["a", "Cat"], ["cat "], {}, "anchors must be other than the concept's phrases, got 'cat' among both"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(
    phrases: list[str], anchors: list[str], changes: dict[str, Any], message: str, encoder: ClipEncoder
) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPZeroShot(encoder, phrases, anchors, replace(CLIPZeroShotConfig(), **changes))


@pytest.mark.usefixtures("unchecked")
def test_a_string_in_place_of_phrases_is_refused(encoder: ClipEncoder) -> None:
    with pytest.raises(TypeError, match="phrases must be a sequence, got 'van gogh'"):
        CLIPZeroShot(encoder, "van gogh")
    with pytest.raises(TypeError, match="anchors must be a sequence, got 'art'"):
        CLIPZeroShot(encoder, ["van gogh"], "art")


def test_a_template_needs_a_place_for_the_phrase() -> None:
    with pytest.raises(ValueError, match="template must match pattern"):
        CLIPZeroShotConfig(template="a photo")


# Measures by name


def test_clip_by_name_takes_phrases_anchor_and_weights(
    encoder: ClipEncoder, pictures: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    measure = concept_measure("clip", PHRASES, "blue dog", weights=tmp_path)
    assert isinstance(measure, CLIPZeroShot)
    assert (measure.phrases, measure.anchors) == (PHRASES, ("blue dog",))
    expected = CLIPZeroShot(encoder, PHRASES, ["blue dog"])(pictures, prompts)
    assert torch.equal(measure(pictures, prompts), expected)


def test_clip_by_name_asks_the_hub_for_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(repository: str, name: str, *, revision: str) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match=r"could not get config\.json of openai/clip-vit-large-patch14"):
        concept_measure("clip", ["van gogh"], "art")


def test_none_is_not_measured() -> None:
    assert concept_measure("none", ["van gogh"]) is None
    with pytest.raises(ValueError, match="weights must be given to a measure that takes it"):
        concept_measure("none", ["van gogh"], weights="x")


def test_a_detector_of_nudity_by_name_says_yes_or_no(monkeypatch: pytest.MonkeyPatch, pictures: Tensor) -> None:
    class Detector:
        def detect(self, pixels: Any) -> list[dict[str, Any]]:
            return [{"class": "BUTTOCKS_EXPOSED", "score": score} for score in (0.5, 0.7, 0.8)]

    made = NudeNet
    monkeypatch.setattr(measures, "NudeNet", lambda config: made(config, Detector()))
    measure = concept_measure("nudenet", ["nudity"])
    assert measure is not None
    assert measure(pictures, [""] * 5).tolist() == [1.0] * 5
    assert all(name in FACTORIES for name in measures.DETECTOR_CONCEPTS)


def stripes(images: Tensor, prompts: Any) -> list[float]:
    return [0.25] * len(prompts)


def test_a_function_and_a_further_name_are_measures(pictures: Tensor) -> None:
    for name in (f"{__name__}:stripes", "tiny"):
        measure = concept_measure(name, ["stripes"], more={"tiny": lambda: as_reward(stripes)})
        assert measure is not None
        assert measure(pictures, [""] * 5).tolist() == [0.25] * 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nudnet", r"measure must be one of clip, nudenet, opennsfw, none, an address.* did you mean nudenet\?"),
        ("image-reward", "measure must be one of clip, nudenet, opennsfw, none, an address"),
        ("nowhere:score", "measure must name a module, got 'nowhere:score'"),
    ],
)
def test_a_name_of_no_measure_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concept_measure(name, ["nudity"])
