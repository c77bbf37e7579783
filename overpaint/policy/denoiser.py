"""The denoising network as a Gaussian policy over latents: one guided prediction, and the step that it makes."""

from collections.abc import Callable, Container, Iterator
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from .conditioning import Conditioning
from .families import Family
from .guidance import ClassifierFree, Guidance, SamplingGuard, StepContext, TrueGuidance
from .noise import SampleNoise
from .process import Process
from .prompts import PromptEncoder
from .types import Latents, PerSample, Plan


@runtime_checkable
class Parts(Protocol):
    """What a prediction is made with, as `DiffusionPolicy` has it."""

    family: Family
    network: Callable[..., Any]
    prompts: PromptEncoder
    guard: SamplingGuard | None
    process: Process

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's weights."""
        ...


def predict(
    parts: Parts,
    latents: Latents,
    timesteps: Shaped[Tensor, " batch"],
    conditioning: Conditioning,
    guidance: Guidance | None = None,
    context: StepContext | None = None,
) -> Latents:
    """Returns the guided prediction, of the network's own kind; all branches go through it in one call."""
    if isinstance(guidance, ClassifierFree):
        guidance = parts.family.guided(guidance) if parts.guard is None else parts.guard.guided(guidance)
    if isinstance(guidance, ClassifierFree) and guidance.scale == 1.0 and not isinstance(guidance, TrueGuidance):
        guidance = None  # the same, without an encoded empty prompt
    branches = (conditioning,)
    if guidance is not None:
        branches = guidance.branches(conditioning, parts.prompts.empty(conditioning), cast(StepContext, context))
    count = len(branches)
    told = Conditioning.cat(branches) if count > 1 else branches[0]
    repeated = latents.repeat(count, 1, 1, 1)
    output = parts.family.call(parts.network, repeated, timesteps.repeat(count), told, parts.dtype)
    predictions = output.float().unflatten(0, (count, len(latents)))
    return predictions[0] if guidance is None else guidance.combine(predictions, cast(StepContext, context))


def predicted(
    parts: Parts,
    latents: Latents,
    timesteps: Shaped[Tensor, " batch"],
    conditioning: Conditioning,
    guidance: Guidance | None = None,
    steps: Int[Tensor, " batch"] | None = None,
) -> tuple[Latents, PerSample]:
    """Returns the prediction at timesteps of training, and their levels; see `DiffusionPolicy.predict_noise`."""
    levels, total = parts.process.levels(timesteps.to(latents.device)), parts.process.num_timesteps
    context = _context(parts, (total - 1 - timesteps).long() if steps is None else steps, total, levels)
    return predict(parts, latents, timesteps, conditioning, guidance, context), levels


def predict_at(
    parts: Parts,
    latents: Latents,
    conditioning: Conditioning,
    plan: Plan,
    steps: Int[Tensor, " batch"],
    guidance: Guidance,
    start: int = 0,
) -> Latents:
    """Returns the guided prediction at steps of a sampling that began at the step `start`."""
    context = _context(parts, steps, len(plan.timesteps), plan.levels[steps])._replace(start=start)
    return predict(parts, latents, plan.timesteps[steps], conditioning, guidance, context)


def mean_and_std(
    parts: Parts,
    latents: Latents,
    conditioning: Conditioning,
    plan: Plan,
    steps: Int[Tensor, " batch"],
    guidance: Guidance,
    eta: float,
    start: int = 0,
) -> tuple[Latents, PerSample]:
    """Returns the Gaussian of one step of each sample; the one path of sampling and of recomputation."""
    prediction = predict_at(parts, latents, conditioning, plan, steps, guidance, start)
    return parts.process.mean_and_std(latents, prediction, plan, steps, eta)


def steps_of(
    parts: Parts,
    latents: Latents,
    conditioning: Conditioning,
    plan: Plan,
    guidance: Guidance,
    eta: float,
    noise: SampleNoise,
    until: int | None = None,
    start: int = 0,
    stochastic: Container[int] | None = None,
) -> Iterator[tuple[Latents, Latents, PerSample]]:
    """Yields the state after each step, and mean and standard deviation of the Gaussian it was drawn from.

    Where some steps are `stochastic`, the others are as with eta 0; the noise of a step is drawn all the same.
    """
    for step in range(start, len(plan.timesteps) if until is None else until):
        own = eta if stochastic is None or step in stochastic else 0.0
        mean, std = mean_and_std(parts, latents, conditioning, plan, all_at(step, latents), guidance, own, start)
        drawn = noise.draw() if eta > 0 else None
        latents = mean if drawn is None or own == 0 else mean + std.view(-1, 1, 1, 1) * drawn
        yield latents, mean, std


def _context(parts: Parts, steps: Int[Tensor, " batch"], total: int, levels: PerSample) -> StepContext:
    """Returns what a guidance may want to know of each sample's step."""
    return StepContext(steps, total, parts.process.noise_scale(levels))


def all_at(step: int, latents: Latents) -> Int[Tensor, " batch"]:
    """Returns the same step for every sample."""
    return torch.full((len(latents),), step, dtype=torch.int64, device=latents.device)
