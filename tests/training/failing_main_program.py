"""A program that the tests start in two processes, in the first of which one thing after the other fails."""

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from conftest import StandIn

from overpaint.training import TrainingConfig, TrainingRun, from_main, process_state


class UnsendableError(Exception):
    """An error that cannot be pickled and read again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def full(*arguments: Any, **options: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "no space left")


def unsendable() -> NoReturn:
    raise UnsendableError("this", "that")


def told(work: Callable[[], object]) -> str:
    """Returns the name and the text of the error that some work ends in."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def train(folder: Path, broken: str) -> None:
    """Trains for three iterations, in which something of the main process's is broken."""
    policy = StandIn()
    config = TrainingConfig(output_dir=folder, iterations=3, learning_rate=1e-2, checkpoint_every=1, progress=False)
    with TrainingRun(policy, config) as run:
        files: Any = {"checkpoint": run._checkpoints, "metrics": run._metrics}.get(broken)
        if run.is_main and files is not None:
            files.save = files.write = full
        for _ in run.iterations():
            batch = run.shard(torch.randn(8, 4, generator=run.generator))
            run.backward(policy.network(batch).square().mean())
            run.update()
            run.log({"train/loss": 0.0})


if __name__ == "__main__":
    output = Path(sys.argv[1])
    taken = output / "taken"
    if process_state().is_main_process:
        taken.write_text("a file, where a folder should be")
    process_state().wait_for_everyone()
    errors = {
        "result": str(from_main(lambda: process_state().process_index)),
        "error": told(lambda: from_main(full)),
        "unsendable": told(lambda: from_main(unsendable)),
        "folder": told(lambda: train(taken / "run", "nothing")),
        "checkpoint": told(lambda: train(output / "checkpoint", "checkpoint")),
        "metrics": told(lambda: train(output / "metrics", "metrics")),
        "afterwards": told(lambda: train(output / "afterwards", "nothing")),
    }
    (output / f"{process_state().process_index}.json").write_text(json.dumps(errors))
    process_state().destroy_process_group()
