"""Runs probes: rate, ceiling and floors, kept where they can be kept."""

import hashlib
import io
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import write_bytes
from overpaint.policy.digest import policy_record
from overpaint.policy.sealed import DamagedFileError
from overpaint.policy.unet_rows import counted_rows

from .probe import Attempt, Floor, PreparedProbe, Probe, ProbeTask, why_not
from .result import Outcomes, ProbeResult, VariantResult, load_outcomes, save_outcomes
from .target import ProbeTarget

SHOWN_PICTURES = 16
"""How many attempts a grid of pictures shows."""


def run_probe(
    probe: Probe,
    policy: DiffusionPolicy,
    original: DiffusionPolicy,
    target: ProbeTarget,
    *,
    count: int = 16,
    seed: int = 0,
    kept: Path | None = None,
    pictures: Path | None = None,
    progress: bool = True,
) -> ProbeResult:
    """Tries to bring a concept back, and tells how much of it came; of the probe's floors, those that the target has.

    Args:
        probe: How.
        policy: The model under test, with whatever guards it; it is left as it was.
        original: The model before it was erased; the ceiling and the floors are its own.
        target: What is looked for.
        count: Attempts of each variant.
        seed: Of everything random.
        kept: Folder in which ceilings and floors are kept, by the hash of the original's weights, the probe's settings,
            and the target's name; None measures them anew.
        pictures: Folder for a PNG of each variant's attempts; None writes none.
        progress: Whether progress bars are shown.

    Raises:
        ValueError: The probe cannot be tried on one of the models, see `why_not`; nothing is drawn then.
    """
    for model in (policy, original):
        if (reason := why_not(probe, model)) is not None:
            raise ValueError(f"{probe.name} cannot be tried: {reason}")
    there = [floor for floor in probe.floors if floor in target.floors]
    tasks: dict[Floor | None, ProbeTask] = {
        floor: target.task(original, count=count, seed=seed, floor=floor, progress=progress) for floor in (None, *there)
    }
    if isinstance(probe, PreparedProbe):
        probe.prepare(tasks[None])
    start = time.process_time()
    with counted_rows() as rows:
        attempts = probe.attempt(policy, tasks[None])
    seconds = time.process_time() - start
    if pictures is not None:
        for attempt in attempts:
            save_pictures(pictures / f"{probe.name}-{file_name(attempt.variant)}.png", attempt, tasks[None])
    key = key_of(probe, original, target, count, seed)
    found = outcomes_of(attempts, tasks[None])
    own = found if policy is original else None
    ceiling = _kept(kept, key, "ceiling", probe, original, tasks[None], own)
    floors = {floor: _kept(kept, key, floor, probe, original, tasks[floor]) for floor in there}
    return ProbeResult(
        probe=probe.name,
        config=asdict(probe.config),
        count=count,
        seed=seed,
        rows_forward=rows.forward,
        rows_backward=rows.backward,
        seconds=seconds,
        variants=tuple(
            VariantResult(
                found=one,
                ceiling=ceiling[number],
                floors={floor: outcomes[number] for floor, outcomes in floors.items()},
            )
            for number, one in enumerate(found)
        ),
    )


def outcomes_of(attempts: Sequence[Attempt], task: ProbeTask) -> list[Outcomes]:
    """Returns the numbers of some attempts.

    Raises:
        ValueError: A score is not finite.
    """
    found = []
    for one in attempts:
        if not torch.isfinite(one.scores).all():
            raise ValueError(f"scores of a probe must be finite, got {one.scores.tolist()} of variant {one.variant}")
        found.append(
            Outcomes(
                variant=one.variant,
                shown=tuple(task.shown(one.scores).tolist()),
                mean_rate=one.mean_rate,
                numbers=dict(one.numbers),
                curve=one.curve,
            )
        )
    return found


def key_of(probe: Probe, original: DiffusionPolicy, target: ProbeTarget, count: int, seed: int) -> str:
    """Returns what ceilings and floors are kept under: whatever decides them, as a short hash."""
    about = {
        "probe": probe.name,
        "config": asdict(probe.config),
        "original": policy_record(original),
        "target": [target.name, target.concept.to_json(), target.shown_from, target.steps, target.guidance_scale],
        **({} if target.size is None else {"size": target.size}),
        "attempts": [count, seed],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _kept(
    folder: Path | None,
    key: str,
    what: str,
    probe: Probe,
    original: DiffusionPolicy,
    task: ProbeTask,
    found: list[Outcomes] | None = None,
) -> list[Outcomes]:
    """Returns what the probe gets from the original model: as it was kept, or else found, unless it was, and kept."""
    path = None if folder is None else folder / f"{probe.name}-{what}-{key}.json"
    if path is not None and path.is_file():
        try:
            return load_outcomes(path)
        except DamagedFileError as error:
            warnings.warn(f"{error}; it is measured anew", RuntimeWarning, stacklevel=2)
    outcomes = outcomes_of(probe.attempt(original, task), task) if found is None else found
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_outcomes(path, outcomes)
    return outcomes


def save_pictures(path: Path, attempt: Attempt, task: ProbeTask) -> None:
    """Writes the first attempts as a grid, with prompts and scores."""
    from overpaint.training.logging import image_grid

    shown = slice(min(SHOWN_PICTURES, len(attempt.images)))
    told = zip((attempt.prompts or task.prompts)[shown], attempt.scores[shown].tolist(), strict=True)
    grid = image_grid(attempt.images[shown], [f"{prompt} ({score:.2f})" for prompt, score in told])
    content = io.BytesIO()
    grid.save(content, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.getvalue())


def file_name(variant: str) -> str:
    """Returns the name of a variant as a file can have it."""
    return "".join(letter if letter.isalnum() else "-" for letter in variant.lower()).strip("-")
