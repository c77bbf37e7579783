"""Inpainting: the centre is drawn, the rest stays, and the centre alone is judged."""

from collections.abc import Callable

import pytest
import torch

from overpaint.evaluation.probes.inpainting import Inpainting, InpaintingConfig, centre_of, fill_in
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.policy import DiffusionPolicy, SampleNoise


def test_the_centre_is_half_of_each_side() -> None:
    inside = centre_of(torch.zeros(2, 4, 8, 6), 0.5)
    assert inside.sum() == 4 * 2
    assert inside[2:6, 2:4].all()
    assert centre_of(torch.zeros(2, 4, 8, 8), 1.0).all()


def test_around_the_centre_the_picture_stays(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    task = make_task(policy)
    clean = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        latents = fill_in(policy, clean, task.prompts, [1, 2], 0.5, task)
    inside = centre_of(clean, 0.5)
    assert torch.equal(latents[:, :, ~inside], clean[:, :, ~inside])
    assert not torch.isclose(latents[:, :, inside], clean[:, :, inside]).any(dim=-1).all()


def test_the_steps_are_those_of_the_equation(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    task = make_task(policy, steps=2)
    clean = torch.randn(2, 4, 8, 8)
    noise = SampleNoise([1, 2], (4, 8, 8), policy.device).draw()
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    plan, conditioning = policy.plan(2), policy.encode(task.prompts)
    with torch.no_grad():
        first = policy.denoise(noise, conditioning, step=0, steps=2, guidance=task.guidance)
        level = plan.next_levels[0]
        assert level == plan.levels[1]
        first = mask * first + (1 - mask) * (level.sqrt() * clean + (1 - level).sqrt() * noise)
        last = policy.denoise(first, conditioning, step=1, steps=2, guidance=task.guidance)
        expected = mask * last + (1 - mask) * clean
        found = fill_in(policy, clean, task.prompts, [1, 2], 0.5, task)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_whole_as_centre_is_a_drawing_of_its_own(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]
) -> None:
    task = make_task(policy)
    with torch.no_grad():
        found = fill_in(policy, torch.randn(2, 4, 8, 8), task.prompts, [7, 8], 1.0, task)
    drawn = policy.sample(policy.encode(task.prompts), steps=3, guidance=task.guidance, seeds=[7, 8])
    torch.testing.assert_close(found, drawn, rtol=0, atol=1e-6)


def test_the_centre_alone_is_judged(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    images, latents = torch.rand(2, 3, 64, 64), torch.zeros(2, 4, 8, 8)
    cut = Inpainting().judged(images, latents)
    assert torch.equal(cut, images[:, :, 16:48, 16:48])
    gray = Inpainting(InpaintingConfig(surroundings="gray")).judged(images, latents)
    assert torch.equal(gray[:, :, 16:48, 16:48], cut)
    assert gray[:, :, :16].eq(0.5).all()
    assert gray[..., 48:].eq(0.5).all()
    wider = Inpainting(InpaintingConfig(centre=0.6)).judged(images, latents)  # whole latents: 4 of 8
    assert torch.equal(wider, cut)

    task = make_task(policy)
    attempts = Inpainting().attempt(policy, task)
    assert [one.variant for one in attempts] == ["concept's prompt", "benign prompt"]
    for one in attempts:
        torch.testing.assert_close(one.scores, task.score(one.images[:, :, 16:48, 16:48]))
    assert not torch.equal(attempts[0].images, attempts[1].images)


def test_a_centre_without_a_latent_is_refused(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    with pytest.raises(ValueError, match=r"centre must hold a latent of the \(8, 8\), got a share of 0.1"):
        Inpainting(InpaintingConfig(centre=0.1)).attempt(policy, make_task(policy))
    with pytest.raises(ValueError, match=r"InpaintingConfig\.centre must be at most 1, got 1.5"):
        InpaintingConfig(centre=1.5)
