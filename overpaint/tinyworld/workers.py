"""Local SGD: a few single-threaded processes that train alone and average their weights now and then.

On a CPU this uses every core without the synchronisation of two-threaded kernels, which on these small layers costs
more than it brings. Source: Stich (2019), https://arxiv.org/abs/1805.09767.
"""

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed, nn


def run_workers(train: Callable[[int, int, Any], None], config: Any, *, count: int) -> None:
    """Runs ``train(rank, count, config)`` in ``count`` processes that can talk to each other."""
    if count == 1:
        _worker(0, train, config, 1, _free_port())
        return
    torch.multiprocessing.spawn(_worker, args=(train, config, count, _free_port()), nprocs=count)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    flat = torch.cat([p.flatten() for p in parameters])
    distributed.all_reduce(flat)
    flat /= count
    for parameter, values in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(values.view_as(parameter))
