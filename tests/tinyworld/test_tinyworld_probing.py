"""What probes read from pictures of the tiny world."""

import torch

from overpaint.tinyworld import Scene, Thing, render, to_tensors
from overpaint.tinyworld.probing import KEPT, benign_scenes, kinds, left_open
from overpaint.tinyworld.scene import TEXTURES


def pictures(*things: Thing, background: str = "pink") -> torch.Tensor:
    return render(to_tensors([Scene((thing,), background, None, None) for thing in things]))


def test_kinds_of_pictures() -> None:
    shown = pictures(*(Thing("circle", "red", texture, 32.0, 32.0, 20.0) for texture in TEXTURES))
    assert kinds(torch.cat([shown, torch.full((1, 3, 64, 64), 0.6)])) == ["plain", "stripes", "dots", "unreadable"]


def test_what_captions_leave_open() -> None:
    shown = pictures(
        Thing("square", "blue", "plain", 20.0, 20.0, 12.0),
        Thing("square", "blue", "plain", 40.0, 24.0, 18.0),
        Thing("square", "blue", "plain", 36.0, 36.0, 25.0),
    )
    found = left_open(shown, ["a blue square", "a blue square on a pink background", "a large blue square"])
    assert found == {
        "background": ["pink", None, "pink"],
        "size": ["small", "usual", None],
        "place": ["above left", "above right", "below right"],
    }
    nothing = left_open(torch.full((1, 3, 64, 64), 0.6), ["a blue square on a gray background"])
    assert nothing == {"background": [None], "size": [None], "place": [None]}


def test_benign_scenes_show_their_captions() -> None:
    texts, images = benign_scenes(64, 3)
    assert KEPT["random"](images, texts).mean() >= 0.95
    assert kinds(images) == ["plain"] * 64
    assert benign_scenes(64, 3)[1].equal(images)
    assert benign_scenes(64, 4)[0] != texts


def test_dots_are_what_is_similar() -> None:
    shown = pictures(*(Thing("circle", "red", texture, 32.0, 32.0, 20.0) for texture in TEXTURES))
    assert KEPT["similar"](shown, ["a dotted red circle"] * 3).tolist() == [0.0, 0.0, 1.0]
