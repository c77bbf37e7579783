"""DDPO on prompts of a concept that are mixed and mined, and attacked where there is a gradient to them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ddpo import DDPOConfig, DDPOTrainer
from erasure import (
    NUDITY,
    ConceptPrompts,
    ConceptPromptsConfig,
    ImageConstraint,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
    SoftAttack,
    SoftAttackConfig,
)
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, read_metrics

SMALL = DDPOConfig(
    samples_per_round=8,
    updates_per_round=2,
    sampling_batch_size=8,
    minibatch_size=4,
    steps=2,
    guidance_scale=1.0,
    baseline="round",
    pictures_every=100,
    erasure_samples_per_round=16,
)
MIXED = (["a striped circle", "a striped square"], ["a cat", "two dogs"])


def cats(images: Images, prompts: Sequence[str]) -> PerSample:
    """A detector that only a picture of a cat trips."""
    return torch.tensor([float("cat" in prompt) for prompt in prompts])


def logged(config: TrainingConfig, tag: str) -> list[float]:
    return [line[tag] for line in read_metrics(config.output_dir / "metrics.jsonl") if tag in line]


def test_hard_prompts_are_mined_from_the_samples_of_all_updates(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    mined = ConceptPrompts(*MIXED, ConceptPromptsConfig(explicit_share=0.0, implicit_share=1.0, hard_share=1.0))
    constraint, config = ImageConstraint(cats, mined, ceiling=0.25), run_config(iterations=3)
    DDPOTrainer(policy, redness, prompts, SMALL, erasure=constraint).train(config)
    assert mined.hard == {"a cat": 3.0}
    assert logged(config, "erasure/hard_share_violation")[1:] == [3.0] * 2
    # Half of the samples are hard, that is cats; of the other half, cats or dogs, some are.
    assert all(violation > 1.0 for violation in logged(config, "erasure/violation")[1:])


def test_objective_is_attacked_and_images_are_not(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], run_config: Callable[..., TrainingConfig]
) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    attack = SoftAttack(SoftAttackConfig(share=1.0, steps=2))
    objective = ReferenceDistance(ReferenceDistanceConfig(steps=3))
    mined = ConceptPrompts(*MIXED)
    constraint = ObjectiveConstraint(objective, NUDITY, mined, ceiling=1e-6, attack=attack)
    config = run_config(iterations=2)
    DDPOTrainer(policy, redness, prompts, SMALL, erasure=constraint).train(config)
    before, after = (logged(config, f"erasure/violation_{when}_attack") for when in ("before", "after"))
    assert logged(config, "erasure/attacked_samples") == [16.0] * 2
    assert all(raised > plain for plain, raised in zip(before, after, strict=True))
    assert logged(config, "erasure/violation") == pytest.approx(after, rel=1e-5)
    assert set(mined.hard) <= set(mined)
    assert len(mined.hard) > 0

    with pytest.raises(ValueError, match=r"ImageConstraint\.attack must be None for DDPO, whose images have no gradi"):
        DDPOTrainer(policy, redness, prompts, SMALL, erasure=ImageConstraint(cats, MIXED[0], attack=attack))
    without_room = ObjectiveConstraint(objective, NUDITY, attack=SoftAttack(SoftAttackConfig(vectors=22)))
    with pytest.raises(ValueError, match="must leave room"):
        DDPOTrainer(policy, redness, prompts, SMALL, erasure=without_room).train(run_config("refused"))
