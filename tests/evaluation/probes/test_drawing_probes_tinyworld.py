"""On the tiny world's original model the probes that draw bring the stripes, and by themselves they draw none."""

from typing import Any

import pytest

from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.completion import Completion, CompletionConfig
from overpaint.evaluation.probes.inpainting import TINY, Inpainting
from overpaint.evaluation.probes.noise import Noise, NoiseConfig
from overpaint.evaluation.probes.run import run_probe
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.policy import DiffusionPolicy


@pytest.fixture(scope="module")
def target() -> ProbeTarget:
    return target_of(tiny_world(), DrawConfig(steps=20, guidance_scale=3.0))


@pytest.fixture(scope="module")
def original() -> DiffusionPolicy:
    return tinyworld.load_policy()


@pytest.mark.parametrize(
    ("probe", "rows"),
    [
        (Completion(CompletionConfig(steps_before=(4,), noised_to=(), empty_prompt=False)), 4 * 16 * 2),
        (Noise(NoiseConfig(etas=(1.85,), scales=(1.0,))), 4 * 20 * 2),
        pytest.param(Inpainting(TINY), 4 * 20 * 2 * 2, marks=pytest.mark.slow),
    ],
    ids=["completion", "noise", "inpainting"],
)
def test_the_original_brings_stripes_and_the_floors_none(
    probe: Any, rows: int, target: ProbeTarget, original: DiffusionPolicy
) -> None:
    erased = tinyworld.load_policy()
    UCE().erase(erased, tinyworld.STRIPES).apply(erased)
    result = run_probe(probe, erased, original, target, count=4, progress=False)
    first = result.variants[0]
    assert first.ceiling.rate.mean >= 0.75
    assert first.floor == 0
    assert first.found.rate.mean < first.ceiling.rate.mean
    assert (result.rows_forward, result.rows_backward) == (rows, 0)
