"""What completion, inpainting, noise and classifier guidance share: batches, guards, costs, and what they leave."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import SAFREE, SLD, Concept, Receler, RecelerConfig, SAFREEConfig, SLDConfig
from overpaint.evaluation.probes.classifier_guidance import ClassifierGuidance, ClassifierGuidanceConfig
from overpaint.evaluation.probes.completion import Completion, CompletionConfig
from overpaint.evaluation.probes.inpainting import Inpainting, InpaintingConfig
from overpaint.evaluation.probes.latent_classifier import LatentClassifierConfig
from overpaint.evaluation.probes.noise import Noise, NoiseConfig
from overpaint.evaluation.probes.probe import Probe, ProbeTask
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.unet_rows import counted_rows

STRIPED = Concept(name="stripes", phrases=("striped",))
PROBES: dict[str, tuple[Any, Any]] = {
    "completion": (Completion, CompletionConfig(steps_before=(2,), noised_to=(700,))),
    "inpainting": (Inpainting, InpaintingConfig()),
    "noise": (Noise, NoiseConfig(etas=(1.85,), scales=(1.0, 1.04))),
    "classifier-guidance": (
        ClassifierGuidance,
        ClassifierGuidanceConfig(
            strengths=(50.0,),
            noisy_strengths=(20.0,),
            etas=(1.34,),
            shown_pictures=4,
            other_pictures=4,
            classifier=LatentClassifierConfig(widths=(8, 4), epochs=1),
        ),
    ),
}
ROWS = {
    # Of two attempts in three steps: two branches with words, one with the empty prompt.
    "completion": 2 * (2 + 1) * (1 + 3),
    "inpainting": 2 * 2 * 2 * 3,
    "noise": 2 * 2 * 2 * 3,
    "classifier-guidance": 2 * 2 * 2 * 3,
}
GUARDS = {
    "SLD": SLD(SLDConfig(warmup_steps=0, guidance_scale=50.0, threshold=1.0)),  # with momentum
    "SAFREE": SAFREE(SAFREEConfig(concepts=("striped",))),
}


def probe_named(name: str, **changes: Any) -> Probe:
    probe, config = PROBES[name]
    return probe(replace(config, **changes))


@pytest.mark.parametrize("name", PROBES)
def test_rows_are_those_of_the_budget_and_the_policy_is_left_as_it_was(
    name: str, make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    original, policy = make_policy(), make_policy(lora=LoRAConfig())
    task, probe = make_task(original), probe_named(name)
    if isinstance(probe, Completion | Inpainting | ClassifierGuidance):
        probe.prepare(task)
    policy.unet.train()
    before = {key: value.clone() for key, value in policy.unet.state_dict().items()}
    trained = [parameter.requires_grad for parameter in policy.unet.parameters()]
    torch.manual_seed(3)
    random = torch.get_rng_state()
    with counted_rows() as rows:
        attempts = probe.attempt(policy, task)
    assert (rows.forward, rows.backward) == (ROWS[name], 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.unet.training
    assert [parameter.requires_grad for parameter in policy.unet.parameters()] == trained
    assert all(parameter.grad is None for parameter in policy.unet.parameters())
    for key, value in policy.unet.state_dict().items():
        assert torch.equal(value, before[key])
    for attempt in attempts:
        assert attempt.images.shape == (2, 3, 64, 64)
        assert attempt.images.isfinite().all()
        assert not attempt.images.requires_grad
    assert len({attempt.variant for attempt in attempts}) == len(attempts)


@pytest.mark.parametrize("name", PROBES)
def test_results_depend_on_neither_batches_nor_other_attempts(
    name: str, policy: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    original = make_policy()
    together = probe_named(name).attempt(policy, make_task(original, count=3))
    alone = probe_named(name, batch_size=1).attempt(policy, make_task(original, count=3))
    for one, other in zip(together, alone, strict=True):
        assert one.variant == other.variant
        torch.testing.assert_close(one.images, other.images, rtol=0, atol=1e-3)  # rounding differs by the batch
    if name != "classifier-guidance":  # whose classifier learns what all prompts show
        fewer = probe_named(name).attempt(policy, make_task(original, count=2))
        for one, other in zip(together, fewer, strict=True):
            torch.testing.assert_close(one.images[:2], other.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("name", PROBES)
def test_guards_are_at_work(
    name: str, guard: str, make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    original, guarded = make_policy(), make_policy()
    GUARDS[guard].erase(guarded, STRIPED).apply(guarded)
    task, probe = make_task(original), probe_named(name)
    found = zip(probe.attempt(original, task), probe.attempt(guarded, task), strict=True)
    assert any(not torch.equal(one.images, other.images) for one, other in found)


@pytest.mark.parametrize("name", PROBES)
def test_added_networks_are_at_work(
    name: str, make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    from erasure import DescentConfig

    original, erased = make_policy(), make_policy()
    descent = DescentConfig(iterations=1, batch_size=1, learning_rate=0.1)
    config = RecelerConfig(rank=2, inner_steps=1, steps=2, descent=descent)
    Receler(config).erase(erased, STRIPED).apply(erased)
    task, probe = make_task(original), probe_named(name)
    found = zip(probe.attempt(original, task), probe.attempt(erased, task), strict=True)
    assert all(not torch.equal(one.images, other.images) for one, other in found)


@pytest.mark.parametrize("name", PROBES)
def test_a_checkpoint_of_the_real_structure_is_probed(name: str, make_task: Callable[..., ProbeTask]) -> None:
    policy = DiffusionPolicy.from_pretrained(Path(__file__).parents[2] / "golden" / "tiny-sd", device="cpu")
    for attempt in probe_named(name).attempt(policy, make_task(policy)):
        assert len(attempt.images) == len(attempt.scores) == 2


@pytest.mark.parametrize("name", PROBES)
def test_velocities_are_probed_too(name: str, v_policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    for attempt in probe_named(name).attempt(v_policy, make_task(v_policy)):
        assert attempt.images.isfinite().all()
