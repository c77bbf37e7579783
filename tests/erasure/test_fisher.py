"""Fisher information: the square of the summed gradient, and its estimate from a few timesteps."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from erasure.methods.sa import fisher
from erasure.methods.sa.fisher import (
    FisherConfig,
    Sums,
    changes,
    fisher_information,
    noise_errors,
    start_of,
    watched_weights,
)
from overpaint.policy import Conditioning, DiffusionPolicy, LoRAConfig
from overpaint.policy.process import Diffusion

PROMPTS = ["a cat", "a dog", "a red circle"]
EVERY = FisherConfig(chunk=4)
FEW = FisherConfig(timesteps=4, chunk=3)
TIMESTEPS = 12


@pytest.fixture
def few_timesteps(make_policy: Callable[..., DiffusionPolicy]) -> Callable[..., DiffusionPolicy]:
    """Makes a policy whose training has 12 timesteps, so that all of them are soon summed."""

    def make(**options: Any) -> DiffusionPolicy:
        policy = make_policy(**options)
        assert isinstance(policy.process, Diffusion)
        policy.process._alphas = policy.process._alphas[:: 1000 // TIMESTEPS][:TIMESTEPS]
        return policy

    return make


@pytest.fixture
def trained(few_timesteps: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return few_timesteps(train="xattn-kv")


def latents(count: int = len(PROMPTS)) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def information(policy: DiffusionPolicy, config: FisherConfig = EVERY, **options: Any) -> dict[str, torch.Tensor]:
    pictures = options.pop("pictures", latents())
    prompts = options.pop("prompts", PROMPTS)
    return fisher_information(policy, pictures, prompts, config, progress=False, **options)


def total(values: dict[str, torch.Tensor]) -> float:
    return sum(value.sum().item() for value in values.values())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_losses_are_summed_over_timesteps_before_they_are_squared(
    trained: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def listen(policy: DiffusionPolicy, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return noise_errors(policy, *arguments)

    monkeypatch.setattr(fisher, "noise_errors", listen)
    values = information(trained)
    assert len(calls) == 9  # three pictures in three chunks
    weights = watched_weights(trained)
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for image in range(3):
        *tensors, prompts = zip(*calls[3 * image : 3 * image + 3], strict=True)
        arguments: list[Any] = [*(torch.cat(parts) for parts in tensors), Conditioning.cat(prompts)]
        assert sorted(arguments[2].tolist()) == list(range(TIMESTEPS))
        assert len(arguments[1].flatten(1).unique(dim=0)) == TIMESTEPS  # each timestep has its own noise
        gradients = torch.autograd.grad(noise_errors(trained, *arguments).sum(), list(weights.values()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient.square() / 3
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5 * expected[name].max().item())


@pytest.mark.parametrize("taken", [2, 3, 4])
def test_the_estimated_total_is_right_on_average_over_all_draws(taken: int) -> None:
    of = 5
    gradients = torch.randn(of, 7, generator=torch.Generator().manual_seed(taken), dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(7, dtype=torch.float64))
    plain, unbiased = [], []
    for draw in itertools.permutations(range(of), taken):
        sums = Sums.zeros({"w": weight})
        parts = torch.tensor(draw).tensor_split(2)
        sums.add([weight], (gradients[part] @ weight for part in parts), of)
        plain.append(sums.plain.item())
        unbiased.append(sums.unbiased.item())
    exact = gradients.sum(dim=0).square().sum().item()
    assert sum(unbiased) / len(unbiased) == pytest.approx(exact, rel=1e-6)
    assert sum(plain) / len(plain) > 1.2 * exact  # what the squares alone would give


def test_a_few_timesteps_are_on_the_scale_of_all(trained: DiffusionPolicy) -> None:
    pictures, prompts = latents(2).repeat(20, 1, 1, 1), PROMPTS[:2] * 20
    exact = total(information(trained, pictures=pictures, prompts=prompts))
    estimated = total(information(trained, FEW, pictures=pictures, prompts=prompts))
    assert estimated == pytest.approx(exact, rel=0.2)  # the standard error over 40 draws is about 0.1


def test_the_share_of_timesteps_bounds_the_correction() -> None:
    sums = Sums({"w": torch.tensor([4.0])}, torch.tensor([4.0]).double(), torch.tensor([-9.0]).double())
    assert sums.information(2, 0.25)["w"].item() == 0.5
    sums.unbiased.fill_(9.0)
    assert sums.information(2, 0.25)["w"].item() == 2.0
    for value in (sums.squares["w"], sums.plain, sums.unbiased):
        value.zero_()
    assert sums.information(2, 0.25)["w"].item() == 0.0


@pytest.mark.parametrize("config", [EVERY, FEW])
def test_it_is_never_negative_and_every_trained_weight_has_it(trained: DiffusionPolicy, config: FisherConfig) -> None:
    values = information(trained, config)
    assert values.keys() == trained.trainable_state().keys()
    assert all((value >= 0).all() and value.any() for value in values.values())
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in values.values())


def test_it_is_that_of_the_reference_and_leaves_the_policy_as_it_was(trained: DiffusionPolicy) -> None:
    expected = information(trained)
    with torch.no_grad():
        for parameter in trained.trainable_parameters():
            parameter += 0.1
    before = trained.trainable_state()
    assert equal(information(trained), expected)
    assert equal(trained.trainable_state(), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.trainable_parameters())


def test_with_a_lora_it_is_that_of_the_weights_beneath(few_timesteps: Callable[..., DiffusionPolicy]) -> None:
    tuned = few_timesteps(lora=LoRAConfig(targets=("attn2.to_k", "attn2.to_v")))
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.fill_(0.1)
    values, expected = information(tuned), information(few_timesteps(train="xattn-kv"))
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    assert {name for name, value in tuned.unet.named_parameters() if value.requires_grad} == set(
        tuned.trainable_state()
    )


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(dora=True)], ids=["LoRA", "DoRA"])
def test_changes_are_those_of_the_weights_with_and_without_a_lora(
    make_policy: Callable[..., DiffusionPolicy], lora: LoRAConfig
) -> None:
    trained = make_policy(train="xattn")
    start = start_of(trained)
    assert not any(change.any() for change in changes(trained, start).values())
    with torch.no_grad():
        for parameter in trained.trainable_parameters():
            parameter += 0.25
    for change in changes(trained, start).values():
        assert change.requires_grad
        torch.testing.assert_close(change, torch.full_like(change, 0.25), rtol=0, atol=1e-6)

    tuned = make_policy(lora=lora)
    assert start_of(tuned) == {}
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.fill_(0.1)
    moved, before = changes(tuned, {}), make_policy().unet.state_dict()
    assert all(change.requires_grad for change in moved.values())
    tuned.merge_lora()
    for name, value in tuned.unet.state_dict().items():
        expected = before[name] + moved[name] if name in moved else before[name]
        torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-6)


def test_velocities_are_turned_into_noise(
    few_timesteps: Callable[..., DiffusionPolicy], v_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = few_timesteps(path=v_pipeline_dir, train="xattn-kv")
    clean, noise = latents(2), latents(4)[2:]
    factors = policy.process.signal_and_noise(policy.process.levels(torch.tensor([3, 9])))
    signal, spread = (factor.view(-1, 1, 1, 1) for factor in factors)
    # A network that gives the true velocity knows the noise.
    monkeypatch.setattr(policy, "network", lambda *args, **kwargs: (signal * noise - spread * clean,))
    errors = noise_errors(policy, clean, noise, torch.tensor([3, 9]), policy.encode(PROMPTS[:2]))
    assert errors.max() < 1e-9


@pytest.mark.parametrize("config", [EVERY, FEW])
def test_an_interrupted_computation_goes_on_to_the_same_bits(
    trained: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: FisherConfig
) -> None:
    monkeypatch.setattr(fisher, "SAVE_EVERY", 1)
    whole = information(trained, config)
    real, begun = fisher._losses, 0

    def failing(*arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(fisher, "_losses", failing)
    with pytest.raises(KeyboardInterrupt):
        information(trained, config, folder=tmp_path)
    assert equal(information(trained, config, folder=tmp_path), whole)
    assert begun == 4  # two pictures, the one that failed, and the last one again
    assert equal(information(trained, config, folder=tmp_path), whole)
    assert begun == 4  # all there
    assert {path.name for path in tmp_path.iterdir()} == {fisher.TENSOR_FILE, fisher.RECORD_FILE}


def test_damaged_information_is_computed_anew(trained: DiffusionPolicy, tmp_path: Path) -> None:
    whole = information(trained, FEW, folder=tmp_path)
    content = bytearray((tmp_path / fisher.TENSOR_FILE).read_bytes())
    content[-3] ^= 1
    (tmp_path / fisher.TENSOR_FILE).write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r" is damaged: .*; the Fisher information is computed anew"):
        assert equal(information(trained, FEW, folder=tmp_path), whole)


def test_a_folder_of_other_information_is_refused(
    trained: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information(trained, FEW, folder=tmp_path)
    with pytest.raises(ValueError, match=r"folder must be new or .* has another timesteps$"):
        information(trained, FisherConfig(timesteps=5, chunk=3), folder=tmp_path)
    with pytest.raises(ValueError, match=r"has another seed$"):
        information(trained, FEW, folder=tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"has another pictures$"):
        information(trained, FEW, folder=tmp_path, pictures=latents() + 1e-3)
    monkeypatch.setattr(trained.family, "max_sequence_length", 77)
    with pytest.raises(ValueError, match=r"has another max_sequence_length$"):
        information(trained, FEW, folder=tmp_path)
    monkeypatch.undo()
    with torch.no_grad():
        trained.unet.conv_in.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"has another model$"):
        information(trained, FEW, folder=tmp_path)
    trained.scheduler.register_to_config(beta_end=0.013)
    with pytest.raises(ValueError, match=r"has another model and another scheduler$"):
        information(trained, FEW, folder=tmp_path)


def test_progress_of_training_does_not_make_another_folder(
    few_timesteps: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    for options in ({"train": "xattn-kv"}, {"lora": LoRAConfig()}):
        policy, folder = few_timesteps(**options), tmp_path / next(iter(options))
        expected = information(policy, FEW, folder=folder)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter += 0.1
        assert equal(information(policy, FEW, folder=folder), expected)


def test_wrong_arguments_are_refused(trained: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match=r"FisherConfig\.timesteps must be at most the 12 of training, got 13"):
        information(trained, FisherConfig(timesteps=13))
    with pytest.raises(ValueError, match="prompts must be one for each of 3 latents, got 1"):
        information(trained, prompts=["a cat"])


@pytest.mark.parametrize(("field", "value"), [("images", 0), ("timesteps", 1), ("chunk", 0)])
def test_settings_are_checked(field: str, value: int) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"FisherConfig\.{field} must .*, got {value}"):
        FisherConfig(**settings)
