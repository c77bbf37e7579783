"""Images whose gradient reaches the policy through the last steps only."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig, SampleNoise
from overpaint.policy.unet_rows import counted_rows
from refl import ReFLConfig, one_step_images
from refl.one_step import image_calls

SEEDS = [11, 12, 13]
PROMPTS = ["a red circle", "a cat", "two blue squares"]


@pytest.fixture
def stirred(policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]) -> DiffusionPolicy:
    """A policy whose LoRA does something."""
    stir(policy)
    return policy


def noises(count: int) -> list[Tensor]:
    """The first draws of the samples' noise: initial latents, then one for each step."""
    noise = SampleNoise(SEEDS, (4, 8, 8), torch.device("cpu"))
    return [noise.draw() for _ in range(count)]


def gradient(policy: DiffusionPolicy, images: Tensor) -> Tensor:
    """Gradient of a number that no two pixels enter alike."""
    weights = torch.linspace(0.5, 1.5, images[0].numel()).view_as(images[0])
    grads = torch.autograd.grad((weights * images).mean(), policy.trainable_parameters())
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 3.0}, {"eta": 0.0}], ids=str)
def test_plain_refl_is_sampling_then_one_shot_prediction(
    stirred: DiffusionPolicy, small: Callable[..., ReFLConfig], changes: dict[str, Any]
) -> None:
    config = small(**changes)
    guidance = ClassifierFree(config.guidance_scale)
    conditioning = stirred.encode(PROMPTS)
    latents = stirred.sample(conditioning, steps=4, guidance=guidance, eta=config.eta, seeds=SEEDS, until=2)
    clean = stirred.predict_clean(latents, conditioning, step=2, steps=4, guidance=guidance)
    expected = stirred.decode(clean)
    images = one_step_images(stirred, PROMPTS, SEEDS, config, reward_step=2)
    assert torch.equal(images, expected)
    assert torch.equal(gradient(stirred, images), gradient(stirred, expected))


def test_two_graded_steps_are_differentiated_both(stirred: DiffusionPolicy, small: Callable[..., ReFLConfig]) -> None:
    conditioning, guidance = stirred.encode(PROMPTS), ClassifierFree(1.0)
    latents = stirred.sample(conditioning, steps=4, guidance=guidance, eta=1.0, seeds=SEEDS, until=2)
    noise = noises(4)[3]  # after the initial latents and the noises of steps 0 and 1
    latents = stirred.denoise(latents, conditioning, step=2, steps=4, guidance=guidance, eta=1.0, noise=noise)
    expected = stirred.decode(stirred.predict_clean(latents, conditioning, step=3, steps=4, guidance=guidance))
    images = one_step_images(stirred, PROMPTS, SEEDS, small(truncation_steps=2), reward_step=3)
    assert torch.equal(images, expected)
    assert torch.equal(gradient(stirred, images), gradient(stirred, expected))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_number_of_graded_steps_changes_the_gradient_and_not_the_images(
    stirred: DiffusionPolicy, small: Callable[..., ReFLConfig], eta: float
) -> None:
    drawn = [
        one_step_images(stirred, PROMPTS, SEEDS, small(truncation_steps=k, eta=eta), reward_step=3) for k in (1, 2, 3)
    ]
    for images in drawn[1:]:
        torch.testing.assert_close(images, drawn[0], rtol=0, atol=1e-6)
    grads = [gradient(stirred, images) for images in drawn]
    for one, other in ((0, 1), (1, 2)):
        assert (grads[one] - grads[other]).norm() > 1e-3 * grads[0].norm()


@pytest.mark.parametrize("truncation_steps", [1, 2])
def test_recomputing_steps_changes_nothing(
    stirred: DiffusionPolicy, small: Callable[..., ReFLConfig], truncation_steps: int
) -> None:
    settings = [small(truncation_steps=truncation_steps, checkpoint_steps=switch) for switch in (False, True)]
    kept, recomputed = (one_step_images(stirred, PROMPTS, SEEDS, config, reward_step=3) for config in settings)
    assert torch.equal(kept, recomputed)
    torch.testing.assert_close(gradient(stirred, recomputed), gradient(stirred, kept), rtol=1e-5, atol=1e-9)


def test_recomputed_steps_run_again_in_the_backward_pass(
    stirred: DiffusionPolicy, small: Callable[..., ReFLConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    network = stirred.network

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return network(*arguments, **options)

    monkeypatch.setattr(stirred, "network", counted)
    images = one_step_images(stirred, PROMPTS, SEEDS, small(truncation_steps=2, checkpoint_steps=True), reward_step=3)
    assert calls == [False, False, True, True]
    images.mean().backward()
    assert calls == [False, False, True, True, True, True]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_low_variance_noises_finished_images_anew(
    stirred: DiffusionPolicy, small: Callable[..., ReFLConfig], eta: float
) -> None:
    images = one_step_images(stirred, PROMPTS, SEEDS, small(low_variance_noises=2, eta=eta), reward_step=3)
    assert images.shape == (6, 3, 64, 64)

    conditioning, guidance = stirred.encode(PROMPTS), ClassifierFree(1.0)
    finished = stirred.sample(conditioning, steps=4, guidance=guidance, eta=eta, seeds=SEEDS)
    timesteps = stirred.plan(4).timesteps[3].expand(3)
    used = 5 if eta else 1  # the rollout's draws: initial latents, and the noises of the four steps
    for k, noise in enumerate(noises(used + 2)[used:]):
        noised = stirred.add_noise(finished, noise, timesteps)
        expected = stirred.decode(stirred.predict_clean(noised, conditioning, step=3, steps=4, guidance=guidance))
        # Six samples at once round differently from three.
        torch.testing.assert_close(images[k::2], expected, rtol=0, atol=1e-5)
    assert (images[0::2] != images[1::2]).any()
    assert gradient(stirred, images).abs().max() > 0


def test_image_does_not_depend_on_what_it_is_drawn_with(
    stirred: DiffusionPolicy, small: Callable[..., ReFLConfig]
) -> None:
    config = small(truncation_steps=2)
    together = one_step_images(stirred, PROMPTS, SEEDS, config, reward_step=3)
    alone = one_step_images(stirred, PROMPTS[2:], SEEDS[2:], config, reward_step=3)
    torch.testing.assert_close(alone, together[2:], rtol=0, atol=1e-5)


def test_weights_without_a_lora_get_the_gradient_too(
    make_policy: Callable[..., DiffusionPolicy], small: Callable[..., ReFLConfig]
) -> None:
    policy = make_policy(train="xattn", gradient_checkpointing=True)
    plain = make_policy(train="xattn")
    grads = [gradient(p, one_step_images(p, PROMPTS, SEEDS, small(), reward_step=2)) for p in (policy, plain)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-9)
    assert grads[0].abs().max() > 0


def test_frozen_parts_keep_no_gradient(
    make_policy: Callable[..., DiffusionPolicy], small: Callable[..., ReFLConfig]
) -> None:
    policy = make_policy(lora=LoRAConfig())
    one_step_images(policy, PROMPTS, SEEDS, small(), reward_step=3).mean().backward()
    with_gradient = {name for name, parameter in policy.unet.named_parameters() if parameter.grad is not None}
    assert with_gradient == set(policy.trainable_state())
    assert all(parameter.grad is None for part in (policy.vae, policy.text_encoder) for parameter in part.parameters())


@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_scale": 3.0}, {"truncation_steps": 3}, {"low_variance_noises": 2, "guidance_scale": 3.0}],
    ids=str,
)
def test_calls_are_as_many_as_stated(
    policy: DiffusionPolicy, small: Callable[..., ReFLConfig], changes: dict[str, Any]
) -> None:
    config = small(**changes)
    found = []
    for step in (2, 3):
        with counted_rows() as rows:
            one_step_images(policy, PROMPTS, SEEDS, config, reward_step=step)
        found.append([rows.forward, rows.backward])
    (first, second), stated = found, image_calls(config)
    assert first[0] + second[0] == 2 * 3 * stated.forward
    assert first[1] == second[1] == 3 * stated.backward
