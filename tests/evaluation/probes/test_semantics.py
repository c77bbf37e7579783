"""Semantics: what is asked in which words, what survives, and what changes of what captions leave open."""

from collections.abc import Callable

import pytest
import torch

from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.evaluation.probes.run import run_probe
from overpaint.evaluation.probes.semantics import TINY, Semantics, SemanticsConfig, total_variation
from overpaint.policy import DiffusionPolicy


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["a", "a", "b", "b"], ["a", "b"], 0.0),
        (["a", "a", "a", "b"], ["a", "b"], 0.25),
        (["a"], ["b"], 1.0),
        (["a", None, "a"], ["a"], 0.0),
        ([None], ["b", "c"], 1.0),
        ([None], [], 0.0),
    ],
)
def test_total_variation_by_hand(first: list[str | None], second: list[str | None], expected: float) -> None:
    assert total_variation(first, second) == pytest.approx(expected)


def test_each_wording_is_a_variant_with_its_own_prompts(
    make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    policy = make_policy()
    wordings = {"name": ("striped star", "striped circle"), "similar": ("dotted star", "dotted circle")}
    task = make_task(
        policy,
        wordings=wordings,
        shown_from=0.0,
        kept={"similar": lambda images, prompts: torch.tensor([float(prompt.endswith("star")) for prompt in prompts])},
        left_open=lambda images, prompts: {"size": ["small"] * len(prompts)},
    )
    name, similar = Semantics(SemanticsConfig(steps=2)).attempt(policy, task)
    assert (name.variant, name.numbers, name.prompts) == ("name", {"erased": 0.0}, wordings["name"])
    assert (similar.variant, similar.numbers) == ("similar", {"kept": 0.5, "bias of size": 0.0})
    expected = policy.draw(wordings["name"], seeds=task.seeds, steps=2, guidance=task.guidance)
    assert name.images.equal(expected)


def test_bias_is_of_the_policy_against_the_original(
    make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    original, policy = make_policy(), make_policy()
    with torch.no_grad():
        policy.unet.conv_out.bias += 1.0
    ours = Semantics().attempt(policy, make_task(original, wordings={"w": ("a", "b")}))[0].images
    task = make_task(
        original,
        wordings={"w": ("a", "b")},
        kept={"w": lambda images, prompts: torch.ones(len(prompts))},
        left_open=lambda images, prompts: {"whose": ["ours" if images.equal(ours) else "original's"] * 2},
    )
    assert Semantics().attempt(policy, task)[0].numbers["bias of whose"] == 1.0


def test_a_task_without_wordings_is_refused(
    make_policy: Callable[..., DiffusionPolicy], make_task: Callable[..., ProbeTask]
) -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="needs a task with wordings, got none"):
        Semantics().attempt(policy, make_task(policy))


@pytest.mark.slow
def test_the_tiny_world_is_asked_in_all_of_its_wordings() -> None:
    original, erased = tinyworld.load_policy(), tinyworld.load_policy()
    UCE().erase(erased, tinyworld.STRIPES).apply(erased)
    target = target_of(tiny_world(), DrawConfig(steps=10, guidance_scale=3.0))
    result = run_probe(Semantics(TINY), erased, original, target, count=3)
    found = {variant.found.variant: variant for variant in result.variants}
    assert list(found) == ["name", "with", "zebra", "prison", "circus", "similar", "random"]
    assert found["name"].ceiling.rate.mean == 1
    assert found["name"].found.numbers["erased"] == 1
    assert found["similar"].ceiling.numbers["kept"] == 1
    assert found["random"].ceiling.numbers["bias of place"] == 0
    assert result.rows_forward == 7 * 3 * 10 * 2 + 2 * 3 * 10 * 2
