"""The arithmetic of rectified flow: pure functions of tensors, without a model.

With the level `s`, which falls from 1 at noise to 0 at the image, and `d = s - s'` to the next one,

    latents = (1 - s) * clean + s * noise          velocity = noise - clean
    mean    = (1 - s') * clean + c * noise         with clean and noise as the network's velocity has them

and the noise that a step adds decides on its standard deviation and on `c`:

    none          std = 0                                     c = s'                        Euler's step
    sde, dance    std = a sqrt(d)                             c = s' - a^2 d / (2 s)
    cps           std = s' sin(eta pi / 2)                    c = sqrt(s'^2 - std^2)
    ancestral     std = eta s' sqrt(1 - r^2)                  c = sqrt(s'^2 - std^2)

with `a = eta sqrt(s / (1 - s))` for sde, `a = eta` for dance, and `r = (1 - s) s' / ((1 - s') s)`. A step of DDIM is of
the form of the last two, and with its own signal and noise in place of `1 - s` and `s` it is that of ancestral: with
eta = 1 that draws from where noising by `noising_mean_and_std` may have come from.

Source: Liu et al. (2023), "Flow straight and fast", https://arxiv.org/abs/2209.03003; sde: Liu et al. (2025),
Flow-GRPO, https://arxiv.org/abs/2505.05470, where `1 - s` at `s = 1` is one minus the schedule's second level; dance:
Xue et al. (2025), DanceGRPO, https://arxiv.org/abs/2505.07818; cps: Wang and Yu (2025), coefficients-preserving
sampling, https://arxiv.org/abs/2509.05952.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .types import Latents, PerSample, Plan

Chain = Literal["sde", "cps", "dance", "ancestral"]
"""Which noise a stochastic step adds."""
CHAINS: tuple[Chain, ...] = get_args(Chain)


def flow_schedule(config: Mapping[str, Any], steps: int, *, tokens: int | None = None, even: bool) -> Plan:
    """Returns the noise levels of a checkpoint's own scheduler for a number of steps, on the CPU.

    Args:
        config: Of diffusers' `FlowMatchEulerDiscreteScheduler`.
        steps: At least 1.
        tokens: Of an image, which a schedule that is shifted by size needs.
        even: Whether the unshifted levels are 1, 1 - 1/steps, ..., 1/steps, as FLUX's pipeline has it, and not
            those between the first and the last level of training, as that of Stable Diffusion 3.

    Raises:
        ValueError: `steps` is below 1, or the schedule is shifted by size and there are no tokens.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    options: dict[str, Any] = {}
    if scheduler.config.use_dynamic_shifting:
        if tokens is None:
            raise ValueError("tokens must be given to a schedule that is shifted by size, got None")
        options["mu"] = shift_of(scheduler.config, tokens)
    if even or options:
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    else:
        options["num_inference_steps"] = steps
    scheduler.set_timesteps(**options)
    levels: Tensor = scheduler.sigmas
    return Plan(scheduler.timesteps, levels[:-1], levels[1:])


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """Returns the logarithm of the shift of a schedule for images of so many tokens: linear in their number."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return config["base_shift"] + slope * (tokens - config["base_image_seq_len"])


def clean_of(latents: Latents, velocity: Latents, levels: PerSample) -> Latents:
    """Returns the clean latents that a velocity amounts to, without another step."""
    return latents - _per_sample(levels) * velocity


def noise_of(latents: Latents, velocity: Latents, levels: PerSample) -> Latents:
    """Returns the noise that a velocity amounts to."""
    return latents + _per_sample(1 - levels) * velocity


def noised(clean: Latents, noise: Latents, levels: PerSample) -> Latents:
    """Returns latents noised forward to a level."""
    return _per_sample(1 - levels) * clean + _per_sample(levels) * noise


def flow_mean_and_std(
    latents: Latents,
    velocity: Latents,
    levels: PerSample,
    next_levels: PerSample,
    *,
    eta: float,
    chain: Chain,
    second_level: Float[Tensor, ""],
) -> tuple[Latents, PerSample]:
    """Returns mean and standard deviation of the Gaussian that one step draws from; with eta 0 it is Euler's step.

    Args:
        latents: State before the step.
        velocity: The network's output for it.
        levels: Of the state.
        next_levels: That the step leads to.
        eta: How much noise the step adds, at least 0; for cps and ancestral at most 1.
        chain: Which.
        second_level: Of the schedule, for sde's first step.
    """
    std, direction = deviation_and_direction(levels, next_levels, eta=eta, chain=chain, second_level=second_level)
    clean, noise = clean_of(latents, velocity, levels), noise_of(latents, velocity, levels)
    mean = _per_sample(1 - next_levels) * clean + _per_sample(direction.to(latents.dtype)) * noise
    return mean, std.to(latents.dtype)


def deviation_and_direction(
    levels: PerSample, next_levels: PerSample, *, eta: float, chain: Chain, second_level: Float[Tensor, ""]
) -> tuple[PerSample, PerSample]:
    """Returns the standard deviation of steps, and how much of the predicted noise their means keep; in float64."""
    level, following = levels.double(), next_levels.double()
    if chain == "cps":
        return following * math.sin(eta * math.pi / 2), following * math.cos(eta * math.pi / 2)
    if chain == "ancestral":
        ratio = (1 - level) * following / ((1 - following) * level)
        std = eta * following * (1 - ratio**2).clamp(min=0).sqrt()
        return std, (following**2 - std**2).clamp(min=0).sqrt()
    variance = torch.full_like(level, eta**2)
    if chain == "sde":
        left = 1 - torch.where(level == 1, second_level.double(), level)
        variance = variance * level / left
    variance = variance * (level - following)
    return variance.sqrt(), following - variance / (2 * level)


def noising_mean_and_std(latents: Latents, levels: PerSample, next_levels: PerSample) -> tuple[Latents, PerSample]:
    """Returns the Gaussian of what a step started from, given where it led: noising from one level to the next.

    With `k = (1 - s) / (1 - s')` it is N(k x', s^2 - k^2 s'^2), which keeps image and noise at their shares; DDPM's
    is in `ddim`. [ours]

    Args:
        latents: State after the step.
        levels: Of the state before it.
        next_levels: That the step leads to.
    """
    level, following = levels.double(), next_levels.double()
    kept = (1 - level) / (1 - following)
    std = (level**2 - (kept * following) ** 2).clamp(min=0).sqrt()
    return _per_sample(kept.to(latents.dtype)) * latents, std.to(latents.dtype)


def mean_slope(
    levels: PerSample, next_levels: PerSample, *, eta: float, chain: Chain, second_level: Float[Tensor, ""]
) -> PerSample:
    """Returns by how much the mean of a step moves when the velocity moves by one: the absolute value of its slope."""
    _, direction = deviation_and_direction(levels, next_levels, eta=eta, chain=chain, second_level=second_level)
    level, following = levels.double(), next_levels.double()
    return (direction * (1 - level) - (1 - following) * level).abs().to(levels.dtype)


def _per_sample(values: PerSample) -> Float[Tensor, "batch 1 1 1"]:
    return values.view(-1, 1, 1, 1)
