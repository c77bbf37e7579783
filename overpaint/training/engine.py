"""accelerate's engine: its start, its end, and agreement between processes."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import TrainingConfig
from .processes import process_state

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA")
"""Kinds of distribution of accelerate that spread one network over processes, or have their own optimizer loop."""


@contextmanager
def started_accelerator(config: TrainingConfig) -> Generator["Accelerator", None, None]:
    """Creates an `Accelerator` for as long as the block lasts; the processes stay connected after it.

    Raises:
        ValueError: accelerate was configured for something that is not supported.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import ProjectConfiguration

    device = process_state().device  # before the accelerator, which would not connect processes on CPUs
    if config.mixed_precision == "fp16" and str(device) == "cpu":
        raise ValueError("mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'")
    ours = not is_initialized()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(
            project_dir=str(config.output_dir), logging_dir=str(Path(config.output_dir) / "tensorboard")
        ),
    )
    try:
        kind = accelerator.distributed_type
        if kind in SHARDED:
            raise ValueError(f"accelerate must be configured without sharding, got {kind.value}")
        yield accelerator
    finally:
        if ours:
            # A later run in this program may want another precision, which accelerate otherwise refuses.
            AcceleratorState._reset_state()


def in_any(accelerator: "Accelerator", flag: bool) -> bool:
    """Returns whether the flag is set in any process."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))
