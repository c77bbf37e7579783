"""From several predictions for one latent to the one that sampling follows."""

from dataclasses import replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from overpaint.settings import Count, Index, NonNegative

from .conditioning import Conditioning
from .parts import Pipeline
from .types import PerSample


class StepContext(NamedTuple):
    """Where on the way from noise to image each sample of a call is; a policy-gradient minibatch mixes steps."""

    steps: Int[Tensor, " batch"]
    """Index of each sample's denoising step, counted from noise."""

    total: Count
    """Number of denoising steps of a whole image."""

    noise_scale: PerSample
    """By what a difference of two predictions is to be multiplied to be a difference of noise: 1 for a network that
    predicts noise, the square root of the cumulative alpha for velocities."""

    start: Index = 0
    """Step that the whole batch was begun at: later than 0 where others have drawn or noised the latents so far."""


@runtime_checkable
class Guidance(Protocol):
    """Which prompts the network sees at a step, and how its answers become one.

    All branches of all samples go through the network in one call.
    """

    def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
        """Returns the prompts of each branch; `empty` is the encoded empty prompt, one for each sample."""
        ...

    def combine(
        self, predictions: Float[Tensor, "branches batch channels h w"], context: StepContext
    ) -> Float[Tensor, "batch channels h w"]:
        """Returns one prediction for each sample from those of the branches, in the order of `branches`.

        Predictions are float32 and of the network's own kind: velocities for a v-prediction network.
        """
        ...


class ClassifierFree:
    """Classifier-free guidance: away from the empty prompt, towards the given one.

    Source: Ho and Salimans (2022), https://arxiv.org/abs/2207.12598, with the scale as diffusers writes it (theirs
    plus one).

    Args:
        scale: Factor of the difference; 1 leaves the prompt's own prediction and asks for no second branch.
        negative: What to lead away from in place of the empty prompt: one for all samples, or one for each.
    """

    def __init__(self, scale: NonNegative = 5.0, negative: Conditioning | None = None) -> None:
        self.scale = float(scale)
        self.negative = negative

    def __repr__(self) -> str:
        """Shows the scale."""
        return f"ClassifierFree(scale={self.scale})"

    @property
    def num_branches(self) -> int:
        """How many predictions it is made of."""
        return 1 if self.scale == 1.0 else 2

    def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
        """Returns the branch to lead away from and the prompt's, or the prompt's alone where the scale is 1."""
        if self.scale == 1.0:
            return (prompt,)
        return self.away(prompt, empty), prompt

    def away(self, prompt: Conditioning, empty: Conditioning) -> Conditioning:
        """Returns what is led away from: the negative prompt, or the empty one, for each sample."""
        away = empty if self.negative is None else self.negative.to(prompt.tokens).expand(len(prompt))
        return away if prompt.sizes is None else replace(away, sizes=prompt.sizes)

    def combine(
        self, predictions: Float[Tensor, "branches batch channels h w"], context: StepContext
    ) -> Float[Tensor, "batch channels h w"]:
        """Returns away + scale * (towards - away), which is the last branch where the scale is 1."""
        if self.scale == 1.0:
            return predictions[-1]
        away, towards = predictions
        return away + self.scale * (towards - away)


class TrueGuidance(ClassifierFree):
    """Classifier-free guidance of a model that has learned to guide itself, such as FLUX: two branches.

    Args:
        scale: As in `ClassifierFree`.
        negative: As in `ClassifierFree`.
        embedded: Scale of the embedded guidance, the same in both branches; 1 is none.
    """

    def __init__(
        self, scale: NonNegative, negative: Conditioning | None = None, *, embedded: NonNegative = 1.0
    ) -> None:
        super().__init__(scale, negative)
        self.embedded = float(embedded)

    def __repr__(self) -> str:
        """Shows both scales."""
        return f"TrueGuidance(scale={self.scale}, embedded={self.embedded})"

    def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
        """Returns the branches of `ClassifierFree`, told the embedded scale where the model reads one."""
        return tuple(_told(one, self.embedded) for one in super().branches(prompt, empty, context))


class Embedded:
    """Guidance that a distilled model does by itself: it reads the scale, and there is one branch; a `Guidance`.

    Source: Meng et al. (2023), "On distillation of guided diffusion models", https://arxiv.org/abs/2210.03142.

    Args:
        scale: What the network is told.
    """

    def __init__(self, scale: float) -> None:
        self.scale = float(scale)

    def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
        """Returns the prompts with the scale."""
        return (_told(prompt, self.scale),)

    def combine(
        self, predictions: Float[Tensor, "branches batch channels h w"], context: StepContext
    ) -> Float[Tensor, "batch channels h w"]:
        """Returns the one prediction."""
        return predictions[0]


def _told(prompt: Conditioning, scale: float) -> Conditioning:
    """Returns prompts with a scale of embedded guidance, where there is one."""
    return prompt if prompt.guidance is None else replace(prompt, guidance=torch.full_like(prompt.guidance, scale))


@runtime_checkable
class SamplingGuard(Protocol):
    """A change of sampling that keeps something out of pictures, put between the caller's guidance and the network.

    A policy has at most one, in `DiffusionPolicy.guard`, and asks it at every step of sampling, at scale 1 as well.
    """

    def guided(self, guidance: ClassifierFree) -> Guidance:
        """Returns what takes the place of classifier-free guidance."""
        ...

    def attach(self, pipeline: Pipeline) -> None:
        """Makes a plain diffusers pipeline draw in the same way, in place."""
        ...


@runtime_checkable
class AdjustableGuard(SamplingGuard, Protocol):
    """A guard that can act less."""

    def weakened(self, strength: float) -> SamplingGuard:
        """Returns it with `strength`, from 0 to 1, of its own; 0 changes nothing."""
        ...


DEFAULT_GUIDANCE = ClassifierFree(5.0)
"""What sampling uses where no guidance is given."""
