"""A concept of the tiny world that is not stripes: words, prompts, the truth about it, and settings of the methods."""

import pytest

from erasure import METHODS
from overpaint import tinyworld
from overpaint.tinyworld import PRESETS, STRIPES, Scene, Thing, render, to_tensors
from overpaint.tinyworld.contents import Shown, contents_of
from overpaint.tinyworld.own_concept import concept_captions, own_concept, preset, without

STARS = own_concept(("star",), "circle", ("square",))


def picture(shape: str, colour: str, texture: str = "plain", background: str = "white", place: str | None = None):
    return render(to_tensors([Scene((Thing(shape, colour, texture, 32, 30, 16),), background, place, None)]))


@pytest.mark.parametrize(
    ("phrase", "shows", "shows_not"),
    [
        ("star", picture("star", "red"), picture("circle", "red")),
        ("a red star", picture("star", "red"), picture("star", "blue")),
        ("with dots", picture("star", "red", "dotted"), picture("star", "red", "striped")),
        ("zebra", picture("star", "red", "striped"), picture("star", "red", "dotted")),
        ("pink background", picture("star", "red", background="pink"), picture("star", "red")),
        ("in the garden", picture("star", "red", place="garden"), picture("star", "red", place="street")),
    ],
)
def test_a_phrase_shows_where_all_of_it_does(phrase: str, shows, shows_not) -> None:
    assert Shown((phrase,))(shows).tolist() == [True]
    assert Shown((phrase,))(shows_not).tolist() == [False]
    assert Shown((phrase, "a purple cross"))(shows).tolist() == [True]


def test_colour_and_shape_are_of_one_object() -> None:
    things = (Thing("star", "red", "plain", 18, 30, 11), Thing("circle", "blue", "plain", 46, 30, 11))
    both = render(to_tensors([Scene(things, "white", None, "left of")]))
    assert Shown(("red star",))(both).tolist() == [True]
    assert Shown(("blue star",))(both).tolist() == [False]


def test_words_that_cannot_be_seen_are_refused() -> None:
    with pytest.raises(ValueError, match="every word must belong to the tiny world, got 'gogh' in 'gogh'"):
        Shown(("star", "gogh"))
    with pytest.raises(ValueError, match=r"phrase must name something that shows .* got 'a photo of'"):
        contents_of("a photo of")


def test_prompts_hold_the_concept_or_do_not() -> None:
    assert all("star" in text for text in concept_captions(STARS, "explicit", 30, 1))
    assert all("square" in text for text in concept_captions(STARS, "neighbour", 30, 1))
    for kind in ("benign", "train", "held_out"):
        found = concept_captions(STARS, kind, 300, 1)
        assert len(found) == 300
        assert not any("star" in text for text in found)
    assert concept_captions(STARS, "implicit", 30, 1) == []
    assert concept_captions(STARS, "explicit", 9, 1) == concept_captions(STARS, "explicit", 9, 1)
    assert concept_captions(STARS, "explicit", 9, 1) != concept_captions(STARS, "explicit", 9, 2)


def test_prompts_of_stripes_are_the_worlds_own() -> None:
    for kind in ("explicit", "implicit", "neighbour", "benign", "train"):
        assert concept_captions(STRIPES, kind, 20, 3) == tinyworld.captions(kind, 20, 3)


def test_words_of_a_route_are_asked_for_as_the_world_asks() -> None:
    dots = own_concept(("with dots", "ladybug"))
    found = concept_captions(dots, "explicit", 8)
    assert all("with dots" in text for text in found[::2])
    assert all("ladybug" in text for text in found[1::2])


def test_a_concept_without_other_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="concept must leave captions of the kind 'benign', got"):
        concept_captions(own_concept(("a", "an")), "benign", 3)


def test_what_is_preserved_by_default_does_not_hold_the_concept() -> None:
    concept = own_concept(("star",))
    assert concept.preserve == without(("star",), STRIPES.preserve)
    assert 0 < len(concept.preserve) < len(STRIPES.preserve)
    assert STARS.preserve == ("", "square")


@pytest.mark.parametrize("method", METHODS)
def test_settings_for_another_concept_name_no_stripes_and_no_phrase_of_it(method: str) -> None:
    assert preset(method) is PRESETS[method]
    told = repr(preset(method, STARS))
    if method != "mace":  # its templates place a phrase, and do not preserve
        assert " star" not in told
    assert not any(word in told for word in ("zebra", "striped", "stripes", "prison", "circus"))
