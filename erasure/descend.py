"""The training of a method that has a loss: a copy of the UNet descends it, and the difference is the erasure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from overpaint.policy import DiffusionPolicy, WeightDelta, merged_state
from overpaint.training import TrainingConfig, TrainingRun, process_state, require

from .changes import WeightChange
from .concept import Concept
from .protocols import ConceptBatch, Objective


@dataclass(frozen=True, kw_only=True)
class DescentConfig:
    """How a loss is descended. Adam without weight decay and clipping by default, as most of the papers have it."""

    iterations: int
    """Updates."""

    learning_rate: float
    """Of every update; constant."""

    batch_size: int = 1
    """Samples of an update, over all processes."""

    weight_decay: float = 0.0
    """Of AdamW; 0 is Adam."""

    max_grad_norm: float = math.inf
    """Longest gradient; longer ones are scaled down."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """torch's, or the 8-bit one of bitsandbytes."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """What the networks compute in. Trained weights are float32 whatever it is."""

    checkpoint_every: int = 100
    """Updates between two checkpoints, where there is a folder for them."""

    seed: int = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: A field breaks its rule.
        """
        for name in ("iterations", "batch_size", "checkpoint_every"):
            value = getattr(self, name)
            require("DescentConfig", value >= 1, name, "be at least 1", value)
        require("DescentConfig", 0 < self.learning_rate < math.inf, "learning_rate", "be positive", self.learning_rate)
        require("DescentConfig", self.weight_decay >= 0, "weight_decay", "not be negative", self.weight_decay)
        require("DescentConfig", self.max_grad_norm > 0, "max_grad_norm", "be positive", self.max_grad_norm)

    def check_processes(self) -> None:
        """Checks that the processes can share a batch.

        Raises:
            ValueError: They cannot.
        """
        count = process_state().num_processes
        rule = f"be a multiple of {count}, the number of processes"
        require("DescentConfig", self.batch_size % count == 0, "batch_size", rule, self.batch_size)


def descend(
    objective: Objective,
    student: DiffusionPolicy,
    concept: Concept,
    config: DescentConfig,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Trains a policy on prompts of the concept; `objective.prepare` comes first.

    Args:
        objective: The loss.
        student: Trained in place, see `DiffusionPolicy.student_copy`.
        concept: Its phrases are the prompts.
        config: How.
        output_dir: Keeps metrics and checkpoints; None keeps nothing.
        resume: Go on with an interrupted run in the same folder.
        progress: Whether a progress bar is shown.
        settings: Dataclasses by name, recorded with the run; they must stay the same when it is resumed.

    Raises:
        ValueError: The method cannot work with this policy or concept, the folder holds another run, `resume` has no
            folder, or the processes cannot share a batch.
    """
    if resume and output_dir is None:
        raise ValueError("resume must come with the output_dir of the interrupted run, got None")
    config.check_processes()
    objective.prepare(student, concept)
    with TemporaryDirectory() as nowhere:
        run_config = TrainingConfig(
            output_dir=Path(output_dir or nowhere),
            iterations=config.iterations,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optimizer=config.optimizer,
            mixed_precision=config.mixed_precision,
            checkpoint_every=config.iterations if output_dir is None else config.checkpoint_every,
            keep_checkpoints=1,
            resume=resume,
            seed=config.seed,
            progress=progress,
        )
        with TrainingRun(student, run_config, configs={"descent": config, **(settings or {})}) as run:
            for _ in run.iterations():
                descend_once(objective, student, concept, config, run)


def descend_once(
    objective: Objective, student: DiffusionPolicy, concept: Concept, config: DescentConfig, run: TrainingRun
) -> None:
    """Does one update of a run, on prompts and seeds that its generator draws."""
    batch = concept_batch(concept, config.batch_size, run.generator)
    mine = ConceptBatch(run.shard(batch.prompts), run.shard(batch.seeds))
    with run.autocast():
        loss = objective.loss(student, mine).mean()
    run.backward(loss)
    grad_norm = run.update()
    run.log({"erasure/loss": run.mean(loss.detach()), "erasure/grad_norm": grad_norm})


def descended(
    objective: Objective,
    student: DiffusionPolicy,
    concept: Concept,
    config: DescentConfig,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> WeightChange:
    """Trains a policy as `descend` does, with the same arguments, and returns what that changed in its weights."""
    before = {name: value.clone() for name, value in merged_state(student.unet).items()}
    descend(
        objective, student, concept, config,
        output_dir=output_dir, resume=resume, progress=progress, settings=settings,
    )  # fmt: skip
    return WeightChange(WeightDelta.between(before, student.unet))


def concept_batch(concept: Concept, size: int, generator: torch.Generator) -> ConceptBatch:
    """Draws phrases of the concept, each as likely as any other, and a seed for each."""
    chosen = torch.randint(len(concept.phrases), (size,), generator=generator).tolist()
    seeds = torch.randint(2**31, (size,), generator=generator).tolist()
    return ConceptBatch([concept.phrases[index] for index in chosen], seeds)
