"""From losses to updates: gradients, clipping, the optimizer's step, and what to do when a number is not finite."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import TrainingConfig
from .ema import ExponentialMovingAverage
from .optimizer import make_optimizer

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or a gradient that was not finite."""


class Descent:
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
        self.ema = ExponentialMovingAverage(parameters, config.ema_decay) if config.ema_decay is not None else None
        self._accelerator = accelerator
        self._network = network
        self._parameters = parameters
        self._optimizer = accelerator.prepare(make_optimizer(parameters, config))
        self._skipped_in_a_row = 0
        self._forget_backward()

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
        self._optimizer.zero_grad(set_to_none=True)
        self._forget_backward()
        if skip:
            self._count_skipped()
        else:
            self._skipped_in_a_row = 0
            if self.ema is not None:
                self.ema.update()
        return grad_norm

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
