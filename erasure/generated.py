"""Generated training data: latents that a policy draws before training starts, cached in a folder.

A thousand of them take longer than some of the trainings do; a drawing that was interrupted goes on where it stopped.
"""

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.atomic import this_process
from overpaint.policy.digest import network_digests, scheduler_settings
from overpaint.policy.prompts import check_prompts
from overpaint.policy.sealed import DamagedFileError, read_tensors, write_tensors
from overpaint.policy.types import Latents
from overpaint.training import process_state
from overpaint.training.logging import progress_bar

from .cache import claim
from .erased import as_json

SHARD = 32
"""Latents in a file; what an interruption can cost."""

RECORD_FILE = "generated.json"
RECORD_FORMAT = "overpaint.Generated/4"


@runtime_checkable
class DrawingObjective(Protocol):
    """An objective that draws pictures when it is prepared, and keeps them in a folder, or in one of that name."""

    config: Any
    folder: Path | None
    folder_name: str
    progress: bool


AnyObjective = TypeVar("AnyObjective")


def for_run(objective: AnyObjective, output_dir: str | Path | None, *, progress: bool) -> AnyObjective:
    """Returns an objective for one run; one that draws pictures is copied, and keeps them in the run's folder."""
    if not isinstance(objective, DrawingObjective):
        return objective
    own = copy.copy(objective)
    if own.folder is None and output_dir is not None:
        own.folder = Path(output_dir) / own.folder_name
    own.progress = progress
    return own


def generated_latents(
    policy: DiffusionPolicy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: ClassifierFree,
    batch_size: int = 16,
    folder: Path | None = None,
    progress: bool = True,
) -> Latents:
    """Draws a clean latent for each prompt, as `policy.decode` and `policy.denoising_loss` take them; on the CPU.

    A latent follows from its prompt and seed, up to the rounding that the batch size brings. Under several processes
    with one folder each begins at another file and reads those that the others have written.

    Args:
        policy: What draws, as it is.
        prompts: One for each latent.
        seeds: One for each latent.
        steps: Denoising steps.
        guidance: A negative prompt must be the same for all.
        batch_size: Drawn at a time.
        folder: Keeps them; None keeps nothing.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: The arguments do not fit each other, or the folder holds what was asked for otherwise.
    """
    prompts, seeds = check_prompts(prompts), list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds must be one for each of {len(prompts)} prompts, got {len(seeds)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if guidance.negative is not None and len(guidance.negative) != 1:
        raise ValueError(f"guidance must have one negative prompt for all, got {len(guidance.negative)}")
    if folder is not None:
        record = {
            "format": RECORD_FORMAT,
            **{name: digest for name, digest in network_digests(policy).items() if name != "vae"},
            "max_sequence_length": policy.family.max_sequence_length,
            "scheduler": as_json(scheduler_settings(policy.scheduler)),
            "guard": None if policy.guard is None else repr(policy.guard),
            "steps": steps,
            "guidance_scale": guidance.scale,
            "negative": None if guidance.negative is None else guidance.negative.texts[0],
            "eta": 0.0,
            "seeds": seeds,
            "prompts": prompts,
        }
        claim(folder / RECORD_FILE, record, "latents")

    state = process_state()
    starts = list(range(0, len(prompts), SHARD))
    begin = state.process_index * len(starts) // state.num_processes
    shards: dict[int, Latents] = {}
    shown = progress and state.is_main_process
    with progress_bar(total=len(prompts), desc="drawing", unit="latent", shown=shown) as bar:
        for start in starts[begin:] + starts[:begin]:
            of = slice(start, min(start + SHARD, len(prompts)))
            path = None if folder is None else folder / f"latents-{start:06d}.safetensors"
            latents = None if path is None else _read(path, of.stop - start)
            if latents is None:
                parts = [slice(first, min(first + batch_size, of.stop)) for first in range(start, of.stop, batch_size)]
                drawn = [
                    policy.sample(policy.encode(prompts[part]), steps=steps, guidance=guidance, seeds=seeds[part]).cpu()
                    for part in parts
                ]
                latents = torch.cat(drawn)
                if not latents.isfinite().all():
                    raise ValueError(f"policy must draw finite latents, got others among samples {start} to {of.stop}")
                if path is not None:
                    write_tensors(path, {"latents": latents}, writer=this_process())
            shards[start] = latents
            bar.update(len(latents))
    return torch.cat([shards[start] for start in starts])


def drawn_pictures(
    objective: DrawingObjective,
    policy: DiffusionPolicy,
    kind: str,
    prompts: Sequence[str],
    count: int,
    *,
    folder: Path | None,
    negative: str = "",
) -> Latents:
    """Draws pictures with a policy's reference for prompts that take turns; the seeds follow from kind and config."""
    cfg = objective.config
    seeds = [random.Random(f"{kind} {index} of {cfg.descent.seed}").randrange(2**31) for index in range(count)]
    guidance = ClassifierFree(cfg.guidance_scale, policy.encode([negative]) if negative else None)
    with policy.reference():
        return generated_latents(
            policy, in_turns(prompts, count), seeds,
            steps=cfg.steps, guidance=guidance, batch_size=cfg.draw_batch_size,
            folder=folder, progress=objective.progress,
        )  # fmt: skip


def in_turns(prompts: Sequence[str], count: int) -> list[str]:
    """Returns as many prompts as `count`; they take turns."""
    return [prompts[index % len(prompts)] for index in range(count)]


def _read(path: Path, count: int) -> Latents | None:
    """Returns the latents of a file, or None where there is none or it is damaged: they are drawn again."""
    if not path.is_file():
        return None
    try:
        latents = read_tensors(path)[0].get("latents")
    except DamagedFileError:
        return None
    return latents if latents is not None and len(latents) == count else None
