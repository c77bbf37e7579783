"""The training of a method that has a loss: a copy of the UNet descends it, and the difference is the erasure."""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from overpaint.policy import DiffusionPolicy, WeightDelta, merged_state
from overpaint.policy.digest import policy_record
from overpaint.settings import AnyFloat, Field, Seed, settings
from overpaint.training import TrainingConfig, TrainingRun, process_state
from overpaint.training.config import Optimizer, Precision, Schedule

from .changes import WeightChange
from .concept import Concept
from .erased import Erasure
from .generated import for_run
from .protocols import ConceptBatch, Learner, Objective, TrainedMethod


@settings
class DescentConfig:
    """How a loss is descended. Adam without weight decay and clipping by default, as most of the papers have it."""

    iterations: int = Field(ge=1)
    """Updates."""

    learning_rate: float = Field(gt=0)
    """Of every update, the largest where there is a schedule."""

    batch_size: int = Field(1, ge=1)
    """Samples of an update, over all processes."""

    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW; 0 is Adam."""

    max_grad_norm: AnyFloat = Field(math.inf, gt=0)
    """Longest gradient; longer ones are scaled down."""

    schedule: Schedule = "constant"
    """Of the learning rate: constant, or falling to 0 at the last update."""

    warmup_iterations: int = Field(0, ge=0)
    """Updates in which the learning rate grows linearly from 0."""

    optimizer: Optimizer = "adamw"
    """torch's, the 8-bit one of bitsandbytes, or torch's Adafactor."""

    mixed_precision: Precision | None = None
    """What the networks compute in; None is what `accelerate launch` says, and otherwise float32. Trained weights are
    float32 whatever it is."""

    checkpoint_every: int = Field(100, ge=1)
    """Updates between two checkpoints, where there is a folder for them."""

    seed: Seed = 0
    """Of everything random."""

    def __post_init__(self) -> None:
        """Checks that the warm-up ends."""
        if self.warmup_iterations > self.iterations:
            raise ValueError(
                f"warmup_iterations must be at most iterations={self.iterations}, got {self.warmup_iterations}"
            )

    def run_config(self, output_dir: Path, *, resume: bool = False, progress: bool = True) -> TrainingConfig:
        """Returns the settings of a run that descends so, in a folder."""
        shared = {name: value for name, value in asdict(self).items() if name != "batch_size"}
        return TrainingConfig(output_dir=output_dir, keep_checkpoints=1, resume=resume, progress=progress, **shared)

    def check_processes(self) -> None:
        """Raises a `ValueError` where the processes cannot share a batch."""
        if self.batch_size % (count := process_state().num_processes):
            raise ValueError(
                f"DescentConfig.batch_size must be a multiple of {count}, the number of processes, "
                f"got {self.batch_size}"
            )


def erase_by_descent(
    objective: TrainedMethod,
    policy: DiffusionPolicy,
    concept: Concept,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    student: DiffusionPolicy | None = None,
) -> Erasure:
    """Trains a copy of the UNet by an objective. The policy is not changed: see `Erasure.apply`.

    Args:
        objective: The loss, with its settings.
        policy: Whose model is erased; a LoRA counts as part of it.
        concept: Each update takes some of its phrases.
        output_dir: Keeps metrics and checkpoints, and what the objective prepares; None keeps nothing.
        resume: Go on with an interrupted run in the same folder.
        progress: Whether progress bars are shown.
        student: The copy that is trained; None makes one that trains `objective.config.train`.

    Raises:
        ValueError: As `descend`.
    """
    objective = for_run(objective, output_dir, progress=progress)
    student = student or policy.student_copy(objective.config.train)
    before = {name: value.clone() for name, value in merged_state(student.model).items()}
    descend(objective, student, concept, output_dir=output_dir, resume=resume, progress=progress)
    change = WeightChange(WeightDelta.between(before, student.model))
    return Erasure.of(policy, objective.name, asdict(objective.config), concept, change)


def descend(
    objective: TrainedMethod,
    student: DiffusionPolicy,
    concept: Concept,
    *,
    output_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Trains a policy in place on prompts of the concept; `objective.prepare` comes first.

    Args:
        objective: The loss, with its settings, which are recorded with the run.
        student: See `DiffusionPolicy.student_copy`.
        concept: Its phrases are the prompts.
        output_dir: As in `erase_by_descent`, with the next two.
        resume: Go on with an interrupted run in the same folder.
        progress: Whether a progress bar is shown.
        record: More dataclasses to record with the run, by name; they must stay the same when it is resumed.

    Raises:
        ValueError: The method cannot work with this policy or concept, the folder holds another run, `resume` has no
            folder, or the processes cannot share a batch.
    """
    config: DescentConfig = objective.config.descent
    if resume and output_dir is None:
        raise ValueError("resume must come with the output_dir of the interrupted run, got None")
    config.check_processes()
    objective.prepare(student, concept)
    recorded = {"descent": config, objective.name.lower(): objective.config, **(record or {})}
    about: dict[str, Any] = {}
    if output_dir is not None:
        about = {"model": policy_record(student, untrained=True), "concept": concept.to_json()}
    with TemporaryDirectory() as nowhere:
        run_config = config.run_config(Path(output_dir or nowhere), resume=resume, progress=progress)
        if output_dir is None:
            run_config = replace(run_config, checkpoint_every=config.iterations)
        with TrainingRun(
            student,
            run_config,
            state={"objective": objective} if isinstance(objective, Learner) else None,
            configs=recorded,
            name=f"erasing: {objective.name}",
            about=about,
            temporary=output_dir is None,
        ) as run:
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
    learned = objective.learn(run) if isinstance(objective, Learner) else {}
    run.log({"erasure/loss": run.mean(loss.detach()), "erasure/grad_norm": grad_norm, **learned})


def concept_batch(concept: Concept, size: int, generator: torch.Generator) -> ConceptBatch:
    """Draws phrases of the concept, each as likely as any other, and a seed for each."""
    chosen = torch.randint(len(concept.phrases), (size,), generator=generator).tolist()
    seeds = torch.randint(2**31, (size,), generator=generator).tolist()
    return ConceptBatch([concept.phrases[index] for index in chosen], seeds)
