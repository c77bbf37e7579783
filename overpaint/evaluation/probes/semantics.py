"""Semantics: whether a concept is gone under all of its wordings, and what of the rest has survived.

The concept is asked for by its name, in other words and without being named, and what is similar and what is random is
asked for as well. An erased share belongs to each wording of the concept, a kept share to each of what has to survive,
and a bias: the total variation distance ½ Σ |p - q| between what the policy and the original draw for captions with the
same seeds, of each attribute that these captions leave open.

Source: EMMA (2025), https://arxiv.org/abs/2512.17320, whose dimensions of erasing ability and retaining ability are
probed here. Departures: the wordings are those of the task; EMMA measures bias by gender and race, here it is whatever
the task says captions leave open; its inference time and image quality belong to the evaluation, not to a probe.
"""

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from overpaint.policy import DiffusionPolicy
from overpaint.settings import Field, settings

from .probe import Attempt, Floor, ProbeTask


@settings
class SemanticsConfig:
    """Settings of the probe of semantics."""

    steps: int | None = Field(None, ge=1)
    """Denoising steps of a picture; None are the task's."""


class Semantics:
    """Asks in every wording of the task; each is a variant.

    There are no floors: what a wording means does not depend on what stands in the concept's place.
    """

    name: ClassVar[str] = "semantics"
    floors: ClassVar[tuple[Floor, ...]] = ()

    def __init__(self, config: SemanticsConfig | None = None) -> None:
        self.config = config or SemanticsConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Draws every wording's prompts with the task's seeds.

        Raises:
            ValueError: The task has no wordings.
        """
        if not task.wordings:
            raise ValueError("semantics needs a task with wordings, got none")
        steps, attempts = self.config.steps, []
        for wording, prompts in task.wordings.items():
            images = task.drawn_by(policy, prompts, steps=steps)
            scores = task.score(images)
            numbers = {"erased": 1.0 - task.rate(scores)}
            if wording in task.kept:
                numbers = {"kept": task.kept[wording](images, prompts).mean().item()}
                if task.left_open is not None:
                    usual = task.drawn_by(task.original, prompts, steps=steps)
                    found, expected = task.left_open(images, prompts), task.left_open(usual, prompts)
                    numbers |= {f"bias of {name}": total_variation(found[name], expected[name]) for name in expected}
            attempts.append(Attempt(wording, images, scores, numbers=numbers, prompts=prompts))
        return attempts


def total_variation(first: Sequence[str | None], second: Sequence[str | None]) -> float:
    """Returns half the sum of the differences of two distributions, in [0, 1]; entries of None do not count.

    1 where one of the two has no other entries, and 0 where both have none.
    """
    counts = [Counter(item for item in items if item is not None) for items in (first, second)]
    one, other = (count.total() for count in counts)
    if not one or not other:
        return float(one != other)
    return sum(abs(counts[0][item] / one - counts[1][item] / other) for item in counts[0] | counts[1]) / 2


TINY = SemanticsConfig(steps=10)
"""For the tiny world, whose pictures of ten steps are those of twenty to the detector."""
