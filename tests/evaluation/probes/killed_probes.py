"""Probes the tiny world in forks that are killed again and again; test_probe_kills.py looks at what came out.

A program of its own because it forks, which a test runner with its threads should not.

    killed_probes.py ROOT NAME KILLS

ROOT is as `under_fire` leaves it.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.registry import PROBES
from overpaint.evaluation.probes.run import run_probe
from tests.training.under_fire import under_fire

ATTACK = {"updates": 2, "batch_size": 2}
LESS: Mapping[str, Mapping[str, Any]] = {
    "textual-inversion": {"vectors": (1,), "updates": 2, "batch_size": 2},
    "adversarial-prompt": {"attack": ATTACK},
    "soft-prompt": {"attack": ATTACK},
    "noise": {"etas": (1.0,)},
    "completion": {"steps_before": (1,), "noised_to": ()},
    "classifier-guidance": {"shown_pictures": 4, "other_pictures": 4, "classifier": {"widths": (8, 4), "epochs": 1}},
    "inverted-latents": {"steps": 3},
    "tracing": {"strengths": (0.0, 1.0), "steps": 3},
    "relearning": {"updates": (0, 2), "steps": 3},
    "resurgence": {
        "updates": (0, 2),
        "pictures": 2,
        "steps": 3,
        "refl": {"batch_size": 2, "micro_batch_size": 2, "steps": 3, "first_reward_step": 1, "last_reward_step": 2},
    },
    "semantics": {"steps": 3},
}
"""What makes the settings for the tiny world smaller yet."""


def smaller(config: Any, less: Mapping[str, Any]) -> Any:
    """Replaces fields, those of groups too."""
    found = {
        name: smaller(getattr(config, name), value) if isinstance(value, Mapping) else value
        for name, value in less.items()
    }
    return replace(config, **found)


def main(root: Path, name: str, kills: int) -> None:
    """Probes an erased model once in peace, and then under fire."""
    make, tiny = PROBES[name]
    probe = make(smaller(tiny, LESS.get(name, {})))
    target = target_of(tiny_world(), DrawConfig(steps=3, guidance_scale=3.0))
    original, erased = tinyworld.load_policy(), tinyworld.load_policy()
    UCE().erase(erased, tinyworld.STRIPES).apply(erased)

    def work(folder: Path) -> None:
        torch.manual_seed(len(str(folder)))  # what has a seed of its own does not ask the global generator
        result = run_probe(
            probe, erased, original, target, count=2, kept=folder / "kept", pictures=folder, progress=False
        )
        result.save(folder / "result.json")

    under_fire(work, root, kills, name, half=".*.partial")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
