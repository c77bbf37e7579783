"""Pieces of work that several processes share, some of which need others to be done before."""

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Protocol, TypeVar, runtime_checkable

import torch

from overpaint.training.logging import progress_bar


@runtime_checkable
class Piece(Protocol):
    """One piece of work, such as a model that is made and measured. It can be pickled."""

    @property
    def label(self) -> str:
        """What the progress bar calls it."""
        ...


SomePiece = TypeVar("SomePiece", bound=Piece)


def work_through(
    stages: Sequence[Sequence[SomePiece]],
    done: Callable[[SomePiece], bool],
    work: Callable[[SomePiece], object],
    *,
    workers: int,
    desc: str = "models",
) -> None:
    """Does what is not done yet, several pieces at a time; no stage begins before the one in front of it is done.

    Args:
        stages: Pieces of work; those of a stage are independent of each other.
        done: Whether a piece is done already; what it leaves behind decides, so that an interrupted run goes on.
        work: Does a piece; where there are several workers, in a process of its own with one thread, and it has to be a
            function of a module. The process ends with the one that calls this, however that ends.
        workers: Processes at a time; 1 is this process.
        desc: What the progress bar says.

    Raises:
        Exception: What a piece raised. Those that had begun are finished first, no others are begun.
    """
    missing = [[piece for piece in stage if not done(piece)] for stage in stages]
    total = sum(map(len, stages))
    with progress_bar(total=total, initial=total - sum(map(len, missing)), desc=desc, unit="model") as bar:
        if workers == 1:
            for piece in chain.from_iterable(missing):
                work(piece)
                bar.set_postfix_str(piece.label, refresh=False)
                bar.update()
            return
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin) as pool:
            for stage in missing:
                futures = {pool.submit(work, piece): piece for piece in stage}
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.set_postfix_str(futures[future].label, refresh=False)
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise


def _begin() -> None:
    torch.set_num_threads(1)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a worker has one"
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
