from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import (
    ClassifierFree,
    Conditioning,
    DiffusionPolicy,
    Guidance,
    PredictionType,
    StepContext,
    predict_epsilon,
)
from overpaint.policy.ddim import noise_scale

CONTEXT = StepContext(torch.zeros(2, dtype=torch.int64), 50, torch.ones(2))


def test_classifier_free_is_a_guidance() -> None:
    assert isinstance(ClassifierFree(), Guidance)
    assert ClassifierFree().scale == 5.0
    assert repr(ClassifierFree(2.0)) == "ClassifierFree(scale=2.0)"


def encoded(value: float) -> Conditioning:
    return Conditioning(("a", "b"), torch.full((2, 3, 4), value))


def test_combination_leads_away_from_the_empty_prompt() -> None:
    away, towards = torch.full((2, 4, 1, 1), 1.0), torch.full((2, 4, 1, 1), 3.0)
    combined = ClassifierFree(2.0).combine(torch.stack([away, towards]), CONTEXT)
    assert torch.equal(combined, torch.full((2, 4, 1, 1), 5.0))


def test_branches_are_empty_then_prompt() -> None:
    prompt, empty = encoded(1.0), encoded(0.0)
    assert ClassifierFree(2.0).branches(prompt, empty, CONTEXT) == (empty, prompt)


def test_scale_one_asks_for_the_prompt_alone() -> None:
    guidance = ClassifierFree(1.0)
    prompt = encoded(1.0)
    assert guidance.branches(prompt, encoded(0.0), CONTEXT) == (prompt,)
    prediction = torch.ones(1, 2, 4, 1, 1)
    assert torch.equal(guidance.combine(prediction, CONTEXT), prediction[0])


def test_negative_prompt_takes_the_place_of_the_empty_one() -> None:
    negative = Conditioning(("bad",), torch.full((1, 3, 4), -1.0))
    away, _ = ClassifierFree(2.0, negative).branches(encoded(1.0), encoded(0.0), CONTEXT)
    assert away.texts == ("bad", "bad")
    assert torch.equal(away.tokens, torch.full((2, 3, 4), -1.0))


def test_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ClassifierFree\.scale must be at least 0, got -1\.0"):
        ClassifierFree(-1.0)


def test_guided_step_is_one_call_of_the_network_on_twice_the_batch(policy: DiffusionPolicy) -> None:
    sizes: list[int] = []

    def network(latents: Tensor, timesteps: Tensor, **rest: Any) -> Any:
        sizes.append(len(latents))
        return policy.unet(latents, timesteps, **rest)

    policy.network = network
    conditioning = policy.encode(["a red circle", "a cat", "a dog"])
    policy.sample(conditioning, steps=3, guidance=ClassifierFree(5.0), seeds=[0, 1, 2])
    policy.sample(conditioning, steps=2, guidance=ClassifierFree(1.0), seeds=[0, 1, 2])
    assert sizes == [6, 6, 6, 3, 3]


def test_guided_prediction_is_that_of_two_separate_calls(policy: DiffusionPolicy) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([900, 20])
    prompt, empty = policy.encode(["a red circle", "a cat"]), policy.encode(["", ""])
    with torch.no_grad():
        guided = policy.predict_noise(latents, timesteps, prompt, ClassifierFree(3.0))
        away = policy.predict_noise(latents, timesteps, empty)
        towards = policy.predict_noise(latents, timesteps, prompt, ClassifierFree(1.0))
    # Batches of two and of four may round differently.
    torch.testing.assert_close(guided, away + 3 * (towards - away), rtol=1e-5, atol=1e-5)


def test_guidance_learns_the_index_of_each_step(policy: DiffusionPolicy) -> None:
    class Recorder(ClassifierFree):
        seen: list[list[int]]

        def combine(self, predictions: Tensor, context: StepContext) -> Tensor:
            self.seen.append(context.steps.tolist())
            return super().combine(predictions, context)

    guidance = Recorder(2.0)
    guidance.seen = []
    conditioning = policy.encode(["a cat", "a dog"])
    trajectory = policy.rollout(conditioning, steps=2, guidance=guidance, seeds=[0, 1])
    policy.log_prob(trajectory, torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]), guidance=guidance)
    policy.predict_noise(trajectory.latents[:, 0], torch.tensor([999, 0]), conditioning, guidance)
    assert guidance.seen == [[0, 0], [1, 1], [1, 0, 1], [0, 999]]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_scale_turns_differences_of_predictions_into_differences_of_noise(kind: PredictionType) -> None:
    generator = torch.Generator().manual_seed(0)
    latents, one, other = torch.randn(3, 5, 4, 1, 1, generator=generator)
    alphas = torch.linspace(0.01, 0.99, 5)
    noise = [predict_epsilon(latents, prediction, alphas, kind) for prediction in (one, other)]
    scale = noise_scale(alphas, kind).view(-1, 1, 1, 1)
    torch.testing.assert_close(scale * (one - other), noise[0] - noise[1], rtol=1e-4, atol=1e-4)


def test_guidance_learns_number_of_steps_and_noise_scale(v_policy: DiffusionPolicy) -> None:
    policy = v_policy
    seen: list[StepContext] = []

    class Recorder(ClassifierFree):
        def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
            seen.append(context)
            return super().branches(prompt, empty, context)

    policy.sample(policy.encode(["a cat"]), steps=3, guidance=Recorder(2.0), seeds=[0])
    policy.predict_noise(torch.zeros(1, 4, 8, 8), torch.tensor([10]), policy.encode(["a cat"]), Recorder(2.0))
    assert [context.total for context in seen] == [3, 3, 3, 1000]
    timesteps = torch.cat([policy.plan(3).timesteps, torch.tensor([10])])
    torch.testing.assert_close(
        torch.cat([context.noise_scale for context in seen]), policy.process.levels(timesteps).sqrt()
    )
