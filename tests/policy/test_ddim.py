from typing import Any

import pytest
import torch
from golden_case import GoldenCase, Record, Tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from overpaint.policy import ddim

CASE = GoldenCase(
    "ddim_logprob",
    left_out={
        "final_step/what_*": "words about the authors' code",
        "final_step/agreement_*": "words about diffusers' own step",
        "final_step/max_abs_difference_*": "how near diffusers' own step is to the authors'",
        "combinations/*/recomputed_minus_sampled_log_prob_max": "the authors' code and itself; ours: test_sampling.py",
        "final_step/deviations/*/*log_prob": "its latents are not in the file, or it is not a number",
        "final_step/deviations/*diffusers_std": "what diffusers does, which has no density there",
        "final_step/deviations/*max_abs_difference_of_prev_sample": "its latents are not in the file",
        "final_step/deviations/float16*": "of latents in half precision; ours are float32 whatever the network is",
        "tolerance/measured_float32_vs_float64/*": "how good the file itself is",
    },
)
SD14 = dict(CASE.record["schedule"])
LEVELS = st.floats(1e-3, 1 - 1e-3)


@pytest.fixture(params=CASE.record["combinations"], ids=lambda combination: combination["prefix"].strip("/"))
def combination(request: pytest.FixtureRequest) -> tuple[Record, Tensors]:
    return request.param, CASE.tensors.under(request.param["prefix"])


def golden_step(case: Record, tensors: Tensors, prediction: Tensor) -> tuple[Tensor, Tensor]:
    plan = ddim.schedule(SD14, case["num_inference_steps"])
    steps = torch.tensor(case["step_indices"])
    return ddim.ddim_mean_and_std(
        tensors["sample"],
        prediction,
        plan.levels[steps],
        plan.next_levels[steps],
        eta=case["eta"],
        prediction_type=case["prediction_type"],
    )


def test_schedule_agrees_with_golden(combination: tuple[Record, Tensors]) -> None:
    case, tensors = combination
    plan = ddim.schedule(SD14, case["num_inference_steps"])
    steps = torch.tensor(case["step_indices"])
    assert plan.timesteps[steps].tolist() == tensors["timesteps"].tolist() == case["timesteps"]
    assert torch.equal(plan.levels[steps], tensors["alpha_prod_t"])
    assert torch.equal(plan.next_levels[steps], tensors["alpha_prod_t_prev"])


def test_mean_and_std_agree_with_golden(combination: tuple[Record, Tensors]) -> None:
    case, tensors = combination
    mean, std = golden_step(case, tensors, tensors["model_output"])
    (atol,), (rtol,) = CASE.tolerance("mean_prev_sample"), CASE.tolerance("std")
    torch.testing.assert_close(mean, tensors["mean"], atol=atol, rtol=0)
    torch.testing.assert_close(std, tensors["std"], atol=0, rtol=rtol)
    assert std.tolist() == pytest.approx(case["std"], abs=0, rel=rtol)
    drawn = mean + std.view(-1, 1, 1, 1) * tensors["noise"]
    torch.testing.assert_close(drawn, tensors["prev_sample"], atol=atol, rtol=0)


@pytest.mark.parametrize(("of", "expected"), [("prev_sample", "log_prob"), ("other_prev_sample", "log_prob_other")])
def test_log_prob_agrees_with_golden(combination: tuple[Record, Tensors], of: str, expected: str) -> None:
    case, tensors = combination
    mean, std = golden_step(case, tensors, tensors["model_output"])
    log_prob = ddim.gaussian_log_prob(tensors[of], mean, std)
    atol, rtol = CASE.tolerance("log_prob")
    torch.testing.assert_close(log_prob, tensors[expected].double(), atol=atol, rtol=rtol)
    assert log_prob.tolist() == pytest.approx(case[expected], abs=atol, rel=rtol)


def test_gradient_of_log_prob_agrees_with_golden(combination: tuple[Record, Tensors]) -> None:
    case, tensors = combination
    prediction = tensors["model_output"].clone().requires_grad_(True)
    mean, std = golden_step(case, tensors, prediction)
    ddim.gaussian_log_prob(tensors["other_prev_sample"], mean, std).sum().backward()
    expected = tensors["grad_log_prob_other_wrt_model_output"]
    assert prediction.grad is not None
    difference = (prediction.grad - expected).abs().amax(dim=(1, 2, 3))
    (part,) = CASE.tolerance("grad")
    assert (difference <= part * expected.abs().amax(dim=(1, 2, 3))).all()


@pytest.mark.parametrize(
    ("deviation", "name", "changes"),
    [
        ("set_alpha_to_one=True, last of 50 steps (t=1), eta 1", "ddpo_pytorch_std", {"set_alpha_to_one": True}),
        ("steps_offset=0, last of 50 steps (t=0), eta 1", "std", {"steps_offset": 0}),
    ],
)
def test_last_step_is_the_authors_with_other_settings_too(deviation: str, name: str, changes: dict[str, Any]) -> None:
    plan = ddim.schedule(SD14 | changes, 50)
    zero = torch.zeros(50, 4, 1, 1)
    _, std = ddim.ddim_mean_and_std(zero, zero, plan.levels, plan.next_levels, eta=1.0, prediction_type="epsilon")
    (rtol,) = CASE.tolerance("std")
    assert float(std[-1]) == pytest.approx(CASE.record["final_step"]["deviations"][deviation][name], abs=0, rel=rtol)


@pytest.mark.parametrize("steps", [1, 3, 20, 40, 50, 999])
def test_last_step_leads_to_timestep_zero_and_keeps_a_positive_std(steps: int) -> None:
    plan = ddim.schedule(SD14, steps)
    assert len(plan.timesteps) == steps
    assert plan.timesteps[-1] == 1
    assert plan.next_levels[-1] == ddim.cumulative_alphas(SD14)[0]
    latents = torch.zeros(steps, 4, 1, 1)
    _, std = ddim.ddim_mean_and_std(latents, latents, plan.levels, plan.next_levels, eta=1.0, prediction_type="epsilon")
    assert (std > 0).all()


@pytest.mark.parametrize("steps", [0, -1, 1000, 1001])
def test_schedule_refuses_a_number_of_steps_that_training_cannot_place(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps must .* got {steps}"):
        ddim.schedule(SD14, steps)


def test_step_by_hand() -> None:
    # a = 0.25, a_prev = 0.64, x = 1, epsilon = 0.5: clean = (1 - sqrt(.75)/2) / 0.5, std^2 = .36/.75 * (1 - .25/.64)
    latents = torch.ones(1, 4, 1, 1)
    mean, std = ddim.ddim_mean_and_std(
        latents, latents * 0.5, torch.tensor([0.25]), torch.tensor([0.64]), eta=1.0, prediction_type="epsilon"
    )
    assert std.item() == pytest.approx(0.2925**0.5, rel=1e-6)
    assert mean.flatten()[0].item() == pytest.approx(0.8 * 1.1339745962 + 0.0675**0.5 * 0.5, rel=1e-6)


def test_log_prob_is_the_mean_of_normal_log_densities() -> None:
    generator = torch.Generator().manual_seed(0)
    values, mean = (torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    std = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std.view(-1, 1, 1, 1)).log_prob(values).flatten(1).mean(dim=1)
    torch.testing.assert_close(ddim.gaussian_log_prob(values, mean, std), expected, rtol=1e-12, atol=1e-12)


def random_pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(1, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return clean, noise


@pytest.mark.parametrize("prediction_type", ddim.PREDICTION_TYPES)
@settings(max_examples=30, deadline=None)
@given(alpha=LEVELS, seed=st.integers(0, 1000))
def test_a_perfect_prediction_gives_back_clean_and_noise(
    prediction_type: ddim.PredictionType, alpha: float, seed: int
) -> None:
    clean, noise = random_pair(seed)
    alphas = torch.tensor([alpha], dtype=torch.float64)
    noised = ddim.add_noise(clean, noise, alphas)
    target = ddim.prediction_target(clean, noise, alphas, prediction_type)
    torch.testing.assert_close(ddim.predict_clean(noised, target, alphas, prediction_type), clean)
    torch.testing.assert_close(ddim.predict_epsilon(noised, target, alphas, prediction_type), noise)


@pytest.mark.parametrize("prediction_type", ddim.PREDICTION_TYPES)
@settings(max_examples=30, deadline=None)
@given(levels=st.tuples(LEVELS, LEVELS).map(sorted), seed=st.integers(0, 1000))
def test_a_deterministic_step_moves_along_the_same_clean_and_noise(
    prediction_type: ddim.PredictionType, levels: list[float], seed: int
) -> None:
    clean, noise = random_pair(seed)
    alphas, previous = (torch.tensor([level], dtype=torch.float64) for level in levels)
    noised = ddim.add_noise(clean, noise, alphas)
    target = ddim.prediction_target(clean, noise, alphas, prediction_type)
    mean, std = ddim.ddim_mean_and_std(noised, target, alphas, previous, eta=0.0, prediction_type=prediction_type)
    torch.testing.assert_close(mean, ddim.add_noise(clean, noise, previous))
    assert std == 0


@settings(max_examples=30, deadline=None)
@given(levels=st.tuples(LEVELS, LEVELS).map(sorted), seed=st.integers(0, 1000))
def test_eta_one_is_the_posterior_of_ddpm(levels: list[float], seed: int) -> None:
    # Ho et al. (2020), equation 7, with the smaller variance.
    latents, prediction = random_pair(seed)
    alphas, previous = (torch.tensor([level], dtype=torch.float64) for level in levels)
    mean, std = ddim.ddim_mean_and_std(latents, prediction, alphas, previous, eta=1.0, prediction_type="epsilon")
    alpha, beta = alphas / previous, 1 - alphas / previous
    clean = (latents - (1 - alphas).sqrt() * prediction) / alphas.sqrt()
    expected = (previous.sqrt() * beta * clean + alpha.sqrt() * (1 - previous) * latents) / (1 - alphas)
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std**2, (1 - previous) / (1 - alphas) * beta)


@settings(max_examples=30, deadline=None)
@given(levels=st.tuples(LEVELS, LEVELS).map(sorted), eta=st.floats(0, 1), seed=st.integers(0, 1000))
def test_a_step_with_any_eta_keeps_the_variance_that_the_schedule_says(
    levels: list[float], eta: float, seed: int
) -> None:
    # Of latents that are all noise (clean = 0), mean^2 + std^2 is the share of noise that the step leads to.
    _, noise = random_pair(seed)
    alphas, previous = (torch.tensor([level], dtype=torch.float64) for level in levels)
    noised = ddim.add_noise(torch.zeros_like(noise), noise, alphas)
    mean, std = ddim.ddim_mean_and_std(noised, noise, alphas, previous, eta=eta, prediction_type="epsilon")
    total = (mean / noise).flatten() ** 2 + std**2
    torch.testing.assert_close(total, (1 - previous).expand_as(total), rtol=1e-6, atol=1e-9)
