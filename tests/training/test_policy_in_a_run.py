"""A run around the policy of this project."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import Trainable, TrainingConfig, TrainingRun


def _train(policy: DiffusionPolicy, config: TrainingConfig) -> dict[str, torch.Tensor]:
    embeddings = policy.encode(["a red circle", "a blue square"])
    with TrainingRun(policy, config) as run:
        for _ in run.iterations():
            seeds = torch.randint(2**31, (2,), generator=run.generator).tolist()
            latents = policy.sample(embeddings, steps=3, until=1, seeds=seeds)
            with run.autocast():
                clean = policy.predict_clean(latents, embeddings, step=1, steps=3)
                loss = clean.float().square().mean()
            run.backward(loss)
            run.update()
    return policy.trainable_state()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_lora_training_resumes_to_the_same_weights(
    mixed_precision: str, make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    def config(name: str, iterations: int) -> TrainingConfig:
        return TrainingConfig(
            output_dir=tmp_path / name,
            iterations=iterations,
            learning_rate=1e-3,
            mixed_precision=mixed_precision,  # ty: ignore[invalid-argument-type]
            resume=True,
            progress=False,
        )

    policy = make_policy(lora=LoRAConfig())
    assert isinstance(policy, Trainable)
    before = policy.trainable_state()
    whole = _train(policy, config("whole", 3))
    assert all(not torch.equal(whole[name], tensor) for name, tensor in before.items())
    _train(make_policy(lora=LoRAConfig()), config("run", 2))
    resumed = _train(make_policy(lora=LoRAConfig()), config("run", 3))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
