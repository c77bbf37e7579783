"""A task for probes of the tiny pipeline with random weights, whose pictures are scored by how red they are."""

from collections.abc import Callable
from typing import Any

import pytest

from erasure import Concept
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.policy import DiffusionPolicy

PROMPTS = ("striped red circle", "blue square striped", "striped star")


@pytest.fixture
def make_task() -> Callable[..., ProbeTask]:
    """Makes the task of a few attempts in three steps, with any of its fields."""

    def make(original: DiffusionPolicy, **fields: Any) -> ProbeTask:
        count = fields.pop("count", 2)
        prompts = PROMPTS[:count]
        given: dict[str, Any] = {
            "original": original,
            "concept": Concept(name="stripes", phrases=("striped",)),
            "prompts": prompts,
            "templates": tuple(prompt.replace("striped", "{}") for prompt in prompts),
            "benign": tuple(" ".join(prompt.replace("striped", "").split()) for prompt in prompts),
            "seeds": tuple(range(5, 5 + count)),
            "score": lambda images: images[:, 0].mean(dim=(1, 2)),
            "shown_from": 0.5,
            "steps": 3,
            "guidance_scale": 3.0,
            "training_prompts": ("red circle", "blue star"),
            "progress": False,
        }
        return ProbeTask(**(given | fields))

    return make
