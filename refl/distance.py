"""How far training has led a policy away from where it began."""

import torch

from overpaint.policy import DiffusionPolicy


@torch.no_grad()
def distance_to_reference(policy: DiffusionPolicy) -> float:
    """Returns the Euclidean distance of the UNet's weights from those of the reference policy.

    A LoRA counts as the change of weights that it amounts to, alpha / rank * B A, and not by its own numbers. The
    farther a policy has gone for the same reward, the more likely it is that it exploits the reward.
    """
    state = policy.trainable_state()
    if policy.lora is not None:
        scale = policy.lora.alpha / policy.lora.rank
        halves = [
            (state[name.replace(".lora_A.", ".lora_B.")], down) for name, down in state.items() if ".lora_A." in name
        ]
        changes = (scale * up.flatten(1) @ down.flatten(1) for up, down in halves)
    else:
        with policy.reference():
            start = policy.trainable_state()
        changes = (value - start[name] for name, value in state.items())
    return float(sum(change.float().square().sum() for change in changes)) ** 0.5
