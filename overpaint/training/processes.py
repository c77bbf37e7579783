"""The processes of a program: one for each accelerator, and any number that a launcher starts where there is none."""

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import PartialState
else:
    PartialState = Any

Result = TypeVar("Result")


def process_state() -> PartialState:
    """Returns accelerate's view of the processes, which connects them at the first call.

    Where there is no accelerator it has to be told so: it takes every one of several processes for the only one else.

    A program that may run in several processes ends with `process_state().destroy_process_group()`, which does nothing
    where there is one: a process that ends while it is connected to others is aborted by gloo's threads now and then.
    """
    from accelerate import PartialState

    return PartialState(cpu=torch.accelerator.current_accelerator(check_available=True) is None)


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
