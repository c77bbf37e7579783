"""The loop around the rounds of a trainer: looks at held-out prompts, early stop, and which weights remain."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.training import Stateful, TrainingConfig, TrainingRun
from rewards import EarlyStopping, Reward

from .collect import PICTURES

Metrics = TypeVar("Metrics", bound=tuple[object, ...])


@runtime_checkable
class RoundsConfig(Protocol):
    """How a trainer draws, and how often its policy is looked at."""

    @property
    def steps(self) -> int:
        """Denoising steps of an image."""
        ...

    @property
    def eta(self) -> float:
        """Noise of the sampling."""
        ...

    @property
    def evaluate_every(self) -> int:
        """Rounds between two looks."""
        ...


@runtime_checkable
class Rounds(Protocol[Metrics]):
    """What the loop asks of a trainer."""

    policy: DiffusionPolicy
    reward: Reward
    guidance: ClassifierFree
    watch: EarlyStopping | None

    @property
    def config(self) -> RoundsConfig:
        """Settings."""
        ...

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell."""
        ...

    def step(self, run: TrainingRun) -> Metrics:
        """Does one round."""
        ...

    def tagged(self, metrics: Metrics, run: TrainingRun) -> Mapping[str, float]:
        """Returns what was measured under the tags of the log."""
        ...


def train_in_rounds(
    trainer: Rounds[Metrics],
    run_config: TrainingConfig,
    *,
    state: Mapping[str, Stateful],
    configs: Mapping[str, Any],
) -> Metrics | None:
    """Trains round by round, or goes on with an interrupted run; see the trainers' `train`.

    Args:
        trainer: Does the rounds.
        run_config: Settings of the run.
        state: What belongs in the checkpoints.
        configs: Settings that are recorded beside the run's.

    Returns:
        What the last round measured; None where a resumed run had nothing left to do.
    """
    policy, watch = trainer.policy, trainer.watch
    metrics = None
    if watch is not None:
        state = {**state, "held_out": watch}
    with TrainingRun(policy, run_config, state=state, configs=configs) as run:
        trainer.prepare(run)
        for iteration in run.iterations():
            if watch is not None and iteration % trainer.config.evaluate_every == 0:
                _look(run, trainer, watch)
                if watch.should_stop:
                    break
            metrics = trainer.step(run)
            run.log(trainer.tagged(metrics, run))
        else:
            if watch is not None:
                _look(run, trainer, watch)
        with run.averaged():
            last = policy.trainable_state()
    policy.load_trainable_state(last)
    if watch is not None:
        watch.restore(policy)
    return metrics


def _look(run: TrainingRun, trainer: Rounds[Metrics], watch: EarlyStopping) -> None:
    """Draws the held-out prompts as a round would, has them judged by both rewards, and logs what was seen."""
    policy, cfg = trainer.policy, trainer.config
    mine = run.shard(range(len(watch.held_out.prompts)))
    part = slice(mine.start, mine.stop)
    with run.averaged():
        look = watch.measure(policy, trainer.reward, part=part, steps=cfg.steps, guidance=trainer.guidance, eta=cfg.eta)
        trained, held_out = run.mean(look.trained), run.mean(look.held_out)
        watch.note(policy, iteration=run.iteration, trained=trained, held_out=held_out)
    run.log({"reward/validation": trained, "reward/held_out": held_out})
    run.log_images("held_out", look.images[:PICTURES], watch.held_out.prompts[part][:PICTURES])


def check_held_out(run: TrainingRun, watch: EarlyStopping | None) -> None:
    """Checks that each process gets equally many held-out prompts.

    Raises:
        ValueError: It does not.
    """
    if watch is not None and len(watch.held_out.prompts) % run.num_processes:
        count = len(watch.held_out.prompts)
        raise ValueError(f"held_out.prompts must divide evenly among {run.num_processes} processes, got {count}")
