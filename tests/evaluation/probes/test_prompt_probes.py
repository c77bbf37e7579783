"""What textual inversion and attacks on prompts have in common: what they descend, and what they leave alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import SAFREE, SLD, Concept, SAFREEConfig, SLDConfig
from overpaint.evaluation.probes.adversarial_prompt import AdversarialPrompt, AdversarialPromptConfig
from overpaint.evaluation.probes.noise_error import noise_error, single_steps
from overpaint.evaluation.probes.probe import Probe, ProbeTask
from overpaint.evaluation.probes.prompt_attack import AttackConfig
from overpaint.evaluation.probes.soft_prompt import SoftPrompt, SoftPromptConfig
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.evaluation.probes.textual_inversion import TextualInversion, TextualInversionConfig
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.policy.unet_rows import counted_rows

CONCEPT = Concept(name="stripes", phrases=("striped",))
PROMPTS = ["a striped red circle", "a striped blue square", "one striped dog"]
ATTACK = AttackConfig(timesteps=(500, 900), updates=2, batch_size=2)
PROBES = {
    "textual inversion": TextualInversion(
        TextualInversionConfig(vectors=(1, 2), initial_text="a", updates=2, batch_size=2)
    ),
    "simplex": AdversarialPrompt(AdversarialPromptConfig(tokens=2, attack=ATTACK)),
    "nearest": AdversarialPrompt(
        AdversarialPromptConfig(tokens=2, form="nearest", attack=replace(ATTACK, target="original"))
    ),
    "soft": SoftPrompt(SoftPromptConfig(vectors=2, initial_text="a", attack=ATTACK)),
}


def brightness(images: Images) -> PerSample:
    return images.mean(dim=(1, 2, 3))


def task_of(original: DiffusionPolicy, count: int = 3, shown_from: float = 2.0) -> ProbeTask:
    """Nothing shows that is to be brought back: brightness is at most 1."""
    target = ProbeTarget(
        name="brightness",
        concept=CONCEPT,
        prompts=lambda kind, count, seed: PROMPTS[:count],
        template=lambda prompt: prompt.replace("striped", "{}"),
        score=brightness,
        shown_from=shown_from,
        steps=2,
        guidance_scale=3.0,
    )
    return target.task(original, count=count, seed=0, progress=False)


def test_the_error_is_that_of_the_noise_seen(policy: DiffusionPolicy) -> None:
    clean, noise = torch.randn(2, 2, 4, 8, 8).unbind()
    timesteps, encoded = torch.tensor([10, 900]), policy.encode(PROMPTS[:2])
    alphas = (
        torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().neg().add(1).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    )
    noised = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    error = noise_error(policy, policy.add_noise(clean, noise, timesteps), timesteps, encoded, noise)
    seen = policy.unet(noised, timesteps, encoder_hidden_states=encoded.tokens).sample
    torch.testing.assert_close(error, ((seen - noise) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PROBES)
def test_the_policy_is_left_as_it_was(make_policy: Callable[..., DiffusionPolicy], name: str) -> None:
    policy = make_policy(train="xattn")
    task = task_of(policy)
    networks = (policy.unet, policy.vae, policy.text_encoder)
    before = [{key: value.clone() for key, value in one.state_dict().items()} for one in networks]
    trained = {key for key, value in policy.unet.named_parameters() if value.requires_grad}
    policy.unet.train()
    PROBES[name].attempt(policy, task)
    assert policy.unet.training
    assert {key for key, value in policy.unet.named_parameters() if value.requires_grad} == trained
    for network, state in zip(networks, before, strict=True):
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("name", PROBES)
def test_rows_are_those_of_pictures_and_updates(policy: DiffusionPolicy, name: str) -> None:
    task = task_of(policy)
    assert len(task.pictures) == 3
    with counted_rows() as rows:
        PROBES[name].attempt(policy, task)
    pictures = 3 * 2 * 2  # prompts, steps, branches of guidance
    if name == "textual inversion":  # on the original model white box and black box are one
        assert (rows.forward, rows.backward) == (2 * pictures, 2 * 2 * 2)
    else:  # unattacked, and after each of two timesteps
        targets = 2 * 2 * 3 if name == "nearest" else 0
        assert (rows.forward, rows.backward) == (3 * pictures + targets, 2 * 2 * 3)


@pytest.mark.parametrize("name", PROBES)
def test_equal_seeds_give_equal_pictures(policy: DiffusionPolicy, name: str) -> None:
    first = PROBES[name].attempt(policy, task_of(policy))
    torch.manual_seed(5)
    second = PROBES[name].attempt(policy, task_of(policy))
    assert all(torch.equal(one.images, other.images) for one, other in zip(first, second, strict=True))


def with_batch_size(probe: Any, batch_size: int) -> Any:
    attack = replace(probe.config.attack, batch_size=batch_size)
    return type(probe)(replace(probe.config, attack=attack))


@pytest.mark.parametrize("name", ["simplex", "nearest", "soft"])
def test_an_attack_does_not_depend_on_the_others(policy: DiffusionPolicy, name: str) -> None:
    (alone,) = PROBES[name].attempt(policy, task_of(policy, count=1))
    (three,) = PROBES[name].attempt(policy, task_of(policy))
    (apart,) = with_batch_size(PROBES[name], 1).attempt(policy, task_of(policy))
    torch.testing.assert_close(three.images[:1], alone.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(three.images, apart.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["simplex", "soft"])
def test_prompts_that_show_the_concept_are_not_attacked(policy: DiffusionPolicy, name: str) -> None:
    plain = brightness(task_of(policy).drawn_by(policy))
    middle = float(plain.median())
    task = task_of(policy, shown_from=middle)
    with counted_rows() as rows:
        (attempt,) = PROBES[name].attempt(policy, task)
    assert attempt.numbers["rate before"] == pytest.approx(2 / 3)
    assert attempt.numbers["rate after"] == pytest.approx(float((attempt.scores >= middle).float().mean()))
    assert rows.backward in (2, 4)  # one prompt, at one timestep or at both
    assert attempt.curve[0] == (0, pytest.approx(2 / 3))
    assert (attempt.scores >= plain).all()


def test_they_run_on_a_checkpoint_of_the_real_structure() -> None:
    policy = DiffusionPolicy.from_pretrained(Path(__file__).parents[2] / "golden" / "tiny-sd", device="cpu")
    for probe in PROBES.values():
        attempts = probe.attempt(policy, task_of(policy, count=2))
        assert all(torch.isfinite(attempt.scores).all() for attempt in attempts)


def test_a_network_of_velocities_is_asked_for_noise(v_policy: DiffusionPolicy) -> None:
    (attempt,) = PROBES["soft"].attempt(v_policy, task_of(v_policy))
    assert torch.isfinite(attempt.scores).all()


GUARDS = {
    "SLD": SLD(SLDConfig(warmup_steps=0, guidance_scale=5000.0, threshold=1.0)),
    "SAFREE": SAFREE(SAFREEConfig(latent_reattention=False)),
}


@pytest.mark.parametrize(
    ("name", "guard"),
    [("textual inversion", "SLD"), ("textual inversion", "SAFREE"), ("simplex", "SLD"), ("soft", "SAFREE")],
)
def test_guards_are_at_work_and_stay(make_policy: Callable[..., DiffusionPolicy], name: str, guard: str) -> None:
    policy, task = make_policy(), task_of(make_policy(), count=2)
    plain = PROBES[name].attempt(policy, task)
    GUARDS[guard].erase(policy, CONCEPT).apply(policy)
    before = policy.guard
    guarded = PROBES[name].attempt(policy, task)
    assert policy.guard is before
    assert not any(torch.allclose(one.images, other.images) for one, other in zip(plain, guarded, strict=True))


def test_a_guard_with_momentum_predicts_at_any_step(policy: DiffusionPolicy) -> None:
    SLD(SLDConfig.strong()).erase(policy, CONCEPT).apply(policy)
    latents, encoded, timesteps = torch.randn(2, 4, 8, 8), policy.encode(PROMPTS[:2]), torch.tensor([10, 900])
    with pytest.raises(ValueError, match="momentum needs the steps"):
        noise_error(policy, latents, timesteps, encoded, latents)
    before = policy.guard
    with single_steps(policy):
        guarded = noise_error(policy, latents, timesteps, encoded, latents)
    assert policy.guard is before
    policy.guard = None
    assert (noise_error(policy, latents, timesteps, encoded, latents) != guarded).all()


def test_all_are_probes() -> None:
    assert all(isinstance(probe, Probe) for probe in PROBES.values())
