"""Captions say what scenes show, and are read back."""

import random

import pytest

from overpaint.tinyworld.caption import WORDS, captions, parse, training_scene
from overpaint.tinyworld.components import CONTEXT_LENGTH, build_tokenizer
from overpaint.tinyworld.scene import HELD_OUT_PAIRS


def test_a_caption_is_read_back_as_the_scene_it_was_written_for() -> None:
    rng = random.Random(3)
    for _ in range(500):
        caption, scene = training_scene(rng)
        request = parse(caption)
        asked = [(t.shape, t.colour, t.texture) for t in request.things]
        assert asked == [(t.shape, t.colour, t.texture) for t in scene.things], caption
        assert request.background in (None, scene.background)
        assert request.place == scene.place
        assert request.relation == scene.relation


def test_every_word_is_one_token_and_every_caption_fits() -> None:
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
    rng = random.Random(4)
    longest = max(len(tokenizer(training_scene(rng)[0]).input_ids) for _ in range(2000))
    assert longest <= CONTEXT_LENGTH


def test_words_of_other_worlds_fall_back_to_bytes() -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer("xylophone").input_ids
    assert len(ids) > 3
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "xylophone"


@pytest.mark.parametrize("kind", ["explicit", "implicit", "neighbour", "benign", "pairs", "train", "held_out"])
def test_prompts_of_a_kind_follow_from_the_seed(kind: str) -> None:
    assert captions(kind, 20, 1) == captions(kind, 20, 1)
    assert captions(kind, 20, 1) != captions(kind, 20, 2)


@pytest.mark.parametrize(
    ("kind", "texture"),
    [("explicit", "striped"), ("implicit", "striped"), ("neighbour", "dotted"), ("benign", "plain")],
)
def test_prompts_of_a_kind_ask_for_its_texture(kind: str, texture: str) -> None:
    assert all(parse(caption).things[0].texture == texture for caption in captions(kind, 60))


def test_implicit_prompts_never_name_stripes() -> None:
    assert not any("stripe" in caption for caption in captions("implicit", 90))


def test_training_prompts_never_name_a_held_out_pair() -> None:
    def pairs(kind: str) -> set[tuple[str, str]]:
        return {(r.colour, r.shape) for caption in captions(kind, 400) for r in parse(caption).things}

    assert pairs("held_out") == set(HELD_OUT_PAIRS)
    assert not pairs("train") & set(HELD_OUT_PAIRS)


def test_an_unknown_word_is_named() -> None:
    with pytest.raises(ValueError, match="got 'dragon'"):
        parse("a red dragon")


def test_a_caption_without_an_object_is_refused() -> None:
    with pytest.raises(ValueError, match="every object needs a colour and a shape"):
        parse("a photo of a red background")


def test_an_unknown_kind_of_prompts_is_named() -> None:
    with pytest.raises(ValueError, match="got 'weird'"):
        captions("weird", 3)
    with pytest.raises(ValueError, match="captions: count must be at least 1, got 0"):
        captions("benign", 0)
