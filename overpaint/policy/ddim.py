"""The arithmetic of denoising: pure functions of tensors, without a model.

With `a` the cumulative alpha of the present timestep and `a_prev` that of the next lower one, a step of DDIM is

    clean = (latents - sqrt(1 - a) * epsilon) / sqrt(a)
    std   = eta * sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
    mean  = sqrt(a_prev) * clean + sqrt(1 - a_prev - std^2) * epsilon

Source: Song et al. (2021), "Denoising diffusion implicit models", https://arxiv.org/abs/2010.02502, equations 12 and
16. With eta = 1 it is ancestral sampling of DDPM with the smaller of its two variances. The log-probability is that of
Black et al. (2023), https://arxiv.org/abs/2305.13301, averaged over the latent's elements as their code has it.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.settings import Count, Share

from .types import Latents, PerSample, Plan

PredictionType = Literal["epsilon", "v_prediction", "sample"]
"""What a network predicts: the noise, the velocity (Salimans and Ho 2022, appendix D), or the clean latents."""

PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def cumulative_alphas(scheduler_config: Mapping[str, Any]) -> Float[Tensor, " timesteps"]:
    """Returns the cumulative alpha of every timestep of training, on the CPU."""
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(dict(scheduler_config))
    return scheduler.alphas_cumprod


def schedule(scheduler_config: Mapping[str, Any], steps: Count) -> Plan:
    """Returns the noise levels of a checkpoint's own scheduler for a number of steps, on the CPU.

    The timesteps are those of diffusers' `DDIMScheduler` with the checkpoint's configuration. The last step leads to
    timestep 0, never beyond it, so that its standard deviation stays above zero.
    Source: `ddim_step_with_logprob` of kvablack/ddpo-pytorch, where the previous timestep is clamped.
    Departs from diffusers only where a configuration says `set_alpha_to_one`, which Stable Diffusion's does not.

    Raises:
        ValueError: `steps` is below 1, or more than the configuration can place.
    """
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_config(dict(scheduler_config))
    levels = scheduler.config.num_train_timesteps
    if not 1 <= steps <= levels:
        raise ValueError(f"steps must be from 1 to the {levels} timesteps of training, got {steps}")
    scheduler.set_timesteps(steps)
    timesteps: Tensor = scheduler.timesteps
    first = int(timesteps[0])
    if first >= levels:
        raise ValueError(
            f"steps must keep timesteps below the {levels} of training, got {steps} that starts at {first}"
        )
    previous = (timesteps - levels // steps).clamp(min=0)
    return Plan(timesteps, scheduler.alphas_cumprod[timesteps], scheduler.alphas_cumprod[previous])


def predict_clean(latents: Latents, prediction: Latents, alphas: PerSample, prediction_type: PredictionType) -> Latents:
    """Returns the clean latents that a network's prediction amounts to."""
    signal, noise = _signal_and_noise(alphas)
    if prediction_type == "epsilon":
        return (latents - noise * prediction) / signal
    if prediction_type == "v_prediction":
        return signal * latents - noise * prediction
    return prediction


def predict_epsilon(
    latents: Latents, prediction: Latents, alphas: PerSample, prediction_type: PredictionType
) -> Latents:
    """Returns the noise that a network's prediction amounts to."""
    signal, noise = _signal_and_noise(alphas)
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return signal * prediction + noise * latents
    return (latents - signal * prediction) / noise


def noise_scale(alphas: PerSample, prediction_type: PredictionType) -> PerSample:
    """Returns by what a difference of two predictions is multiplied to be a difference of noise."""
    if prediction_type == "epsilon":
        return torch.ones_like(alphas)
    if prediction_type == "v_prediction":
        return alphas.sqrt()
    return -(alphas / (1 - alphas)).sqrt()


def prediction_target(clean: Latents, noise: Latents, alphas: PerSample, prediction_type: PredictionType) -> Latents:
    """Returns what a network of that kind should predict for the latents `add_noise(clean, noise, alphas)`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal_scale, noise_scale = _signal_and_noise(alphas)
        return signal_scale * noise - noise_scale * clean
    return clean


def add_noise(clean: Latents, noise: Latents, alphas: PerSample) -> Latents:
    """Returns latents noised forward to cumulative alpha `alphas`."""
    signal_scale, noise_scale = _signal_and_noise(alphas)
    return signal_scale * clean + noise_scale * noise


def ddim_mean_and_std(
    latents: Latents,
    prediction: Latents,
    alphas: PerSample,
    previous_alphas: PerSample,
    *,
    eta: Share,
    prediction_type: PredictionType,
) -> tuple[Latents, PerSample]:
    """Returns mean and standard deviation of the Gaussian that one step draws from.

    Args:
        latents: State before the step.
        prediction: The network's output for it.
        alphas: Cumulative alpha of the state.
        previous_alphas: Cumulative alpha that the step leads to.
        eta: Share of the noise of ancestral sampling, in [0, 1]; 0 is deterministic.
        prediction_type: What the network predicts.
    """
    clean = predict_clean(latents, prediction, alphas, prediction_type)
    epsilon = predict_epsilon(latents, prediction, alphas, prediction_type)
    # Differences of numbers near one: in float64, which costs nothing for one number a sample.
    level, previous = alphas.double(), previous_alphas.double()
    variance = eta**2 * (1 - previous) / (1 - level) * (1 - level / previous)
    # Not below zero but for rounding, as eta <= 1.
    direction = (1 - previous - variance).clamp(min=0).sqrt().to(latents.dtype)
    std = variance.sqrt().to(latents.dtype)
    mean = _per_sample(previous_alphas.sqrt()) * clean + _per_sample(direction) * epsilon
    return mean, std


def noising_mean_and_std(latents: Latents, alphas: PerSample, previous_alphas: PerSample) -> tuple[Latents, PerSample]:
    """Returns the Gaussian of what a step started from, given where it led: forward noising from one level to the next.

    It is `q(x_t | x_prev) = N(sqrt(a / a_prev) x_prev, 1 - a / a_prev)`, without a network and without eta.
    Source: Ho et al. (2020), https://arxiv.org/abs/2006.11239, equation 2.

    Args:
        latents: State after the step.
        alphas: Cumulative alpha of the state before it.
        previous_alphas: Cumulative alpha that the step leads to.
    """
    kept = alphas.double() / previous_alphas.double()
    return _per_sample(kept.sqrt().to(latents.dtype)) * latents, (1 - kept).sqrt().to(latents.dtype)


def mean_sensitivity(
    alphas: PerSample, previous_alphas: PerSample, *, eta: float, prediction_type: PredictionType
) -> PerSample:
    """Returns by how much the mean of a step moves when the network's prediction moves by one.

    The mean is linear in the prediction; this is the absolute value of its slope.
    """
    zero = alphas.new_zeros(len(alphas), 1, 1, 1)
    at_one, _ = ddim_mean_and_std(zero, zero + 1, alphas, previous_alphas, eta=eta, prediction_type=prediction_type)
    return at_one[:, 0, 0, 0].abs()


def gaussian_log_prob(values: Latents, mean: Latents, std: PerSample) -> PerSample:
    """Returns the log-density of each sample, as the mean over its elements and not their sum; float64.

    Clip ranges such as 1e-4 belong to that scale, and those of flows are smaller still: in float32, equal densities
    would differ by up to 3e-7. `std` must be above zero.
    """
    std = std.double()
    squared = ((values.double() - mean.double()) ** 2).flatten(1).mean(dim=1)
    return -squared / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))


def gaussian_kl(mean: Latents, other_mean: Latents, std: PerSample) -> PerSample:
    """Returns the divergence of two Gaussians with the same standard deviation, averaged over the latent's elements.

    It is |mean - other_mean|^2 / (2 std^2), on the scale of the log-probabilities.
    Source: Fan et al. (2023), DPOK, https://arxiv.org/abs/2305.16381, where it is summed over the elements.
    """
    return ((mean - other_mean) ** 2).flatten(1).mean(dim=1) / (2 * std**2)


def _signal_and_noise(
    alphas: PerSample,
) -> tuple[Float[Tensor, "batch 1 1 1"], Float[Tensor, "batch 1 1 1"]]:
    """Returns the factors of the clean latents and of the noise in latents of that cumulative alpha."""
    return _per_sample(alphas.sqrt()), _per_sample((1 - alphas).sqrt())


def _per_sample(values: PerSample) -> Float[Tensor, "batch 1 1 1"]:
    """Shapes one number per sample so that it multiplies latents."""
    return values.view(-1, 1, 1, 1)
