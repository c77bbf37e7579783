"""How far training has led a policy from its reference."""

from collections.abc import Callable

import pytest
import torch

from overpaint.policy import DiffusionPolicy, LoRAConfig, WeightDelta, merged_state
from refl import distance_to_reference


@pytest.mark.parametrize(
    "options",
    [{"lora": LoRAConfig()}, {"lora": LoRAConfig(dora=True)}, {"train": "xattn"}],
    ids=["lora", "dora", "xattn"],
)
def test_nothing_trained_is_no_distance(options: dict, make_policy: Callable[..., DiffusionPolicy]) -> None:
    assert distance_to_reference(make_policy(**options)) == 0.0


@pytest.mark.parametrize(
    "options",
    [{"lora": LoRAConfig(rank=2, alpha=6.0)}, {"lora": LoRAConfig(rank=2, dora=True)}, {"train": "xattn"}],
    ids=["lora", "dora", "xattn"],
)
def test_distance_is_the_norm_of_the_change_of_weights(
    options: dict, make_policy: Callable[..., DiffusionPolicy], stir: Callable[[DiffusionPolicy], None]
) -> None:
    policy = make_policy(**options)
    plain = {name: value.clone() for name, value in merged_state(policy.unet).items()}
    stir(policy)
    changes = WeightDelta.between(plain, policy.unet).tensors.values()
    expected = sum(float(change.square().sum()) for change in changes) ** 0.5
    assert expected > 0
    assert distance_to_reference(policy) == pytest.approx(expected, rel=1e-5)
    assert torch.is_grad_enabled()
