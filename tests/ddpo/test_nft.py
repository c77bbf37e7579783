"""DiffusionNFT on a tiny policy: who draws, what is trained on, and what an interruption leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpo import NFTConfig, NFTTrainer, group_advantages
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, LoRAConfig, Trajectory
from overpaint.training import TrainingConfig, TrainingRun, read_metrics


class KilledError(Exception):
    """Stands for a process that dies."""


def small_config(**changes: Any) -> NFTConfig:
    """Settings of two updates on a few denoising steps."""
    settings: dict[str, Any] = {
        "samples_per_round": 8,
        "images_per_prompt": 4,
        "sampling_batch_size": 4,
        "minibatch_size": 4,
        "updates_per_round": 2,
        "steps": 3,
    }
    return NFTConfig(**settings | changes)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_loss_of_an_update_by_hand(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    """Errors of the noise that plus and minus amount to, spelled out, with an old policy that is another one."""
    policy = make_policy(train="xattn-kv")
    trainer = NFTTrainer(policy, redness, prompts, small_config(updates_per_round=1, beta=0.5, kl_weight=0.2))
    now = policy.trainable_state()
    old_weights = moved(now, 0.1, seed=1)
    trainer.old.weights = dict(old_weights)
    before = moved(now, 0.05, seed=2)
    policy.load_trainable_state(before)
    with TrainingRun(policy, run_config(seed=5)) as run:
        metrics = trainer.step(run)

    generator = torch.Generator().manual_seed(5)
    texts = [prompts[k] for k in torch.randint(len(prompts), (2,), generator=generator).tolist() for _ in range(4)]
    seeds = torch.randint(2**31 - 1, (8,), generator=generator).tolist()
    by_hand = make_policy(train="xattn-kv")  # its reference is what the other began as
    by_hand.load_trainable_state(old_weights)
    clean = by_hand.sample(by_hand.encode(texts), steps=3, guidance=ClassifierFree(1.0), seeds=seeds)
    rewards = redness(by_hand.decode(clean), texts)
    share = (group_advantages(rewards, texts).clamp(-5, 5) / 10 + 0.5).float()
    losses, distances = [], []
    for sample, text in enumerate(texts):
        for step, timestep in enumerate(by_hand.plan(3).timesteps[:2]):
            noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed((seeds[sample] + 1) * 3 + step))[None]
            times = timestep.expand(1)
            noised = by_hand.add_noise(clean[sample : sample + 1], noise, times)
            seen = []
            for weights in (before, old_weights, now):
                by_hand.load_trainable_state(weights)
                with torch.no_grad():
                    seen.append(by_hand.predict_noise(noised, times, by_hand.encode([text])))
            mine, old, reference = seen
            plus, minus = 0.5 * mine + 0.5 * old - noise, 1.5 * old - 0.5 * mine - noise
            parts = [one.square().mean() / one.abs().mean() for one in (plus, minus)]
            losses.append(5 * (share[sample] * parts[0] + (1 - share[sample]) * parts[1]) / 0.5)
            distances.append((mine - reference).square().mean())
    expected = torch.stack(losses).mean() + 0.2 * torch.stack(distances).mean()
    assert metrics.reward == pytest.approx(float(rewards.mean()), rel=1e-4)
    assert metrics.loss == pytest.approx(float(expected), rel=1e-4)
    assert metrics.kl == pytest.approx(float(torch.stack(distances).mean()), rel=1e-4)


def moved(weights: dict[str, Tensor], by: float, *, seed: int) -> dict[str, Tensor]:
    """Weights near others."""
    generator = torch.Generator().manual_seed(seed)
    return {name: value + by * torch.randn(value.shape, generator=generator) for name, value in weights.items()}


@pytest.mark.parametrize("forgetting", ["at once", "soon"])
def test_the_old_policy_draws_and_follows(
    forgetting: Any,
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    policy = make_policy(train="xattn-kv")
    trainer = NFTTrainer(policy, redness, prompts, small_config(forgetting=forgetting))
    first = policy.trainable_state()
    drew: list[dict[str, Tensor]] = []
    draw = trainer.collector.draw

    def watched(conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
        drew.append(policy.trainable_state())
        return draw(conditioning, seeds)

    trainer.collector.draw = watched
    with TrainingRun(policy, run_config()) as run:
        metrics = trainer.step(run)
        trained = policy.trainable_state()
        trainer.step(run)
    kept = {"at once": 0.0, "soon": 0.002}[forgetting]
    assert metrics.kept == pytest.approx(kept)
    assert_same(drew[0], first)
    expected = {name: kept * first[name] + (1 - kept) * value for name, value in trained.items()}
    assert_same(drew[2], expected, 1e-6)
    assert any((trained[name] - first[name]).abs().max() > 1e-3 for name in first)


def test_reward_goes_up_in_the_tiny_world(run_config: Callable[..., TrainingConfig]) -> None:
    def redder(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))

    config = NFTConfig(
        samples_per_round=32, images_per_prompt=32, sampling_batch_size=32, minibatch_size=32, steps=5,
        trained_levels=2, updates_per_round=2, beta=0.1,
    )  # fmt: skip
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=8, alpha=8))
    settings = run_config(iterations=5, learning_rate=3e-3)
    NFTTrainer(policy, redder, ["a star on a white background"], config).train(settings)
    rewards = [line["reward/mean"] for line in read_metrics(settings.output_dir / "metrics.jsonl")]
    assert rewards[-1] > rewards[0] + 0.1


@pytest.mark.parametrize("size", [1, 3])
def test_minibatch_size_does_not_change_the_update(
    size: int,
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    ends = []
    for minibatch in (16, size):
        policy = make_policy(train="xattn-kv")
        trainer = NFTTrainer(policy, redness, prompts, small_config(minibatch_size=minibatch, trained_levels=1))
        # With a large epsilon Adam's step is proportional to the gradient, so that rounding is not blown up.
        trainer.train(run_config(str(minibatch), iterations=1, adam_epsilon=1.0, learning_rate=1.0, max_grad_norm=1e6))
        ends.append(policy.trainable_state())
    assert_same(ends[1], ends[0], 1e-6)


def test_resumed_equals_uninterrupted(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    run_config: Callable[..., TrainingConfig],
) -> None:
    def run(name: str, dies_at: int = -1, **settings: Any) -> tuple[DiffusionPolicy, NFTTrainer]:
        policy = make_policy(train="xattn-kv")
        trainer = NFTTrainer(policy, redness, prompts, small_config(forgetting="soon"))
        draw, draws = trainer.collector.draw, []

        def mortal(conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
            if len(draws) == dies_at:
                raise KilledError
            draws.append(seeds)
            return draw(conditioning, seeds)

        trainer.collector.draw = mortal
        trainer.train(run_config(name, iterations=3, **settings))
        return policy, trainer

    whole, at_end = run("whole")
    with pytest.raises(KilledError):
        run("run", dies_at=3, checkpoint_every=1)
    resumed, again = run("run", checkpoint_every=1, resume=True)
    assert_same(resumed.trainable_state(), whole.trainable_state())
    assert_same(again.old.weights, at_end.old.weights)
    assert again.old.updates == at_end.old.updates == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_round": 6}, "samples_per_round must be a multiple of images_per_prompt=4, got 6"),
        ({"trained_levels": 3}, "trained_levels must be below steps=3, got 3"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_a_round_that_does_not_divide_is_refused(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    trainer = NFTTrainer(policy, redness, prompts, small_config(updates_per_round=3))
    with pytest.raises(
        ValueError, match="samples_per_round must be a multiple of updates_per_round times processes, 3"
    ):
        trainer.train(run_config())


PROGRAM = '''
"""Trains two rounds; the first process writes what they led to."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ddpo import NFTConfig, NFTTrainer
from overpaint.policy import DiffusionPolicy
from overpaint.training import TrainingConfig, process_state


class Redness:
    differentiable = False

    def __call__(self, images, prompts):
        return images[:, 0].mean(dim=(1, 2))


pipeline, folder, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
policy = DiffusionPolicy.from_pretrained(pipeline, train="xattn-kv", device="cpu")
config = NFTConfig(
    samples_per_round=8, images_per_prompt=4, sampling_batch_size=4 // processes, minibatch_size=4 // processes,
    updates_per_round=2, steps=3, trained_levels=1,
)
trainer = NFTTrainer(policy, Redness(), ["a red circle", "a cat"], config)
metrics = trainer.train(
    TrainingConfig(
        output_dir=folder, iterations=2, learning_rate=1.0, adam_epsilon=1.0, weight_decay=0.0, max_grad_norm=1e6,
        progress=False,
    )
)
state = process_state()
assert state.num_processes == processes
if state.is_main_process:
    numbers = torch.tensor([metrics.loss, metrics.plus, metrics.minus, metrics.kl, metrics.reward])
    old = {f"old.{name}": value.contiguous() for name, value in trainer.old.weights.items()}
    save_file(policy.trainable_state() | old | {"metrics": numbers}, folder / "end.safetensors")
state.destroy_process_group()
'''


@pytest.mark.proof("several processes take the updates of one")
@pytest.mark.slow
@pytest.mark.parametrize("several", [2, 4])
def test_several_processes_take_the_updates_of_one(
    several: int, pipeline_dir: Path, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    ends = []
    for processes in (1, several):
        folder = tmp_path / f"run-{processes}"
        torchrun(program, pipeline_dir, folder, processes, processes=processes)
        ends.append(load_file(folder / "end.safetensors"))
    assert_same(ends[1], ends[0], 1e-5)
