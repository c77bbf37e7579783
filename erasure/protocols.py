"""What an erasure method is: one of three families, each with its own small protocol.

| family | what it changes | protocol | what it gives |
|---|---|---|---|
| guidance | sampling, no weights | `policy.Guidance` | a way to combine predictions, handed to `policy.sample` |
| edit | weights, in closed form | `Edit` | a `policy.WeightDelta` |
| objective | weights, by descending a loss | `Objective` | a loss on noise predictions |

A method implements exactly one of them. Costs on images are no method: see `erasure.constraint`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from overpaint.policy import DiffusionPolicy, WeightDelta
from overpaint.policy.types import PerSample
from overpaint.settings import Seed
from overpaint.training import Stateful, TrainingRun

from .concept import Concept


class ConceptBatch(NamedTuple):
    """What an objective is evaluated on: prompts that elicit the concept, and a seed for each.

    Everything random in a loss follows from the seeds, so that the same batch gives the same loss on any machine.
    """

    prompts: Sequence[str]
    seeds: Sequence[Seed]


@runtime_checkable
class Edit(Protocol):
    """A method that computes new weights in closed form, without images and without training."""

    def __call__(self, policy: DiffusionPolicy, concept: Concept) -> WeightDelta:
        """Returns the change of the UNet's weights that erases the concept. The policy itself is not changed."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A method that erases by descending a loss on noise predictions: alone, or as the constraint of a reward."""

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Computes once what the loss needs, before the first update.

        Raises:
            ValueError: The method cannot work with this policy or this concept.
        """
        ...

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the loss of each sample, in squared units of the noise; gradients reach what the policy trains."""
        ...


class UNetCalls(NamedTuple):
    """How many samples go through the UNet for each sample of an update, on average, each branch of guidance."""

    forward: float  # without gradient
    backward: float  # with gradient


@runtime_checkable
class TrainedMethod(Objective, Protocol):
    """An objective that is trained alone, with settings of its own."""

    name: str
    config: Any
    """`descent` in it is a `DescentConfig`, and `train`, where it is there, what `policy.student_copy` takes."""

    def unet_calls(self) -> UNetCalls:
        """Returns the calls of its training, whose preparation is not counted."""
        ...


@runtime_checkable
class Learner(Stateful, Protocol):
    """An objective that learns something of its own beside the policy, such as a constant of its loss.

    Its state, the same in all processes, goes into the checkpoints of a training of its own.
    """

    def learn(self, run: TrainingRun) -> dict[str, float]:
        """Learns from the last loss, once after every update of the policy; returns what is to be logged."""
        ...


def check_unet(policy: DiffusionPolicy, method: str) -> None:
    """Checks that a method finds the cross-attention that it works on.

    Raises:
        ValueError: The model has a transformer, whose attention to image and text is one.
    """
    if policy.family.network != "unet":
        raise ValueError(
            f"{method} must be given a model with a UNet, whose cross-attention it works on, got a "
            f"{policy.family.pipelines[0]}, which has a transformer"
        )


def check_trainable(policy: DiffusionPolicy, purpose: str, remedy: str = "load it with lora= or train=") -> None:
    """Raises a `ValueError` where the policy has nothing to train; it says what for, and the remedy."""
    if not policy.trainable_parameters():
        raise ValueError(f"{purpose} needs a policy with trainable weights, got one without; {remedy}")
