"""Dynamic tracing: the way from the original to the erased model, by weights, guards and added networks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from erasure.methods.receler.erasers import fresh_erasers
from erasure.methods.safree import SAFREEConfig
from erasure.methods.safree.safree import SAFREEGuard
from erasure.methods.sld import SLDConfig, SLDGuard
from overpaint.evaluation.probes.probe import ProbeTask
from overpaint.evaluation.probes.tracing import Tracing, TracingConfig, between
from overpaint.policy import ClassifierFree, DiffusionPolicy, Guidance, WeightDelta
from overpaint.policy.added import add_networks
from overpaint.policy.digest import policy_record

Make = Callable[..., DiffusionPolicy]
MakeTask = Callable[..., ProbeTask]


@pytest.fixture
def pair(make_policy: Make) -> tuple[DiffusionPolicy, DiffusionPolicy]:
    """An original and a policy that draws something else."""
    original, policy = make_policy(), make_policy()
    WeightDelta({"conv_out.bias": torch.ones(4), "conv_in.bias": -torch.ones(8)}).apply(policy.unet)
    return original, policy


def predicted(policy: DiffusionPolicy, **options: Any) -> torch.Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.predict_noise(
            latents, torch.tensor([300, 600]), policy.encode(["a red star", "a cat"]), **options
        )


def test_weights_are_interpolated(pair: tuple[DiffusionPolicy, DiffusionPolicy]) -> None:
    original, policy = pair
    before = policy_record(policy)
    with between(original, policy) as way:
        for strength in (0.25, 0.75, 0.0):
            bias = way.at(strength).unet.conv_out.bias
            torch.testing.assert_close(bias, original.unet.conv_out.bias + strength)
        torch.testing.assert_close(predicted(way.at(0.0)), predicted(original))
        torch.testing.assert_close(predicted(way.at(1.0)), predicted(policy))
    assert policy_record(policy) == before


def test_added_networks_add_a_share(make_policy: Make) -> None:
    original, policy = make_policy(), make_policy()
    erasers = fresh_erasers(policy.unet, 2, 0)
    for eraser in erasers.values():
        nn.init.normal_(eraser.up.bias)
    add_networks(policy.unet, erasers)
    expected = predicted(policy)
    with between(original, policy) as way:
        torch.testing.assert_close(predicted(way.at(0.0)), predicted(original))
        torch.testing.assert_close(predicted(way.at(1.0)), expected)
        half = predicted(way.at(0.5))
        assert not torch.allclose(half, expected)
        for eraser in erasers.values():
            eraser.up.weight.data *= 0.5
            eraser.up.bias.data *= 0.5
        torch.testing.assert_close(half, predicted(policy))


def test_guards_act_with_a_share_of_their_strength(make_policy: Make) -> None:
    original, policy = make_policy(), make_policy()
    config = SLDConfig(concept_text="striped", warmup_steps=0, momentum_scale=0.0)
    policy.guard = SLDGuard(config, policy.encode(["striped"]))
    with between(original, policy) as way:
        guard = way.at(0.25).guard
        assert isinstance(guard, SLDGuard)
        assert guard.config.guidance_scale == 250
        guided = {"guidance": ClassifierFree(3.0)}
        torch.testing.assert_close(predicted(way.at(0.0), **guided), predicted(original, **guided))
        torch.testing.assert_close(predicted(way.at(1.0), **guided), predicted(policy, **guided))
        assert not torch.allclose(predicted(original, **guided), predicted(policy, **guided))


def test_a_guard_inside_of_its_unet_acts_inside_of_the_copy(make_policy: Make) -> None:
    original, policy = make_policy(), make_policy()
    policy.guard = SAFREEGuard(SAFREEConfig(concepts=("striped",)), 1.0, policy.prompts, policy.unet)
    guided = {"guidance": ClassifierFree(3.0), "steps": torch.tensor([0, 0])}
    with between(original, policy) as way:
        torch.testing.assert_close(predicted(way.at(0.0), **guided), predicted(original, **guided))
        torch.testing.assert_close(predicted(way.at(1.0), **guided), predicted(policy, **guided))


class Steady:
    """A guard that cannot act less."""

    def guided(self, guidance: ClassifierFree) -> Guidance:
        return guidance

    def attach(self, pipeline: Any) -> None: ...


def test_what_has_no_strength_or_other_parameters_is_refused(make_policy: Make, make_task: MakeTask) -> None:
    original, policy = make_policy(), make_policy()
    policy.guard = Steady()
    with pytest.raises(ValueError, match="guard must have a strength to be traced, got"):
        Tracing().attempt(policy, make_task(original))
    policy.guard = None
    policy.unet.conv_out = nn.Conv2d(8, 4, 1)
    with pytest.raises(ValueError, match=r"must have the original's parameters to be traced, and differs in 'conv_out"):
        Tracing().attempt(policy, make_task(original))


def test_rates_and_kinds_by_strength(pair: tuple[DiffusionPolicy, DiffusionPolicy], make_task: MakeTask) -> None:
    original, policy = pair
    with between(original, policy) as way:
        task = make_task(original)
        middle = task.drawn_by(way.at(0.5))

    def score(images: torch.Tensor) -> torch.Tensor:
        """One of two pictures at the start, both in the middle, none at the end."""
        shown = {True: [1.0, 1.0]}.get(torch.allclose(images, middle, atol=1e-5), [0.0, 0.0])
        return torch.tensor([1.0, 0.0] if images.equal(task.pictures) else shown)

    task = make_task(original, score=score, kinds=lambda images: ["red" if one else "blue" for one in score(images)])
    (attempt,) = Tracing(TracingConfig(strengths=(0.0, 0.5, 1.0))).attempt(policy, task)
    assert attempt.curve == ((0.0, 0.5), (0.5, 1.0), (1.0, 0.0))
    assert attempt.images.equal(task.drawn_by(policy))
    assert attempt.numbers == {
        "largest jump": 1.0,
        "jump up to": 1.0,
        **{"blue at 0": 0.5, "blue at 0.5": 0.0, "blue at 1": 1.0},
        **{"red at 0": 0.5, "red at 0.5": 1.0, "red at 1": 0.0},
    }


@pytest.mark.parametrize("strengths", [(0.0, 0.5), (0.5, 1.0), (0.0, 0.7, 0.3, 1.0), (0.0, 0.0, 1.0)])
def test_strengths_lead_from_the_original_to_the_erased(strengths: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="strengths must grow from 0 to 1"):
        TracingConfig(strengths=strengths)
