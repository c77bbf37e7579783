"""What `accelerate launch` and `accelerate config` ask of a run: it is honoured, or refused in words.

They speak through environment variables, which `accelerate.Accelerator` would otherwise take over without a word.
"""

import os
from typing import get_args

import torch

from .config import Precision

UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""What spreads one network over processes, by the variable that asks for it."""

RANKS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables that a launcher of several processes sets in each of them."""


def wants_cpu() -> bool:
    """Returns whether `accelerate launch --cpu`, or its configuration, keeps the run on the CPU."""
    return _is_set("ACCELERATE_USE_CPU")


def check_launcher() -> None:
    """Checks that nothing was asked for that a run would ignore.

    Raises:
        ValueError: Sharding, gradient accumulation, or several processes on CPUs, of which accelerate starts one only.
    """
    for variable, name in UNSUPPORTED.items():
        if _is_set(variable):
            raise ValueError(
                f"accelerate must be configured without {name}: of what shares out a network, FSDP2 alone works"
            )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ValueError(
            "accelerate's gradient_accumulation_steps must be 1, because batch sizes are those of an update and a "
            f"trainer's own micro_batch_size or minibatch_size divides them, got {steps}"
        )
    # The launcher names a main process for several, and on CPUs starts one all the same.
    if wants_cpu() and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in RANKS):
        raise ValueError(
            "accelerate launch --cpu must come with --num_processes 1, because it starts a single process whatever "
            "the number says; for several, use torchrun --nproc_per_node. If one is what you want, unset MASTER_ADDR, "
            f"got {os.environ['MASTER_ADDR']!r}"
        )


def launched_sharding() -> bool:
    """Returns whether the launcher asks for FSDP.

    Raises:
        ValueError: It asks for FSDP's first version, which flattens what is trained together with what is not.
    """
    if not _is_set("ACCELERATE_USE_FSDP"):
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(f"accelerate's fsdp_version must be 2, got {version}")
    return True


def launched_precision() -> Precision | None:
    """Returns the mixed precision that the launcher asks for; None for "no", which it also says when nobody asked.

    Raises:
        ValueError: It asks for one that is not supported, such as fp8.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    for known in get_args(Precision):
        if asked == known:
            return None if asked == "no" else known
    raise ValueError(f"accelerate's mixed_precision must be one of {', '.join(get_args(Precision))}, got {asked!r}")


def default_precision(device: torch.device | str) -> Precision:
    """Returns what a large model is best trained in: what the launcher asks for, or what the device is fast at.

    That is bf16 where a GPU has it, fp16 on other GPUs, and float32 ("no") on a CPU. `TrainingConfig.mixed_precision`
    takes it.
    """
    device = torch.device(device)
    asked = launched_precision()
    if asked is not None:
        return asked
    if device.type == "cpu":
        return "no"
    return "bf16" if has_bf16(device) else "fp16"


def resolved_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """Returns the precision of a run.

    Args:
        wanted: From its settings; None leaves it to the launcher.
        device: Where it computes.

    Raises:
        ValueError: The launcher asks for another one, or the device does not have it.
    """
    asked = launched_precision()
    if wanted is not None and asked is not None and wanted != asked:
        raise ValueError(
            f"mixed_precision must be what accelerate was launched or configured with, {asked!r}, or left out, got "
            f"{wanted!r}"
        )
    precision = wanted or asked or "no"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'")
    if precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"mixed_precision must be 'fp16' or 'no' on {name}, which has no bfloat16, got 'bf16'")
    return precision


def has_bf16(device: torch.device) -> bool:
    """Returns whether a device computes in bfloat16 itself; older GPUs only emulate it, slowly."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _is_set(variable: str) -> bool:
    """Reads a yes-or-no variable as accelerate does."""
    from accelerate.utils import parse_flag_from_env

    return parse_flag_from_env(variable)
