"""From prompts to images whose gradient reaches the policy through the last denoising steps only."""

from collections.abc import Callable, Sequence

import torch
from torch.utils.checkpoint import checkpoint

from erasure.protocols import UNetCalls
from overpaint.policy import ClassifierFree, DiffusionPolicy, SampleNoise
from overpaint.policy.types import Images, Latents
from overpaint.settings import Index, Seed

from .config import ReFLConfig


def one_step_images(
    policy: DiffusionPolicy, prompts: Sequence[str], seeds: Sequence[Seed], config: ReFLConfig, *, reward_step: Index
) -> Images:
    """Draws images as steps 2 and 3 of an iteration do: without gradient to a late step, then one shot with it.

    All noise of an image follows from its own seed, in the order in which a rollout draws it: how many of the steps
    carry gradient does not change the image.

    Args:
        policy: What draws.
        prompts: One for each image.
        seeds: One for each image.
        config: Settings.
        reward_step: Step whose one-shot prediction is decoded, counted from noise.

    Returns:
        Images in [0, 1]; `low_variance_noises` for each prompt, prompt by prompt, where that is on.

    Source: Algorithm 1 of Xu et al. (2023), https://arxiv.org/abs/2304.05977. With `truncation_steps` above 1 the steps
    before the reward step carry gradient too.
    """
    guidance = ClassifierFree(config.guidance_scale)
    conditioning = policy.encode(prompts)
    repeats = config.low_variance_noises
    first = reward_step - config.truncation_steps + 1
    until = config.steps if repeats else first
    latents = policy.sample(
        conditioning,
        steps=config.steps,
        guidance=guidance,
        eta=config.eta,
        seeds=seeds,
        until=until,
        height=config.height,
        width=config.width,
    )
    if repeats:
        noise = _noise_after(1 + until if config.eta > 0 else 1, seeds, latents)
        timesteps = policy.plan(config.steps, config.height, config.width).timesteps[reward_step].expand(len(latents))
        noised = [policy.add_noise(latents, noise.draw(), timesteps) for _ in range(repeats)]
        latents = torch.stack(noised, dim=1).flatten(0, 1)
        conditioning = conditioning.repeat_interleave(repeats)
    elif first < reward_step:
        noise = _noise_after(1 + until, seeds, latents) if config.eta > 0 else None
        for step in range(first, reward_step):
            drawn = None if noise is None else noise.draw()

            def denoise(state: Latents, step: int = step, drawn: Latents | None = drawn) -> Latents:
                return policy.denoise(
                    state, conditioning, step=step, steps=config.steps, guidance=guidance, eta=config.eta, noise=drawn
                )

            latents = _stored_or_recomputed(denoise, latents, recompute=config.checkpoint_steps)

    def predict(state: Latents) -> Latents:
        return policy.predict_clean(state, conditioning, step=reward_step, steps=config.steps, guidance=guidance)

    return policy.decode(_stored_or_recomputed(predict, latents, recompute=config.checkpoint_steps))


def image_calls(config: ReFLConfig) -> UNetCalls:
    """Returns how many samples go through the UNet for a prompt of `one_step_images`, on average over reward steps.

    A sampling guard adds its own branches.
    """
    branches, repeats = ClassifierFree(config.guidance_scale).num_branches, config.low_variance_noises
    reward_step = (config.first_reward_step + config.last_reward_step) / 2
    forward = config.steps if repeats else reward_step - config.truncation_steps + 1
    return UNetCalls(branches * forward, branches * config.truncation_steps * max(1, repeats))


def _noise_after(draws: int, seeds: Sequence[int], latents: Latents) -> SampleNoise:
    """Returns the noises of the samples, without the first draws, which the rollout has used."""
    noise = SampleNoise(seeds, latents.shape[1:], latents.device)
    for _ in range(draws):
        noise.draw()
    return noise


def _stored_or_recomputed(step: Callable[[Latents], Latents], latents: Latents, *, recompute: bool) -> Latents:
    """Runs a step and keeps its activations, or throws them away and computes them again in the backward pass."""
    if not recompute:
        return step(latents)
    return checkpoint(step, latents, use_reentrant=False, preserve_rng_state=False)  # nothing random inside
