"""Diffusion and rectified flow behind one protocol."""

from typing import Any, cast

import pytest
import torch

from overpaint.policy import ddim, flow
from overpaint.policy.process import Diffusion, Process, RectifiedFlow, add_noise

DDIM = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading",
}  # fmt: skip
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}
BY_SIZE = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
CPU, SIZE = torch.device("cpu"), (8, 8)
KINDS = ("epsilon", "v_prediction", "sample")
PROCESSES: dict[str, Process] = {
    **{kind: Diffusion(DDIM | {"prediction_type": kind}) for kind in KINDS},
    **{chain: RectifiedFlow(FLOW, chain=chain, even=False) for chain in flow.CHAINS},
}


@pytest.fixture(params=PROCESSES)
def process(request: pytest.FixtureRequest) -> Process:
    return PROCESSES[request.param]


def noises(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(2, *shape, generator=generator))


def test_a_true_prediction_tells_image_and_noise(process: Process) -> None:
    clean, noise = noises(3, 16, 4, 4)
    levels = process.levels(torch.tensor([100, 500, 900]))
    latents, target = add_noise(process, clean, noise, levels), process.target(clean, noise, levels)
    torch.testing.assert_close(process.clean(latents, target, levels), clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.noise(latents, target, levels), noise, rtol=1e-4, atol=1e-4)
    moved = process.noise(latents, target + 0.1, levels) - process.noise(latents, target, levels)
    scale = process.noise_scale(levels).view(-1, 1, 1, 1).expand_as(moved)
    torch.testing.assert_close(moved, 0.1 * scale, rtol=1e-3, atol=1e-4)


def test_a_step_without_noise_leads_to_the_next_level_of_the_same_image_and_noise(process: Process) -> None:
    clean, noise = noises(5, 4, 4, 4)
    plan = process.plan(5, SIZE, CPU)
    steps = torch.arange(5)
    latents = add_noise(process, clean, noise, plan.levels)
    mean, std = process.mean_and_std(latents, process.target(clean, noise, plan.levels), plan, steps, 0.0)
    torch.testing.assert_close(mean, add_noise(process, clean, noise, plan.next_levels), rtol=1e-4, atol=1e-4)
    assert not std.any()


def test_scales_are_those_of_the_steps(process: Process) -> None:
    plan, zero = process.plan(6, SIZE, CPU), torch.zeros(6, 4, 1, 1)
    steps = torch.arange(6)
    std, slope = process.scales(plan, 0.7)
    at_zero, deviation = process.mean_and_std(zero, zero, plan, steps, 0.7)
    at_one, _ = process.mean_and_std(zero, zero + 1, plan, steps, 0.7)
    torch.testing.assert_close(std.float(), deviation, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(slope.float(), (at_one - at_zero)[:, 0, 0, 0].abs(), rtol=1e-4, atol=1e-6)


def test_one_formula_serves_both() -> None:
    """std = eta n' sqrt(1 - (s n' / (s' n))²) is DDIM's, and with cps' own std the rest of a step is the same."""
    plan = PROCESSES["epsilon"].plan(50, SIZE, CPU)
    level, following = plan.levels.double(), plan.next_levels.double()
    signal, share, then_signal, then_share = level.sqrt(), (1 - level).sqrt(), following.sqrt(), (1 - following).sqrt()
    expected = 0.7 * then_share * (1 - (signal * then_share / (then_signal * share)) ** 2).sqrt()
    std, _ = PROCESSES["epsilon"].scales(plan, 0.7)
    torch.testing.assert_close(std, expected, rtol=0, atol=2e-15)

    plan = PROCESSES["cps"].plan(50, SIZE, CPU)
    latents, velocity = noises(50, 4, 2, 2)
    mean, std = PROCESSES["cps"].mean_and_std(latents, velocity, plan, torch.arange(50), 0.7)
    clean, noise = (ask(latents, velocity, plan.levels) for ask in (PROCESSES["cps"].clean, PROCESSES["cps"].noise))
    kept = (plan.next_levels.square() - std.square()).clamp(min=0).sqrt()
    factors = ((1 - plan.next_levels).view(-1, 1, 1, 1), kept.view(-1, 1, 1, 1))
    torch.testing.assert_close(mean, factors[0] * clean + factors[1] * noise, rtol=1e-4, atol=1e-5)


def test_the_first_step_of_an_sde_takes_the_schedules_second_level() -> None:
    plan = PROCESSES["sde"].plan(10, SIZE, CPU)
    std, _ = PROCESSES["sde"].scales(plan, 0.7)
    second = float(plan.levels[1])
    assert plan.levels[0] == 1
    assert float(std[0]) == pytest.approx(0.7 * (1 / (1 - second)) ** 0.5 * (1 - second) ** 0.5, rel=1e-6)


def test_diffusion_is_ddims_arithmetic_to_the_bit() -> None:
    process = PROCESSES["v_prediction"]
    plan, (latents, prediction) = process.plan(10, SIZE, CPU), noises(3, 4, 4, 4)
    steps = torch.tensor([0, 4, 9])
    levels = plan.levels[steps], plan.next_levels[steps]
    expected = ddim.ddim_mean_and_std(latents, prediction, *levels, eta=1.0, prediction_type="v_prediction")
    for mine, theirs in zip(process.mean_and_std(latents, prediction, plan, steps, 1.0), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(
        add_noise(process, latents, prediction, levels[0]), ddim.add_noise(latents, prediction, levels[0])
    )


def test_a_flow_of_fluxs_is_shifted_by_the_size_of_its_images() -> None:
    process = RectifiedFlow(FLOW | BY_SIZE, even=True)
    small, large = (process.plan(4, size, CPU) for size in ((32, 32), (128, 128)))
    assert (large.levels[1:] > small.levels[1:]).all()
    assert process.plan(4, (32, 32), CPU) is small
    assert torch.equal(process.plan(4, (16, 64), CPU).levels, small.levels)  # as many tokens


@pytest.mark.parametrize(
    ("chain", "eta", "message"),
    [
        ("sde", 0.0, "eta must be above 0 for log-probabilities"),
        ("sde", 1.5, "eta must be from 0 to 1, got 1.5"),
    ],
)
def test_a_flow_without_a_density_is_refused(chain: Any, eta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(FLOW, chain=chain, even=False).stochastic_steps(4, eta)


def test_all_steps_of_a_flow_have_a_density_but_the_last_of_those_that_keep_levels() -> None:
    for chain, count in (("sde", 4), ("dance", 4), ("cps", 3), ("ancestral", 3)):
        process = RectifiedFlow(FLOW, chain=cast(Any, chain), even=False)
        assert process.stochastic_steps(4, 0.5) == tuple(range(count))
        plan = process.plan(4, SIZE, CPU)
        deviations, _ = process.scales(plan, 0.5)
        assert (deviations > 0).tolist() == [step < count for step in range(4)]


@pytest.mark.parametrize("kind", ["epsilon", "ancestral"])
def test_noising_back_from_where_a_step_led_keeps_image_and_noise_at_their_shares(kind: str) -> None:
    process = PROCESSES[kind]
    plan = process.plan(6, SIZE, CPU)
    for step in range(5):
        levels, then = plan.levels[step : step + 1].double(), plan.next_levels[step : step + 1].double()
        signal, noise = (float(part) for part in process.signal_and_noise(levels))
        then_signal, then_noise = (float(part) for part in process.signal_and_noise(then))
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        mean, std = process.noising(one, plan, step)
        assert float(mean) * then_signal == pytest.approx(signal, abs=1e-6)
        assert (float(mean) * then_noise) ** 2 + float(std) ** 2 == pytest.approx(noise**2, rel=1e-5)


def test_an_ancestral_step_of_a_flow_is_the_posterior_of_noising() -> None:
    """Bayes' rule for Gaussians: x' given x and the image, from x' given the image and x given x'."""
    process = PROCESSES["ancestral"]
    plan = process.plan(6, SIZE, CPU)
    clean, noise = (part[:1].double() for part in noises(1, 4, 4, 4))
    for step in range(1, 5):
        level, then = (levels[step : step + 1].double() for levels in (plan.levels, plan.next_levels))
        latents = add_noise(process, clean, noise, level)
        kept, spread = process.noising(torch.ones(1, 1, 1, 1, dtype=torch.float64), plan, step)
        precision = 1 / then**2 + kept.flatten() ** 2 / spread**2
        expected = ((1 - then) * clean / then**2 + kept * latents / spread**2) / precision
        mean, std = process.mean_and_std(latents, noise - clean, plan, torch.tensor([step]), 1.0)
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std, precision.rsqrt(), rtol=1e-5, atol=1e-6)
