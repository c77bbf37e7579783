"""The loop around a trainer's iterations: evaluations, early stopping, and which weights remain."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.digest import policy_record
from overpaint.settings import Count, Share
from rewards import Reward, as_reward, scores_of

from .config import TrainingConfig
from .early_stopping import EarlyStopping
from .engine import from_main, process_state
from .memory import first_step, memory_explained
from .record import prompts_record, reward_record
from .run import TrainingRun
from .types import Stateful

PICTURES = 16
"""Images of an evaluation that are logged."""

TRAINING_PICTURES, FIRST_SEED = 8, 3_000_000
"""Images of training prompts that are logged where nothing is held out, and the seed of the first."""

Item = TypeVar("Item")
Metrics = TypeVar("Metrics", bound=tuple[object, ...])


@runtime_checkable
class Trainer(Protocol[Metrics]):
    """What the loop asks of a trainer."""

    policy: DiffusionPolicy
    reward: Reward
    guidance: ClassifierFree
    early_stopping: EarlyStopping | None

    @property
    def name(self) -> str:
        """What the progress bar is called."""
        ...

    @property
    def prompts(self) -> Sequence[str]:
        """What images are drawn for."""
        ...

    @property
    def config(self) -> Any:
        """Settings: at least `steps`, `height`, `width`, and `evaluate_every`, the iterations between evaluations."""
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

    def resize(self, sizes: Mapping[str, Count]) -> None:
        """Takes other sizes of what goes through the networks at a time, by the names of its settings."""
        ...

    def tagged(self, metrics: Metrics, run: TrainingRun) -> Mapping[str, float]:
        """Returns what was measured under the tags of the log."""
        ...


def train(
    trainer: Trainer[Metrics],
    run_config: TrainingConfig,
    *,
    state: Mapping[str, Stateful],
    configs: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
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
        about: What the trainer knows of what makes the result, beside policy, reward and prompts.
        notes: What only the program knows: where the model came from, its own settings, the record of an erasure. As
            JSON can hold it; it goes into `run.json` and to the trackers.

    Returns:
        What the last iteration measured; None where a resumed run had nothing left to do.

    Raises:
        ValueError: The run cannot be started or resumed, the held-out prompts do not divide evenly among the
            processes, or as the trainer's `prepare`.
        MemoryExhaustedError: Memory ran out, and smaller parts would not do.
    """
    policy, stopping = trainer.policy, trainer.early_stopping
    if stopping is not None:
        state = {**state, "early_stopping": stopping}
    metrics = None
    known: dict[str, Any] = {}
    if process_state().is_main_process:  # which writes it down
        known = {**described(trainer), **(about or {}), "notes": dict(notes or {})}
    with TrainingRun(policy, run_config, state=state, configs=configs, name=trainer.name, about=known) as run:
        if stopping is not None:
            check_batches(run, "", {"held_out.prompts": len(stopping.held_out.prompts)})
        with memory_explained(trainer.config):
            trainer.prepare(run)
        for iteration in run.iterations():
            if iteration % trainer.config.evaluate_every == 0:
                with memory_explained(trainer.config):
                    trainer.evaluate(run)
                if stopping is not None and stopping.should_stop:
                    break
            if metrics is None:
                metrics = first_step(trainer, run)
            else:
                with memory_explained(trainer.config):
                    metrics = trainer.step(run)
            skipped = {"train/skipped": run.skipped} if run.skipped else {}
            run.log({**trainer.tagged(metrics, run), "train/learning_rate": run.learning_rate, **skipped})
        else:
            trainer.evaluate(run)
        with run.averaged():
            last = policy.trainable_state()
    policy.load_trainable_state(last)
    if stopping is not None:
        stopping.restore(policy)
    return metrics


def described(trainer: Trainer[Any]) -> dict[str, Any]:
    """Returns what a trainer's result depends on, for the record of the run: model, reward and prompts."""
    policy, stopping = trainer.policy, trainer.early_stopping
    lora = None if policy.lora is None else asdict(policy.lora)
    about: dict[str, Any] = {
        "model": {**policy_record(policy, untrained=True), "lora": lora},
        "reward": reward_record(trainer.reward),
        "prompts": prompts_record(trainer.prompts),
    }
    if stopping is not None:
        held_out = stopping.held_out
        about["held_out"] = {
            "reward": reward_record(as_reward(held_out.reward)),
            "prompts": prompts_record(held_out.prompts),
            "first_seed": held_out.first_seed,
        }
    return about


def evaluate_held_out(run: TrainingRun, trainer: Trainer[Metrics], *, eta: Share = 0.0) -> None:
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
            height=trainer.config.height,
            width=trainer.config.width,
        )
        trained, held_out = run.mean(scores.trained), run.mean(scores.held_out)
        stopping.note(trainer.policy, iteration=run.iteration, trained=trained, held_out=held_out)
    run.log({"reward/validation": trained, "reward/held_out": held_out})
    images, rewards = scores.images[:PICTURES], scores.trained[:PICTURES]
    run.log_images("held_out", images, stopping.held_out.prompts[part][:PICTURES], rewards=rewards)


def log_pictures(run: TrainingRun, trainer: Trainer[Metrics], *, eta: float = 0.0) -> None:
    """Logs pictures of the first training prompts, drawn with averaged weights and always from the same seeds."""
    if run.config.shard:  # whose network takes all processes to draw
        _log_pictures(run, trainer, eta)
    else:
        from_main(lambda: _log_pictures(run, trainer, eta))


def _log_pictures(run: TrainingRun, trainer: Trainer[Metrics], eta: float) -> None:
    """Draws, scores and logs in the main process."""
    prompts = list(dict.fromkeys(trainer.prompts))[:TRAINING_PICTURES]
    with run.averaged():
        images = trainer.policy.draw(
            prompts,
            seeds=range(FIRST_SEED, FIRST_SEED + len(prompts)),
            steps=trainer.config.steps,
            guidance=trainer.guidance,
            eta=eta,
            height=trainer.config.height,
            width=trainer.config.width,
        )
    with torch.no_grad():
        rewards = scores_of("reward", trainer.reward, images, prompts)
    run.log_images("training_prompts", images, prompts, rewards=rewards)


def check_image_size(trainer: Trainer[Any]) -> None:
    """Checks that the policy can draw images of the size that a trainer's settings say.

    Raises:
        ValueError: The VAE's factor does not divide a side.
    """
    policy, config = trainer.policy, trainer.config
    try:
        policy.latent_shape(config.height, config.width)
    except ValueError as error:
        raise ValueError(f"{type(config).__name__}.{error}") from None


def check_batches(run: TrainingRun, owner: str, batches: Mapping[str, int]) -> None:
    """Checks that each process gets an equal part of every batch.

    Raises:
        ValueError: It does not.
    """
    for name, count in batches.items():
        if count % run.num_processes:
            raise ValueError(f"{owner}{name} must divide evenly among {run.num_processes} processes, got {count}")


def draw_batch(run: TrainingRun, population: Sequence[Item], count: Count) -> list[tuple[Item, int]]:
    """Draws items and a seed for each, for the batch of all processes, and returns this process's part.

    Args:
        run: Its generator draws.
        population: What is drawn from, with repetition.
        count: Size of the batch of all processes.

    Raises:
        ValueError: The batch cannot be divided evenly among the processes.
    """
    picks = torch.randint(len(population), (count,), generator=run.generator)
    seeds = torch.randint(2**31 - 1, (count,), generator=run.generator)
    mine = zip(run.shard(picks).tolist(), run.shard(seeds).tolist(), strict=True)
    return [(population[pick], seed) for pick, seed in mine]
