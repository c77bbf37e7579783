"""Dynamic tracing: where the pictures go while a model turns from the original into the erased one.

Weights are interpolated, θ(s) = θ_original + s (θ_erased - θ_original), and the same prompts are drawn with the same
seeds at each strength s. Where a concept is avoided, the condition is steered elsewhere and pictures jump; where it is
destroyed, it fades.

Source: "When are concepts erased" (2025), https://arxiv.org/abs/2505.17013, dynamic concept tracing. Departures: what
is no difference of weights comes in by strength too, together with the weights. A guard acts with that share of its own
strength (see `AdjustableGuard`), and what added networks add is multiplied by it.
"""

from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy, WeightDelta, merged_state
from overpaint.policy.added import added_networks
from overpaint.policy.guidance import AdjustableGuard, SamplingGuard
from overpaint.policy.types import Images
from overpaint.settings import Field, NonNegative, settings

from .probe import Attempt, Floor, ProbeTask


@settings
class TracingConfig:
    """Settings of dynamic tracing."""

    strengths: tuple[NonNegative, ...] = Field((0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0), min_length=2)
    """Shares of the way from the original to the erased model at which pictures are drawn, growing from 0 to 1."""

    steps: int | None = Field(None, ge=1)
    """Denoising steps of a picture; None are the task's."""

    def __post_init__(self) -> None:
        """Checks that strengths lead from the original to the erased model."""
        if list(self.strengths) != sorted(set(self.strengths)) or (self.strengths[0], self.strengths[-1]) != (0.0, 1.0):
            raise ValueError(f"strengths must grow from 0 to 1, got {self.strengths}")


class Tracing:
    """Draws at strengths between the original and the policy; its one variant shows the pictures of the whole change.

    Numbers are the largest difference of rates at neighbouring strengths, the strength after it, and, where the task
    tells kinds of pictures, the share of each kind at each strength.
    """

    name: ClassVar[str] = "tracing"
    floors: ClassVar[tuple[Floor, ...]] = ("benign",)

    def __init__(self, config: TracingConfig | None = None) -> None:
        self.config = config or TracingConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Draws the task's prompts at every strength.

        Raises:
            ValueError: The policy has not the original's parameters, or its guard has no strength.
        """
        steps = self.config.steps
        drawn: dict[float, Images] = {0.0: task.drawn_by(task.original, steps=steps)}
        with between(task.original, policy) as way:
            for strength in self.config.strengths[1:-1]:
                drawn[strength] = task.drawn_by(way.at(strength), steps=steps)
        drawn[1.0] = task.drawn_by(policy, steps=steps)

        scores = {strength: task.score(images) for strength, images in drawn.items()}
        curve = tuple((at, task.rate(found)) for at, found in scores.items())
        jump, after = max((abs(rate - before), at) for (_, before), (at, rate) in pairwise(curve))
        numbers = {"largest jump": jump, "jump up to": after}
        if task.kinds is not None:
            shown = {strength: task.kinds(images) for strength, images in drawn.items()}
            for kind in sorted({kind for kinds in shown.values() for kind in kinds}):
                for strength, kinds in shown.items():
                    numbers[f"{kind} at {strength:g}"] = kinds.count(kind) / len(kinds)
        return [Attempt("whole change", drawn[1.0], scores[1.0], numbers=numbers, curve=curve)]


class Way:
    """A policy of its own that can be brought anywhere between an original and an erased one."""

    def __init__(self, traced: DiffusionPolicy, delta: WeightDelta) -> None:
        self.traced, self.delta, self.guard, self.strength = traced, delta, traced.guard, 1.0

    def at(self, strength: float) -> DiffusionPolicy:
        """Returns the policy, brought to a strength."""
        self.delta.apply(self.traced.model, strength - self.strength)
        self.strength = strength
        self.traced.guard = _weakened(self.guard, strength)
        return self.traced

    def scale(self, network: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Multiplies what an added network adds."""
        return self.strength * output


@contextmanager
def between(original: DiffusionPolicy, policy: DiffusionPolicy) -> Generator[Way]:
    """Gives the way from an original to a policy, for the length of a `with` block; both are left as they were."""
    before, after = merged_state(original.model), merged_state(policy.model)
    shapes = {name: (tuple(value.shape), tuple(after[name].shape)) for name, value in before.items() if name in after}
    differing = sorted({*(before.keys() ^ after.keys()), *(name for name, (a, b) in shapes.items() if a != b)})
    if differing:
        raise ValueError(
            f"the policy must have the original's parameters to be traced, and differs in {differing[0]!r}"
        )
    _weakened(policy.guard, 1.0)
    way = Way(policy.student_copy(), WeightDelta.between(before, policy.model))
    handles = [network.register_forward_hook(way.scale) for network in added_networks(way.traced.model).values()]
    try:
        yield way
    finally:
        for handle in handles:
            handle.remove()


def _weakened(guard: SamplingGuard | None, strength: float) -> SamplingGuard | None:
    """Returns a guard with a share of its strength.

    Raises:
        ValueError: It has none.
    """
    if guard is None:
        return None
    if not isinstance(guard, AdjustableGuard):
        raise ValueError(f"the policy's guard must have a strength to be traced, got {guard!r} without `weakened`")
    return guard.weakened(strength)


TINY = TracingConfig(strengths=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), steps=10)
"""For the tiny world."""
