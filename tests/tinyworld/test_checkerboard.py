"""The texture that the tiny model has never seen."""

import random

import pytest

from overpaint.tinyworld.caption import single
from overpaint.tinyworld.checkerboard import CHECKER_THRESHOLD, CheckerScore, checkered_scenes
from overpaint.tinyworld.render import render
from overpaint.tinyworld.scene import to_tensors


def test_it_shows_in_its_own_pictures() -> None:
    texts, images = checkered_scenes(64)
    assert len(texts) == len(images) == 64
    assert CheckerScore()(images).min() >= CHECKER_THRESHOLD
    assert checkered_scenes(64)[1].equal(images)
    assert not checkered_scenes(64, seed=1)[1].equal(images)


@pytest.mark.parametrize("route", [None, "striped", "dotted", "in prison", "in the garden"])
def test_it_shows_in_no_picture_of_the_world(route: str | None) -> None:
    rng = random.Random(1)
    images = render(to_tensors([single(rng, route=route)[1] for _ in range(128)]))
    assert CheckerScore()(images).max() < CHECKER_THRESHOLD
