"""What is the same for every model under test is done once for a target, and is no part of what a probe costs."""

from collections.abc import Callable

import torch

from erasure import Concept
from overpaint.evaluation.probes.completion import Completion, CompletionConfig
from overpaint.evaluation.probes.probe import PreparedProbe
from overpaint.evaluation.probes.run import run_probe
from overpaint.evaluation.probes.target import Foreign, ProbeTarget
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample


def brightness(images: Images) -> PerSample:
    return images.mean(dim=(1, 2, 3))


def pictures(count: int, seed: int) -> tuple[list[str], Images]:
    generator = torch.Generator().manual_seed(seed)
    return ["a circle"] * count, torch.rand(count, 3, 64, 64, generator=generator)


def make_target() -> ProbeTarget:
    return ProbeTarget(
        name="brightness",
        concept=Concept(name="stripes", phrases=("striped",)),
        prompts=lambda kind, count, seed: ["a striped circle"] * count,
        template=lambda prompt: prompt.replace("striped", "{}"),
        score=brightness,
        foreign=Foreign(pictures=pictures, score=brightness, shown_from=0.5),
        steps=3,
        guidance_scale=3.0,
    )


def test_a_target_gives_the_same_task_again(make_policy: Callable[..., DiffusionPolicy]) -> None:
    original, target = make_policy(), make_target()
    task = target.task(original, count=2, seed=0)
    assert target.task(original, count=2, seed=0) is task
    others = [
        target.task(original, count=3, seed=0),
        target.task(original, count=2, seed=1),
        target.task(original, count=2, seed=0, floor="benign"),
        target.task(original, count=2, seed=0, progress=False),
        target.task(make_policy(), count=2, seed=0),
        make_target().task(original, count=2, seed=0),
    ]
    assert all(other is not task for other in others)


def test_further_foreign_pictures_are_other_ones(make_policy: Callable[..., DiffusionPolicy]) -> None:
    task = make_target().task(make_policy(), count=2, seed=0, floor="foreign")
    assert task.examples is not None
    _, further = task.examples(5)
    assert further.shape == (5, 3, 64, 64)
    assert not torch.isclose(further[:2], task.pictures).all(dim=(1, 2, 3)).any()


def test_preparation_is_not_counted_and_done_once(make_policy: Callable[..., DiffusionPolicy]) -> None:
    original, target = make_policy(), make_target()
    probe = Completion(CompletionConfig(steps_before=(2,), noised_to=(), empty_prompt=False))
    assert isinstance(probe, PreparedProbe)
    made = []
    original.unet.register_forward_hook(lambda *_: made.append(1))
    for _ in range(2):
        result = run_probe(probe, make_policy(), original, target, count=2, progress=False)
        assert (result.rows_forward, result.rows_backward) == (2 * 2, 0)
    # Two steps for each of three tasks, once; and a step for the ceiling and each of two floors, twice.
    assert len(made) == 3 * 2 + 2 * 3
