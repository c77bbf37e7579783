"""Local SGD: a few single-threaded processes that train alone and average their weights now and then.

On a CPU this uses every core without the synchronisation of two-threaded kernels, which on these small layers costs
more than it brings. Source: Stich (2019), https://arxiv.org/abs/1805.09767.
"""

import math
import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from overpaint.settings import Count, Field, Positive, Seed, settings


@settings
class WorkersConfig:
    """What every training program of the tiny world asks for."""

    learning_rate: Positive = 1.5e-3
    """Peak of a cosine schedule with a short warm-up."""

    workers: int = Field(2, ge=1)
    """Processes, one thread each."""

    average_every: Count = 8
    """Steps between two averagings of the weights."""

    seed: Seed = 0
    """Seed of data and initial weights."""


def run_workers(train: Callable[[int, int, Any], None], config: Any, *, count: int) -> None:
    """Runs ``train(rank, count, config)`` in ``count`` processes that can talk to each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if count == 1:
        _worker(0, train, config, 1, port)
    else:
        torch.multiprocessing.spawn(_worker, args=(train, config, count, port), nprocs=count)


def run_program(train: Callable[[int, int, Any], None], config_class: type[Any]) -> None:
    """Runs a training program: its settings come from the command line, and name folder and number of workers."""
    import tyro

    config = tyro.cli(config_class)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    run_workers(train, config, count=config.workers)


def _worker(rank: int, train: Callable, config: Any, count: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=count)
    try:
        train(rank, count, config)
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def average(modules: Iterable[nn.Module]) -> None:
    """Replaces every parameter by its mean over the workers."""
    count = distributed.get_world_size()
    if count == 1:
        return
    parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
    flat = nn.utils.parameters_to_vector(parameters)
    distributed.all_reduce(flat)
    flat /= count
    for parameter, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))


def cosine(step: int, steps: int, *, warm_up: int = 100) -> float:
    """Returns the factor of the learning rate at a step: a linear warm-up, then half a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class Descent:
    """AdamW on a module, with the learning rate's schedule, clipping, and averaging over the workers.

    Args:
        module: What is trained.
        config: `learning_rate`, `steps` and `average_every`.
        weight_decay: AdamW's.
        warm_up: Steps of linear warm-up.
    """

    def __init__(self, module: nn.Module, config: Any, *, weight_decay: float, warm_up: int = 100) -> None:
        self.module = module
        self.average_every = config.average_every
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine(step, config.steps, warm_up=warm_up)
        )

    def step(self, loss: Tensor, step: int) -> None:
        """Takes the optimizer step of that number, counted from 1."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        if step % self.average_every == 0:
            average([self.module])
