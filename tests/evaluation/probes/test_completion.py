"""Completion: what others began is finished, from the right step, with the right prompt."""

from collections.abc import Callable

import pytest
import torch

from overpaint.evaluation.probes.completion import Completion, CompletionConfig
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.evaluation.probes.seeds import seed_of
from overpaint.policy import DiffusionPolicy, SampleNoise


def test_the_original_completes_what_it_draws_anyway(
    make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    original = make_policy()
    task = make_task(original)
    attempts = Completion(CompletionConfig(steps_before=(1, 2), noised_to=())).attempt(original, task)
    assert [one.variant for one in attempts] == ["after 1 steps", "after 2 steps"]
    for one in attempts:
        assert torch.equal(one.images, task.pictures)


def test_the_first_steps_are_the_originals_and_the_rest_the_policys(
    make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    original, policy = make_policy(), make_policy()
    with torch.no_grad():
        policy.unet.conv_out.weight.mul_(0.5)
    task = make_task(original)
    (found,) = Completion(CompletionConfig(steps_before=(2,), noised_to=())).attempt(policy, task)
    conditioning = original.encode(task.prompts)
    half = original.sample(conditioning, steps=3, guidance=task.guidance, seeds=task.seeds, until=2)
    with torch.no_grad():
        latents = policy.denoise(half, policy.encode(task.prompts), step=2, steps=3, guidance=task.guidance)
        empty = policy.denoise(half, policy.encode(["", ""]), step=2, steps=3, guidance=task.guidance)
        torch.testing.assert_close(found.images, policy.decode(latents), rtol=0, atol=1e-6)
        rate = (task.score(policy.decode(empty)) >= task.shown_from).float().mean().item()
    assert found.numbers == {"empty prompt": rate}


def test_pictures_are_noised_to_the_nearest_visited_timestep(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]
) -> None:
    task = make_task(policy)
    visited = policy.plan(3).timesteps.tolist()
    (found,) = Completion(CompletionConfig(steps_before=(), noised_to=(visited[1] + 40,))).attempt(policy, task)
    seeds = [seed_of(f"completion from {visited[1] + 40}", seed) for seed in task.seeds]
    noise = SampleNoise(seeds, (4, 8, 8), policy.device).draw()
    (alpha,) = policy.process.levels(torch.tensor([visited[1]]))
    latents = alpha.sqrt() * policy.encode_images(task.pictures) + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        for step in (1, 2):
            latents = policy.denoise(latents, policy.encode(task.prompts), step=step, steps=3, guidance=task.guidance)
        torch.testing.assert_close(found.images, policy.decode(latents), rtol=0, atol=1e-5)
    assert found.variant == f"noised to {visited[1] + 40}"


def test_the_noisiest_start_counts_and_the_curve_has_all(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]
) -> None:
    task = make_task(policy, shown_from=0.0)
    (found,) = Completion(CompletionConfig(steps_before=(), noised_to=(700, 0, 300))).attempt(policy, task)
    assert found.variant == "noised to 700"
    assert found.curve == ((0.0, 1.0), (300.0, 1.0), (700.0, 1.0))
    assert found.numbers["completes half from"] == 700
    assert found.numbers["empty prompt from 300"] == 1
    never = make_task(policy, shown_from=2.0)
    (found,) = Completion(CompletionConfig(steps_before=(), noised_to=(300,))).attempt(policy, never)
    assert found.numbers["completes half from"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps_before": (), "noised_to": ()}, "steps_before or noised_to must hold something"),
        ({"steps_before": (0,)}, r"steps_before\[0\] must be at least 1, got 0"),
        ({"noised_to": (-1,)}, r"noised_to\[0\] must be at least 0, got -1"),
        ({"steps_before": (2, 2)}, "must hold each once"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompletionConfig(**config)


def test_what_the_task_has_no_room_for_is_refused(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    with pytest.raises(ValueError, match="steps_before must be below the task's 3 steps, got"):
        Completion(CompletionConfig(steps_before=(1, 3))).attempt(policy, make_task(policy))
    with pytest.raises(ValueError, match="noised_to must be below the 1000 timesteps of training, got"):
        Completion(CompletionConfig(steps_before=(1,), noised_to=(1000,))).attempt(policy, make_task(policy))
