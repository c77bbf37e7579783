"""Estimate of an erasure's cost, before it starts."""

import time
from typing import NamedTuple

import torch

from overpaint.policy import DiffusionPolicy

from .protocols import TrainedMethod


class Estimate(NamedTuple):
    """What training takes."""

    forward: int  # samples through the UNet without gradient, in all
    backward: int  # samples through it with gradient, in all
    minutes: float  # on this device, from one timed call of each kind
    memory: float  # GiB of GPU memory at the most, as the timed calls had it; 0 on a CPU, where nobody counts

    def __str__(self) -> str:
        """Says it in a line."""
        memory = f", {self.memory:.1f} GiB of GPU memory" if self.memory else ""
        calls = f"{self.forward:,} UNet forwards and {self.backward:,} with gradient"
        return f"{calls}, about {self.minutes:.1f} minutes{memory}"


def estimate(method: TrainedMethod, policy: DiffusionPolicy, train: str = "full") -> Estimate:
    """Times one forward and one forward with gradient of the method's batch, and multiplies.

    Args:
        method: What is going to train.
        policy: With what.
        train: A parameter set to take gradients for; that of all weights costs the most, by less than half.
    """
    descent, calls = method.config.descent, method.unet_calls()
    student = policy.student_copy(train)
    latents = torch.zeros(descent.batch_size, *student.latent_shape(), device=policy.device)
    timesteps = torch.full((descent.batch_size,), 500, device=policy.device)
    conditioning = policy.encode([""] * descent.batch_size)
    cuda = policy.device.type == "cuda"

    def timed(*, gradient: bool) -> float:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.set_grad_enabled(gradient):
            loss = student.predict_direction(latents, timesteps, conditioning).square().mean()
            if gradient:
                loss.backward()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = {gradient: min(timed(gradient=gradient) for _ in range(2)) for gradient in (False, True)}
    total = descent.iterations * (calls.forward * seconds[False] + calls.backward * seconds[True])
    samples = descent.iterations * descent.batch_size
    return Estimate(
        forward=round(samples * calls.forward),
        backward=round(samples * calls.backward),
        minutes=total / 60,
        memory=torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    )
