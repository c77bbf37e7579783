"""The benchmark of generation compares like with like, and its ratio is not far off."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from benchmarks import generation_cost
from benchmarks.generation_cost import Config
from benchmarks.timing import ratio
from overpaint.evaluation import DrawConfig, draw, plan
from overpaint.policy import DiffusionPolicy

PLANNED = plan({"benign": ["a red circle", "a blue dog", "a cat", "two dogs"]})
CONFIG = Config(images=4, batch_size=2, steps=3, repeats=2)


@pytest.fixture
def watched(make_policy: Callable[..., DiffusionPolicy]) -> tuple[DiffusionPolicy, list[Any]]:
    """A policy that notes the shapes of every call of its networks."""
    policy, seen = make_policy(), []
    unet, decoder = policy.unet.forward, policy.vae.decoder.forward

    def call_unet(latents: Tensor, timesteps: Tensor, **options: Any) -> Any:
        timestep = int(timesteps.flatten()[0])
        seen.append(("unet", tuple(latents.shape), tuple(options["encoder_hidden_states"].shape), timestep))
        return unet(latents, timesteps, **options)

    def call_decoder(latents: Tensor, *rest: Any) -> Any:
        seen.append(("vae", tuple(latents.shape)))
        return decoder(latents, *rest)

    policy.unet.forward, policy.vae.decoder.forward = call_unet, call_decoder
    return policy, seen


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_bare_calls_are_those_of_drawing(scale: float, watched: tuple[DiffusionPolicy, list[Any]]) -> None:
    policy, seen = watched
    config = Config(images=4, batch_size=2, steps=3, guidance_scale=scale, repeats=2)
    draw(policy, PLANNED, DrawConfig(steps=3, guidance_scale=scale), model="m", batch_size=2, progress=False)
    drawn = seen.copy()
    seen.clear()
    bare = generation_cost.BareCalls(policy, [image.prompt for image in PLANNED], config)
    bare()
    assert seen == drawn
    assert len(seen) == 2 * (3 + 1)


def test_folders_and_bare_calls_take_turns(make_policy: Callable[..., DiffusionPolicy]) -> None:
    times = generation_cost.measure(make_policy(), PLANNED, CONFIG)
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    assert min(*times["generate"], *times["bare"]) > 0


def test_the_ratio_of_the_tiny_world_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    times = generation_cost.main(Config(images=4, batch_size=4, steps=3, repeats=2))
    assert f"ratio    {ratio(times['generate'], times['bare']):.3f} (target: at most 1.05)" in capsys.readouterr().out


@pytest.mark.slow  # a ratio of times belongs on a quiet machine
def test_the_ratio_of_the_tiny_world_is_near_one() -> None:
    times = generation_cost.main(Config(images=32, batch_size=16, steps=20, repeats=5))
    assert 0.8 < ratio(times["generate"], times["bare"]) < 1.6


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="images must be a positive multiple of batch_size 16, got 20"):
        Config(images=20)
    with pytest.raises(ValueError, match="repeats must be at least 2, got 1"):
        Config(repeats=1)
