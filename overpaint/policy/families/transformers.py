"""What the families with a flow transformer have in common: where a LoRA goes, and rectified flow's scheduler."""

from typing import Any

ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""Every projection of the joint attention, of image and of text."""


def check_flow(scheduler: Any) -> None:
    """Checks that a scheduler is of rectified flow, with levels that are one of those that checkpoints come with.

    Raises:
        ValueError: It is not.
    """
    name = type(scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ValueError(
            f"the scheduler must be of rectified flow, FlowMatchEulerDiscreteScheduler, for this checkpoint, got {name}"
        )
    for setting in (
        "use_karras_sigmas",
        "use_beta_sigmas",
        "use_exponential_sigmas",
        "stochastic_sampling",
        "invert_sigmas",
    ):
        if scheduler.config.get(setting):
            raise ValueError(f"the scheduler's {setting} must be False, got True in {name}")
