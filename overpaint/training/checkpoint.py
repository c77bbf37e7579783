"""Checkpoints that are whole or not there at all.

A checkpoint is a folder `iteration-00000123` (123 iterations were done) with

- `weights.safetensors`: the trained weights, by the policy's own names;
- `state.pt`: everything else (optimizer, averages, generators, constraints, counters), as `torch.save` writes it;
- `manifest.json`: size and SHA-256 of the other files.

It is written into a hidden folder, brought to the disk and then renamed, so that a run killed at any moment leaves
either the complete checkpoint or none. `torch.load(weights_only=True)` reads the state: tensors and plain values, and
nothing that could run code.
"""

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from overpaint.policy.atomic import naming
from overpaint.policy.weight_files import SafeTensors, read_pickle
from overpaint.settings import Count, Index
from overpaint.text_files import read_json_object

FORMAT = 3
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
STATE = "state.pt"
NAME = "iteration-{:08d}"


class Checkpoint(NamedTuple):
    """Everything a run needs to go on."""

    iteration: Index
    """Number of iterations done."""

    weights: dict[str, Tensor]
    """The trained weights by name."""

    state: dict[str, Any]
    """Everything else, as nested dicts, lists, tuples, numbers, strings and tensors."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that is incomplete, or not what was written."""


class CheckpointFolder:
    """The checkpoints of one run, of which the newest few are kept.

    Args:
        path: The folder; it is made when the first checkpoint is saved.
        keep: Number of checkpoints to keep.
    """

    def __init__(self, path: Path, *, keep: Count) -> None:
        self.path = path
        self.keep = keep

    def checkpoints(self) -> list[Path]:
        """Returns the folders of all checkpoints, oldest first, without looking into them."""
        return sorted(self.path.glob("iteration-*"), key=lambda path: int(path.name.removeprefix("iteration-")))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, whole or not at all, and removes those beyond the number to keep.

        Raises:
            OSError: The disk is full, for example; the message names the checkpoint, and those before it stay.
        """
        with naming(self.path / NAME.format(checkpoint.iteration)):
            return self._save(checkpoint)

    def _save(self, checkpoint: Checkpoint) -> Path:
        """Does what `save` says."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._remove(".partial-*")
        name = NAME.format(checkpoint.iteration)
        partial = self.path / f".partial-{name}"
        try:
            _write(partial, checkpoint)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # whose room may be what the disk lacks
            raise
        final = self.path / name
        if final.exists():
            final.rename(self.path / f".partial-old-{name}")
        partial.rename(final)
        _sync(self.path)
        self._remove(".partial-*")
        self._drop_oldest()
        return final

    def newest(self) -> int | None:
        """Returns the iteration of the newest sound checkpoint, or None where none was ever written.

        Damaged ones are told of in a warning and set aside under another name, and what a `save` that was killed left
        undone is done.

        Raises:
            DamagedCheckpointError: There are checkpoints and all are damaged.
        """
        damaged: list[tuple[Path, DamagedCheckpointError]] = []
        for path in reversed(self.checkpoints()):
            try:
                iteration = verified_iteration(path)
                if path.name != NAME.format(iteration):
                    raise DamagedCheckpointError(f"its manifest is that of iteration {iteration}")
            except DamagedCheckpointError as error:
                damaged.append((path, error))
                continue
            for bad, reason in damaged:
                message = f"checkpoint {bad} is damaged ({reason}); going on from {path.name}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
                aside = self.path / f"damaged-{bad.name}"
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
            self._remove(".partial-*")
            self._drop_oldest()
            return iteration
        if damaged:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged)
            raise DamagedCheckpointError(f"{self.path} must hold a sound checkpoint, and all are damaged: {reasons}")
        return None

    def load(self, iteration: Index) -> Checkpoint:
        """Reads the checkpoint of an iteration that `newest` has found sound."""
        return _read(self.path / NAME.format(iteration), iteration)

    def _drop_oldest(self) -> None:
        """Removes the checkpoints beyond the number to keep."""
        for old in self.checkpoints()[: -self.keep]:
            # Renamed first, so that a kill while files are being removed leaves nothing that looks like a checkpoint.
            shutil.rmtree(old.rename(self.path / f".partial-old-{old.name}"))

    def _remove(self, pattern: str) -> None:
        """Removes what an interrupted save has left."""
        for path in self.path.glob(pattern):
            shutil.rmtree(path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint after comparing every file with the manifest.

    Raises:
        DamagedCheckpointError: A file is missing, or is not what was written.
    """
    return _read(path, verified_iteration(path))


def verified_iteration(path: Path) -> int:
    """Compares every file of a checkpoint with its manifest, and returns the iteration.

    Raises:
        DamagedCheckpointError: A file is missing, or is not what was written.
    """
    try:
        manifest = read_json_object(path / MANIFEST)
        if manifest["format"] != FORMAT:
            raise DamagedCheckpointError(f"format must be {FORMAT}, got {manifest['format']!r}")
        for name in (WEIGHTS, STATE):
            if _digest(path / name) != manifest["files"][name]:
                raise DamagedCheckpointError(f"{name} is not what was written")
        return manifest["iteration"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{type(error).__name__}: {error}") from error


def check_same_weights(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Compares names and shapes of the weights that are trained with those of a checkpoint.

    Raises:
        ValueError: They differ; the message has the first difference.
    """
    ours = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if ours != theirs:
        name = min(name for name, _ in ours.items() ^ theirs.items())
        raise ValueError(
            f"policy must train the same weights as the checkpoint, got {name!r} of shape {ours.get(name)} "
            f"instead of {theirs.get(name)}"
        )


def _read(folder: Path, iteration: int) -> Checkpoint:
    """Reads all files of a sound checkpoint."""
    try:
        return Checkpoint(iteration, dict(SafeTensors([folder / WEIGHTS])), read_pickle(folder / STATE, mapped=False))
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes all files of a checkpoint and brings them to the disk."""
    folder.mkdir()
    # Copies on the CPU, because safetensors takes no two tensors that share memory.
    weights = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in checkpoint.weights.items()}
    save_file(weights, folder / WEIGHTS)
    with (folder / STATE).open("wb") as file:  # of Python's own, whose errors say what is wrong with the disk
        torch.save(checkpoint.state, file)
    try:
        read_pickle(folder / STATE)
    except ValueError as error:
        raise TypeError(f"state must be made of dicts, lists, tuples, numbers, strings and tensors: {error}") from error
    manifest: Mapping[str, Any] = {
        "format": FORMAT,
        "iteration": checkpoint.iteration,
        "files": {name: _digest(folder / name) for name in (WEIGHTS, STATE)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        _sync(file)
    _sync(folder)


def _digest(file: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seed_global_generators(seed: int) -> None:
    """Seeds the generators of Python, numpy and torch, those of all devices included."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the libraries a trainer calls may draw from it)
    torch.manual_seed(seed)


def global_random_state(device: torch.device) -> dict[str, Any]:
    """Returns the state of the generators of Python, numpy and torch, and of the device's own one."""
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002 (see above)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),  # torch reads no uint32 of a state
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_global_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Takes back what `global_random_state` returned; a run that moves to or from a GPU keeps the others."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002 (see above)
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
