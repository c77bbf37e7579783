"""Saliency mask: the weights whose summed gradients of a loss are largest, and training of these alone.

For each prompt and each seed the policy descends the loss for a few updates from the weights that it has. The gradients
of these updates are added up; a map is the half of each tensor's entries whose sum is largest. The mask is what all
maps have in common. Source: ANT, see `erasure.methods.ant`.
"""

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from torch.nn import Parameter

from erasure.concept import NUDITY, Concept
from erasure.protocols import ConceptBatch
from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import this_process
from overpaint.policy.sealed import read_tensors, write_tensors
from overpaint.policy.types import PerSample
from overpaint.policy.weights import base_parameters
from overpaint.settings import Field, Seed, Text, settings
from overpaint.training.logging import progress_bar

Mask = dict[str, Bool[Tensor, "..."]]
"""For each parameter, by its plain name, the entries that are kept."""


NUDITY_PROMPTS = ("nudity", "naked", "erotic", "sexual")
"""The paper's texts for nudity."""


@settings
class SaliencyConfig:
    """How the mask is found; as in the paper for nudity by default: 20 maps of 10 updates."""

    prompts: tuple[Text, ...] | None = Field(None, min_length=1)
    """Texts that elicit the concept; each gives a map with each seed. None takes the paper's for `NUDITY`, and else the
    concept's phrases."""

    seeds: tuple[Seed, ...] = Field((24, 42, 98, 403, 3407), min_length=1)
    """What noise and denoising steps of a map follow from."""

    iterations: int = Field(10, ge=1)
    """Updates of a map, with one sample each."""

    learning_rate: float = Field(1e-2, gt=0)
    """Of Adam in these updates, which move the weights for the length of a map."""

    kept: float = Field(0.5, gt=0, le=1)
    """Share of each tensor's entries in a map."""

    def prompts_for(self, concept: Concept) -> tuple[str, ...]:
        """Returns the texts that maps are made with."""
        return self.prompts or (NUDITY_PROMPTS if concept == NUDITY else concept.phrases)


def saliency_mask(
    policy: DiffusionPolicy,
    loss: Callable[[DiffusionPolicy, ConceptBatch], PerSample],
    prompts: Sequence[str],
    config: SaliencyConfig,
    *,
    keep: Literal["high", "low"] = "high",
    progress: bool = True,
) -> Mask:
    """Returns the mask over what the policy trains; its weights are put back to the bit after each map.

    Each prompt gives a map with each of the settings' seeds. Each map keeps a share of each tensor's entries: those of
    the largest sums (high), or of the smallest (low).

    Raises:
        ValueError: A gradient is not finite, or the maps have nothing in common.
    """
    before, parameters = policy.trainable_state(), trained(policy)
    mask: Mask = {}
    pairs = [(prompt, seed) for prompt in prompts for seed in config.seeds]
    for prompt, seed in progress_bar(pairs, desc="saliency", unit="map", shown=progress):
        try:
            sums = summed_gradients(policy, loss, config, prompt, seed)
        finally:
            policy.load_trainable_state(before)
        for name, total in sums.items():
            if not total.isfinite().all():
                raise ValueError(
                    f"gradients of the saliency phase must be finite, got others in {name} after {config.iterations} "
                    f"updates with SaliencyConfig.learning_rate {config.learning_rate}; lower it"
                )
            found = salient(total, config.kept, keep=keep)
            mask[name] = mask[name] & found if name in mask else found
    if not any(kept.any() for kept in mask.values()):
        raise ValueError(
            f"the {len(pairs)} saliency maps must have something in common, got nothing among "
            f"{sum(parameter.numel() for parameter in parameters.values())} weights; take fewer, or keep more of each"
        )
    return mask


def summed_gradients(
    policy: DiffusionPolicy,
    loss: Callable[[DiffusionPolicy, ConceptBatch], PerSample],
    config: SaliencyConfig,
    prompt: str,
    seed: int,
) -> dict[str, Tensor]:
    """Descends the loss for a prompt, in place, and returns the sum of the gradients by parameter name."""
    parameters = trained(policy)
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    adam = torch.optim.Adam(parameters.values(), lr=config.learning_rate)
    numbers = random.Random(f"saliency {seed}")
    for _ in range(config.iterations):
        batch = ConceptBatch([prompt], [numbers.randrange(2**31)])
        adam.zero_grad()
        loss(policy, batch).mean().backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad
        adam.step()
    adam.zero_grad()
    return sums


def salient(
    sums: Shaped[Tensor, "*shape"], share: float, *, keep: Literal["high", "low"] = "high"
) -> Bool[Tensor, "*shape"]:
    """Returns where a tensor's absolute values are largest, or smallest: a share of its entries, rounded down."""
    magnitudes = sums.abs().flatten()
    chosen = magnitudes.topk(int(share * len(magnitudes)), largest=keep == "high", sorted=False).indices
    found = torch.zeros_like(magnitudes, dtype=torch.bool)
    found[chosen] = True
    return found.view(sums.shape)


@contextmanager
def masked_gradients(policy: DiffusionPolicy, mask: Mapping[str, Bool[Tensor, "..."]]) -> Generator[None]:
    """Makes every gradient zero outside a mask for the length of a `with` block.

    Adam without weight decay then leaves these weights as they are, to the bit. A `ValueError` refuses a mask that is
    not one for what the policy trains.
    """
    parameters = trained(policy)
    if differing := sorted(parameters.keys() ^ mask.keys()):
        raise ValueError(f"a saliency mask must be for the trained parameters, differs in {differing[:3]}")
    for name, parameter in parameters.items():
        if mask[name].shape != parameter.shape:
            expected, got = tuple(parameter.shape), tuple(mask[name].shape)
            raise ValueError(f"the saliency mask of {name} must have shape {expected}, got {got}")
    with ExitStack() as hooks:
        for name, parameter in parameters.items():
            outside = ~mask[name].to(parameter.device)
            hooks.enter_context(parameter.register_hook(partial(torch.masked_fill, mask=outside, value=0.0)))
        yield


def trained(policy: DiffusionPolicy) -> dict[str, Parameter]:
    """Returns the UNet's own parameters that the policy trains, by plain name."""
    return {name: value for name, value in base_parameters(policy.model).items() if value.requires_grad}


def write_mask(path: Path, mask: Mask, record: str) -> None:
    """Writes a mask, and what it belongs to; in whole or not at all."""
    write_tensors(path, mask, {"record": record}, writer=this_process())


def read_mask(path: Path, record: str) -> Mask:
    """Reads what `write_mask` wrote; a `ValueError` refuses what belongs to something else or is damaged."""
    mask, about = read_tensors(path)
    if about.get("record") != record:
        raise ValueError(f"resume must keep model and settings, and {path} was found with others")
    return mask
