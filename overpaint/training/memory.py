"""Parts that fit: where memory runs out in the first iteration of a session, it begins again with half at a time.

The iteration starts from the same state and the same random numbers, and how much goes through the networks at a time
changes a gradient by rounding alone: the run is the one that would have begun with the smaller parts.
"""

import gc
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from overpaint.settings import Count

from .logging import tell
from .run import TrainingRun

SIZES = ("micro_batch_size", "sampling_batch_size", "minibatch_size")
"""Settings of trainers that say how much goes through the networks at a time, and nothing else."""

REMEDIES = (
    "load the policy with gradient_checkpointing=True, dtype=torch.bfloat16 for frozen weights, or tiling=True for "
    "large images; train a LoRA in place of weights; set TrainingConfig.mixed_precision='bf16' or "
    "optimizer='adamw8bit'; or draw smaller images"
)

Metrics = TypeVar("Metrics", covariant=True)


class MemoryExhaustedError(RuntimeError):
    """Memory ran out where nothing could be made smaller without changing the run."""


@runtime_checkable
class Resizable(Protocol[Metrics]):
    """A trainer whose parts can be made smaller."""

    @property
    def config(self) -> Any:
        """Settings, with some of `SIZES`."""
        ...

    def step(self, run: TrainingRun) -> Metrics:
        """Does one iteration."""
        ...

    def resize(self, sizes: Mapping[str, Count]) -> None:
        """Takes other sizes of its parts, by the names of the settings."""
        ...


def first_step(trainer: Resizable[Metrics], run: TrainingRun) -> Metrics:
    """Does the first iteration of a session, with parts as small as they have to be.

    Raises:
        MemoryExhaustedError: Memory ran out with one sample at a time, or under several processes, of which the others
            would not know.
    """
    while (sizes := halved(sizes_of(trainer.config))) and run.num_processes == 1:
        before = run.snapshot()
        try:
            return trainer.step(run)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Past the exception, whose traceback holds on to what filled the memory.
        tell(f"memory ran out with {words(sizes_of(trainer.config))}: going on with {words(sizes)}, in the same way")
        trainer.resize(sizes)
        run.rewind(before)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    with memory_explained(trainer.config):
        return trainer.step(run)


@contextmanager
def memory_explained(config: Any) -> Generator[None]:
    """Says of memory that ran out which settings use less of it.

    Raises:
        MemoryExhaustedError: It ran out inside.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = sizes_of(config)
        lower = f"lower {words(sizes)}; " if halved(sizes) else ""
        raise MemoryExhaustedError(f"memory ran out: {lower}{REMEDIES} ({str(error).splitlines()[0]})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Tells that a device's memory, or the machine's, has run out, by torch's error."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError):
        return True
    told = [isinstance(one, str) for one in error.args]  # accelerate reads a message, and there may be none
    return type(error) is RuntimeError and told == [True] and should_reduce_batch_size(error)


def sizes_of(config: Any) -> dict[str, int]:
    """Returns how much goes through the networks at a time, by the names of a trainer's settings."""
    return {name: getattr(config, name) for name in SIZES if hasattr(config, name)}


def halved(sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns the sizes above 1 made smaller: each its largest divisor up to a half, so that it divides what it did."""
    return {
        name: max(part for part in range(1, size // 2 + 1) if size % part == 0)
        for name, size in sizes.items()
        if size > 1
    }


def words(sizes: Mapping[str, int]) -> str:
    """Writes sizes for a message."""
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
