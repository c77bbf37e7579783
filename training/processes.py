"""The processes of a program: one for each accelerator, and any number that a launcher starts where there is none."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from accelerate import PartialState
else:
    PartialState = Any


def process_state() -> PartialState:
    """Returns accelerate's view of the processes, which connects them at the first call.

    Where there is no accelerator it has to be told so: it takes every one of several processes for the only one else.

    A program that may run in several processes ends with `process_state().destroy_process_group()`, which does nothing
    where there is one: a process that ends while it is connected to others is aborted by gloo's threads now and then.
    """
    from accelerate import PartialState

    return PartialState(cpu=torch.accelerator.current_accelerator(check_available=True) is None)
