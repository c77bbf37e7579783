"""Samples that wait on the disk for a reward that failed."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from overpaint.policy import DiffusionPolicy, Trajectory
from overpaint.policy.sealed import DamagedFileError, read_tensors, write_tensors

FOLDER = "ungraded"
"""Where they wait, below the folder of the run."""


class SampleCache:
    """The samples that one process drew in one round, cached until they are scored.

    Args:
        output_dir: Folder of the run.
        round: Index of the round.
        process: Index of the process.
        kind: What they are, where the round has samples of several collectors.
    """

    def __init__(self, output_dir: Path, *, round: int, process: int, kind: str = "") -> None:
        ending = f"-{kind}" if kind else ""
        self.path = output_dir / FOLDER / f"round-{round:06d}-process-{process}{ending}.safetensors"

    def save(self, batches: Sequence[Trajectory], prompts: Sequence[str], seeds: Sequence[int]) -> None:
        """Writes what was drawn so far, in one move."""
        tensors = {}
        for index, batch in enumerate(batches):
            tensors[f"{index}/latents"] = batch.latents.contiguous()
            tensors[f"{index}/log_probs"] = batch.log_probs.contiguous()
            tensors[f"{index}/timesteps"] = batch.timesteps.clone()
            if batch.means is not None:
                tensors[f"{index}/means"] = batch.means.contiguous()
        about = {"request": _request(prompts, seeds), "batches": str(len(batches))}
        write_tensors(self.path, tensors, about)

    def load(self, policy: DiffusionPolicy, prompts: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        """Returns the batches that were kept for the very prompts and seeds; none where none were, or are damaged."""
        if not self.path.exists():
            return []
        try:
            tensors, about = read_tensors(self.path)
        except DamagedFileError as error:
            warnings.warn(f"{error}; the samples are drawn again", RuntimeWarning, stacklevel=2)
            return []
        if about.get("request") != _request(prompts, seeds):
            return []
        tensors = {name: value.to(policy.device) for name, value in tensors.items()}
        batches: list[Trajectory] = []
        first = 0
        for index in range(int(about["batches"])):
            latents, log_probs, timesteps = (
                tensors[f"{index}/{name}"] for name in ("latents", "log_probs", "timesteps")
            )
            conditioning = policy.encode(prompts[first : first + len(latents)])
            batches.append(Trajectory(latents, log_probs, timesteps, conditioning, tensors.get(f"{index}/means")))
            first += len(latents)
        return batches

    def forget(self) -> None:
        """Removes the file, where there is one."""
        self.path.unlink(missing_ok=True)


def _request(prompts: Sequence[str], seeds: Sequence[int]) -> str:
    """Returns what was to be drawn, as text."""
    return json.dumps([list(prompts), list(seeds)])
