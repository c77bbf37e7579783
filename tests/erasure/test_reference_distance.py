from collections.abc import Callable

import pytest
import torch

from erasure import NUDITY, UCE, ConceptBatch, ReferenceDistance, ReferenceDistanceConfig
from erasure.rollout import random_stops
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, LoRAConfig

OBJECTIVE = ReferenceDistance(ReferenceDistanceConfig(steps=4))
BATCH = ConceptBatch(["a naked person", "nude", "a nude person"], [3, 4, 5])
TRAINED = [pytest.param({"lora": LoRAConfig()}, id="lora"), pytest.param({"train": "xattn"}, id="weights")]


@pytest.fixture(params=TRAINED)
def erased(request: pytest.FixtureRequest, make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    """An erased policy, ready to be trained."""
    policy = make_policy(**request.param)
    UCE().erase(policy, NUDITY).apply(policy)
    return policy


def disturb(policy: DiffusionPolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_loss_is_zero_before_training(erased: DiffusionPolicy) -> None:
    assert torch.equal(OBJECTIVE.loss(erased, BATCH), torch.zeros(3))


def test_loss_is_positive_once_the_policy_has_moved(erased: DiffusionPolicy) -> None:
    disturb(erased)
    assert (OBJECTIVE.loss(erased, BATCH) > 1e-6).all()


def test_gradient_reaches_all_trained_parameters_and_no_others(erased: DiffusionPolicy) -> None:
    disturb(erased)
    OBJECTIVE.loss(erased, BATCH).mean().backward()
    moved = {name for name, parameter in erased.unet.named_parameters() if parameter.grad is not None}
    assert moved == set(erased.trainable_state())
    assert all(p.grad is not None and p.grad.any() for p in erased.trainable_parameters())


def test_descending_the_loss_leads_back(erased: DiffusionPolicy) -> None:
    disturb(erased)
    optimizer = torch.optim.Adam(erased.trainable_parameters(), lr=1e-2)
    before = OBJECTIVE.loss(erased, BATCH).mean().item()
    for _ in range(15):
        optimizer.zero_grad()
        OBJECTIVE.loss(erased, BATCH).mean().backward()
        optimizer.step()
    assert OBJECTIVE.loss(erased, BATCH).mean().item() < 0.3 * before


def test_loss_is_the_mean_square_over_a_sample(policy: DiffusionPolicy) -> None:
    disturb(policy)
    one_step = ReferenceDistance(ReferenceDistanceConfig(steps=1))
    embeddings = policy.encode(BATCH.prompts)
    noise = policy.sample(embeddings, steps=1, seeds=BATCH.seeds, until=0)
    timesteps = policy.plan(1).timesteps.expand(3)
    with torch.no_grad():
        prediction = policy.predict_noise(noise, timesteps, embeddings)
    with policy.reference():
        target = policy.predict_noise(noise, timesteps, embeddings)
    expected = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
    torch.testing.assert_close(one_step.loss(policy, BATCH).detach(), expected, rtol=1e-5, atol=0)


def test_same_seeds_give_the_same_loss_and_others_another(policy: DiffusionPolicy) -> None:
    disturb(policy)
    first, again = OBJECTIVE.loss(policy, BATCH), OBJECTIVE.loss(policy, BATCH)
    other = OBJECTIVE.loss(policy, BATCH._replace(seeds=[6, 7, 8]))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loss_of_a_sample_does_not_depend_on_its_batch(policy: DiffusionPolicy) -> None:
    disturb(policy)
    alone = [OBJECTIVE.loss(policy, ConceptBatch([p], [s])) for p, s in zip(*BATCH, strict=True)]
    # Relative to losses of any size; the network rounds otherwise when the batch is larger.
    torch.testing.assert_close(OBJECTIVE.loss(policy, BATCH), torch.cat(alone), rtol=1e-3, atol=0)


def test_seeds_spread_over_all_steps(policy: DiffusionPolicy) -> None:
    disturb(policy)
    seen: list[int] = []
    predict = policy.predict_direction

    def spy(latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seen.extend(timesteps.tolist())
        return predict(latents, timesteps, conditioning)

    policy.predict_direction = spy  # ty: ignore[invalid-assignment]
    OBJECTIVE.loss(policy, ConceptBatch(["nude"] * 24, range(24)))
    assert set(seen) == set(policy.plan(4).timesteps.tolist())


def test_latents_are_the_tuned_policys_own(policy: DiffusionPolicy) -> None:
    disturb(policy)
    seed = next(seed for seed in range(100) if random_stops([seed], 0, 3).item() == 3)
    embeddings = policy.encode(["nude"])
    guidance = ClassifierFree(OBJECTIVE.config.guidance_scale)
    latents = policy.sample(embeddings, steps=4, guidance=guidance, seeds=[seed], until=3)
    timesteps = policy.plan(4).timesteps[[3]]
    with policy.reference():
        target = policy.predict_noise(latents, timesteps, embeddings)
    expected = (policy.predict_noise(latents, timesteps, embeddings) - target).square().mean()
    torch.testing.assert_close(OBJECTIVE.loss(policy, ConceptBatch(["nude"], [seed]))[0], expected, rtol=1e-4, atol=0)


def test_policy_without_trainable_weights_is_refused(make_policy: Callable[..., DiffusionPolicy]) -> None:
    with pytest.raises(ValueError, match="keeping 'nudity' erased needs a policy with trainable weights"):
        OBJECTIVE.prepare(make_policy(), NUDITY)


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("guidance_scale", -1.0), ("guidance_scale", float("nan"))])
def test_impossible_setting_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"ReferenceDistanceConfig\.{field} must be"):
        ReferenceDistanceConfig(**{field: value})  # ty: ignore[invalid-argument-type]
