"""A program that the tests start in several processes, one of which fails in the way that it is told.

    failing_rank_program.py FOLDER FAILURE RANK

FAILURE is the name of a built-in error, "killed", or "none"; it comes in iteration 3 of 6. A run that is there goes on.
"""

import builtins
import os
import signal
import sys
import time
from pathlib import Path

import torch
from conftest import StandIn
from safetensors.torch import save_file

from overpaint.training import TrainingConfig, TrainingRun, process_state


def fail(failure: str, folder: Path) -> None:
    """Writes down when, and fails."""
    (folder / "failed-at").write_text(repr(time.time()))
    if failure == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise getattr(builtins, failure)("as the test wants it")


def main(folder: Path, failure: str, rank: int) -> None:
    """Trains for six iterations on the same batches, however many processes there are."""
    policy = StandIn()
    config = TrainingConfig(
        output_dir=folder, iterations=6, learning_rate=1e-2, checkpoint_every=1, ema_decay=0.5, progress=False,
        resume=True,
    )  # fmt: skip
    with TrainingRun(policy, config) as run:
        for iteration in run.iterations():
            batch = run.shard(torch.randn(8, 4, generator=run.generator))
            if iteration == 3 and run.process_index == rank and failure != "none":
                fail(failure, folder)
            run.backward(policy.network(batch).square().mean())
            run.update()
        with run.ema_weights():
            average = policy.trainable_state()
        if run.is_main:
            save_file(policy.trainable_state(), folder / "weights.safetensors")
            save_file(average, folder / "average.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    process_state().destroy_process_group()
