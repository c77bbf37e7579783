"""The loop around a trainer's iterations: evaluations, early stopping, and which weights remain."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from overpaint.policy import ClassifierFree, DiffusionPolicy
from rewards import Reward

from .config import TrainingConfig
from .early_stopping import EarlyStopping
from .run import TrainingRun
from .types import Stateful

PICTURES = 16
"""Images of an evaluation that are logged."""

Metrics = TypeVar("Metrics", bound=tuple[object, ...])


@runtime_checkable
class Trainer(Protocol[Metrics]):
    """What the loop asks of a trainer."""

    policy: DiffusionPolicy
    reward: Reward
    guidance: ClassifierFree
    early_stopping: EarlyStopping | None

    @property
    def config(self) -> Any:
        """Settings: at least `steps` of an image and `evaluate_every`, the iterations between two evaluations."""
        ...

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell."""
        ...

    def evaluate(self, run: TrainingRun) -> None:
        """Evaluates the policy on what it is not trained on."""
        ...

    def step(self, run: TrainingRun) -> Metrics:
        """Does one iteration."""
        ...

    def tagged(self, metrics: Metrics, run: TrainingRun) -> Mapping[str, float]:
        """Returns what was measured under the tags of the log."""
        ...


def train(
    trainer: Trainer[Metrics], run_config: TrainingConfig, *, state: Mapping[str, Stateful], configs: Mapping[str, Any]
) -> Metrics | None:
    """Trains, or goes on with an interrupted run.

    The policy ends with the weights of the best held-out reward, or, where nothing is held out or the constraint held
    at no evaluation, with the last ones. With `ema_decay` both are averaged weights, while checkpoints keep what
    training goes on from.

    Args:
        trainer: Does the iterations.
        run_config: Settings of the run.
        state: What belongs in the checkpoints.
        configs: Settings that are recorded beside the run's.

    Returns:
        What the last iteration measured; None where a resumed run had nothing left to do.

    Raises:
        ValueError: The run cannot be started or resumed, the held-out prompts do not divide evenly among the
            processes, or as the trainer's `prepare`.
    """
    policy, stopping = trainer.policy, trainer.early_stopping
    if stopping is not None:
        state = {**state, "early_stopping": stopping}
    metrics = None
    with TrainingRun(policy, run_config, state=state, configs=configs) as run:
        if stopping is not None:
            check_batches(run, "", {"held_out.prompts": len(stopping.held_out.prompts)})
        trainer.prepare(run)
        for iteration in run.iterations():
            if iteration % trainer.config.evaluate_every == 0:
                trainer.evaluate(run)
                if stopping is not None and stopping.should_stop:
                    break
            metrics = trainer.step(run)
            run.log(trainer.tagged(metrics, run))
        else:
            trainer.evaluate(run)
        with run.averaged():
            last = policy.trainable_state()
    policy.load_trainable_state(last)
    if stopping is not None:
        stopping.restore(policy)
    return metrics


def evaluate_held_out(run: TrainingRun, trainer: Trainer[Metrics], *, eta: float = 0.0) -> None:
    """Draws the held-out prompts with averaged weights, scores them by both rewards, and logs what was measured."""
    stopping = trainer.early_stopping
    if stopping is None:
        return
    mine = run.shard(range(len(stopping.held_out.prompts)))
    part = slice(mine.start, mine.stop)
    with run.averaged():
        scores = stopping.evaluate(
            trainer.policy,
            trainer.reward,
            part=part,
            steps=trainer.config.steps,
            guidance=trainer.guidance,
            eta=eta,
        )
        trained, held_out = run.mean(scores.trained), run.mean(scores.held_out)
        stopping.note(trainer.policy, iteration=run.iteration, trained=trained, held_out=held_out)
    run.log({"reward/validation": trained, "reward/held_out": held_out})
    run.log_images("held_out", scores.images[:PICTURES], stopping.held_out.prompts[part][:PICTURES])


def check_batches(run: TrainingRun, owner: str, batches: Mapping[str, int]) -> None:
    """Checks that each process gets an equal part of every batch.

    Raises:
        ValueError: It does not.
    """
    for name, count in batches.items():
        if count % run.num_processes:
            raise ValueError(f"{owner}{name} must divide evenly among {run.num_processes} processes, got {count}")
