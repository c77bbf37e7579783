"""Memory that runs out: parts become smaller, and the run is the one that began with them; or it is said what helps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, NFTConfig, NFTTrainer, RWRConfig, RWRTrainer
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.types import Images, PerSample
from overpaint.training import MemoryExhaustedError, TrainingConfig
from overpaint.training.memory import halved, is_out_of_memory
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer

PROMPTS = ["a red circle", "a blue square"]


class Redness:
    """The mean of red."""

    differentiable = True

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        return images[:, 0].mean(dim=(1, 2))


def refl(policy: DiffusionPolicy, size: int) -> ReFLTrainer:
    config = ReFLConfig(
        batch_size=8, micro_batch_size=size, steps=3, first_reward_step=1, last_reward_step=2, pretraining_batch_size=4,
        guidance_scale=1.0, reward_scale=1.0,
    )  # fmt: skip
    pairs = PretrainingPairs(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), PROMPTS)
    return ReFLTrainer(policy, Redness(), PROMPTS, config, pretraining=pairs)


def ddpo(policy: DiffusionPolicy, size: int) -> DDPOTrainer:
    config = DDPOConfig(
        samples_per_round=8, updates_per_round=1, sampling_batch_size=size, minibatch_size=size, steps=2,
        guidance_scale=1.0, min_count=1, buffer_size=4,
    )  # fmt: skip
    return DDPOTrainer(policy, Redness(), PROMPTS, config)


def rwr(policy: DiffusionPolicy, size: int) -> RWRTrainer:
    config = RWRConfig(samples_per_round=8, sampling_batch_size=size, minibatch_size=size, steps=2, guidance_scale=1.0)
    return RWRTrainer(policy, Redness(), PROMPTS, config)


def nft(policy: DiffusionPolicy, size: int) -> NFTTrainer:
    config = NFTConfig(samples_per_round=8, images_per_prompt=4, sampling_batch_size=size, minibatch_size=size, steps=3)
    return NFTTrainer(policy, Redness(), PROMPTS, config)


TRAINERS: dict[str, Callable[[DiffusionPolicy, int], Any]] = {"refl": refl, "ddpo": ddpo, "rwr": rwr, "nft": nft}


@pytest.fixture
def make(make_policy: Callable[..., DiffusionPolicy]) -> Callable[[int | None], DiffusionPolicy]:
    """Loads a policy whose network has memory for so many samples at a time; None is for any."""

    def load(room: int | None) -> DiffusionPolicy:
        policy = make_policy(lora=LoRAConfig(rank=2))
        forward = policy.model.forward

        def limited(sample: Tensor, *arguments: Any, **options: Any) -> Any:
            if room is not None and len(sample) > room:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate room for {len(sample)} samples.")
            return forward(sample, *arguments, **options)

        policy.model.forward = limited
        return policy

    return load


def run_config(folder: Path, **settings: Any) -> TrainingConfig:
    # With a large epsilon a step is proportional to the gradient, so that rounding stays as small as it is.
    shared: dict[str, Any] = {"iterations": 2, "learning_rate": 1e-2, "adam_epsilon": 1e-2, "progress": False}
    return TrainingConfig(output_dir=folder, **shared | settings)


@pytest.mark.proof("out of memory: went on with smaller parts")
@pytest.mark.parametrize("name", TRAINERS)
def test_parts_are_halved_until_they_fit_and_the_numbers_are_theirs(
    name: str,
    make: Callable[[int | None], DiffusionPolicy],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    ends = []
    for room, size in ((2, 8), (None, 2)):
        policy = make(room)
        trainer = TRAINERS[name](policy, size)
        trainer.train(run_config(tmp_path / f"{size}"))
        ends.append(policy.trainable_state())
        told = capfd.readouterr().err
        assert told.count("memory ran out with") == (2 if room else 0)
    assert any(value.abs().max() > 1e-3 for key, value in ends[0].items() if "lora_B" in key)
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


@pytest.mark.proof("out of memory: ended with what helps")
@pytest.mark.parametrize("name", TRAINERS)
def test_memory_that_one_sample_exhausts_ends_with_what_helps(
    name: str,
    make: Callable[[int | None], DiffusionPolicy],
    tmp_path: Path,
) -> None:
    with pytest.raises(MemoryExhaustedError, match=r"gradient_checkpointing=True.*\(CUDA out of memory. Tried"):
        TRAINERS[name](make(0), 4).train(run_config(tmp_path))


def test_memory_that_runs_out_later_names_the_size(
    make: Callable[[int | None], DiffusionPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = refl(make(None), 8)
    step, calls = trainer.step, []

    def failing(run: Any) -> Any:
        calls.append(run.iteration)
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return step(run)

    monkeypatch.setattr(trainer, "step", failing)
    with pytest.raises(MemoryExhaustedError, match=r"lower micro_batch_size=8; load the policy with"):
        trainer.train(run_config(tmp_path, iterations=4, checkpoint_every=1))
    monkeypatch.undo()
    assert calls == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1] == "iteration-00000002"


def test_other_errors_are_left_alone(
    make: Callable[[int | None], DiffusionPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = refl(make(None), 8)
    monkeypatch.setattr(trainer, "step", lambda run: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trainer.train(run_config(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"micro_batch_size": 8}, {"micro_batch_size": 4}), ({"a": 9, "b": 1}, {"a": 3}), ({"a": 7}, {"a": 1}), ({}, {})],
)
def test_halves_divide_what_the_sizes_did(sizes: dict[str, int], expected: dict[str, int]) -> None:
    assert halved(sizes) == expected


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"), True),
        (RuntimeError("something else"), False),
        (RuntimeError(), False),
        (RuntimeError(12, "CUDA out of memory."), False),
        (ValueError("CUDA out of memory."), False),
    ],
)
def test_what_counts_as_memory_that_ran_out(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) == is_memory
