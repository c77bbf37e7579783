"""accelerate's engine: processes, its start and end, and the wrapper around the trained network."""

import pickle
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .config import TrainingConfig
from .launcher import check_launcher, launched_sharding, resolved_precision, wants_cpu
from .types import Shardable, Trainable

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState
else:
    PartialState = Any

Result = TypeVar("Result")

MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes that accelerate leaves on a module; while they stay, a second run would not be wrapped anew."""


def process_state() -> PartialState:
    """Returns accelerate's view of the processes, which connects them at the first call.

    Where there is no accelerator it has to be told so: it takes every one of several processes for the only one else.
    `accelerate launch --cpu` counts as none.

    A program that may run in several processes ends with `process_state().destroy_process_group()`, which does nothing
    where there is one: a process that ends while it is connected to others is aborted by gloo's threads now and then.
    """
    from accelerate import PartialState

    return PartialState(cpu=wants_cpu() or torch.accelerator.current_accelerator(check_available=True) is None)


def from_main(work: Callable[[], Result]) -> Result:
    """Returns in every process what the work returns in the main one, and fails in all if it fails there.

    All processes have to call it, and none goes on before the work is done. Whatever the main process alone has to do
    before others need it belongs in here: an error outside would leave them waiting for it.

    Raises:
        Exception: The work's own error; in the others, where it cannot be sent, a RuntimeError that tells of it.
    """
    from accelerate.utils import broadcast_object_list

    state = process_state()
    if state.num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if state.is_main_process:
        try:
            outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, _sendable(error)
    result, told = broadcast_object_list(outcome)
    if told is not None:
        raise failure or told
    return result


def _sendable(error: Exception) -> Exception:
    """Returns an error that other processes can be sent: itself, or one that tells of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"the main process failed with {type(error).__name__}: {error}")
    return error


def resolved(config: TrainingConfig) -> TrainingConfig:
    """Connects the processes, and returns the settings with the precision that the run will have.

    Raises:
        ValueError: accelerate was launched or configured for something that is not supported, or that contradicts the
            settings.
    """
    check_launcher()
    state = process_state()  # before the accelerator, which would not connect processes on CPUs
    precision = resolved_precision(config.mixed_precision, torch.device(str(state.device)))
    return replace(config, mixed_precision=precision, shard=config.shard or launched_sharding())


@contextmanager
def started_accelerator(config: TrainingConfig) -> Generator["Accelerator", None, None]:
    """Creates an `Accelerator` for as long as the block lasts; the processes stay connected after it.

    Args:
        config: Settings with a precision that `resolved` has settled.

    Raises:
        ValueError: accelerate runs on a device that is not supported.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import DistributedType, patch_environment

    ours = not is_initialized()
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # `prepared_network` shards, and leaves the LoRA whole
        accelerator = Accelerator(mixed_precision=config.mixed_precision)
    try:
        if accelerator.distributed_type == DistributedType.XLA:
            raise ValueError("accelerate must be configured for CPUs or GPUs, got XLA")
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


@contextmanager
def prepared_network(
    accelerator: "Accelerator", policy: Trainable, *, shard: bool = False
) -> Generator[nn.Module, None, None]:
    """Puts accelerate's wrapper in the policy's `network` for as long as the block lasts.

    Gradients stay in their process unless a backward asks otherwise (see `TrainingRun.backward`). A network that is to
    be sharded has no wrapper: it is changed in place, for good, and so that what is trained stays whole.

    Raises:
        ValueError: The policy's network is no module, or it cannot be sharded.
    """
    network = policy.network
    if not isinstance(network, nn.Module):
        raise ValueError(f"policy.network must be a torch module so that accelerate can wrap it, got {network!r}")
    if shard and accelerator.num_processes > 1:
        if not isinstance(policy, Shardable):
            raise ValueError("shard must be False for a policy without a method of that name, got True")
        policy.shard(accelerator.num_processes)
        yield network
        return
    before: dict[str, Any] = {mark: network.__dict__[mark] for mark in MARKS if mark in network.__dict__}
    try:
        # A launcher may start one process as one of many; alone it has nothing to average.
        wrapped = accelerator.prepare_model(network, evaluation_mode=accelerator.num_processes == 1)
        policy.network = wrapped
        with accelerator.no_sync(wrapped):
            yield wrapped
    finally:
        policy.network = network
        for mark in MARKS:
            network.__dict__.pop(mark, None)
        network.__dict__.update(before)
