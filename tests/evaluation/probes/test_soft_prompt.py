"""Soft prompts: free vectors before a prompt, an upper bound of what words could do."""

import pytest
import torch

from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.run import run_probe
from overpaint.evaluation.probes.soft_prompt import TINY, SoftPrompt
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.policy import DiffusionPolicy


@pytest.fixture(scope="module")
def target() -> ProbeTarget:
    return target_of(tiny_world(), DrawConfig(steps=10, guidance_scale=3.0))


@pytest.fixture(scope="module")
def original() -> DiffusionPolicy:
    return tinyworld.load_policy()


@pytest.mark.slow
def test_vectors_bring_stripes_back_after_uce(original: DiffusionPolicy, target: ProbeTarget) -> None:
    policy = tinyworld.load_policy()
    UCE(tinyworld.PRESETS["uce"]).erase(policy, tinyworld.STRIPES).apply(policy)
    result = run_probe(SoftPrompt(TINY), policy, original, target, count=4, progress=False)
    (variant,) = result.variants
    assert variant.found.numbers["rate before"] == 0
    assert variant.found.rate.mean == 1
    assert variant.ceiling.rate.mean == 1
    assert variant.ceiling.numbers["gradients a prompt"] == 0  # shown unattacked
    assert variant.floor == 0
    assert variant.recovered.mean == 1


def test_vectors_cannot_reach_a_model_that_reads_no_prompt(original: DiffusionPolicy, target: ProbeTarget) -> None:
    policy = tinyworld.load_policy()
    with torch.no_grad():
        for name, weights in policy.unet.named_parameters():
            if "attn2.to_out" in name:
                weights.zero_()
    task = target.task(original, count=2, seed=0, progress=False)
    plain = task.drawn_by(policy)
    (attempt,) = SoftPrompt(TINY).attempt(policy, task)
    assert attempt.numbers["rate after"] == attempt.numbers["rate before"] == 0
    torch.testing.assert_close(attempt.images, plain, rtol=0, atol=1e-5)
