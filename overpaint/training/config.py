"""Settings of a training run that do not depend on the algorithm."""

from typing import Annotated, Literal

from overpaint.settings import AnyFloat, AnyPath, Field, settings

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


Decay = Annotated[float, Field(ge=0, lt=1)]


@settings
class TrainingConfig:
    """Where a run writes, how long it goes on, and how it descends."""

    output_dir: AnyPath
    """Folder of the run: metrics.jsonl, run_config.json, checkpoints/ and images/. With several machines it has to be
    one that all of them see."""

    iterations: int = Field(ge=1)
    """Number of iterations in all, those before an interruption included."""

    learning_rate: float = Field(1e-5, gt=0)
    """Constant step size of the optimizer. ReFL's authors train whole UNets with 1e-5; LoRA takes 1e-4 and more."""

    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""

    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator of Adam's step."""

    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay, a fraction of learning_rate times the weight in each iteration."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """torch's AdamW, or bitsandbytes' AdamW8bit, which keeps its moments in one byte each."""

    max_grad_norm: AnyFloat = Field(1.0, gt=0)
    """Gradients are scaled down to this Euclidean norm; infinity leaves them as they are."""

    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the trained weights in each update; None keeps none."""

    ema_warmup: bool = False
    """Whether that decay grows from 0 to its value, as 1 - (1 + updates)^(-2/3)."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Type that accelerate's autocast computes in. fp16 needs a GPU and scales the loss."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where metrics and images go besides metrics.jsonl and images/."""

    project: str = Field("overpaint", min_length=1)
    """Name of the project in the trackers; the run itself is named after output_dir."""

    checkpoint_every: int = Field(100, ge=1)
    """Iterations between two checkpoints; one more is written after the last iteration."""

    keep_checkpoints: int = Field(3, ge=1)
    """Number of newest checkpoints that are kept. With 1, a damaged one has none to fall back to."""

    resume: bool = False
    """Whether to go on from the newest checkpoint in output_dir; in an empty folder the run starts anew."""

    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of `TrainingRun.generator`, and of the global generators of Python, numpy and torch."""

    max_skipped: int = Field(10, ge=0)
    """Updates in a row that may be skipped for a non-finite loss or gradient; one more stops the run."""

    progress: bool = True
    """Whether the main process shows a progress bar on stderr."""

    def __post_init__(self) -> None:
        """Checks that each tracker is named once."""
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must be different, got {self.trackers}")
