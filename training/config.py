"""Settings of a training run that do not depend on the algorithm."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from .require import require

OPTIMIZERS = ("adamw", "adamw8bit")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("wandb", "tensorboard")

_require = partial(require, "")

FREE_FIELDS = frozenset(
    {
        "output_dir",
        "iterations",
        "trackers",
        "project",
        "checkpoint_every",
        "keep_checkpoints",
        "resume",
        "max_skipped",
        "progress",
    }
)
"""Fields that may change between the start of a run and its resumption, because they do not change its numbers."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Where a run writes, how long it goes on, and how it descends."""

    output_dir: Path
    """Folder of the run: metrics.jsonl, run_config.json, checkpoints/ and images/. With several machines it has to be
    one that all of them see."""

    iterations: int
    """Number of iterations in all, those before an interruption included."""

    learning_rate: float = 1e-5
    """Constant step size of the optimizer. ReFL's authors train whole UNets with 1e-5; LoRA takes 1e-4 and more."""

    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""

    adam_epsilon: float = 1e-8
    """Added to the denominator of Adam's step."""

    weight_decay: float = 1e-2
    """Decoupled weight decay, a fraction of learning_rate times the weight in each iteration."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' AdamW8bit, which keeps its moments in one byte each."""

    max_grad_norm: float = 1.0
    """Gradients are scaled down to this Euclidean norm; infinity leaves them as they are."""

    ema_decay: float | None = None
    """Decay of an exponential moving average of the trained weights in each update; None keeps none."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type that accelerate's autocast computes in. fp16 needs a GPU and scales the loss."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where metrics and images go besides metrics.jsonl and images/."""

    project: str = "overpaint"
    """Name of the project in the trackers; the run itself is named after output_dir."""

    checkpoint_every: int = 100
    """Iterations between two checkpoints; one more is written after the last iteration."""

    keep_checkpoints: int = 3
    """Number of newest checkpoints that are kept. With 1, a damaged one has none to fall back to."""

    resume: bool = False
    """Whether to go on from the newest checkpoint in output_dir; in an empty folder the run starts anew."""

    seed: int = 0
    """Seed of `TrainingRun.generator`, and of the global generators of Python, numpy and torch."""

    max_skipped: int = 10
    """Updates in a row that may be skipped for a non-finite loss or gradient; one more stops the run."""

    progress: bool = True
    """Whether the main process shows a progress bar on stderr."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: A field breaks its rule.
        """
        for name in ("iterations", "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            _require(value > 0 and math.isfinite(value), name, "be positive and finite", value)
        betas = self.adam_betas
        _require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "adam_betas", "be two numbers in [0, 1)", betas)
        _require(0 <= self.weight_decay < math.inf, "weight_decay", "be finite and not negative", self.weight_decay)
        _require(self.optimizer in OPTIMIZERS, "optimizer", f"be one of {OPTIMIZERS}", self.optimizer)
        _require(self.max_grad_norm > 0, "max_grad_norm", "be positive", self.max_grad_norm)
        decay = self.ema_decay
        _require(decay is None or 0 < decay < 1, "ema_decay", "be None or lie between 0 and 1", decay)
        _require(self.mixed_precision in PRECISIONS, "mixed_precision", f"be one of {PRECISIONS}", self.mixed_precision)
        known = set(self.trackers) <= set(TRACKERS) and len(set(self.trackers)) == len(self.trackers)
        _require(known, "trackers", f"be different names among {TRACKERS}", self.trackers)
        _require(bool(self.project), "project", "not be empty", self.project)
        _require(0 <= self.seed < 2**31, "seed", "lie in [0, 2**31)", self.seed)
        _require(self.max_skipped >= 0, "max_skipped", "not be negative", self.max_skipped)
