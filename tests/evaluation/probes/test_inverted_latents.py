"""Inverted latents: a step turned round, its correction, and how likely the noises are."""

from collections.abc import Callable

import pytest
import torch

from erasure.methods.sld import SLDConfig, SLDGuard
from overpaint import tinyworld
from overpaint.evaluation.probes.inverted_latents import (
    InvertedLatents,
    InvertedLatentsConfig,
    coefficients,
    distance_from_noise,
    drawn_from,
    empty_prompts,
    inverted,
    noise_at,
    psnr,
)
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.digest import policy_record
from overpaint.policy.unet_rows import counted_rows

Make = Callable[..., DiffusionPolicy]
MakeTask = Callable[..., ProbeTask]


def noise(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_coefficients_by_hand() -> None:
    from_latents, from_noise = coefficients(torch.tensor(0.36), torch.tensor(0.64))
    assert from_latents.item() == pytest.approx(0.75)
    assert from_noise.item() == pytest.approx(0.8 - 0.75 * 0.6)


@pytest.mark.parametrize("kind", ["pipeline_dir", "v_pipeline_dir"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_step_is_turned_round(make_policy: Make, kind: str, step: int, request: pytest.FixtureRequest) -> None:
    """What leads from z_t to z_{t-1} leads back, with the noise that the policy sees at z_t."""
    policy = make_policy(path=request.getfixturevalue(kind))
    plan, empty, alone = policy.plan(4), empty_prompts(policy, 2), ClassifierFree(1.0)
    before = noise()
    with torch.no_grad():
        after = policy.denoise(before, empty, step=step, steps=4, guidance=alone)
        from_latents, from_noise = coefficients(plan.levels[step], plan.next_levels[step])
        seen = noise_at(policy, before, empty, step, 4)
    torch.testing.assert_close(from_latents * after + from_noise * seen, before, rtol=1e-4, atol=1e-4)


def test_updates_bring_pictures_back_more_closely() -> None:
    policy = tinyworld.load_policy()
    latents = policy.sample(policy.encode(["a striped red star"] * 2), steps=4, seeds=[0, 1])
    errors = []
    for updates in (0, 4):
        found = inverted(policy, latents, 4, updates=updates, learning_rate=0.05)
        errors.append((drawn_from(policy, found, 4) - latents).square().mean().item())
    assert errors[1] < 0.7 * errors[0]


def test_a_picture_is_inverted_as_it_would_be_alone(make_policy: Make) -> None:
    policy = make_policy()
    together = inverted(policy, noise(3), 3, updates=2, learning_rate=0.05)
    alone = inverted(policy, noise(3)[2:], 3, updates=2, learning_rate=0.05)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)
    assert not together.requires_grad


def test_the_guard_of_the_policy_acts_in_both_directions(make_policy: Make) -> None:
    policy, bare = make_policy(), make_policy()
    config = SLDConfig(concept_text="striped", warmup_steps=0, momentum_scale=0.0, threshold=1.0)
    policy.guard = SLDGuard(config, policy.encode(["striped"]))
    assert not torch.allclose(inverted(policy, noise(), 3, updates=1), inverted(bare, noise(), 3, updates=1))
    assert not torch.allclose(drawn_from(policy, noise(), 3), drawn_from(bare, noise(), 3))


def test_a_guard_that_remembers_leaves_the_black_box(make_policy: Make, make_task: MakeTask) -> None:
    original, policy = make_policy(), make_policy()
    policy.guard = SLDGuard(SLDConfig(concept_text="striped"), policy.encode(["striped"]))
    with pytest.raises(ValueError, match="momentum needs the steps of one batch in their order"):
        InvertedLatents(InvertedLatentsConfig(updates=0)).attempt(policy, make_task(original))
    black = InvertedLatents(InvertedLatentsConfig(updates=0, boxes=("black",)))
    assert [attempt.variant for attempt in black.attempt(policy, make_task(original))] == ["black box"]


def test_both_boxes_leave_the_models_as_they_were(make_policy: Make, make_task: MakeTask) -> None:
    original, policy = make_policy(), make_policy(train="xattn")
    with torch.no_grad():
        policy.unet.conv_out.bias += 0.3
    records = policy_record(original), policy_record(policy)
    with counted_rows() as rows:
        config = InvertedLatentsConfig(updates=2, batch_size=1)
        white, black = InvertedLatents(config).attempt(policy, make_task(original))
    assert (policy_record(original), policy_record(policy)) == records
    assert all(parameter.grad is None for parameter in policy.unet.parameters())
    # Drawn are the pictures and the references, with guidance. Inverted and drawn again are both, and in the black box
    # the pictures alone.
    assert rows.forward == 2 * (2 * 3 * 2) + 3 * (2 * 3 * 2)
    assert rows.backward == 3 * (2 * 3) * 2
    assert (white.variant, list(white.numbers)) == ("white box", ["psnr", "reference psnr", "distance"])
    assert (black.variant, list(black.numbers)) == ("black box", ["psnr"])
    assert not white.images.equal(black.images)


def test_the_distance_of_true_noise_is_small_and_grows_with_its_length() -> None:
    assert distance_from_noise(noise(400)) < 1.5  # of a standard deviation of 11.3
    halves = 1.21 * noise(400).square().flatten(1).sum(dim=1).mean() / 2 - 128
    assert distance_from_noise(1.1 * noise(400)) == pytest.approx(halves.item(), rel=0.05)
    one = torch.full((1, 4, 1, 1), 2.0)
    assert distance_from_noise(one) == pytest.approx(8 - 3.3567 / 2, abs=1e-3)  # the median of χ² with 4 degrees


def test_psnr_by_hand() -> None:
    reference = torch.zeros(2, 3, 4, 4)
    assert psnr(torch.stack([reference[0] + 0.1, reference[1]]), reference).tolist() == pytest.approx([20.0, 100.0])
