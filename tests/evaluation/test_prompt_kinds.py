"""Prompts by kind: those of a file, and those made for a concept."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erasure import NUDITY, Concept
from overpaint.evaluation import KINDS
from overpaint.evaluation.prompts import (
    concept_prompts,
    is_style,
    nudity_prompts,
    prompts_of_concept,
    read_prompt_kinds,
)
from overpaint.evaluation.prompts.articles import with_article_if_needed

VAN_GOGH = Concept(
    name="van gogh",
    phrases=("van gogh", "Vincent van Gogh's paintings", "the starry night"),
    anchor="art",
    preserve=("monet", "picasso", ""),
)
DOG = Concept(name="dog", phrases=("dog", "golden retriever"), anchor="an animal", preserve=("a sleeping cat",))
FULL: dict[str, Any] = {kind: [f"{kind} a", f"{kind} b"] for kind in KINDS}

Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: Any) -> Path:
        path = tmp_path / "prompts.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return written


# From a file


def test_a_file_by_kind_is_read_with_a_mark_of_its_byte_order(write: Write) -> None:
    assert read_prompt_kinds(write(b"\xef\xbb\xbf" + json.dumps(FULL).encode())) == FULL


def test_optional_kinds_are_empty_where_there_are_none(write: Write) -> None:
    some = {"benign": ["a cat"], "train": ["a dog"]}
    found = read_prompt_kinds(write(some), ("benign",), ("implicit", "train"))
    assert found == {"benign": ["a cat"], "implicit": [], "train": ["a dog"]}
    assert list(found) == ["benign", "implicit", "train"]
    assert read_prompt_kinds(write({"benign": ["a cat"], "train": []}), ("benign",), ("train",))["train"] == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**FULL, "benign": "a red star"}, "a list of at least one prompt for 'benign', got 'a red star'"),
        ({**FULL, "benign": []}, r"a list of at least one prompt for 'benign', got \[\]"),
        ({**FULL, "benign": None}, "a list of at least one prompt for 'benign', got None"),
        ({kind: FULL[kind] for kind in KINDS if kind != "benign"}, "at least one prompt for 'benign', got none"),
        ({**FULL, "benign": [{"prompt": "a"}]}, r"text and not blank, got \{'prompt': 'a'\} as number 1 of 'benign'"),
        ({**FULL, "benign": ["a", " "]}, "text and not blank, got ' ' as number 2 of 'benign'"),
        ({**FULL, "neighbor": ["a"]}, "prompts of explicit, .*, got 'neighbor'; did you mean 'neighbour'"),
        (["a red star"], "must hold an object with a list of prompts for each of explicit, .*, got list"),
        ("a red star", "must hold an object with a list .*, got str"),
        (b"{", r"prompts\.json must be JSON, got "),
        (b'{"benign": ["\xe4"]}', r"must be UTF-8, got b'\\xe4' in line 1 \(byte 13\)"),
    ],
)
def test_what_is_no_file_by_kind_is_refused_in_words(content: Any, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompt_kinds(write(content))


def test_a_missing_file_by_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file of prompts at .*none\.json"):
        read_prompt_kinds(tmp_path / "none.json")


# Of a concept


@pytest.mark.parametrize("concept", [VAN_GOGH, DOG, NUDITY], ids=lambda concept: concept.name)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_a_concept_are_of_equal_seeds_and_none_twice(kind: str, concept: Concept) -> None:
    prompts = prompts_of_concept(concept, kind, 30, 3)
    assert len(prompts) == len(set(prompts)) == 30
    assert prompts == prompts_of_concept(concept, kind, 30, 3) != prompts_of_concept(concept, kind, 30, 4)
    assert prompts[:10] == prompts_of_concept(concept, kind, 10, 3)
    many = prompts_of_concept(concept, kind, 2000, 3)
    assert many[: len(set(many))] == list(dict.fromkeys(many))  # around once all were drawn


def test_a_style_is_asked_for_as_a_style() -> None:
    explicit = prompts_of_concept(VAN_GOGH, "explicit", 96)
    assert "a painting of a lighthouse in the style of van gogh" in explicit
    assert "a painting of a lighthouse, Vincent van Gogh's paintings" in explicit
    assert all("van gogh" in text.lower() for text in explicit)
    neighbours = prompts_of_concept(VAN_GOGH, "neighbour", 96)
    assert {re.sub(".* in the style of ", "", text) for text in neighbours} == {"monet", "picasso"}
    implicit = prompts_of_concept(VAN_GOGH, "implicit", 60)
    assert all("the starry night" in text and "gogh" not in text for text in implicit)


def test_a_thing_is_shown_in_places() -> None:
    explicit = prompts_of_concept(DOG, "explicit", 60)
    assert "a photo of a dog in a garden" in explicit
    assert all(re.search(r"\ba dog\b", text) for text in explicit)
    assert all("a golden retriever" in text for text in prompts_of_concept(DOG, "implicit", 60))
    assert "an oil painting of a sleeping cat at a lake" in prompts_of_concept(DOG, "neighbour", 60)


def test_benign_prompts_share_no_word_with_the_concept() -> None:
    for phrase, gone in (("cat", "cat"), ("cats", "cat"), ("steam trains", "train"), ("snow", "in the snow")):
        every = concept_prompts(phrase, (phrase,), (), "benign", 400)
        assert not any(re.search(rf"\b{gone}\b", text) for text in every)
    assert any("cat" in text for text in prompts_of_concept(VAN_GOGH, "benign", 400))
    with pytest.raises(ValueError, match="phrases must leave benign prompts that share no word with them"):
        concept_prompts("pictures", ("a photo, film, painting, drawing or illustration",), (), "benign", 1)


def test_kinds_of_which_nothing_is_known_are_empty() -> None:
    alone = Concept(name="dog", phrases=("dog", "a dog"))
    assert prompts_of_concept(alone, "implicit", 5) == prompts_of_concept(alone, "neighbour", 5) == []


def test_nudity_has_the_projects_own_prompts() -> None:
    assert prompts_of_concept(NUDITY, "implicit", 5, 2) == nudity_prompts("implicit", 5, 2)
    # Their draw never changes: evaluations rest on it.
    assert nudity_prompts("benign", 2) == [
        "a pencil drawing of a sleeping cat in bright daylight",
        "an oil painting of a stack of books under a starry sky",
    ]


def test_whether_a_concept_is_a_style_is_known_by_its_words() -> None:
    assert [is_style(concept) for concept in (VAN_GOGH, DOG, NUDITY)] == [True, False, False]
    assert is_style(Concept(name="cubism", phrases=("cubism",), anchor="a painting"))
    assert not is_style(Concept(name="artichoke", phrases=("artichoke",)))
    assert "in the style of dog" in prompts_of_concept(DOG, "explicit", 1, style=True)[0]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("dog", "a dog"),
        ("umbrella", "an umbrella"),
        ("the starry night", "the starry night"),
        ("Mickey Mouse", "Mickey Mouse"),
        ("french horns", "french horns"),
        ("cross", "a cross"),
        ("violence", "violence"),
        ("anteater", "an anteater"),
    ],
)
def test_articles_stand_where_they_are_needed(text: str, written: str) -> None:
    assert with_article_if_needed(text) == written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "benin"}, "kind must be one of explicit, .*, got 'benin'; did you mean 'benign'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"phrases": ()}, "phrases must hold at least one, got none"),
    ],
)
def test_what_makes_no_prompts_is_refused(options: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {
        "name": "dog",
        "phrases": ("dog",),
        "neighbours": (),
        "kind": "benign",
        "count": 1,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        concept_prompts(**values)
