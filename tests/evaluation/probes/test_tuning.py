"""Tuning a copy: on what is benign (resurgence) and on the concept (relearning)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from erasure.methods.sld import SLDConfig, SLDGuard
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.evaluation.probes.relearning import HALF, Relearning, RelearningConfig, relearning_ratio
from overpaint.evaluation.probes.result import Outcomes, VariantResult
from overpaint.evaluation.probes.resurgence import Resurgence, ResurgenceConfig, area
from overpaint.evaluation.probes.tuning import Tuning, updates_to_half
from overpaint.policy import DiffusionPolicy
from overpaint.policy.digest import policy_record
from refl import ReFLConfig
from rewards import as_reward

Make = Callable[..., DiffusionPolicy]
MakeTask = Callable[..., ProbeTask]

PICTURES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CAPTIONS = ("red circle", "blue star", "a cat")


def redness(images: torch.Tensor, prompts: Any = ()) -> torch.Tensor:
    return images[:, 0].mean(dim=(1, 2))


def tuned(policy: DiffusionPolicy, *updates: int, seed: int = 0) -> torch.Tensor:
    student = policy.student_copy("full")
    tuning = Tuning(student, CAPTIONS, PICTURES, learning_rate=1e-2, batch_size=2, seed=seed)
    for until in updates:
        tuning.until(until)
    assert tuning.updates == updates[-1]
    return torch.cat([parameter.detach().flatten() for parameter in student.trainable_parameters()])


def test_tuning_goes_on_where_it_was_left(make_policy: Make) -> None:
    policy = make_policy()
    whole = tuned(policy, 3)
    assert tuned(policy, 1, 1, 3).equal(whole)
    assert not tuned(policy, 2).equal(whole)
    assert not tuned(policy, 3, seed=1).equal(whole)


def test_tuning_lowers_the_loss_of_its_pictures(make_policy: Make) -> None:
    policy = make_policy()
    student = policy.student_copy("full")
    tuning = Tuning(student, CAPTIONS, PICTURES, learning_rate=1e-2, batch_size=3, seed=0)

    def loss() -> float:
        timesteps, noise = torch.tensor([100, 500, 900]), torch.ones_like(tuning.latents)
        with torch.no_grad():
            return student.denoising_loss(tuning.latents, tuning.conditioning, timesteps, noise).mean().item()

    before = loss()
    tuning.until(20)
    assert loss() < before


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(0.0, 0.6), (10.0, 1.0)], 0.0),
        ([(0.0, 0.0), (10.0, 0.25), (20.0, 0.75)], 15.0),
        ([(0.0, 0.0), (10.0, 1.0)], 5.0),
        ([(0.0, 0.5)], 0.0),
        ([(0.0, 0.0), (10.0, 0.4)], None),
    ],
)
def test_updates_to_one_half_by_hand(curve: list[tuple[float, float]], expected: float | None) -> None:
    assert updates_to_half(curve) == (None if expected is None else pytest.approx(expected))


def test_area_by_hand() -> None:
    assert area(((0.0, 0.2), (10.0, 0.4), (40.0, 0.6))) == pytest.approx((10 * 0.1 + 30 * 0.3) / 40)


def result(found: dict[str, float], foreign: dict[str, float]) -> VariantResult:
    one, other = (Outcomes(variant="", shown=(True,), numbers=numbers) for numbers in (found, foreign))
    return VariantResult(found=one, ceiling=one, floors={"foreign": other})


def test_relearning_against_something_foreign() -> None:
    assert relearning_ratio(result({HALF: 10.0}, {HALF: 40.0})) == 0.25
    assert relearning_ratio(result({}, {HALF: 40.0})) is None
    assert relearning_ratio(result({HALF: 10.0}, {})) is None
    alone = result({HALF: 10.0}, {})
    assert relearning_ratio(replace(alone, floors={"benign": alone.ceiling})) is None


def test_relearning_measures_a_copy(make_policy: Make, make_task: MakeTask) -> None:
    policy = make_policy(train="xattn")
    config = SLDConfig(concept_text="striped", warmup_steps=0, threshold=1.0)
    policy.guard = SLDGuard(config, policy.encode(["striped"]))
    before, asked = policy_record(policy), []

    def examples(count: int) -> tuple[list[str], torch.Tensor]:
        asked.append(count)
        return list(CAPTIONS), PICTURES

    config = RelearningConfig(updates=(0, 1, 3), pictures=3, learning_rate=1e-2, batch_size=2, steps=2)
    task = make_task(make_policy(), examples=examples, shown_from=0.0)
    one, three = Relearning(config).attempt(policy, task)
    assert policy_record(policy) == before
    assert all(parameter.grad is None for parameter in policy.unet.parameters())
    assert asked == [3]
    assert (one.variant, three.variant) == ("after 1 updates", "after 3 updates")
    assert not one.images.equal(three.images)
    assert (one.curve, three.curve) == ((), ((0.0, 1.0), (1.0, 1.0), (3.0, 1.0)))
    assert three.numbers == {HALF: 0.0}

    student = policy.student_copy("full")
    Tuning(student, CAPTIONS, PICTURES, learning_rate=1e-2, batch_size=2, seed=task.seeds[0]).until(3)
    expected = student.draw(task.prompts, seeds=task.seeds, steps=2, guidance=task.guidance)  # with the guard
    assert three.images.equal(expected)
    student.guard = None
    assert not student.draw(task.prompts, seeds=task.seeds, steps=2, guidance=task.guidance).equal(expected)


REFL = ReFLConfig(
    batch_size=2, micro_batch_size=2, steps=2, first_reward_step=1, last_reward_step=1, pretraining_batch_size=2
)
SMALL = ResurgenceConfig(
    updates=(0, 1, 2), pictures=3, batch_size=2, learning_rate=1e-2, lora_learning_rate=1e-2, refl=REFL, steps=2
)


def test_every_way_of_tuning_changes_a_copy(make_policy: Make, make_task: MakeTask) -> None:
    policy = make_policy()
    before = policy_record(policy)
    task = make_task(
        make_policy(),
        reward=as_reward(redness),
        shown_from=0.0,
        benign_pictures=lambda count: (list(CAPTIONS), PICTURES),
    )
    attempts = Resurgence(SMALL).attempt(policy, task)
    assert policy_record(policy) == before
    assert [attempt.variant for attempt in attempts] == ["denoising with a LoRA", "denoising", "ReFL"]
    start = policy.draw(task.prompts, seeds=task.seeds, steps=2, guidance=task.guidance)
    for attempt in attempts:
        assert not attempt.images.equal(start)
        assert attempt.curve == ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0))
        assert attempt.numbers == {"rise": 0.0, "largest rise": 0.0, "area": 0.0}

    chance = torch.get_rng_state()  # Python's own generator is drawn from by the checks of types in tests
    again = Resurgence(SMALL).attempt(policy, task)
    assert torch.get_rng_state().equal(chance)
    assert all(one.images.equal(other.images) for one, other in zip(attempts, again, strict=True))


def test_rise_is_that_of_the_tuned_copy(make_policy: Make, make_task: MakeTask) -> None:
    policy = make_policy()
    start = policy.draw(make_task(policy).prompts, seeds=(5, 6), steps=2, guidance=make_task(policy).guidance)
    task = make_task(policy, score=lambda images: torch.tensor([1.0 - float(images.equal(start)), 0.0]))
    (attempt,) = Resurgence(
        ResurgenceConfig(updates=(0, 1), ways=("denoising",), pictures=2, learning_rate=1e-2, steps=2)
    ).attempt(policy, task)  # on pictures that the original draws for the training prompts
    assert attempt.curve == ((0.0, 0.0), (1.0, 0.5))
    assert attempt.numbers == {"rise": 0.5, "largest rise": 0.5, "area": 0.25}


def test_what_a_task_lacks_is_told(make_policy: Make, make_task: MakeTask) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="by ReFL needs a task with a reward, got none"):
        Resurgence(SMALL).attempt(policy, make_task(policy))
    with pytest.raises(ValueError, match="needs a task with benign pictures or training prompts, got neither"):
        Resurgence(ResurgenceConfig(ways=("denoising",))).attempt(policy, make_task(policy, training_prompts=()))
    with pytest.raises(ValueError, match="needs a task with examples, got none"):
        Relearning().attempt(policy, make_task(policy))


@pytest.mark.parametrize("updates", [(0,), (1, 2), (0, 3, 2), (0, 2, 2)])
@pytest.mark.parametrize("config", [RelearningConfig, ResurgenceConfig])
def test_updates_grow_from_none(config: Any, updates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="updates must grow from 0"):
        config(updates=updates)
