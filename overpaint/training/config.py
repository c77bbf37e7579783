"""Settings of a training run that do not depend on the algorithm."""

from typing import Annotated, Literal

from overpaint.settings import AnyFloat, AnyPath, Field, settings

Precision = Literal["no", "bf16", "fp16"]
"""What the networks compute in: float32, or accelerate's autocast to one of two types."""

Optimizer = Literal["adamw", "adamw8bit", "adafactor"]

Schedule = Literal["constant", "linear", "cosine"]

FREE_FIELDS = frozenset(
    {
        "output_dir",
        "iterations",
        "trackers",
        "project",
        "checkpoint_every",
        "keep_checkpoints",
        "resume",
        "shard",
        "max_skipped",
        "progress",
    }
)
"""Fields that may change between the start of a run and its resumption, because they do not change its numbers.
`iterations` does where the learning rate follows a schedule that ends with it."""

ADAM = {"adam_betas": (0.9, 0.999), "adam_epsilon": 1e-8}
"""Defaults of what adafactor does not read."""


Decay = Annotated[float, Field(ge=0, lt=1)]


@settings
class TrainingConfig:
    """Where a run writes, how long it goes on, and how it descends."""

    output_dir: AnyPath
    """Folder of the run: metrics.jsonl, run_config.json, run.json, checkpoints/ and images/. With several machines it
    has to be one that all of them see."""

    iterations: int = Field(ge=1)
    """Number of iterations in all, those before an interruption included."""

    learning_rate: float = Field(1e-5, gt=0)
    """Step size of the optimizer, the largest where there is a schedule. ReFL's authors train whole UNets with 1e-5;
    LoRA takes 1e-4 and more."""

    schedule: Schedule = "constant"
    """How the step size goes on after the warm-up: constant, or falling to 0 over the iterations that are left. It is
    the same for all updates of an iteration."""

    warmup_iterations: int = Field(0, ge=0)
    """Iterations in which the step size grows linearly from 0."""

    adam_betas: tuple[Decay, Decay] = ADAM["adam_betas"]
    """Decay rates of Adam's two moments."""

    adam_epsilon: float = Field(ADAM["adam_epsilon"], gt=0)
    """Added to the denominator of Adam's step."""

    weight_decay: float = Field(1e-2, ge=0)
    """Decoupled weight decay, a fraction of learning_rate times the weight in each iteration."""

    optimizer: Optimizer = "adamw"
    """torch's AdamW; bitsandbytes' AdamW8bit, which keeps its moments in one byte each; or torch's Adafactor, which
    keeps rows and columns of the second moment only, and whose steps are learning_rate times the size of a weight."""

    max_grad_norm: AnyFloat = Field(1.0, gt=0)
    """Gradients are scaled down to this Euclidean norm; infinity leaves them as they are."""

    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the trained weights in each update; None keeps none."""

    ema_warmup: bool = False
    """Whether that decay grows from 0 to its value, as 1 - (1 + updates)^(-2/3)."""

    mixed_precision: Precision | None = None
    """Type that accelerate's autocast computes in; None is what `accelerate launch` or `accelerate config` says, and
    otherwise "no", float32. bf16 needs a GPU that has it or a CPU; fp16 needs a GPU and scales the loss."""

    shard: bool = False
    """Spreads the frozen weights of the network over the processes (torch's FSDP2), for one that is too large for a
    device; a LoRA stays whole in each. `accelerate launch --use_fsdp --fsdp_version 2` asks for it, too."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where metrics and images go besides metrics.jsonl and images/."""

    project: str = Field("overpaint", min_length=1)
    """Name of the project in the trackers; the run itself is named after output_dir."""

    checkpoint_every: int = Field(100, ge=1)
    """Iterations between two checkpoints; one more is written after the last iteration, and where a run is stopped."""

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
        """Checks what joins several fields, and that each tracker is named once."""
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers must be different, got {self.trackers}")
        if self.warmup_iterations > self.iterations:
            raise ValueError(
                f"warmup_iterations must be at most iterations={self.iterations}, got {self.warmup_iterations}"
            )
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup must be False without ema_decay, got True")
        for name, default in ADAM.items():
            if self.optimizer == "adafactor" and (value := getattr(self, name)) != default:
                raise ValueError(f"{name} must be left alone with the optimizer 'adafactor', got {value}")
