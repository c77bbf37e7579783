"""Fisher information: how much each weight matters for pictures that must stay as they are.

Source: Heng and Soh (2023), https://arxiv.org/abs/2305.10120, after elastic weight consolidation (Kirkpatrick et al.
2017, https://arxiv.org/abs/1612.00796). For each picture the denoising losses of all timesteps are summed, the gradient
of the sum is squared, and the squares are averaged over the pictures. How it is estimated from a few timesteps is ours:
see `FisherConfig.timesteps` and docs/methods/sa.md.
"""

import math
import random
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from erasure.cache import claim
from erasure.erased import as_json
from erasure.rollout import squared_error
from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.policy.atomic import this_process
from overpaint.policy.digest import scheduler_settings, tensors_hash
from overpaint.policy.noise import draw_noise
from overpaint.policy.sealed import DamagedFileError, read_tensors, write_tensors
from overpaint.policy.types import Latents
from overpaint.policy.weights import base_parameters, lora_layers, lora_updates
from overpaint.settings import Field, settings
from overpaint.training.logging import progress_bar

SAVE_EVERY = 25
"""Pictures between two saves; what an interruption can cost."""

TENSOR_FILE = "fisher.safetensors"
RECORD_FILE = "fisher.json"
RECORD_FORMAT = "overpaint.Fisher/3"


@settings
class FisherConfig:
    """How Fisher information is computed; as the authors did by default, which takes 5 million gradients."""

    images: int = Field(5000, ge=1)
    """Pictures that the squares are averaged over."""

    timesteps: int | None = Field(None, ge=2)
    """Timesteps of each picture: None sums over all N of training, 1000 for Stable Diffusion. A number n takes n of
    them at random, and what it gives is on the scale of all N, so that a penalty's weight means the same. The gradient
    of the sum is estimated as N/n times that of the n; its square is too large by the variance of that. So the squares
    tell the weights of a tensor from each other, and the tensor's total is corrected by what differs between parts of
    the n."""

    chunk: int = Field(50, ge=1)
    """Most timesteps that go through the UNet at a time."""


class Sums(NamedTuple):
    """What is added up over pictures."""

    squares: dict[str, Tensor]  # of each weight: squared gradients, scaled to all timesteps
    plain: Float[Tensor, " tensors"]  # of each tensor: the sum of its squares
    unbiased: Float[Tensor, " tensors"]  # the same, less what the draw of the timesteps adds on average

    @classmethod
    def zeros(cls, weights: Mapping[str, Tensor]) -> "Sums":
        """Returns the sums over no picture."""
        squares = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in weights.items()}
        scalars = (torch.zeros(len(weights), dtype=torch.float64) for _ in range(2))
        return cls(squares, *scalars)

    def add(self, weights: Sequence[Tensor], losses: Generator[Float[Tensor, " part"]], of: int) -> None:
        """Adds a picture, of which `losses` are those of some of `of` timesteps, part by part, with gradient.

        Weights are in the order of the sums; there are at least two parts unless all timesteps are there.
        """
        totals = [torch.zeros_like(value) for value in self.squares.values()]
        between = torch.zeros_like(self.plain)
        parts = taken = 0
        for part in losses:
            gradients = torch.autograd.grad(part, weights, torch.ones_like(part), materialize_grads=True)
            for total, gradient in zip(totals, gradients, strict=True):
                total += gradient
            between += norms(gradients) / len(part)
            taken, parts = taken + len(part), parts + 1
        for square, total in zip(self.squares.values(), totals, strict=True):
            square += (of / taken * total).square()
        plain = norms(totals)
        for sums in (self.plain, self.unbiased):
            sums.add_(plain * (of / taken) ** 2)
        if taken < of:
            # Sampling without replacement: the mean of n has variance s² (1/n - 1/N), and s² is estimated from what
            # differs between random parts of the n.
            variance = (between - plain / taken) / (parts - 1)
            self.unbiased.sub_(of**2 * variance * (1 / taken - 1 / of))

    def information(self, images: int, share: float) -> dict[str, Tensor]:
        """Returns the means over the images that were added, each tensor's scaled to its unbiased total.

        Share is that of the timesteps that were taken. The correction lies between it, where gradients of different
        timesteps have nothing in common, and 1, where they are the same.
        """
        factors = (self.unbiased / self.plain).nan_to_num(1.0).clamp(share, 1.0).tolist()
        pairs = zip(self.squares.items(), factors, strict=True)
        return {name: square * (factor / images) for (name, square), factor in pairs}


def fisher_information(
    policy: DiffusionPolicy,
    latents: Latents,
    prompts: Sequence[str],
    config: FisherConfig,
    *,
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Returns the diagonal of the Fisher information of a policy's reference, on the policy's device.

    It is over `watched_weights`, and takes the memory of two more copies of these while it is computed, of one when it
    is done. Under several processes each computes all of it: let one of them fill the folder first.

    Args:
        policy: What trains; the weights are as training began.
        latents: Clean latents of pictures that must stay as they are.
        prompts: What each shows.
        config: How; `images` is not read.
        seed: Of noise and timesteps.
        folder: Keeps it, unfinished too; None keeps nothing.
        progress: Whether a progress bar is shown.

    Raises:
        ValueError: There are fewer timesteps than asked for, as many prompts as latents there are not, or the folder
            holds other information.
    """
    count, of = len(latents), policy.num_timesteps
    taken = of if config.timesteps is None else config.timesteps
    if taken > of:
        raise ValueError(f"FisherConfig.timesteps must be at most the {of} of training, got {taken}")
    if len(prompts) != count:
        raise ValueError(f"prompts must be one for each of {count} latents, got {len(prompts)}")
    weights = watched_weights(policy)
    watched, sums, done = list(weights.values()), Sums.zeros(weights), 0
    if folder is not None:
        claim(folder / RECORD_FILE, _record(policy, latents, prompts, config, seed), "Fisher information")
        sums, done = _read(folder, sums)
    parts = max(math.ceil(taken / config.chunk), 1 if taken == of else 2)
    with (
        at_reference(policy, watched),
        progress_bar(total=count, initial=done, desc="Fisher information", unit="picture", shown=progress) as bar,
    ):
        for index in range(done, count):
            choice = random.Random(f"Fisher {index} of {seed}")
            timesteps = torch.tensor(choice.sample(range(of), taken))
            noise = torch.Generator().manual_seed(choice.randrange(2**31))
            clean = latents[index : index + 1].to(policy.device)
            prompt = policy.encode(prompts[index : index + 1])
            sums.add(watched, _losses(policy, clean, prompt, timesteps.tensor_split(parts), noise), of)
            if folder is not None and ((index + 1) % SAVE_EVERY == 0 or index + 1 == count):
                _write(folder, sums, index + 1)
            bar.update()
    return sums.information(count, taken / of)


def _losses(
    policy: DiffusionPolicy,
    clean: Latents,
    prompt: Conditioning,
    parts: Sequence[Int[Tensor, " part"]],
    generator: torch.Generator,
) -> Generator[Float[Tensor, " part"]]:
    """Yields the losses of one picture's timesteps, part by part, each timestep with a noise of its own."""
    for part in parts:
        noise = draw_noise([generator] * len(part), clean.shape[1:], clean.device)
        yield noise_errors(policy, clean.expand_as(noise), noise, part.to(clean.device), prompt.expand(len(part)))


def noise_errors(
    policy: DiffusionPolicy,
    clean: Latents,
    noise: Latents,
    timesteps: Shaped[Tensor, " batch"],
    conditioning: Conditioning,
) -> Float[Tensor, " batch"]:
    """Returns the mean of (ε - ε(x_t, t, c))² over the elements of each sample, in squared units of the noise."""
    return squared_error(
        policy.predict_direction(policy.add_noise(clean, noise, timesteps), timesteps, conditioning),
        policy.direction(clean, noise),
    )


def norms(tensors: Sequence[Tensor]) -> Float[Tensor, " tensors"]:
    """Returns the squared norm of each tensor, in float64 on the CPU."""
    return torch.stack([tensor.float().square().sum(dtype=torch.float64) for tensor in tensors]).cpu()


def watched_weights(policy: DiffusionPolicy) -> dict[str, nn.Parameter]:
    """Returns the weights whose change is penalised, by name: those that train, or the UNet's own beneath a LoRA."""
    if policy.lora is None:
        return dict(zip(policy.trainable_state(), policy.trainable_parameters(), strict=True))
    own = base_parameters(policy.model)
    return {f"{name}.weight": own[f"{name}.weight"] for name in lora_layers(policy.model)}


def start_of(policy: DiffusionPolicy) -> dict[str, Tensor]:
    """Returns the watched weights as training began; none with a LoRA, whose change starts at zero."""
    if policy.lora is not None:
        return {}
    with policy.reference():
        return {name: value.data for name, value in watched_weights(policy).items()}


def changes(policy: DiffusionPolicy, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns by how much each watched weight has changed since `start_of`, with gradient to what trains."""
    if policy.lora is None:
        return {name: value - start[name] for name, value in watched_weights(policy).items()}
    with torch.autocast(policy.device.type, enabled=False):
        return dict(lora_updates(policy.model))


@contextmanager
def at_reference(policy: DiffusionPolicy, weights: Sequence[nn.Parameter]) -> Generator[None]:
    """Puts the reference in place and lets the weights have gradients."""
    before = [weight.requires_grad for weight in weights]
    with policy.reference():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                yield
        finally:
            for weight, had in zip(weights, before, strict=True):
                weight.requires_grad_(had)


def _record(
    policy: DiffusionPolicy, latents: Latents, prompts: Sequence[str], config: FisherConfig, seed: int
) -> dict[str, Any]:
    """Returns what the information is of: the model and how it is asked, what is watched, pictures, and settings."""
    with policy.reference():
        values = dict(base_parameters(policy.model)) | watched_weights(policy)
        model = tensors_hash(values)
    return {
        "format": RECORD_FORMAT,
        "model": model,
        "max_sequence_length": policy.family.max_sequence_length,
        "scheduler": as_json(scheduler_settings(policy.scheduler)),
        "weights": sorted(watched_weights(policy)),
        "pictures": tensors_hash({"latents": latents}),
        "prompts": list(prompts),
        "timesteps": config.timesteps,
        "chunk": config.chunk,
        "seed": seed,
    }


def _write(folder: Path, sums: Sums, done: int) -> None:
    """Writes the sums over the pictures done so far, all at once or not at all."""
    tensors = {f"squares/{name}": value.cpu() for name, value in sums.squares.items()}
    tensors |= {"plain": sums.plain, "unbiased": sums.unbiased, "done": torch.tensor(done)}
    write_tensors(folder / TENSOR_FILE, tensors, writer=this_process())


def _read(folder: Path, sums: Sums) -> tuple[Sums, int]:
    """Returns what `_write` wrote and how many pictures are in it; the given sums and 0 where it wrote nothing.

    What is damaged counts as not written, with a warning.
    """
    path = folder / TENSOR_FILE
    if not path.is_file():
        return sums, 0
    try:
        there, _ = read_tensors(path)
    except DamagedFileError as error:
        warnings.warn(f"{error}; the Fisher information is computed anew", RuntimeWarning, stacklevel=2)
        return sums, 0
    squares = {name: there[f"squares/{name}"].to(value.device) for name, value in sums.squares.items()}
    return Sums(squares, there["plain"], there["unbiased"]), int(there["done"])
