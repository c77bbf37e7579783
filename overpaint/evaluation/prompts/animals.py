"""Animals, the prompts of DDPO's tasks, and what is new in others to a policy that was trained on them.

The lists are other people's files, fetched when first used. Source: Black et al. (2023), https://arxiv.org/abs/2305.13301.
"""

import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from overpaint.text_files import read_text, text_lines
from rewards.public_files import PublicFile, fetch

from .articles import with_article
from .sets import github_file


def _ddpo(name: str, sha256: str) -> PublicFile:
    path = f"1958463f020112c9a7bc85768d296daacc2e1b4b/ddpo_pytorch/assets/{name}"
    source = "of Black et al. (2023), https://arxiv.org/abs/2305.13301"
    return github_file("kvablack/ddpo-pytorch", path, name, sha256, "MIT", source)


IMAGENET_CLASSES = _ddpo("imagenet_classes.txt", "a40d9be82eb4738becd1dd69991b89f87f309975e860a6f3f45395d8c06a7e0d")
COMMON_ANIMALS = _ddpo("simple_animals.txt", "ee3d9b638ce2a40e896a34319af85709d3c1c3188da0b8feda739dcb7363188d")
ACTIVITIES = _ddpo("activities.txt", "00adcf51a3d74cfd180f9b389f57ea83dca4c5191911328b7b9c714952ad7558")

NUM_IMAGENET_ANIMALS = 398
"""The first lines of ImageNet's classes are the animals."""

KINDS_OF_COMMON_ANIMALS = (
    *range(0, 7), *range(389, 398),  # fish
    *range(7, 25), *range(80, 101), *range(127, 147),  # birds
    *range(30, 33),  # frogs
    *range(33, 38),  # turtles
    *range(38, 49),  # lizards
    *range(52, 69),  # snakes
    *range(72, 78),  # spiders
    *range(147, 149),  # whales
    *range(151, 276),  # dogs, wolves and wild dogs
    *range(277, 281),  # foxes
    *range(281, 286),  # cats
    *range(294, 298),  # bears
    *range(300, 308),  # beetles
    *range(321, 327),  # butterflies
    339, 342, 343, 345, 348, 350,  # a horse, two wild pigs, cattle, a sheep, a wild goat
    *range(370, 383),  # monkeys
)  # fmt: skip
"""Lines of ImageNet's classes, counted from 0, that are kinds of common animals, many without saying so (beagle)."""
READ_AS_ANOTHER = (313, 408, 724, 751)
"""Lines whose first name alone is read as another thing, animal or person: walking stick, amphibian, pirate, racer."""
NO_THINGS = range(970, 999)
"""Lines of ImageNet's classes that are landscapes, people, plants and fungi."""

UNSEEN_ACTIVITIES = (
    "taking an exam", "baking a cake", "reading a newspaper", "painting a picture", "playing the piano",
    "flying a kite",
)  # fmt: skip
"""What no policy is trained on; the first is the one of Black et al. (2023), the others were made for this project."""


def imagenet_animals(folder: Path | None = None) -> list[str]:
    """Returns the prompts of the compression tasks: ImageNet's 398 animals, such as "a tench".

    Two departures from the authors' code, whose prompt is the whole line as it stands ("tench, Tinca tinca"): only the
    first of its names is taken, and it has an article. A few first names alone mean something else first ("crane").
    """
    return [with_article(names[0]) for names in _imagenet(folder)[:NUM_IMAGENET_ANIMALS]]


def common_animals(folder: Path | None = None) -> list[str]:
    """Returns the prompts of the aesthetic task: 45 common animals, such as "a cat".

    A departure from the authors' code, whose prompt is the bare noun: it has an article.
    """
    return [with_article(animal) for animal in _lines(COMMON_ANIMALS, folder)]


def animal_activities(folder: Path | None = None) -> list[str]:
    """Returns the prompts of the alignment task: each common animal in three activities, as "an ant playing chess"."""
    return _doing(common_animals(folder), _lines(ACTIVITIES, folder))


def splits(folder: Path | None = None) -> dict[str, list[str]]:
    """Returns prompts by what is new in them to a policy that was trained on the common animals.

    Unseen animals are those of ImageNet that are no kind of a common animal, and none of whose names has one in it
    (a tiger cat and a bullfrog are seen). Objects are ImageNet's other lines without landscapes, people, plants
    and fungi, and without those named after an animal. Kinds and prompts are always in the same order.

    The questions are those of Black et al. (2023); the lists and five of the six unseen activities are this project's.
    """
    return {
        "trained": common_animals(folder),
        "unseen-animals": _unseen_animals(folder),
        "objects": _objects(folder),
        "unseen-activity": _doing(common_animals(folder), UNSEEN_ACTIVITIES),
    }


def activity_splits(folder: Path | None = None) -> dict[str, list[str]]:
    """Returns what `splits` does for a policy that was trained on the common animals in their three activities.

    Unseen animals and objects are in the trained activities, trained animals in unseen ones.
    """
    trained = _lines(ACTIVITIES, folder)
    return {
        "trained": animal_activities(folder),
        "unseen-animals": _doing(_unseen_animals(folder), trained),
        "objects": _doing(_objects(folder), trained),
        "unseen-activity": _doing(common_animals(folder), UNSEEN_ACTIVITIES),
    }


def _unseen_animals(folder: Path | None) -> list[str]:
    common = _lines(COMMON_ANIMALS, folder)
    left_out = {*KINDS_OF_COMMON_ANIMALS, *READ_AS_ANOTHER}
    animals = enumerate(_imagenet(folder)[:NUM_IMAGENET_ANIMALS])
    return [with_article(names[0]) for k, names in animals if k not in left_out and not _has_any(names, common)]


def _objects(folder: Path | None) -> list[str]:
    common, classes = _lines(COMMON_ANIMALS, folder), _imagenet(folder)
    animals = {names[0].lower() for names in classes[:NUM_IMAGENET_ANIMALS]}
    left_out = {*range(NUM_IMAGENET_ANIMALS), *NO_THINGS, *READ_AS_ANOTHER}
    things = [names for k, names in enumerate(classes) if k not in left_out and not _has_any(names, common)]
    prompts = [with_article(names[0]) for names in things if names[0].lower() not in animals]
    return list(dict.fromkeys(prompts))  # two lines begin with the same name (maillot)


def _has_any(names: Iterable[str], animals: Iterable[str]) -> bool:
    """Says whether one of the animals is a word of one of the names, or the end of one as in "bullfrog"."""
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    # Short ones end many words that have nothing to do with them (elephant).
    return any(word == animal or (len(animal) > 3 and word.endswith(animal)) for word in words for animal in animals)


def _doing(nouns: Iterable[str], activities: Iterable[str]) -> list[str]:
    return [f"{noun} {activity}" for noun, activity in product(nouns, activities)]


def _imagenet(folder: Path | None) -> list[list[str]]:
    """Returns the names of each of ImageNet's classes; the first is the usual one."""
    return [line.split(", ") for line in _lines(IMAGENET_CLASSES, folder)]


def _lines(file: PublicFile, folder: Path | None) -> list[str]:
    return text_lines(read_text(fetch(file, folder)))
