"""Properties that every erasure method has; a new method is one row of METHODS."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erasure import UCE, Concept, Erasure, UCEConfig
from overpaint.policy import DiffusionPolicy, LoRAConfig, select_parameters
from overpaint.policy.weights import base_parameters

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"), preserve=("", "dotted"))
PROMPTS = ["a striped red circle", "a dotted blue square"]
METHODS = [
    pytest.param(UCE(), "xattn-kv", id="uce"),
    pytest.param(UCE(UCEConfig(variant="released")), "xattn-kv", id="uce-released"),
]
every_method = pytest.mark.parametrize(("method", "parameters"), METHODS)


def weights(policy: DiffusionPolicy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in base_parameters(policy.unet).items()}


def draw(policy: DiffusionPolicy) -> torch.Tensor:
    return policy.draw(PROMPTS, seeds=[1, 2], steps=2)


@every_method
def test_erasing_leaves_the_policy_as_it_was(policy: DiffusionPolicy, method: UCE, parameters: str) -> None:
    before = weights(policy)
    method.erase(policy, CONCEPT)
    after = weights(policy)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@every_method
def test_applying_changes_the_named_parameters_and_no_others(
    policy: DiffusionPolicy, method: UCE, parameters: str
) -> None:
    before = weights(policy)
    method.erase(policy, CONCEPT).apply(policy)
    changed = {name for name, value in weights(policy).items() if not torch.equal(value, before[name])}
    assert changed == set(select_parameters(policy.unet, parameters))


@every_method
def test_strength_zero_changes_nothing(policy: DiffusionPolicy, method: UCE, parameters: str) -> None:
    delta = method.erase(policy, CONCEPT, 0.0).delta
    assert delta.tensors
    assert not any(tensor.any() for tensor in delta.tensors.values())


@every_method
def test_erasing_twice_gives_the_same_bits(policy: DiffusionPolicy, method: UCE, parameters: str) -> None:
    first, second = (method.erase(policy, CONCEPT).delta.tensors for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first | second)


@every_method
def test_lora_on_top_does_not_matter(make_policy: Callable[..., DiffusionPolicy], method: UCE, parameters: str) -> None:
    bare, tuned = make_policy(), make_policy(lora=LoRAConfig())
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.fill_(0.1)
    expected, actual = (method.erase(each, CONCEPT).delta.tensors for each in (bare, tuned))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@every_method
def test_saved_and_loaded_erasure_is_the_same(
    policy: DiffusionPolicy, tmp_path: Path, method: UCE, parameters: str
) -> None:
    erasure = method.erase(policy, CONCEPT, 0.5)
    erasure.save(tmp_path / "new" / "folder")
    loaded = Erasure.load(tmp_path / "new" / "folder")
    assert (loaded.method, loaded.config, loaded.concept) == (erasure.method, erasure.config, erasure.concept)
    assert loaded.config["strength"] == 0.5
    assert loaded.delta.tensors.keys() == erasure.delta.tensors.keys()
    assert all(torch.equal(loaded.delta.tensors[name], value) for name, value in erasure.delta.tensors.items())


@every_method
def test_pipeline_and_policy_draw_the_same_when_erased(
    make_policy: Callable[..., DiffusionPolicy], method: UCE, parameters: str
) -> None:
    policy, other = make_policy(), make_policy()
    erasure = method.erase(policy, CONCEPT)
    plain = draw(policy)
    erasure.apply(policy)
    pipeline = other.to_pipeline()
    erasure.apply_to_pipeline(pipeline)
    erased = draw(policy)
    assert not torch.equal(erased, plain)
    assert torch.equal(erased, draw(DiffusionPolicy(pipeline, device="cpu")))
