"""Rounds made by hand: the model calls of DDPO's and DiffusionNFT's alone, and the loop of the DDPO authors' code."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle, islice
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.timing import IdleOptimizer, call_unet, unet_inputs
from ddpo import DDPOConfig, NFTConfig, PromptStatistics, clipped_surrogate
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Plan, PredictionType, Trajectory
from overpaint.policy.autoencoder import CHUNK
from overpaint.policy.ddim import ddim_mean_and_std, gaussian_log_prob, schedule
from overpaint.policy.types import PerSample
from rewards import Reward

Autocast = Callable[[], AbstractContextManager[Any]]
"""Returns the block in which networks compute in the run's precision."""


class UpdateCalls(NamedTuple):
    """What an update calls the network for."""

    steps: int
    """Of each sample that are trained on."""
    guided: bool
    """Whether guidance is trained too, which calls for both branches."""
    undifferentiated: int
    """Calls without gradient beside each that has one."""


def update_calls(config: DDPOConfig | NFTConfig, policy: DiffusionPolicy) -> UpdateCalls:
    """Returns the calls of an update: DDPO's ratio needs the trained prediction, NFT's loss the old policy's too."""
    if isinstance(config, NFTConfig):
        return UpdateCalls(config.levels_per_sample, guided=False, undifferentiated=1 + (config.kl_weight > 0))
    steps = len(policy.process.trained_steps(config.steps, config.eta))
    return UpdateCalls(config.trained_of(steps), guided=config.guidance_scale != 1, undifferentiated=0)


class BareRound:
    """The model calls of a round, and nothing else.

    The arithmetic between the calls is left out, and so is everything random: what a call reads is the same each time.
    Left out too is what DDPO's trainer calls only to measure the divergence from the reference policy. The optimizer's
    step size is zero, so that the weights stay.

    Args:
        policy: Its networks are called.
        reward: Scores the images.
        prompts: What images are drawn for; the calls take them in turn.
        config: Shapes.
        autocast: Precision of the networks.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: Reward,
        prompts: Sequence[str],
        config: DDPOConfig | NFTConfig,
        autocast: Autocast,
    ) -> None:
        self.policy = policy
        self.reward = reward
        self.config = config
        self.autocast = autocast
        self.timesteps = policy.plan(config.steps, config.height, config.width).timesteps.tolist()
        self.update_calls = calls = update_calls(config, policy)
        drawn = config.sampling_batch_size
        self.prompts = list(islice(cycle(prompts), drawn))
        self.drawn = self._inputs(drawn, guided=config.guidance_scale != 1)
        height, width = (side or policy.image_size for side in (config.height, config.width))
        self.images = torch.rand(drawn, 3, height, width, device=policy.device)
        self.trained = self._inputs(config.minibatch_size, guided=calls.guided)
        self.optimizer = IdleOptimizer(policy.trainable_parameters())

    def __call__(self) -> None:
        """Runs the calls once."""
        cfg, vae = self.config, self.policy.vae
        for _ in range(cfg.samples_per_round // cfg.sampling_batch_size):
            with torch.no_grad():
                with self.autocast():
                    for timestep in self.timesteps:
                        call_unet(self.policy, timestep, *self.drawn)
                    for part in self.drawn[0][: cfg.sampling_batch_size].split(CHUNK):
                        scaled = part / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0)
                        vae.decode(scaled.to(vae.dtype), return_dict=False)
                self.reward(self.images, self.prompts)
        pairs = cfg.samples_per_round // cfg.updates_per_round * self.update_calls.steps
        for _ in range(cfg.updates_per_round):
            for index in range(pairs // cfg.minibatch_size):
                timestep = self.timesteps[index % cfg.steps]
                with self.autocast():
                    with torch.no_grad():
                        for _ in range(self.update_calls.undifferentiated):
                            call_unet(self.policy, timestep, *self.trained)
                    prediction = call_unet(self.policy, timestep, *self.trained)
                prediction.float().square().mean().backward()
            self.optimizer.step()

    def _inputs(self, count: int, *, guided: bool) -> tuple[Tensor, Conditioning]:
        """Returns latents and embeddings for a call on that many samples, with both branches where it is guided."""
        policy, prompts = self.policy, list(islice(cycle(self.prompts), count))
        branches = guided and isinstance(policy.family.guided(ClassifierFree(2.0)), ClassifierFree)
        empty = [""] * count if branches else []
        return unet_inputs(policy, empty + prompts, self.config.height)


class PlainRound:
    """A round as the authors' code goes about it, which trains on one step of one small batch at a time.

    Drawing is the trainer's own, in batches of the same size; so are decoding, the reward and the advantages. In the
    update each small batch looks its embeddings up, and goes through its steps one after the other, gradients added up
    over steps and batches. The optimizer's step size is zero.
    Source of the structure: kvablack/ddpo-pytorch, `scripts/train.py`, where the small batch is `train.batch_size`.

    Args:
        policy: What is trained.
        reward: Scores the images.
        prompts: What images are drawn for, with repetition.
        config: The trainer's settings. The size of its minibatches is not used.
        autocast: Precision of the networks.
        batch_size: Samples of a small batch.

    Raises:
        ValueError: The small batch does not divide the samples of an update.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: Reward,
        prompts: Sequence[str],
        config: DDPOConfig,
        autocast: Autocast,
        *,
        batch_size: int,
    ) -> None:
        samples = config.samples_per_round // config.updates_per_round
        if samples % batch_size:
            raise ValueError(f"batch_size must divide the {samples} samples of an update, got {batch_size}")
        self.policy = policy
        self.reward = reward
        self.prompts = prompts
        self.config = config
        self.autocast = autocast
        self.batch_size = batch_size
        plan = schedule(policy.scheduler_config, config.steps)
        self.schedule = Plan(*(part.to(policy.device) for part in plan))
        self.statistics = PromptStatistics(config.buffer_size, config.min_count)
        self.generator = torch.Generator().manual_seed(0)
        self.optimizer = IdleOptimizer(policy.trainable_parameters())

    def __call__(self) -> None:
        """Does one round."""
        cfg = self.config
        count = cfg.samples_per_round
        picks = torch.randint(len(self.prompts), (count,), generator=self.generator).tolist()
        seeds = torch.randint(2**31 - 1, (count,), generator=self.generator).tolist()
        prompts = [self.prompts[pick] for pick in picks]
        size = cfg.sampling_batch_size
        parts = [slice(first, first + size) for first in range(0, count, size)]
        batches, rewards = zip(*(self._sample(prompts[part], seeds[part]) for part in parts), strict=True)
        advantages = self.statistics.advantages(torch.cat(rewards), prompts)
        advantages = advantages.clamp(-cfg.max_advantage, cfg.max_advantage).to(self.policy.device, torch.float32)
        latents = torch.cat([batch.latents for batch in batches])
        log_probs = torch.cat([batch.log_probs for batch in batches])
        size = count // cfg.updates_per_round
        for first in range(0, count, size):
            part = slice(first, first + size)
            self.backward(prompts[part], latents[part], log_probs[part], advantages[part])
            self.optimizer.step()

    def backward(
        self,
        prompts: Sequence[str],
        latents: Float[Tensor, "samples states 4 h w"],
        log_probs: Float[Tensor, "samples steps"],
        advantages: PerSample,
    ) -> None:
        """Adds up the gradient of an update, the mean over its samples and all their steps, drawn with `log_probs`."""
        size, steps = self.batch_size, self.config.steps
        share = size / len(prompts) / steps
        for first in range(0, len(prompts), size):
            part = slice(first, first + size)
            embeddings = self.policy.encode([""] * size + list(prompts[part])).tokens.to(self.policy.dtype)
            for step in range(steps):
                present = self._log_probs(latents[part, step], latents[part, step + 1], embeddings, step)
                losses = clipped_surrogate(
                    present, log_probs[part, step], advantages[part], clip_range=self.config.clip_range
                )
                (losses.mean() * share).backward()

    def _log_probs(self, before: Tensor, after: Tensor, embeddings: Tensor, step: int) -> PerSample:
        """Returns the log-probabilities under the present weights of what one step did to a small batch."""
        cfg, policy, count = self.config, self.policy, len(before)
        timestep, alpha, previous = (part[step] for part in self.schedule)
        with self.autocast():
            output = policy.network(
                torch.cat([before, before]).to(policy.dtype),
                timestep.expand(2 * count),
                encoder_hidden_states=embeddings,
                return_dict=False,
            )[0]
        away, towards = output.float().chunk(2)
        mean, std = ddim_mean_and_std(
            before,
            away + cfg.guidance_scale * (towards - away),
            alpha.expand(count),
            previous.expand(count),
            eta=cfg.eta,
            prediction_type=cast(PredictionType, policy.process.prediction_type),
        )
        return gaussian_log_prob(after, mean, std)

    @torch.no_grad()
    def _sample(self, prompts: list[str], seeds: list[int]) -> tuple[Trajectory, PerSample]:
        """Draws a batch and scores it; the scores are on the CPU."""
        cfg, policy = self.config, self.policy
        guidance = ClassifierFree(cfg.guidance_scale)
        with self.autocast():
            conditioning = policy.encode(prompts)
            trajectory = policy.rollout(conditioning, steps=cfg.steps, guidance=guidance, eta=cfg.eta, seeds=seeds)
            images = policy.decode(trajectory.latents[:, -1])
        return trajectory, self.reward(images, prompts).float().cpu()
