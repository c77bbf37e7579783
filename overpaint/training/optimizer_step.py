"""The optimizer step: gradients, clipping, the optimizer, averaged weights, and what numbers that are not finite do."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from overpaint.settings import Share

from .config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that was not finite."""


class OptimizerStep:
    """The weights, their gradients and the optimizer; `TrainingRun` hands `backward` and `update` to it.

    Args:
        accelerator: accelerate's engine.
        network: The network as accelerate has wrapped it, inside its `no_sync`.
        parameters: What is trained; all of it belongs to the network.
        config: Settings of the run.
    """

    def __init__(
        self, accelerator: "Accelerator", network: nn.Module, parameters: list[nn.Parameter], config: TrainingConfig
    ) -> None:
        self.config = config
        self.skipped = 0
        self.ema = AveragedWeights(parameters, config.ema_decay, config.ema_warmup) if config.ema_decay else None
        self._accelerator = accelerator
        self._network = network
        self._parameters = parameters
        self._optimizer = accelerator.prepare(make_optimizer(parameters, config))
        self._factor = learning_rate_factor(config)
        self._skipped_in_a_row = 0
        self._forget_backward()

    def begin(self, iteration: int) -> None:
        """Sets the learning rate of an iteration."""
        rate = self.config.learning_rate * self._factor(iteration)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @property
    def learning_rate(self) -> float:
        """Step size of the present iteration."""
        return float(self._optimizer.param_groups[0]["lr"])

    def backward(self, loss: Float[Tensor, ""], *, sync: bool) -> None:
        """Adds the gradient of a loss; see `TrainingRun.backward`.

        torch decides at a forward whether the next backward averages over the processes, which goes wrong when two
        forwards come before two backwards. So the whole run is inside `no_sync`, and accelerate's trigger turns the
        averaging on for one backward. It then averages what has been added up so far.
        """
        self._finite = self._finite & torch.isfinite(loss.detach())
        if sync and self._synchronised and isinstance(self._network, nn.parallel.DistributedDataParallel):
            # After its first averaging torch sorts the weights anew at the next forward, and fails without one.
            self._network.reducer._rebuild_buckets()
        with self._accelerator.trigger_sync_in_backward(self._network) if sync else nullcontext():
            self._accelerator.backward(loss)
        if sync and self.config.shard and self._accelerator.num_processes > 1:
            self._average_gradients()
        self._synchronised = sync

    def update(self) -> float:
        """Takes one step; see `TrainingRun.update`."""
        if not self._synchronised:
            raise RuntimeError("update() must follow a backward(loss, sync=True), got none since the last update")
        accelerator = self._accelerator
        missing = sum(parameter.grad is None for parameter in self._parameters)
        if missing and accelerator.num_processes > 1:
            raise RuntimeError(f"backward() must reach every trained weight, got no gradient for {missing} of them")

        norm = accelerator.clip_grad_norm_(self._parameters, self.config.max_grad_norm)
        broken = (~(self._finite & torch.isfinite(norm))).float()
        if accelerator.num_processes > 1:
            broken = accelerator.reduce(broken, reduction="sum")
        # One transfer from the device for both numbers.
        grad_norm, skip = torch.stack([norm.float(), broken]).tolist()
        if not skip:
            self._optimizer.step()
        elif accelerator.scaler is not None:
            # The gradients were unscaled above; the scaler has to learn of an overflow to lower its scale.
            accelerator.scaler.update()
        self.forget_gradients()
        if skip:
            self._count_skipped()
        else:
            self._skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update()
        return grad_norm

    def forget_gradients(self) -> None:
        """Drops what has been added up since the last update."""
        self._optimizer.zero_grad(set_to_none=True)
        self._forget_backward()

    def _average_gradients(self) -> None:
        """Averages the gradients over the processes, which no wrapper does where the network is sharded."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = self._accelerator.reduce(nn.utils.parameters_to_vector(gradients), reduction="mean")
        nn.utils.vector_to_parameters(flat, gradients)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the weights themselves."""
        scaler = self._accelerator.scaler
        return {
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Takes back what `state_dict` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _forget_backward(self) -> None:
        """Notes that no backward has come since the last update."""
        self._synchronised = False
        self._finite = torch.ones((), dtype=torch.bool, device=self._accelerator.device)

    def _count_skipped(self) -> None:
        """Counts a skipped update, and stops when there are too many in a row."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.config.max_skipped:
            raise NonFiniteError(
                f"{self._skipped_in_a_row} updates in a row had a loss or a gradient that is not finite, and "
                f"max_skipped is {self.config.max_skipped}: look at the reward, or lower learning_rate, which is "
                f"{self.config.learning_rate:g}"
            )


class AveragedWeights:
    """An exponential moving average of the weights, kept by diffusers' `EMAModel`.

    In each update, average = decay * average + (1 - decay) * weights. It starts at the weights of the start, so that
    there is no bias to correct.

    Args:
        parameters: What is averaged. They are read, and only changed inside `swapped`.
        decay: Part of the old average that stays, between 0 and 1.
        warmup: Whether the decay grows to its value as 1 - (1 + updates)^(-2/3), so that early weights are forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: Share, warmup: bool = False) -> None:
        from diffusers.training_utils import EMAModel

        self._parameters = list(parameters)
        # Without warm-up, EMAModel has a ramp of its own, which its lower bound and this start switch off.
        floor, start = (0.0, 0) if warmup else (decay, -1)
        self._model: Any = EMAModel(
            self._parameters, decay=decay, min_decay=floor, update_after_step=start, use_ema_warmup=warmup
        )

    @property
    def averages(self) -> list[Tensor]:
        """The averages, in the order of the parameters."""
        return self._model.shadow_params

    def update(self) -> None:
        """Moves the averages towards the weights."""
        self._model.step(self._parameters)

    @contextmanager
    def swapped(self) -> Generator[None, None, None]:
        """Puts the averages in place of the weights for as long as the block lasts."""
        self._model.store(self._parameters)
        self._model.copy_to(self._parameters)
        torch.clear_autocast_cache()
        try:
            yield
        finally:
            self._model.restore(self._parameters)
            torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages and how many updates they have seen."""
        return {"averages": self.averages, "updates": self._model.optimization_step}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Takes back what `state_dict` returned."""
        self._model.optimization_step = state["updates"]
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.copy_(saved)


def learning_rate_factor(config: TrainingConfig) -> Callable[[int], float]:
    """Returns what the learning rate of each iteration is multiplied with, as diffusers' `get_scheduler` has it.

    It follows from the iteration alone, so that there is no state to resume.
    """
    if config.schedule == "constant" and not config.warmup_iterations:
        return lambda iteration: 1.0
    from diffusers.optimization import get_scheduler

    # The schedule itself is wanted, not what steps it: that would hold on to an optimizer and count its steps.
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(
        "constant_with_warmup" if config.schedule == "constant" else config.schedule,
        nothing,
        num_warmup_steps=config.warmup_iterations,
        num_training_steps=config.iterations,
    )
    return scheduler.lr_lambdas[0]


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Returns the optimizer that the settings name, over the given parameters.

    Raises:
        ValueError: There is nothing to train, or bitsandbytes does not work here.

    Source of Adafactor: Shazeer and Stern (2018), https://arxiv.org/abs/1804.04235.
    """
    if not parameters:
        raise ValueError("parameters must not be empty: load the policy with lora= or train=, got nothing trainable")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=config.learning_rate,
            betas=config.adam_betas,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer = _adamw8bit(parameters, config)
    _try_one_step(parameters[0].device, config)
    return optimizer


def _adamw8bit(parameters: Sequence[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """Returns bitsandbytes' AdamW8bit; tensors below 4096 elements keep 32-bit moments, as is its default."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"{UNUSABLE}: bitsandbytes does not load ({error})") from error
    return AdamW8bit(
        parameters,
        lr=config.learning_rate,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _try_one_step(device: torch.device, config: TrainingConfig) -> None:
    """Takes one step on a parameter of no importance, so that a missing kernel is found before any work."""
    parameter = nn.Parameter(torch.ones(4096, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        _adamw8bit([parameter], config).step()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"{UNUSABLE}: bitsandbytes has no 8-bit step on {device} ({error})") from error


UNUSABLE = "optimizer must be one that works here, got 'adamw8bit'"
