"""Networks that are added to a UNet, policies with a UNet of their own, and guards of sampling."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overpaint.policy import ClassifierFree, DiffusionPolicy, Guidance, LoRAConfig, select_parameters
from overpaint.policy.added import add_networks, added_networks, remove_networks
from overpaint.policy.weights import base_parameters

PROMPTS = ["a red circle", "a photo of a cat"]


def draw(policy: DiffusionPolicy) -> Tensor:
    return policy.draw(PROMPTS, steps=2, seeds=[1, 2])


def networks(policy: DiffusionPolicy) -> dict[str, nn.Module]:
    """Returns a doubling of what each cross-attention gives."""
    return {name: nn.Identity() for name, _ in policy.unet.named_modules() if name.endswith("attn2")}


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


def test_a_layer_gives_its_output_and_what_the_network_makes_of_it(bare: DiffusionPolicy) -> None:
    layer = next(module for name, module in bare.unet.named_modules() if name.endswith("attn2"))
    inputs, context = torch.randn(1, 5, 8), torch.randn(1, 3, 16)
    before = layer(inputs, encoder_hidden_states=context)
    add_networks(bare.unet, networks(bare))
    assert torch.equal(layer(inputs, encoder_hidden_states=context), 2 * before)


def test_removing_gives_back_the_policy_to_the_bit(bare: DiffusionPolicy) -> None:
    before, names = draw(bare), set(bare.unet.state_dict())
    add_networks(bare.unet, networks(bare))
    assert not torch.equal(draw(bare), before)
    remove_networks(bare.unet)
    assert torch.equal(draw(bare), before)
    assert set(bare.unet.state_dict()) == names
    assert not added_networks(bare.unet)


def test_added_networks_are_no_weights_of_the_unet(bare: DiffusionPolicy) -> None:
    names = set(base_parameters(bare.unet))
    add_networks(bare.unet, {name: nn.Linear(8, 8) for name in networks(bare)})
    assert set(base_parameters(bare.unet)) == names
    chosen = select_parameters(bare.unet, "added")
    assert len(chosen) == 2 * len(networks(bare))
    assert all(".attn2.added." in name for name in chosen)


def test_a_plain_pipeline_keeps_them_and_its_folder_cannot(bare: DiffusionPolicy, tmp_path: Path) -> None:
    add_networks(bare.unet, networks(bare))
    other = DiffusionPolicy(bare.to_pipeline(), device="cpu")
    assert torch.equal(draw(other), draw(bare))
    with pytest.raises(ValueError, match="cannot hold networks added to the UNet"):
        bare.save_pipeline(tmp_path)


def test_a_second_network_and_an_unknown_layer_are_refused(bare: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="lacks 'nowhere'"):
        add_networks(bare.unet, {**networks(bare), "nowhere": nn.Identity()})
    assert not added_networks(bare.unet)
    add_networks(bare.unet, networks(bare))
    with pytest.raises(ValueError, match=r"takes one added network, and '.*attn2' has one already"):
        add_networks(bare.unet, networks(bare))


def test_a_trainee_draws_the_same_and_leaves_its_policy_alone(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(lora=LoRAConfig())
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.fill_(0.1)
    before = draw(policy)
    student_copy = policy.student_copy("xattn")
    torch.testing.assert_close(draw(student_copy), before, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in student_copy.trainable_parameters():
            parameter.zero_()
    assert torch.equal(draw(policy), before)
    assert not torch.equal(draw(student_copy), before)
    with student_copy.reference():
        torch.testing.assert_close(draw(student_copy), before, rtol=0, atol=1e-5)
    assert student_copy.vae is policy.vae


class Stronger:
    """Triples the scale of guidance, and notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def guided(self, guidance: ClassifierFree) -> Guidance:
        self.asked.append(guidance.scale)
        return ClassifierFree(3 * guidance.scale)

    def attach(self, pipeline: Any) -> None:
        pipeline.attached = self


def test_a_safeguard_takes_the_place_of_guidance_at_scale_one_as_well(bare: DiffusionPolicy, tmp_path: Path) -> None:
    tripled = [bare.draw(PROMPTS, steps=2, seeds=[1, 2], guidance=ClassifierFree(scale)) for scale in (6.0, 3.0)]
    bare.guard = Stronger()
    for scale, expected in zip((2.0, 1.0), tripled, strict=True):
        assert torch.equal(bare.draw(PROMPTS, steps=2, seeds=[1, 2], guidance=ClassifierFree(scale)), expected)
    assert bare.guard.asked == [2.0, 2.0, 1.0, 1.0]
    assert bare.to_pipeline().attached is bare.guard
    with pytest.raises(ValueError, match="cannot hold a guard"):
        bare.save_pipeline(tmp_path)
