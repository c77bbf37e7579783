"""The prompts of DDPO's tasks, on the real lists where they lie next to the checkout."""

from pathlib import Path

import pytest

from overpaint.evaluation import plan
from overpaint.evaluation.prompts import (
    activity_splits,
    animal_activities,
    common_animals,
    imagenet_animals,
    splits,
)
from overpaint.evaluation.prompts.animals import UNSEEN_ACTIVITIES
from overpaint.evaluation.prompts.articles import with_article


@pytest.fixture
def data(shared: Path) -> Path:
    return shared / "data"


@pytest.fixture
def lines(data: Path) -> list[str]:
    """ImageNet's classes as they are in their file."""
    return (data / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    "phrase",
    [
        "a cat", "an ant", "an eft", "an American coot", "an Ibizan hound", "an EntleBucher", "an ox", "an iPod",
        "an umbrella", "an upright", "an unidentified object", "an otter",
        "an hourglass", "an heirloom", "an honest fox", "a horse", "a hyena",
        "a European gallinule", "a ewe", "a eucalyptus", "a unicorn", "a unicycle", "a utensil", "a ukulele", "a urial",
        "a one-armed bandit", "an onion",
        "an X-ray", "a CD player", "an RV", "a T-shirt", "a U-boat", "an ATM", "an SUV",
        "a Model T", "an Airedale", "a Saluki",
    ],
)  # fmt: skip
def test_article_follows_the_sound(phrase: str) -> None:
    assert with_article(phrase.split(" ", 1)[1]) == phrase


def test_substances_and_pairs_have_no_article() -> None:
    assert with_article("binoculars") == "binoculars"
    assert with_article("red wine") == "red wine"


def test_articles_of_all_animals_follow_the_first_letter_but_for_those_that_sound_otherwise(data: Path) -> None:
    prompts = [*imagenet_animals(data), *common_animals(data)]
    assert len(prompts) == 398 + 45
    by_letter = [f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}" for _, noun in (p.split(" ", 1) for p in prompts)]
    differ = [prompt for prompt, other in zip(prompts, by_letter, strict=True) if prompt != other]
    # Read through by hand: no other of the 443 sounds unlike its first letter.
    assert differ == ["a European fire salamander", "a European gallinule"]


def test_compression_prompts_are_the_first_names_of_the_first_398_lines(data: Path, lines: list[str]) -> None:
    prompts = imagenet_animals(data)
    assert [prompt.split(" ", 1)[1] for prompt in prompts] == [line.split(",")[0] for line in lines[:398]]
    assert (prompts[0], prompts[-1]) == ("a tench", "a puffer")
    assert len(set(prompts)) == 398


def test_aesthetic_prompts_are_the_45_common_animals(data: Path) -> None:
    prompts = common_animals(data)
    assert len(set(prompts)) == 45
    assert (prompts[0], prompts[20], prompts[-1]) == ("a cat", "an ant", "a kangaroo")


def test_alignment_prompts_are_each_common_animal_in_each_activity(data: Path) -> None:
    prompts = animal_activities(data)
    assert len(set(prompts)) == 135
    assert prompts[:3] == ["a cat washing the dishes", "a cat riding a bike", "a cat playing chess"]
    assert "an ant playing chess" in prompts


def test_unseen_animals_are_no_kind_of_a_trained_one(data: Path, lines: list[str]) -> None:
    found = splits(data)
    unseen = found["unseen-animals"]
    assert set(unseen) <= set(imagenet_animals(data))
    assert not set(unseen) & set(found["trained"])
    assert {"a scorpion", "a snail", "a leopard", "an African elephant", "an otter", "a chimpanzee"} <= set(unseen)
    # In this order: by the last word, by a synonym, by another word, at the end of a word, and by kind alone.
    seen = {
        "a tiger shark", "a tabby", "a koala", "a cougar", "a hog", "a guinea pig", "a platypus", "a bullfrog",
        "a jellyfish", "a beagle", "a robin", "a tench", "a tarantula", "a monarch", "a timber wolf", "an ox",
    }  # fmt: skip
    assert seen <= set(imagenet_animals(data))
    assert not seen & set(unseen)
    # No word of any of its names is a trained animal.
    trained = {prompt.split(" ", 1)[1] for prompt in found["trained"]}
    names = {with_article(line.split(",")[0]): line for line in lines[:398]}
    words = {prompt: set(names[prompt].lower().replace(",", " ").replace("-", " ").split()) for prompt in unseen}
    assert {prompt for prompt in unseen if words[prompt] & trained} == set()
    assert len(unseen) == 75


def test_objects_are_neither_animals_nor_landscapes_people_and_plants(data: Path) -> None:
    objects = splits(data)["objects"]
    assert {"an abacus", "a teapot", "an hourglass", "sunglasses", "toilet tissue", "a banana"} <= set(objects)
    animals = {prompt.lower() for prompt in (*imagenet_animals(data), *common_animals(data))}
    assert not animals & {prompt.lower() for prompt in objects}  # not even "a crane" and "a mouse"
    others = {"a volcano", "a groom", "a daisy", "an acorn", "a teddy", "a spider web", "a hotdog", "an amphibian"}
    assert not others & set(objects)
    assert len(objects) == 559


def test_unseen_activities_are_none_of_the_trained_and_done_by_trained_animals(data: Path) -> None:
    unseen = splits(data)["unseen-activity"]
    assert not set(unseen) & set(animal_activities(data))
    assert len(set(unseen)) == 45 * len(UNSEEN_ACTIVITIES)
    assert unseen[0] == "a cat taking an exam"


def test_splits_of_the_alignment_task_differ_from_training_in_one_thing_each(data: Path) -> None:
    plain, doing = splits(data), activity_splits(data)
    activities = ("washing the dishes", "riding a bike", "playing chess")
    assert doing["trained"] == animal_activities(data)
    for kind in ("unseen-animals", "objects"):
        assert doing[kind] == [f"{noun} {activity}" for noun in plain[kind] for activity in activities]
    assert doing["unseen-activity"] == plain["unseen-activity"]


def test_splits_can_be_planned_and_are_the_same_every_time(data: Path) -> None:
    for make in (splits, activity_splits):
        prompts = make(data)
        assert list(prompts) == ["trained", "unseen-animals", "objects", "unseen-activity"]
        assert list(make(data).items()) == list(prompts.items())
        planned = plan(prompts)
        assert len(planned) == sum(len(texts) for texts in prompts.values())
        every = [image.prompt for image in planned]
        assert len(set(every)) == len(every)
