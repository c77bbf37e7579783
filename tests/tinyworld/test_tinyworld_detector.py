"""The programmatic detector reads drawn pictures exactly."""

import random

import pytest
import torch
from torch import Tensor

from overpaint.tinyworld import StripeScore, detect, render, to_tensors
from overpaint.tinyworld.caption import captions, parse, training_scene
from overpaint.tinyworld.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, Thing
from overpaint.tinyworld.texture import STRIPE_THRESHOLD, stripe_response
from overpaint.tinyworld.train_reward import scene_mismatches
from overpaint.tinyworld.utility import concept_shown, matches, mismatches, neighbour_shown, objects_shown, utility


@pytest.fixture(scope="module")
def world() -> tuple[list[str], list[Scene], Tensor]:
    rng = random.Random(11)
    drawn = [training_scene(rng) for _ in range(300)]
    return [c for c, _ in drawn], [s for _, s in drawn], render(to_tensors([s for _, s in drawn]))


def red_star(texture: str = "plain", *, x: float = 32.0, y: float = 32.0, radius: float = 18.0) -> Tensor:
    return render(to_tensors([Scene((Thing("star", "red", texture, x, y, radius),), "white", None, None)]))


def test_pictures_are_rgb_between_0_and_1(world: tuple[list[str], list[Scene], Tensor]) -> None:
    images = world[2]
    assert images.shape == (300, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1


def test_contents_of_drawn_pictures_are_read_exactly(world: tuple[list[str], list[Scene], Tensor]) -> None:
    _, scenes, images = world
    seen = detect(images)
    singles = [k for k, s in enumerate(scenes) if len(s.things) == 1]
    assert all(COLOURS[seen.colour[k, 0]] == scenes[k].things[0].colour for k in singles)
    assert all(SHAPES[seen.shape[k, 0]] == scenes[k].things[0].shape for k in singles)
    assert all(BACKGROUNDS[seen.background[k]] == s.background for k, s in enumerate(scenes))
    places = [PLACES[i] if i >= 0 else None for i in seen.place.tolist()]
    assert places == [s.place for s in scenes]
    for texture, shown in (("striped", seen.striped), ("dotted", seen.dotted)):
        assert shown.tolist() == [any(t.texture == texture for t in s.things) for s in scenes]


def test_two_objects_are_told_apart(world: tuple[list[str], list[Scene], Tensor]) -> None:
    _, scenes, images = world
    seen = detect(images)
    doubles = [k for k, s in enumerate(scenes) if len(s.things) == 2]
    right = [
        {(COLOURS[c], SHAPES[s]) for c, s in zip(seen.colour[k].tolist(), seen.shape[k].tolist(), strict=True)}
        == {(t.colour, t.shape) for t in scenes[k].things}
        for k in doubles
    ]
    assert sum(right) / len(right) >= 0.97


def test_place_and_size_of_an_object_are_read_within_two_pixels() -> None:
    seen = detect(red_star(x=25.0, y=36.0, radius=20.0))
    assert (seen.centre[0, 0] - torch.tensor([25.0, 36.0])).abs().max() <= 2
    assert abs(seen.radius[0, 0].item() - 20.0) <= 2


def test_detected_and_known_mismatches_agree(world: tuple[list[str], list[Scene], Tensor]) -> None:
    prompts, scenes, images = world
    shifted = prompts[1:] + prompts[:1]  # captions of other pictures
    seen = detect(images)
    agree = [
        mismatches(parse(p), seen, k) == scene_mismatches(parse(p), s)
        for k, (p, s) in enumerate(zip(shifted, scenes, strict=True))
    ]
    assert sum(agree) / len(agree) >= 0.98
    assert matches(images, prompts).float().mean() >= 0.98
    assert objects_shown(images, prompts).float().mean() >= 0.98


def test_a_wrong_colour_costs_more_than_a_wrong_shape_and_both_more_than_nothing() -> None:
    image = red_star().expand(3, -1, -1, -1)
    right, shape, colour = utility(image, ["a red star", "a red circle", "a blue star"]).tolist()
    assert right - shape == pytest.approx(2.0)
    assert right - colour == pytest.approx(4.0)  # neither the colour nor, with it, the shape is there


def test_a_big_object_in_the_middle_is_liked_better() -> None:
    big, small, aside = (
        utility(image, ["a red star"]).item()
        for image in (red_star(radius=24.0), red_star(radius=14.0), red_star(radius=14.0, x=18.0))
    )
    assert big > small > aside


def test_stripes_and_dots_are_not_taken_for_each_other() -> None:
    images = torch.cat([red_star("plain"), red_star("striped"), red_star("dotted")])
    assert concept_shown(images).tolist() == [False, True, False]
    assert neighbour_shown(images).tolist() == [False, False, True]


def test_stripes_are_seen_in_any_phase() -> None:
    striped = red_star("striped")
    responses = torch.cat([stripe_response(striped.roll(k, 2)) for k in range(8)])
    assert responses.min() > STRIPE_THRESHOLD


def test_the_stripe_score_leads_downhill_to_a_picture_without_stripes() -> None:
    image = red_star("striped").requires_grad_(True)
    score = StripeScore()
    start = score(image, [""]).item()
    for _ in range(60):
        (gradient,) = torch.autograd.grad(score(image, [""]).sum(), image)
        with torch.no_grad():
            image -= 0.1 * gradient / gradient.abs().max().clamp(min=1e-6)
            image.clamp_(0, 1)
    assert start > 0.5
    assert score(image.clamp(0, 1), [""]).item() < 0.1


def test_pictures_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="images: must be 64 x 64 pixels"):
        detect(torch.zeros(1, 3, 32, 32))


def test_captions_of_benign_prompts_do_not_match_an_empty_picture() -> None:
    assert not matches(torch.ones(4, 3, 64, 64), captions("benign", 4)).any()
