import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from erasure import NUDITY, SLD, UCE, AddedNetworks, Change, Erasure, Receler
from erasure.changes import KINDS, WeightChange
from overpaint.policy import DiffusionPolicy, LoRAConfig, SampleNoise, WeightDelta
from overpaint.policy.weights import base_parameters


@pytest.fixture
def erasure(policy: DiffusionPolicy) -> Erasure:
    return UCE().erase(policy, NUDITY)


@pytest.mark.parametrize("train", [None, "xattn"])
def test_erased_policy_is_the_reference_of_the_training_that_follows(
    make_policy: Callable[..., DiffusionPolicy], erasure: Erasure, train: str | None
) -> None:
    policy = make_policy(train=train)
    erasure.apply(policy)
    erased = {name: parameter.detach().clone() for name, parameter in base_parameters(policy.unet).items()}
    with policy.reference():
        assert all(torch.equal(value, erased[name]) for name, value in base_parameters(policy.unet).items())


@pytest.mark.parametrize("train", [None, "xattn"])
@pytest.mark.parametrize("method", ["uce", "receler", "sld"])
def test_the_model_before_can_be_the_reference_of_an_erased_one(
    make_policy: Callable[..., DiffusionPolicy], method: str, train: str | None
) -> None:
    latents = SampleNoise([0, 1], (4, 8, 8), torch.device("cpu")).draw()

    def predicted(policy: DiffusionPolicy) -> torch.Tensor:
        return policy.predict_noise(latents, torch.tensor([500, 20]), policy.encode(["nude", "a red circle"])).detach()

    policy = make_policy(train=train, lora=None if train else LoRAConfig(rank=2))
    policy.load_trainable_state({name: value + 0.01 for name, value in policy.trainable_state().items()})
    if train:
        policy.remember_reference()
    with policy.reference():
        before = predicted(policy)
    change: Change = {
        "uce": lambda: UCE().erase(policy, NUDITY).change,
        "receler": lambda: AddedNetworks(
            {
                name: torch.full_like(value, 0.1)
                for name, value in AddedNetworks.of(Receler().student(policy).unet).tensors.items()
            }
        ),
        "sld": lambda: SLD().erase(policy, NUDITY).change,
    }[method]()
    erasure = Erasure(method=method, config={}, concept=NUDITY, change=change)
    erasure.apply(policy, reference="original")
    erased = predicted(policy)
    with policy.reference():
        torch.testing.assert_close(predicted(policy), before, rtol=0, atol=0)
    torch.testing.assert_close(predicted(policy), erased, rtol=0, atol=0)
    if method != "sld":
        assert (erased - before).abs().max() > 1e-3
        policy.remember_reference()  # the present one again
        with policy.reference():
            assert (predicted(policy) - before).abs().max() > 1e-3


def test_weights_that_a_reference_cannot_have_are_refused(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match=r"reference's conv_in.bias must fit the UNet, got shape \(9,\), not \(8,\)"):
        policy.remember_reference({"conv_in.bias": torch.ones(9)})
    with pytest.raises(ValueError, match=r"got shape \(1,\), which the UNet lacks"):
        policy.remember_reference({"nowhere.bias": torch.ones(1)})


def test_erasure_for_a_while_puts_back_the_same_bits(policy: DiffusionPolicy, erasure: Erasure) -> None:
    before = {name: parameter.detach().clone() for name, parameter in base_parameters(policy.unet).items()}
    with erasure.applied(policy):
        changed = {name for name, value in base_parameters(policy.unet).items() if not torch.equal(value, before[name])}
    assert changed == set(erasure.delta.tensors)
    assert all(torch.equal(value, before[name]) for name, value in base_parameters(policy.unet).items())


def test_erasure_for_a_while_is_taken_back_after_an_error(policy: DiffusionPolicy, erasure: Erasure) -> None:
    name = next(iter(erasure.delta.tensors))
    before = base_parameters(policy.unet)[name].detach().clone()
    with pytest.raises(RuntimeError, match="drawing failed"), erasure.applied(policy):
        raise RuntimeError("drawing failed")
    assert torch.equal(base_parameters(policy.unet)[name], before)


def test_erasure_of_another_network_is_refused(policy: DiffusionPolicy) -> None:
    delta = WeightDelta({"nowhere.weight": torch.ones(1)})
    other = Erasure(method="UCE", config={}, concept=NUDITY, change=WeightChange(delta))
    with pytest.raises(ValueError, match=r"lacks 'nowhere\.weight'"):
        other.apply(policy)


def test_erasure_of_other_weights_is_refused_unless_that_is_wanted(
    make_policy: Callable[..., DiffusionPolicy], erasure: Erasure
) -> None:
    other = make_policy()
    with torch.no_grad():
        for parameter in base_parameters(other.unet).values():
            parameter.mul_(1.001)
    before = {name: parameter.detach().clone() for name, parameter in base_parameters(other.unet).items()}
    for apply in (lambda: erasure.apply(other), lambda: erasure.apply_to_pipeline(other.to_pipeline())):
        with pytest.raises(ValueError, match=r"have the weights that UCE erased .* \(SHA-256 .*check_base=False"):
            apply()
    assert all(torch.equal(value, before[name]) for name, value in base_parameters(other.unet).items())
    erasure.apply(other, check_base=False)
    name = next(iter(erasure.delta.tensors))
    assert not torch.equal(base_parameters(other.unet)[name], before[name])


def test_one_erasure_is_applied_once(policy: DiffusionPolicy, erasure: Erasure) -> None:
    erasure.apply(policy)
    with pytest.raises(ValueError, match="must have the weights that UCE erased"):
        erasure.apply(policy)


def test_folder_without_an_erasure_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"an erasure's folder must hold erasure\.json"):
        Erasure.load(tmp_path)


def test_erasure_of_another_format_is_refused(tmp_path: Path, erasure: Erasure) -> None:
    erasure.save(tmp_path)
    record = tmp_path / "erasure.json"
    record.write_text(json.dumps(json.loads(record.read_text(encoding="utf-8")) | {"format": "2"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be of format 'overpaint\.Erasure/3', got '2'"):
        Erasure.load(tmp_path)


def test_record_is_json_and_gives_back_infinite_settings(tmp_path: Path, erasure: Erasure) -> None:
    def refused(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    config = {"descent": {"max_grad_norm": math.inf, "rates": [1.0, -math.inf]}, "anchor": "inf", "train": None}
    kept = replace(erasure, config=config)
    kept.save(tmp_path)
    text = (tmp_path / "erasure.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=refused)
    assert record["config"]["descent"] == {"max_grad_norm": {"float": "inf"}, "rates": [1.0, {"float": "-inf"}]}
    assert Erasure.load(tmp_path).config == config
    older = record | {"format": "overpaint.Erasure/2", "config": config}
    (tmp_path / "erasure.json").write_text(json.dumps(older), encoding="utf-8")
    assert "Infinity" in (tmp_path / "erasure.json").read_text(encoding="utf-8")
    assert Erasure.load(tmp_path).config == config


@pytest.mark.parametrize("depth", [600, 990])
def test_settings_that_nest_deeply_are_refused_in_words_or_read(tmp_path: Path, erasure: Erasure, depth: int) -> None:
    erasure.save(tmp_path)
    text = (tmp_path / "erasure.json").read_text(encoding="utf-8")
    deep = text.replace('"config": {', '"config": {"a": ' + '{"a": ' * depth + "1" + "}" * depth + ",")
    (tmp_path / "erasure.json").write_text(deep, encoding="utf-8")
    with suppress(ValueError):  # how deep Python follows depends on its version
        assert "a" in Erasure.load(tmp_path).config


def test_a_saved_erasure_can_name_one_of_four_kinds_and_nothing_else(tmp_path: Path, erasure: Erasure) -> None:
    assert set(KINDS) == {"weights", "added-networks", "sld", "safree"}
    assert all(kind == change.kind for kind, change in KINDS.items())
    erasure.save(tmp_path)
    record = tmp_path / "erasure.json"
    named = json.loads(record.read_text(encoding="utf-8")) | {"kind": "json:JSONDecoder"}
    record.write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the kind of a change must be one of weights, .*, got 'json:JSONDecoder'"):
        Erasure.load(tmp_path)


def test_saved_erasure_holds_no_pickle(tmp_path: Path, erasure: Erasure) -> None:
    erasure.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
