"""How far training has led a policy away from where it began."""

import torch

from overpaint.policy import DiffusionPolicy
from overpaint.policy.weights import lora_updates


@torch.no_grad()
def distance_to_reference(policy: DiffusionPolicy) -> float:
    """Returns the Euclidean distance of the UNet's weights from those of the reference policy.

    A LoRA counts as the change of weights that it amounts to, and not by its own numbers. The
    farther a policy has gone for the same reward, the more likely it is that it exploits the reward.
    """
    if policy.lora is not None:
        changes = (update for _, update in lora_updates(policy.model))
    else:
        state = policy.trainable_state()
        with policy.reference():
            start = policy.trainable_state()
        changes = (value - start[name] for name, value in state.items())
    return float(sum(change.float().square().sum() for change in changes)) ** 0.5
