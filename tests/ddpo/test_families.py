"""DDPO on every family of models: ratios start at one in every precision, windows, the guard, and what is refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, NFTConfig, NFTTrainer, RWRConfig, RWRTrainer
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))


FAMILIES = ("sdxl", "sd3", "flux")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load(name: str, **options: Any) -> DiffusionPolicy:
    folder = GOLDEN / "flow" / f"tiny-{name}"
    if name != "sdxl":
        options["max_sequence_length"] = 8
    return DiffusionPolicy.from_pretrained(folder, device="cpu", lora=LoRAConfig(), **options)


def config(**options: Any) -> DDPOConfig:
    usual: dict[str, Any] = {
        "samples_per_round": 4, "updates_per_round": 2, "sampling_batch_size": 2, "minibatch_size": 2, "steps": 5,
        "guidance_scale": 2.0, "eta": 0.7, "baseline": "round", "height": 64, "width": 64,
    }  # fmt: skip
    return DDPOConfig(**usual | options)


def train(policy: DiffusionPolicy, folder: Path, settings: DDPOConfig, iterations: int = 1, **options: Any) -> Any:
    trainer = DDPOTrainer(policy, redness, ["a cat", "a house"], settings)
    run = TrainingConfig(output_dir=folder, iterations=iterations, learning_rate=1e-2, **options)
    return trainer, trainer.train(run)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_ratio_is_exactly_one_before_the_first_update(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = load(name, dtype=dtype)
    before = policy.trainable_state()
    _, measured = train(policy, tmp_path, config())
    assert measured.ratio_start == 0
    assert measured.ratio_max > 0
    assert measured.grad_norm > 0
    assert any(not torch.equal(before[key], value) for key, value in policy.trainable_state().items())


def test_the_last_step_of_a_flow_is_not_trained_on(tmp_path: Path) -> None:
    for name, count in (("sdxl", 5), ("sd3", 4), ("flux", 4)):
        trainer = DDPOTrainer(load(name), redness, ["a cat"], config())
        assert trainer.steps.possible == tuple(range(count))
        assert trainer.steps.trained == count


def test_a_window_is_drawn_anew_each_round_and_alone_is_stochastic() -> None:
    trainer = DDPOTrainer(load("sd3"), redness, ["a cat"], config(steps=10, window=2, window_span=0.5))
    generator = torch.Generator().manual_seed(0)
    windows = {trainer.steps.window(trainer.config, generator) for _ in range(50)}
    assert windows == {(0, 1), (1, 2), (2, 3)}  # within the first half of nine
    trainer.window = (1, 2)
    conditioning = trainer.policy.encode(["a cat"])
    drawn = trainer._rollout(conditioning, [3])
    assert drawn.log_probs.isnan()[0].tolist() == [step not in (1, 2) for step in range(10)]
    trainer.window = (0, 1)
    other = trainer._rollout(conditioning, [3])
    assert torch.equal(other.latents[:, 0], drawn.latents[:, 0])  # the same noise to begin with
    assert not torch.equal(other.latents[:, 1], drawn.latents[:, 1])


def test_a_windowed_round_trains(tmp_path: Path) -> None:
    trainer, measured = train(load("sd3"), tmp_path, config(window=2, kl="velocity", kl_weight=0.1), iterations=2)
    assert trainer.window is not None
    assert measured.grad_norm > 0
    assert measured.kl > 0


def test_guarded_ratio_starts_at_one_and_keeps_its_scale(tmp_path: Path) -> None:
    _, measured = train(load("flux"), tmp_path, config(ratio="guard", clip_range=2e-6))
    assert measured.ratio_start == 0
    assert 0 < measured.ratio_max < 1e-2


def test_guard_measures_old_means_again_where_shapes_differ(tmp_path: Path) -> None:
    _, measured = train(load("flux", dtype=torch.bfloat16), tmp_path, config(ratio="guard", minibatch_size=4))
    assert measured.ratio_start == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sdxl", {"ratio": "guard"}, "DDPOConfig.ratio must be 'plain' for diffusion"),
        ("sd3", {"steps": 1}, "steps must be at least 2 to learn from any but the last, got 1"),
        ("sd3", {"window": 5}, "DDPOConfig.window must be at most 4, the steps that can be trained on, got 5"),
        ("flux", {"height": 72}, "DDPOConfig.height must be a positive multiple of 16, got 72"),
    ],
)
def test_what_cannot_be_done_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDPOTrainer(load(name), redness, ["a cat"], config(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6}, "window must be at most steps=5, got 6"),
        ({"window": 2, "step_weights": "signal"}, "window must be 0 with step_weights 'signal', got 2"),
        (
            {"inner_epochs": 2, "estimator": "score", "updates_per_round": 1},
            "inner_epochs must be 1 with",
        ),
        ({"ratio": "guard", "estimator": "score", "updates_per_round": 1}, "ratio must be 'plain' with the estimator"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_cps_has_no_density_at_its_last_step(tmp_path: Path) -> None:
    policy = load("sd3", chain="cps")
    trainer, measured = train(policy, tmp_path, config())
    assert trainer.steps.possible == (0, 1, 2, 3)
    assert measured.ratio_start == 0
    conditioning = policy.encode(["a cat"])
    with pytest.raises(ValueError, match=r"step 4 must have a density, and only \[0, 1, 2, 3\] can have one"):
        policy.rollout(conditioning, steps=5, seeds=[0], eta=0.7, height=64, width=64, stochastic=[4])
    drawn: Tensor = policy.rollout(conditioning, steps=5, seeds=[0], eta=0.7, height=64, width=64).log_probs
    assert drawn.isnan()[0].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("trainer", ["rwr", "nft"])
def test_trainers_without_a_density_learn(trainer: str, name: str, tmp_path: Path) -> None:
    policy = load(name)
    shared: dict[str, Any] = {"sampling_batch_size": 2, "minibatch_size": 2, "steps": 4, "height": 64, "width": 64}
    made: RWRTrainer | NFTTrainer
    if trainer == "rwr":
        made = RWRTrainer(
            policy, redness, ["a cat"], RWRConfig(samples_per_round=4, batch_size=4, epochs_per_round=1, **shared)
        )
    else:
        made = NFTTrainer(policy, redness, ["a cat"], NFTConfig(samples_per_round=4, images_per_prompt=4, **shared))
    before = policy.trainable_state()
    measured = made.train(TrainingConfig(output_dir=tmp_path, iterations=2, learning_rate=1e-2))
    assert measured is not None
    assert measured.loss > 0
    assert any(not torch.equal(before[key], value) for key, value in policy.trainable_state().items())


def test_inner_epochs_go_over_the_same_samples_again(tmp_path: Path) -> None:
    once, twice = load("sd3"), load("sd3")
    _, first = train(once, tmp_path / "once", config(clip_range=0.5))
    _, second = train(twice, tmp_path / "twice", config(clip_range=0.5, inner_epochs=2))
    assert first.reward == second.reward
    assert second.ratio_start == 0
    assert second.ratio_max > first.ratio_max
    moved = [
        sum(float((value - start).square().sum()) for value, start in zip(state.values(), fresh.values(), strict=True))
        for state, fresh in ((policy.trainable_state(), load("sd3").trainable_state()) for policy in (once, twice))
    ]
    assert moved[1] > moved[0]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_divergence_of_velocities_is_that_of_the_networks_predictions(name: str) -> None:
    policy = load(name)
    cfg = config(kl="velocity", guidance_scale=1.0)
    trainer = DDPOTrainer(policy, redness, ["a cat"], cfg)
    with torch.no_grad():
        for index, parameter in enumerate(policy.trainable_parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    trajectory = trainer._rollout(policy.encode(["a cat"] * 2), [1, 2])
    samples, steps = torch.tensor([0, 1]), torch.tensor([1, 3])
    latents, timesteps = trajectory.latents[samples, steps], trajectory.timesteps[steps]

    def both() -> tuple[Tensor, Tensor, Tensor]:
        options: dict[str, Any] = {"guidance": trainer.guidance, "eta": cfg.eta}
        _, mean, std = policy.stored_steps(trajectory, samples, steps, **options)
        return policy.predict(latents, timesteps, trajectory.conditioning), mean, std

    with torch.no_grad():
        prediction, mean, std = both()
        with policy.reference():
            reference, reference_mean, _ = both()
        found = trainer.gradient._divergence(mean, reference_mean, std, steps)
    expected = (prediction - reference).square().flatten(1).mean(dim=1)
    assert expected.min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_critic_reads_latents_of_any_width(name: str, tmp_path: Path) -> None:
    _, measured = train(load(name), tmp_path, config(baseline="critic"), iterations=2)
    assert measured.grad_norm > 0
