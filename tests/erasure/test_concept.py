from typing import Any

import pytest

from erasure import NUDITY, Concept
from overpaint.tinyworld.presets import STRIPES


def test_concept_without_phrases_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Concept\.phrases must have at least 1 item, got \(\)"):
        Concept(name="nothing", phrases=())


def test_concept_with_a_blank_phrase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Concept\.phrases\[\d\] must not be blank, got ' '"):
        Concept(name="nothing", phrases=("nudity", " "))


def test_concept_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Concept\.name must not be blank, got ''"):
        Concept(name="", phrases=("nudity",))


@pytest.mark.parametrize("field", ["phrases", "preserve"])
def test_one_string_in_place_of_a_tuple_is_refused(field: str) -> None:
    fields: dict[str, Any] = {"name": "nudity", "phrases": ("nudity",), field: "nudity"}
    with pytest.raises(ValueError, match=rf"Concept\.{field} must be a valid tuple, got 'nudity'"):
        Concept(**fields)


def test_an_anchor_that_is_no_text_is_refused() -> None:
    fields: dict[str, Any] = {"name": "nudity", "phrases": ("nudity",), "anchor": None}
    with pytest.raises(ValueError, match=r"Concept\.anchor must be a valid string, got None"):
        Concept(**fields)


@pytest.mark.parametrize("concept", [NUDITY, STRIPES], ids=lambda concept: concept.name)
def test_a_preset_survives_json(concept: Concept) -> None:
    assert Concept.from_json(concept.to_json()) == concept


def test_saved_concept_with_another_field_is_refused() -> None:
    with pytest.raises(ValueError, match="must have the fields"):
        Concept.from_json(NUDITY.to_json() | {"words": []})


def test_nudity_is_what_the_authors_of_uce_edit() -> None:
    assert (NUDITY.phrases, NUDITY.anchor, NUDITY.preserve) == (("nudity",), " ", ("",))


def test_stripes_preserves_nothing_that_it_erases() -> None:
    assert not set(STRIPES.phrases) & set(STRIPES.preserve)
