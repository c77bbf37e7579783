from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from overpaint.policy import PARAMETER_SETS, DiffusionPolicy, LoRAConfig, WeightDelta, merged_state, select_parameters

PROMPTS = ["a red circle", "a photo of a cat"]
SEEDS = [11, 12]
OWN_SETS = [name for name in PARAMETER_SETS if name != "added"]


def images(policy: DiffusionPolicy) -> Tensor:
    return policy.draw(PROMPTS, steps=2, seeds=SEEDS)


def loss(policy: DiffusionPolicy) -> Tensor:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy.predict_noise(latents, torch.tensor([900, 100]), policy.encode(PROMPTS)).square().mean()


# Named parameter sets.


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("xattn", ["attn2.to_q.weight", "attn2.to_out.0.bias"], ["attn1.to_q.weight", "ff.net.2.weight", "norm2.bias"]),
        ("xattn-kv", ["attn2.to_k.weight", "attn2.to_v.weight"], ["attn2.to_q.weight", "attn1.to_k.weight"]),
        ("selfattn", ["attn1.to_q.weight", "attn1.to_out.0.weight"], ["attn2.to_k.weight"]),
        (
            "noxattn",
            ["attn1.to_q.weight", "conv_in.weight", "time_emb_proj.weight", "conv1.weight"],
            ["attn2.to_k.weight", "time_embedding.linear_1.weight", "conv_out.weight", "conv_norm_out.bias"],
        ),
        ("full", ["conv_in.weight", "time_embedding.linear_1.bias", "attn2.to_k.weight", "conv_out.bias"], []),
    ],
)
def test_a_named_set_holds_what_its_name_says(
    make_policy: Callable[..., DiffusionPolicy], name: str, inside: list[str], outside: list[str]
) -> None:
    chosen = select_parameters(make_policy().unet, name)
    for ending in inside:
        assert any(key.endswith(ending) for key in chosen), ending
    for ending in outside:
        assert not any(key.endswith(ending) for key in chosen), ending


@pytest.mark.parametrize("name", OWN_SETS)
def test_only_the_chosen_parameters_change_and_all_of_them_do(
    make_policy: Callable[..., DiffusionPolicy], name: str
) -> None:
    policy = make_policy(train=name)
    before = {key: value.clone() for key, value in policy.unet.state_dict().items()}
    optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=0.1)
    loss(policy).backward()
    with_gradient = {key for key, value in policy.unet.named_parameters() if value.grad is not None}
    optimizer.step()
    changed = {key for key, value in policy.unet.state_dict().items() if not torch.equal(value, before[key])}
    assert with_gradient == changed == set(select_parameters(policy.unet, name))
    assert not any(value.grad is not None for part in (policy.vae, policy.text_encoder) for value in part.parameters())


def test_names_do_not_change_under_a_lora(policy: DiffusionPolicy, make_policy: Callable[..., DiffusionPolicy]) -> None:
    bare = make_policy()
    for name in OWN_SETS:
        assert select_parameters(policy.unet, name).keys() == select_parameters(bare.unet, name).keys()
    assert merged_state(policy.unet).keys() == bare.unet.state_dict().keys()


def test_unknown_set_is_refused(make_policy: Callable[..., DiffusionPolicy]) -> None:
    with pytest.raises(ValueError, match=r"must be one of xattn, .*, added, got 'attention'"):
        make_policy(train="attention")


def test_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="'xattn' must not be empty"):
        select_parameters(nn.Linear(2, 2), "xattn")


def test_policy_without_options_trains_nothing(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy()
    assert policy.trainable_parameters() == []
    assert not any(parameter.requires_grad for parameter in policy.unet.parameters())
    with policy.reference():
        inside = images(policy)
    assert torch.equal(inside, images(policy))


def test_lora_and_named_set_exclude_each_other(make_policy: Callable[..., DiffusionPolicy]) -> None:
    with pytest.raises(ValueError, match="lora and train exclude each other"):
        make_policy(lora=LoRAConfig(), train="full")


def test_half_precision_weights_are_not_trained(make_policy: Callable[..., DiffusionPolicy]) -> None:
    with pytest.raises(ValueError, match=r"needs weights in float32, .* got .* in torch.bfloat16"):
        make_policy(train="xattn", dtype=torch.bfloat16)


# LoRA.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_lora_changes_nothing(make_policy: Callable[..., DiffusionPolicy], dtype: torch.dtype) -> None:
    bare, fresh = make_policy(dtype=dtype), make_policy(dtype=dtype, lora=LoRAConfig(rank=2))
    assert torch.equal(images(fresh), images(bare))
    assert fresh.dtype == dtype
    assert {parameter.dtype for parameter in fresh.trainable_parameters()} == {torch.float32}


def test_lora_sits_on_its_targets_with_its_rank(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(lora=LoRAConfig(rank=3, targets=("attn2.to_k",)))
    state = policy.trainable_state()
    layers = {name.rsplit(".lora_", 1)[0] for name in state}
    assert layers
    assert all(layer.endswith("attn2.to_k") for layer in layers)
    assert {min(tensor.shape) for tensor in state.values()} == {3}
    assert policy.lora == LoRAConfig(rank=3, targets=("attn2.to_k",))


def test_fresh_loras_depend_on_their_seed_alone(pipeline_dir: Path) -> None:
    def fresh(seed: int) -> dict[str, Tensor]:
        return DiffusionPolicy.from_pretrained(pipeline_dir, lora=LoRAConfig(seed=seed)).trainable_state()

    first = fresh(0)
    generator_state = torch.get_rng_state()
    second, other = fresh(0), fresh(1)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert not any(torch.equal(other[name], value) for name, value in first.items() if "lora_A" in name)
    assert not any(value.any() for name, value in first.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"targets": ()}, r"targets must have at least 1 item, got \(\)"),
    ],
)
def test_impossible_lora_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_merged_lora_draws_the_same(policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]) -> None:
    untrained = images(policy)
    stir(policy)
    trained = images(policy)
    assert (trained - untrained).abs().max() > 1e-3
    policy.merge_lora()
    torch.testing.assert_close(images(policy), trained, rtol=0, atol=1e-4)
    assert policy.lora is None
    assert policy.trainable_parameters() == []
    assert not any("lora" in name for name in policy.unet.state_dict())


def test_what_needs_a_lora_says_so(make_policy: Callable[..., DiffusionPolicy], tmp_path: Path) -> None:
    policy = make_policy(train="xattn")
    for action in (policy.merge_lora, lambda: policy.save_lora(tmp_path), lambda: policy.load_lora(tmp_path)):
        with pytest.raises(ValueError, match="the policy must have a LoRA"):
            action()


# Reference and state.


@pytest.mark.parametrize("options", [{"lora": LoRAConfig(rank=2)}, {"train": "xattn"}], ids=["lora", "train"])
def test_reference_is_the_policy_before_training(
    make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None], options: dict[str, Any]
) -> None:
    policy = make_policy(**options)
    before = images(policy)
    stir(policy)
    trained, state = images(policy), policy.trainable_state()
    with policy.reference():
        assert torch.equal(images(policy), before)
        assert not loss(policy).requires_grad
        with policy.reference():
            assert torch.equal(images(policy), before)
        assert torch.equal(images(policy), before)
    assert torch.equal(images(policy), trained)
    assert all(torch.equal(state[name], value) for name, value in policy.trainable_state().items())
    loss(policy).backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())


def test_reference_is_left_when_something_fails_inside(
    policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]
) -> None:
    stir(policy)
    trained = images(policy)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(images(policy), trained)
    assert loss(policy).requires_grad


def test_remembered_weights_become_the_reference(
    make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]
) -> None:
    policy = make_policy(train="xattn")
    stir(policy)
    policy.remember_reference()
    edited = images(policy)
    stir(policy)
    with policy.reference():
        assert torch.equal(images(policy), edited)


def test_trained_state_goes_back_exactly(policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]) -> None:
    stir(policy)
    state, trained = policy.trainable_state(), images(policy)
    stir(policy)
    assert not torch.equal(images(policy), trained)
    policy.load_trainable_state(state)
    assert torch.equal(images(policy), trained)


def test_state_that_does_not_fit_changes_nothing(policy: DiffusionPolicy) -> None:
    state = policy.trainable_state()
    name = next(iter(state))
    with pytest.raises(ValueError, match="must hold the trained parameters and no others"):
        policy.load_trainable_state({name: state[name] + 1})
    with pytest.raises(ValueError, match=r"must have shape \(\d+, \d+\), got \(1,\)"):
        policy.load_trainable_state({key: value + 1 for key, value in state.items()} | {name: torch.zeros(1)})
    assert all(torch.equal(state[key], value) for key, value in policy.trainable_state().items())


# Weight deltas.


@pytest.fixture
def delta(make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]) -> WeightDelta:
    policy = make_policy(train="xattn-kv")
    before = {name: value.clone() for name, value in merged_state(policy.unet).items()}
    stir(policy)
    return WeightDelta.between(before, policy.unet)


def test_delta_holds_the_changed_parameters_only(
    delta: WeightDelta, make_policy: Callable[..., DiffusionPolicy]
) -> None:
    assert delta.tensors.keys() == select_parameters(make_policy().unet, "xattn-kv").keys()


def test_delta_takes_a_policy_to_the_changed_one(
    delta: WeightDelta, make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]
) -> None:
    changed, target = make_policy(), make_policy(train="xattn-kv")
    stir(target)
    original = images(changed)
    delta.apply(changed.unet)
    torch.testing.assert_close(images(changed), images(target), rtol=0, atol=1e-4)
    assert (images(changed) - original).abs().max() > 1e-3
    delta.apply(changed.unet, scale=-1.0)
    torch.testing.assert_close(images(changed), original, rtol=0, atol=1e-4)


def test_delta_is_added_under_a_lora(delta: WeightDelta, policy: DiffusionPolicy) -> None:
    before = merged_state(policy.unet)
    before = {name: before[name].clone() for name in delta.tensors}
    delta.apply(policy.unet, scale=0.5)
    after = merged_state(policy.unet)
    for name, difference in delta.tensors.items():
        torch.testing.assert_close(after[name], before[name] + 0.5 * difference)


def test_delta_of_a_lora_is_its_product(policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None]) -> None:
    before = {name: value.clone() for name, value in merged_state(policy.unet).items()}
    stir(policy)
    delta = WeightDelta.between(before, policy.unet)
    state = policy.trainable_state()
    assert len(delta.tensors) == len(state) / 2
    for name, difference in delta.tensors.items():
        layer = name.removesuffix(".weight")
        product = state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
        torch.testing.assert_close(difference, product, rtol=1e-4, atol=1e-6)


def test_delta_is_saved_and_loaded_exactly(delta: WeightDelta, tmp_path: Path) -> None:
    delta.save(tmp_path / "delta")
    loaded = WeightDelta.load(tmp_path / "delta")
    assert loaded.tensors.keys() == delta.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], value) for name, value in delta.tensors.items())


def test_delta_that_does_not_fit_changes_nothing(delta: WeightDelta, policy: DiffusionPolicy) -> None:
    before = {name: value.clone() for name, value in policy.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"lacks 'nowhere.weight'"):
        WeightDelta(delta.tensors | {"nowhere.weight": torch.zeros(1)}).apply(policy.unet)
    name = next(reversed(delta.tensors))
    with pytest.raises(ValueError, match=r"must have the weight delta's shape \(1,\), got"):
        WeightDelta(delta.tensors | {name: torch.zeros(1)}).apply(policy.unet)
    assert all(torch.equal(before[name], value) for name, value in policy.unet.state_dict().items())


def test_damaged_folder_of_a_delta_is_refused(delta: WeightDelta, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold weight_delta.safetensors"):
        WeightDelta.load(tmp_path)
    delta.save(tmp_path)
    tensors = load_file(tmp_path / "weight_delta.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "weight_delta.safetensors")
    with pytest.raises(ValueError, match=r"must hold the parameters that weight_delta.json lists"):
        WeightDelta.load(tmp_path)
    (tmp_path / "weight_delta.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match=r"must be of format 'overpaint.WeightDelta/1', got 'another'"):
        WeightDelta.load(tmp_path)


# DoRA.


DORA = LoRAConfig(rank=2, alpha=6.0, targets=("to_q", "attn2.to_k", "conv1"), dora=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_dora_changes_nothing_but_rounding(
    make_policy: Callable[..., DiffusionPolicy], dtype: torch.dtype
) -> None:
    bare, fresh = make_policy(dtype=dtype), make_policy(dtype=dtype, lora=DORA)
    torch.testing.assert_close(images(fresh), images(bare), rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert {parameter.dtype for parameter in fresh.trainable_parameters()} == {torch.float32}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    norms = bare.unet.get_submodule(name).weight.float().norm(dim=1)
    torch.testing.assert_close(fresh.trainable_state()[f"{name}.lora_magnitude_vector.default.weight"], norms)


def test_dora_is_the_equation_of_its_paper(
    make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]
) -> None:
    policy = make_policy(lora=DORA)
    stir(policy)
    before = {name: value.clone() for name, value in make_policy().unet.state_dict().items()}
    state = policy.trainable_state()
    layers = [name.removesuffix(".lora_A.default.weight") for name in state if ".lora_A." in name]
    merged = merged_state(policy.unet)
    assert {name for name, value in merged.items() if not torch.equal(value, before[name])} == {
        f"{layer}.weight" for layer in layers
    }
    for layer in (layer for layer in layers if "attn" in layer):
        turned = 3.0 * state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
        turned = before[f"{layer}.weight"] + turned
        norms = state[f"{layer}.lora_magnitude_vector.default.weight"]
        expected = norms[:, None] * turned / turned.norm(dim=1, keepdim=True)
        torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=1e-4, atol=1e-6)


def test_dora_is_trained_saved_merged_and_left_for_the_reference(
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
    plain_images: Callable[..., Tensor],
    pipeline_dir: Path,
    tmp_path: Path,
) -> None:
    policy = make_policy(lora=DORA)
    before = images(make_policy())
    stir(policy)
    trained = images(policy)
    assert (trained - before).abs().max() > 1e-3
    with policy.reference():
        assert torch.equal(images(policy), before)
    loss(policy).backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.trainable_parameters())
    assert sum("magnitude" in name for name in policy.trainable_state()) == len(policy.trainable_state()) / 3
    policy.save_lora(tmp_path)
    fresh = make_policy()
    fresh.load_lora(tmp_path)
    assert fresh.lora == DORA
    assert torch.equal(images(fresh), trained)
    plain = plain_images(pipeline_dir, tmp_path)
    torch.testing.assert_close(plain, policy.draw(PROMPTS, steps=3, seeds=SEEDS), rtol=0, atol=1e-4)
    torch.testing.assert_close(images(DiffusionPolicy(policy.to_pipeline())), trained, rtol=0, atol=1e-4)
    policy.merge_lora()
    torch.testing.assert_close(images(policy), trained, rtol=0, atol=1e-4)
    assert not any("lora" in name for name in policy.unet.state_dict())


def test_dora_does_not_undo_a_change_of_the_weights_beneath(
    delta: WeightDelta, make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]
) -> None:
    changed, fresh = make_policy(), make_policy(lora=DORA)
    original = images(changed)
    delta.apply(changed.unet)
    delta.apply(fresh.unet)
    torch.testing.assert_close(images(fresh), images(changed), rtol=0, atol=1e-5)
    assert (images(fresh) - original).abs().max() > 1e-3


@pytest.mark.parametrize("config", [LoRAConfig(), DORA], ids=["LoRA", "DoRA"])
def test_a_delta_that_is_applied_for_a_while_leaves_no_bit_changed(
    delta: WeightDelta,
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
    config: LoRAConfig,
) -> None:
    policy = make_policy(lora=config)
    stir(policy)
    before = {name: value.clone() for name, value in policy.unet.state_dict().items()}
    drawn = images(policy)
    with delta.applied(policy.unet):
        assert (images(policy) - drawn).abs().max() > 1e-3
    assert all(torch.equal(before[name], value) for name, value in policy.unet.state_dict().items())
    assert torch.equal(images(policy), drawn)
