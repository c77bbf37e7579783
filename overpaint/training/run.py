"""A training run: everything around the loss that every trainer needs."""

import io
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from overpaint.policy.atomic import atomic_file
from overpaint.settings import AnyFloat

from .checkpoint import (
    Checkpoint,
    CheckpointFolder,
    DamagedCheckpointError,
    check_same_weights,
    global_random_state,
    seed_global_generators,
    set_global_random_state,
)
from .config import TrainingConfig
from .engine import from_main, in_any, prepared_network, resolved, started_accelerator
from .folder import CHECKPOINTS, IMAGES, METRICS, check_same_run, claim, made_of, recorded
from .logging import MetricsFile, Progress, image_grid, tell
from .optimizer_step import OptimizerStep
from .record import RunRecord, device_name
from .signals import INTERRUPTED, TERMINATED, Termination
from .trackers import Trackers, check_trackers
from .types import Sliceable, Stateful, Trainable

STATE = frozenset({"made_of", "optimizer_step", "objects", "generator", "random"})
"""What a checkpoint holds besides weights."""

Items = TypeVar("Items", bound=Sliceable)


def check_trainable(policy: Trainable) -> None:
    """Checks that there is something to train.

    Raises:
        ValueError: There is not.
    """
    if not policy.trainable_parameters():
        raise ValueError("policy must have trainable weights: load it with lora= or train=, got none")


class TrainingRun:
    """Owns what every training run needs, and leaves the loss to the trainer.

        with TrainingRun(policy, config, state={"lagrangian": lagrangian}) as run:
            for iteration in run.iterations():
                with run.autocast():
                    loss = ...
                run.backward(loss)
                grad_norm = run.update()
                run.log({"train/loss": loss, "train/grad_norm": grad_norm})

    Inside the block, `policy.network` is accelerate's wrapper of the UNet. A run that was killed goes on with the
    same numbers when it is started again with `resume`: weights, optimizer, averages, all generators, and the objects
    in `state` come from the newest sound checkpoint, and metrics of later iterations are dropped. What a program does
    between entering the block and the first iteration sees the generators as they were when the run was new.

    One process, or several with one copy of the network each, under `accelerate launch`.

    Args:
        policy: What is trained, in place.
        config: Settings of the run.
        state: Further objects whose state belongs in the checkpoints, by name. It must be the same in all processes.
        configs: Further settings that are recorded beside the run's own, dataclasses by name. They too must stay the
            same when the run is resumed.
        name: What the progress bar is called.
        about: What else made the result, as JSON can hold it: model, reward, prompts. It goes into `run.json` and to
            the trackers. All but `notes` must stay the same when the run is resumed.
        temporary: Whether the output folder goes away with the run: Ctrl-C then stops it at once.

    Raises:
        ValueError: The policy has nothing to train.
    """

    config: TrainingConfig
    """Settings of the run; once it is entered, with the precision that it has."""

    iteration: int
    """Index of the current iteration; after the last, their number."""

    device: torch.device
    """Where this process computes."""

    is_main: bool
    """Whether this is the process that writes."""

    process_index: int
    """Index of this process, from 0."""

    num_processes: int
    """Number of processes."""

    generator: torch.Generator
    """Source of random numbers on the CPU. It is the same in all processes: draw for the whole batch, then `shard`."""

    def __init__(
        self,
        policy: Trainable,
        config: TrainingConfig,
        *,
        state: Mapping[str, Stateful] | None = None,
        configs: Mapping[str, Any] | None = None,
        name: str = "training",
        about: Mapping[str, Any] | None = None,
        temporary: bool = False,
    ) -> None:
        self.policy = policy
        self.config = config
        self._state = dict(state or {})
        self._configs = dict(configs or {})
        self._name = name
        self._about = dict(about or {})
        self._temporary = temporary
        check_trainable(policy)
        check_trackers(config)
        self.iteration = 0
        self._saved: int | None = None
        self._random_state: dict[str, Any] | None = None
        self._generator_state: Tensor | None = None
        self._metrics: MetricsFile | None = None
        self._loop: Any = None
        self._bar: Progress | None = None
        self._failure: Exception | None = None
        self._record: RunRecord | None = None

    def __enter__(self) -> "TrainingRun":
        """Starts or resumes the run.

        Raises:
            ValueError: The output folder holds another run, accelerate was launched or configured for something that is
                not supported or contradicts the settings, or what is trained cannot be in the run's precision.
        """
        self.config = resolved(self.config)
        narrow = {parameter.dtype for parameter in self.policy.trainable_parameters()} & {torch.float16}
        if self.config.mixed_precision == "fp16" and narrow:
            raise ValueError(
                "policy must keep its trainable weights in float32 with mixed_precision 'fp16', got float16"
            )
        with ExitStack() as stack:
            self.accelerator = stack.enter_context(started_accelerator(self.config))
            self.device = self.accelerator.device
            self.is_main = self.accelerator.is_main_process
            self.process_index = self.accelerator.process_index
            self.num_processes = self.accelerator.num_processes
            from_main(lambda: claim(self.config, self._configs))
            config, policy = self.config, self.policy
            folder = Path(config.output_dir)
            self.generator = torch.Generator().manual_seed(config.seed)
            policy.to(self.device)
            network = stack.enter_context(prepared_network(self.accelerator, policy, shard=config.shard))
            self._optimizer_step = OptimizerStep(self.accelerator, network, policy.trainable_parameters(), config)
            self._made_of = made_of(config, self._configs, self._about)
            self._checkpoints = CheckpointFolder(folder / CHECKPOINTS, keep=config.keep_checkpoints)
            self._resume()
            from_main(lambda: self._open_logs(stack))
            # Last, because what the lines above draw may depend on what they find in the folder.
            seed_global_generators(config.seed + self.process_index)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives back the policy's own network, the signal handler and the trackers."""
        with self._stack:
            if self._loop is not None:
                self._loop.close()
            if self._record is not None:
                self._record.end(self.iteration, error)
        if error is None:
            self._tell_failure()

    # The processes.

    def shard(self, items: Items) -> Items:
        """Returns this process's part of a batch; the parts are equal, so that a mean of means is the mean.

        Raises:
            ValueError: The batch cannot be divided evenly.
        """
        part, rest = divmod(len(items), self.num_processes)
        if rest or not part:
            raise ValueError(f"batch must divide evenly among {self.num_processes} processes, got {len(items)} items")
        return items[self.process_index * part : (self.process_index + 1) * part]

    def gather(self, values: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "all ..."]:
        """Returns the values of all processes in their order, without gradients; undoes `shard`."""
        values = values.detach().to(self.device)
        return self.accelerator.gather(values) if self.num_processes > 1 else values

    def mean(self, values: AnyFloat | int | Tensor) -> float:
        """Returns the mean over all values of all processes, each of which holds equally many."""
        total = torch.as_tensor(values, device=self.device).detach().float().mean()
        return float(self.accelerator.reduce(total, reduction="mean") if self.num_processes > 1 else total)

    def in_any(self, flag: bool) -> bool:
        """Returns whether the flag is set in any process."""
        return in_any(self.accelerator, flag)

    # The loop.

    def iterations(self) -> Iterator[int]:
        """Yields the index of each iteration that is left, and saves checkpoints between them.

        On SIGTERM, and on the first Ctrl-C, the iteration is finished, a checkpoint is saved, and the program exits. A
        second Ctrl-C aborts at once; so does the first in a notebook and outside the main thread.

        Raises:
            Exception: One process of several could not write what it was told to; it is raised in all of them.
            SystemExit: SIGTERM or Ctrl-C came; the code is `TERMINATED` (143) or `INTERRUPTED` (130).
        """
        self._loop = self._iterate()
        return self._loop

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the block in which a loss is computed in the run's precision."""
        return self.accelerator.autocast() if self.config.mixed_precision != "no" else nullcontext()

    def backward(self, loss: Float[Tensor, ""], *, sync: bool = True) -> None:
        """Adds the gradient of a loss to the gradient of the coming update.

        Several losses may be added up this way, in one process or in many, whether their forwards came one by one or
        all before: only the backward with `sync` averages the sum over the processes. It has to be the last one
        before the update and to reach every trained weight.

        Args:
            loss: Mean over this process's part of the batch. A non-finite one makes `update` skip.
            sync: Whether the update comes next.
        """
        self._optimizer_step.backward(loss, sync=sync)

    def update(self) -> float:
        """Clips the gradient, takes one step of the optimizer and of the averages, and clears the gradient.

        The step is skipped, in all processes alike, when a loss or the gradient is not finite.

        Returns:
            Euclidean norm of the gradient before clipping; not finite if the gradient was not.

        Raises:
            NonFiniteError: More than `max_skipped` updates in a row were skipped.
            RuntimeError: There was no backward with `sync` since the last update.
        """
        return self._optimizer_step.update()

    @property
    def learning_rate(self) -> float:
        """Step size of the present iteration."""
        return self._optimizer_step.learning_rate

    @property
    def skipped(self) -> int:
        """Updates that were skipped since the run began, those before an interruption included."""
        return self._optimizer_step.skipped

    def ema_weights(self) -> AbstractContextManager[None]:
        """Returns the block in which the policy has the averaged weights, for evaluation or saving.

        Raises:
            ValueError: The run keeps no average.
        """
        if self._optimizer_step.ema is None:
            raise ValueError("ema_decay must be set to use averaged weights, got None")
        return self._optimizer_step.ema.swapped()

    def averaged(self) -> AbstractContextManager[None]:
        """Returns the block in which the policy has the averaged weights, or its own where the run keeps no average."""
        return nullcontext() if self._optimizer_step.ema is None else self._optimizer_step.ema.swapped()

    # What is written down.

    def log(self, values: Mapping[str, SupportsFloat]) -> None:
        """Writes values of the current iteration to metrics.jsonl, to the trackers and to the progress bar.

        Only the main process writes. Values that differ between processes go through `mean` before.

        Args:
            values: Numbers by tag, such as `reward/mean`.
        """
        if self._metrics is None:
            return
        numbers = {tag: float(v.detach() if isinstance(v, Tensor) else v) for tag, v in values.items()}
        with self._told_to_all():
            self._metrics.write(self.iteration, numbers)
            self._trackers.log(numbers, self.iteration)
        if self._bar is not None:
            self._bar.show(numbers, self.skipped)

    def log_images(
        self,
        name: str,
        images: Float[Tensor, "batch 3 H W"],
        prompts: Sequence[str] | None = None,
        *,
        rewards: Float[Tensor, " batch"] | None = None,
    ) -> None:
        """Writes a grid of images to images/<name>-<iteration>.png and to the trackers.

        Where there are prompts, wandb gets a table of them too, `<name>_table`, with a row for each image. Only the
        main process writes.

        Args:
            name: Name of the grid; a slash in it becomes a hyphen in the name of the file.
            images: RGB in [0, 1].
            prompts: One for each image, written beneath it.
            rewards: One for each image, written before its prompt.
        """
        if not self.is_main:
            return
        values = None if rewards is None else rewards.tolist()
        captions = prompts
        if prompts is not None and values is not None:
            captions = [f"{value:.2f} {prompt}" for value, prompt in zip(values, prompts, strict=True)]
        grid = image_grid(images, captions)
        folder = Path(self.config.output_dir) / IMAGES
        with self._told_to_all():
            folder.mkdir(exist_ok=True)
            with atomic_file(folder / f"{name.replace('/', '-')}-{self.iteration:06d}.png") as partial:
                grid.save(partial, format="PNG")
            self._trackers.log_image(name, grid, self.iteration)
            if prompts is not None:
                self._trackers.log_table(f"{name}_table", images, prompts, values, self.iteration)

    # How it is done.

    def _open_logs(self, stack: ExitStack) -> None:
        """Opens what only the main process writes to, and has the stack close it."""
        config = self.config
        self._metrics = MetricsFile(Path(config.output_dir) / METRICS, start=self.iteration)
        stack.callback(self._metrics.close)
        settings = recorded(config, self._configs)
        self._record = RunRecord.begin(
            Path(config.output_dir), settings, self._about, run=self._what_runs(), iteration=self.iteration
        )
        self._trackers = Trackers(config, settings | self._record.for_trackers())
        stack.callback(self._trackers.finish)

    def _what_runs(self) -> dict[str, Any]:
        """Returns what only the run knows of what makes its result."""
        return {
            "name": self._name,
            "iterations": self.config.iterations,
            "trained_weights": sum(parameter.numel() for parameter in self.policy.trainable_parameters()),
            "device": device_name(self.device),
            "processes": self.num_processes,
            "precision": self.config.mixed_precision,
        }

    def _what_runs_where(self) -> str:
        """Returns a line for who started the run."""
        what = self._what_runs()
        processes = "one process" if self.num_processes == 1 else f"{self.num_processes} processes"
        precision = "float32" if what["precision"] == "no" else what["precision"]
        start = f" from {self.iteration}" if self.iteration else ""
        return (
            f"{what['iterations']} iterations{start}, {what['trained_weights']:,} trained weights, {self.device}, "
            f"{processes}, {precision}: {self.config.output_dir}"
        )

    def _iterate(self) -> Iterator[int]:
        """Yields iterations; see `iterations`."""
        self._restore_randomness()
        total = self.config.iterations
        shown = self.is_main and self.config.progress
        told = self._what_runs_where()
        bar = Progress(name=self._name, total=total, done=self.iteration, shown=shown, told=told)
        with Termination(interrupts=not self._temporary, told=self.is_main) as termination:
            try:
                self._bar = bar
                while self.iteration < total:
                    self._optimizer_step.begin(self.iteration)
                    yield self.iteration
                    self.iteration += 1
                    bar.advance()
                    stop = in_any(self.accelerator, termination.requested or self._failure is not None)
                    if stop:
                        from_main(self._tell_failure)
                    if stop or self.iteration == total or self.iteration % self.config.checkpoint_every == 0:
                        self.save()
                    if stop:
                        raise SystemExit(self._stopped(by_hand=in_any(self.accelerator, termination.interrupted)))
            finally:
                self._bar = None
                bar.close()

    def _stopped(self, *, by_hand: bool) -> int:
        """Says how to go on after a signal, and returns the exit code."""
        if self.is_main and not self._temporary:
            tell(
                f"stopped by {'Ctrl-C' if by_hand else 'SIGTERM'} after {self.iteration} of {self.config.iterations} "
                f"iterations, which are saved in {self.config.output_dir}: go on with resume=True, or --resume where a "
                "program was started with its settings"
            )
        return INTERRUPTED if by_hand else TERMINATED

    @contextmanager
    def _told_to_all(self) -> Generator[None]:
        """Puts an error of the main process alone off to the iteration's end, where the others are listening."""
        try:
            yield
        except Exception as error:
            if self.num_processes == 1:
                raise
            self._failure = self._failure or error

    def _tell_failure(self) -> None:
        """Raises what was put off."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    # Checkpoints.

    def save(self) -> None:
        """Saves a checkpoint of the iterations done so far, unless there is one; all processes have to call it.

        `iterations` calls it when its time has come. A trainer does so before it gives up in the middle of an
        iteration; the generator then has to be where it was at the beginning of it.
        """
        from accelerate.utils import gather_object

        if self._saved == self.iteration:
            return
        random_state = global_random_state(self.device)
        random_states = gather_object([random_state])
        from_main(lambda: self._write_checkpoint(random_states))
        # What was called to save may have drawn, and a run resumed from here will not have called it.
        set_global_random_state(random_state, self.device)
        self._saved = self.iteration

    def snapshot(self) -> bytes:
        """Returns what a checkpoint holds, in the machine's memory and of this process alone, for `rewind`."""
        kept = io.BytesIO()
        torch.save(self._present([global_random_state(self.device)])._asdict(), kept)
        return kept.getvalue()

    def rewind(self, before: bytes) -> None:
        """Puts everything back to where it was at a `snapshot`, and forgets gradients."""
        checkpoint = Checkpoint(**torch.load(io.BytesIO(before), map_location="cpu", weights_only=True))
        self._take_over(checkpoint)
        self._optimizer_step.forget_gradients()
        self.generator.set_state(checkpoint.state["generator"])
        set_global_random_state(checkpoint.state["random"][0], self.device)

    def _write_checkpoint(self, random_states: list[dict[str, Any]]) -> None:
        """Writes what all processes have in common, and the global generators of each."""
        if self._metrics is not None:
            self._metrics.sync()
        self._checkpoints.save(self._present(random_states))
        if self._record is not None:
            self._record.note(self.iteration)

    def _present(self, random_states: list[dict[str, Any]]) -> Checkpoint:
        """Returns everything that the run needs to go on from here."""
        state = {
            "optimizer_step": self._optimizer_step.state_dict(),
            "made_of": self._made_of,
            "objects": {name: item.state_dict() for name, item in self._state.items()},
            "generator": self.generator.get_state(),
            "random": random_states,
        }
        return Checkpoint(self.iteration, self.policy.trainable_state(), state)

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Takes weights, optimizer and all objects from a checkpoint; the generators are the caller's to set."""
        self.policy.load_trainable_state(checkpoint.weights)
        self._optimizer_step.load_state_dict(checkpoint.state["optimizer_step"])
        for name, item in self._state.items():
            item.load_state_dict(checkpoint.state["objects"][name])

    def _resume(self) -> None:
        """Takes over the newest sound checkpoint, where there is one; `claim` has made sure that it may."""
        # The main process chooses, because setting damaged ones aside is for one process to do.
        iteration = from_main(self._checkpoints.newest)
        if iteration is None:
            return
        checkpoint = self._checkpoints.load(iteration)
        state = checkpoint.state
        if missing := sorted(STATE - state.keys()):
            raise DamagedCheckpointError(f"the state of iteration {iteration} must hold {missing[0]}, and does not")
        from_main(lambda: check_same_run(state["made_of"], self._made_of, self.config))
        if state["objects"].keys() != self._state.keys():
            raise ValueError(
                f"state must name {sorted(state['objects'])} as in the checkpoint, got {sorted(self._state)}"
            )
        check_same_weights(self.policy.trainable_state(), checkpoint.weights)
        self._take_over(checkpoint)
        self.iteration = self._saved = iteration
        self._generator_state = state["generator"]
        if len(state["random"]) == self.num_processes:
            self._random_state = state["random"][self.process_index]
        else:
            warnings.warn(
                f"the checkpoint has the global generators of {len(state['random'])} processes, and there are "
                f"{self.num_processes} now: they start from the seed again",
                RuntimeWarning,
                stacklevel=3,
            )

    def _restore_randomness(self) -> None:
        """Puts the generators where the checkpoint has them; late, so that preparations see them new."""
        if self._generator_state is not None:
            self.generator.set_state(self._generator_state)
        if self._random_state is not None:
            set_global_random_state(self._random_state, self.device)
        self._generator_state = self._random_state = None
