"""The overhead benchmark compares like with like."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import overhead
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig, TrainingRun
from refl import PretrainingPairs, ReFLTrainer

PROMPTS = ["a red circle", "a blue square"]
CONFIG = overhead.Config(batch_size=2, pretraining_batch_size=3, steps=3, reward_step=2, repeats=2)


class Redness:
    """The mean of red, as a network that can be watched."""

    differentiable = True

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(("reward", tuple(images.shape), images.requires_grad))
        return images[:, 0].mean(dim=(1, 2))


@pytest.fixture
def watched(make_policy: Callable[..., DiffusionPolicy]) -> tuple[DiffusionPolicy, Redness, list[Any]]:
    """A policy and a reward that note the shape of every call, and whether it is differentiated."""
    policy, seen = make_policy(lora=LoRAConfig()), []
    unet, decoder = policy.unet.forward, policy.vae.decoder.forward

    def call_unet(latents: Tensor, timesteps: Tensor, **options: Any) -> Any:
        embeddings = options["encoder_hidden_states"]
        seen.append(("unet", tuple(latents.shape), tuple(timesteps.shape), tuple(embeddings.shape)))
        output = unet(latents, timesteps, **options)
        seen[-1] += (output[0].requires_grad,)
        return output

    def call_decoder(latents: Tensor, *rest: Any) -> Any:
        seen.append(("decoder", tuple(latents.shape), latents.requires_grad))
        return decoder(latents, *rest)

    policy.unet.forward = call_unet
    policy.vae.decoder.forward = call_decoder
    return policy, Redness(seen), seen


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_bare_iteration_makes_the_calls_of_the_trainers_iteration(
    watched: tuple[DiffusionPolicy, Redness, list[Any]], tmp_path: Path, guidance_scale: float
) -> None:
    policy, reward, seen = watched
    config = overhead.Config(
        batch_size=2, pretraining_batch_size=3, steps=3, reward_step=2, guidance_scale=guidance_scale
    )
    pairs = PretrainingPairs(torch.randn(3, 4, 8, 8), [PROMPTS[0]] * 3)
    trainer = ReFLTrainer(policy, reward, PROMPTS, config.refl(), pretraining=pairs)
    with TrainingRun(policy, TrainingConfig(output_dir=tmp_path, iterations=1, progress=False)) as run:
        trainer.prepare(run)
        seen.clear()  # the trainer has tried the reward on one image
        trainer.step(run)
    of_the_trainer = seen.copy()
    seen.clear()

    overhead.BareIteration(policy, reward, PROMPTS, config)()

    assert len(of_the_trainer) == 2 + 1 + 1 + 1 + 1  # rollout, graded step, decoder, reward, pretraining
    assert seen == of_the_trainer


def test_bare_iteration_gives_every_trained_weight_a_gradient_and_changes_none(
    make_policy: Callable[..., DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(lora=LoRAConfig())
    before = policy.trainable_state()
    bare = overhead.BareIteration(policy, Redness([]), PROMPTS, CONFIG)
    reached: list[bool] = []
    step = bare.optimizer.step
    parameters = policy.trainable_parameters()
    monkeypatch.setattr(
        bare.optimizer, "step", lambda: (reached.extend(p.grad is not None for p in parameters), step())
    )

    bare()

    assert len(reached) == len(before)
    assert all(reached)
    assert all(torch.equal(value, before[name]) for name, value in policy.trainable_state().items())


def test_timing_has_the_repeats_that_were_asked_for(make_policy: Callable[..., DiffusionPolicy]) -> None:
    times = overhead.measure(make_policy(lora=LoRAConfig()), Redness([]), PROMPTS, CONFIG)
    assert [len(seconds) for seconds in times.values()] == [CONFIG.repeats] * 2
    assert min(*times["trainer"], *times["bare"]) > 0


def test_a_single_repeat_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        overhead.Config(repeats=1)
