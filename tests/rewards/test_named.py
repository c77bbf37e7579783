"""Rewards by name."""

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import (
    FACTORIES,
    CLIPScore,
    FunctionReward,
    ImageReward,
    Incompressibility,
    RemoteReward,
    reward_named,
)

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MODULE = """
from functools import partial

from torch import nn

import {sibling}


def score(images, prompts):
    return images[:, 0].mean(dim=(1, 2))


def scaled(factor, images, prompts):
    return factor * score(images, prompts)


twice = partial(scaled, 2.0)
green = lambda images, prompts: images[:, 1].mean(dim=(1, 2))


class Blue:
    differentiable = True

    def __init__(self, weights=None, *, factor=1.0):
        self.weights, self.factor = weights, factor

    def __call__(self, images, prompts):
        return self.factor * images[:, 2].mean(dim=(1, 2))


class Network(nn.Module):
    def forward(self, images, prompts):
        return score(images, prompts)


class Needy(Blue):
    def __init__(self, path, size):
        pass


network = Network()
halved = Blue(factor=0.5)


def make(vocab=None, weights=None):
    reward = Blue(weights)
    reward.vocab = vocab
    return reward


def make_function():
    return score


def passed_on(*arguments, **options):
    return score(*arguments, **options)


async def later(images, prompts):
    return score(images, prompts)


def of_three(images, prompts, metadata):
    return score(images, prompts), {{}}


def make_nothing():
    pass


number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module of rewards that imports another."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sibling_of_it.py").write_text("")
    (tmp_path / "my_reward.py").write_text(MODULE.format(sibling="sibling_of_it"))
    return tmp_path


def mean(channel: int) -> Tensor:
    return IMAGES[:, channel].mean(dim=(1, 2))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("score", mean(0)),
        ("twice", 2 * mean(0)),
        ("green", mean(1)),
        ("Blue", mean(2)),
        ("halved", 0.5 * mean(2)),
        ("halved.__call__", 0.5 * mean(2)),
        ("Network", mean(0)),
        ("network", mean(0)),
        ("make", mean(2)),
        ("make_function", mean(0)),
        ("passed_on", mean(0)),
    ],
)
@pytest.mark.parametrize("place", ["my_reward", "my_reward.py", "./my_reward.py", "elsewhere/my_reward.py"])
def test_a_name_in_a_module_or_a_file_is_a_reward(name: str, expected: Tensor, place: str, folder: Path) -> None:
    if place.startswith("elsewhere"):
        (folder / "elsewhere").mkdir()
        for file in ("my_reward.py", "sibling_of_it.py"):
            (folder / file).rename(folder / "elsewhere" / file)
    reward = reward_named(f"{place}:{name}")
    assert torch.equal(reward(IMAGES, ["a", "b"]), expected)


def test_a_file_is_imported_once_and_hides_no_module_of_its_name(folder: Path) -> None:
    (folder / "rewards.py").write_text("runs = []\n\ndef score(images, prompts):\n    return [7.0] * len(prompts)\n")
    reward = reward_named(f"{folder}/rewards.py:score")
    assert reward(IMAGES, ["a", "b"]).tolist() == [7.0, 7.0]
    again = reward_named("rewards.py:score")
    assert isinstance(reward, FunctionReward)
    assert isinstance(again, FunctionReward)
    assert again.function is reward.function
    assert isinstance(reward_named("rewards.jpeg:Incompressibility"), Incompressibility)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_reward:later", "got later, which is a coroutine; from 'my_reward:later'"),
        ("my_reward:of_three", r"reward must be callable with .*, got of_three\(images, prompts, metadata\); from"),
        ("my_reward:Needy", "reward must name a class that needs no arguments, .* which needs path, size"),
        ("my_reward:make_nothing", "reward must be callable with .* got None; from 'my_reward:make_nothing'"),
        ("my_reward:number", "reward must be callable with .* got 3; from"),
        ("my_reward:scores", r"got 'my_reward:scores': .*my_reward\.py has no scores; did you mean score\?"),
        (
            "my_rewards:score",
            "reward must name a module, got 'my_rewards:score': no my_rewards where Python looks, nor",
        ),
        ("nowhere/my_reward.py:score", "reward must name a file that exists, .* there is no nowhere/my_reward.py"),
        ("my_reward.py", r"got 'my_reward\.py'; name what in it: my_reward\.py:score"),
        ("needs.py:score", "must name a module that can be imported, got .*: No module named 'nothing_of_this_name'"),
        ("needs:score", "must name a module that can be imported, got .*: No module named 'nothing_of_this_name'"),
        ("half:score", "must name a module that can be imported, got 'half:score': SyntaxError"),
        ("raising:score", "must name a module that can be imported, got 'raising:score': KeyError: 'HOME_OF_IT'"),
        ("builtins:dict", "reward must be callable with"),
        ("rewards.jpeg:Missing", "reward must name something that its module has"),
        ("rewards.jpeg", "reward must be one of .*, package.module:name or path/to/file.py:name, got 'rewards.jpeg'"),
        ("ImageReward", "got 'ImageReward'; did you mean image-reward\\?"),
        ("image_reward", "did you mean image-reward\\?"),
        ("opennfsw", "did you mean opennsfw\\?"),
        ("weights", "got 'weights'; the path of weights is given as reward_weights"),
    ],
)
def test_a_name_that_is_none_is_refused_in_words(name: str, message: str, folder: Path) -> None:
    (folder / "needs.py").write_text("import nothing_of_this_name\n")
    (folder / "half.py").write_text("def score(images\n")
    (folder / "raising.py").write_text("import os\nos.environ['HOME_OF_IT']\n")
    (folder / "weights").mkdir()
    with pytest.raises(ValueError, match=message):
        reward_named(name)


def test_an_error_of_a_factory_is_its_own(folder: Path) -> None:
    (folder / "failing.py").write_text("def make():\n    return len(3)\n")
    with pytest.raises(TypeError, match="has no len"):
        reward_named("failing:make")


def test_an_address_is_a_served_reward_with_the_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = reward_named("http://127.0.0.1:8085")
    assert isinstance(reward, RemoteReward)
    assert (reward.config.url, reward.config.token_variable) == ("http://127.0.0.1:8085", None)
    monkeypatch.setenv("OVERPAINT_TOKEN", "secret")
    reward = reward_named("https://rewards.example")
    assert isinstance(reward, RemoteReward)
    assert reward.config.token_variable == "OVERPAINT_TOKEN"


@pytest.mark.parametrize("name", FACTORIES)
def test_every_short_name_leads_to_something_that_can_be_called(name: str) -> None:
    assert callable(FACTORIES[name])


def test_further_short_names_are_the_callers() -> None:
    assert isinstance(reward_named("mine", {"mine": Incompressibility}), Incompressibility)
    with pytest.raises(ValueError, match=r"reward must be one of image-reward, .*, mine, an address"):
        reward_named("other", {"mine": Incompressibility})


# Weights and vocabulary


def test_weights_and_vocabulary_are_given_to_what_takes_them(reward: ImageReward, folder: Path) -> None:
    reward.save_pretrained(folder / "saved")
    loaded = reward_named("image-reward", weights=folder / "saved")
    assert isinstance(loaded, ImageReward)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in reward.state_dict().items())
    made: Any = reward_named("my_reward:make", weights="~/w", vocab=folder / "v")
    assert (made.weights, made.vocab) == (Path("~/w").expanduser(), folder / "v")
    instance: Any = reward_named("my_reward:Blue", weights=folder)
    assert instance.weights == folder


def test_the_weights_of_a_short_name_are_its_factorys_first_argument(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder of a CLIP checkpoint must hold config"):
        reward_named("clip", weights=folder)
    assert FACTORIES["clip"] == MethodType(vars(CLIPScore.load.__func__)["__wrapped__"], CLIPScore)  # unchecked


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "compressibility",
            "weights",
            "weights must be given to a reward that takes it, and compressibility takes none",
        ),
        ("nudenet", "weights", "nudenet takes none"),
        ("alignment", "weights", "alignment takes none"),
        ("clip", "vocab", "vocab must be given to a reward that takes it, and clip takes none"),
        ("my_reward:score", "weights", "my_reward:score takes none"),
        ("my_reward:halved", "vocab", "my_reward:halved takes none"),
        ("http://127.0.0.1:8085", "weights", "weights must be given to the server, and not beside its address"),
        ("tiny", "weights", "weights must be given to a reward that takes it, and tiny takes none"),
    ],
)
def test_weights_or_a_vocabulary_for_what_takes_none_are_refused(
    name: str, given: str, message: str, folder: Path
) -> None:
    paths: dict[str, Path] = {given: folder}
    with pytest.raises(ValueError, match=message):
        reward_named(name, {"tiny": Incompressibility}, **paths)
