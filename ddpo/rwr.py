"""Reward-weighted regression: the pretraining loss on the policy's own images, the better ones weighing more.

The baseline of Black et al. (2023), https://arxiv.org/abs/2305.13301, section 4.2, after Lee et al. (2023),
https://arxiv.org/abs/2302.12192. It maximises a bound of the likelihood of good images and ignores the steps that led
to them, which is what DDPO is compared with. See docs/rwr.md for each departure from the authors' code.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy
from overpaint.policy.prompts import check_prompts
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import AnyFloat, Count, Field, Index, settings
from overpaint.training import (
    EarlyStopping,
    HeldOut,
    TrainingConfig,
    TrainingRun,
    check_trainable,
    evaluate_held_out,
    train,
)
from overpaint.training.loop import check_batches, check_image_size
from rewards import RewardLike, as_reward

from .collect import Collector, drawing_ends, requested_again_on_failure, tagged
from .requests import draw_requests
from .scoring import ScoringConfig
from .weighting import softmax_weights, sparse_weights


@settings
class RWRConfig:
    """What reward-weighted regression does in a round; by default the authors' settings.

    Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, and jannerm/ddpo, `config/base.py`.
    """

    weighting: Literal["softmax", "sparse"] = "softmax"
    """Weights of samples: softmax of their rewards (RWR), or 1 for the best and 0 for the others (RWR-sparse)."""

    samples_per_round: int = Field(10_240, ge=1)
    """Images that are drawn and scored in a round, over all processes."""

    sampling_batch_size: int = Field(8, ge=1)
    """Images that a process draws at a time."""

    epochs_per_round: int = Field(5, ge=1)
    """Passes over the samples of weight above zero. The authors' RWR-sparse makes 50."""

    batch_size: int = Field(64, ge=1)
    """Samples of an update, over all processes."""

    minibatch_size: int = Field(8, ge=1)
    """Samples that go through the UNet at a time in an update."""

    steps: int = Field(50, ge=1)
    """Denoising steps of an image."""

    height: int | None = Field(None, ge=1)
    """As in `DDPOConfig`, with the next one."""

    width: int | None = Field(None, ge=1)
    """Width of the images."""

    guidance_scale: float = Field(5.0, ge=0)
    """Classifier-free guidance, in sampling and in the regression alike."""

    eta: float = Field(1.0, ge=0, le=1)
    """Noise of the sampling in [0, 1]."""

    inverse_temperature: float = Field(0.2, ge=0)
    """Factor of rewards in the softmax, per unit of reward. It has to suit the reward's scale."""

    per_prompt: bool = False
    """Whether the softmax is taken among the samples of each prompt; the authors do so for aesthetics."""

    percentile: float = Field(90.0, ge=0, lt=100)
    """Rewards at or above this percentile of the round have weight 1 in RWR-sparse."""

    evaluate_every: int = Field(1, ge=1)
    """Rounds between two evaluations of the held-out prompts, if there are any."""

    patience: int = Field(0, ge=0)
    """As in `DDPOConfig`."""


class RWRMetrics(NamedTuple):
    """What one round measured, over all processes."""

    reward: AnyFloat
    reward_std: AnyFloat
    loss: AnyFloat
    """Mean weighted loss of the round's updates."""
    grad_norm: AnyFloat
    effective_samples: AnyFloat
    """Samples that count: the squared sum of the weights over the sum of their squares."""
    updates: Index
    retries: AnyFloat
    seconds_sampling: AnyFloat
    seconds_reward: AnyFloat
    seconds_update: AnyFloat


class RWRTrainer:
    """Tunes a policy by regression on its own images, weighted by their rewards.

    An iteration of the run is a round: samples are drawn and scored, and trained on for some epochs. Arguments and
    errors are those of `DDPOTrainer`, but there is no erasure constraint.
    """

    name: str = "RWR"

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: RewardLike,
        prompts: Sequence[str],
        config: RWRConfig | None = None,
        *,
        held_out: HeldOut | None = None,
        scoring: ScoringConfig | None = None,
    ) -> None:
        check_trainable(policy)
        self.policy = policy
        self.reward = reward = as_reward(reward)
        self.prompts = check_prompts(prompts)
        self.config = cfg = config or RWRConfig()
        self.early_stopping = EarlyStopping.of(cfg, held_out)
        self.guidance = ClassifierFree(cfg.guidance_scale)
        check_image_size(self)
        draw = drawing_ends(policy, cfg, self.guidance)
        self.collector = Collector(policy, draw, reward, None, batch_size=cfg.sampling_batch_size, scoring=scoring)

    def train(self, run_config: TrainingConfig, *, notes: Mapping[str, Any] | None = None) -> RWRMetrics | None:
        """Trains, or goes on with an interrupted run; as `DDPOTrainer.train`."""
        return train(self, run_config, state={}, configs={"rwr": self.config}, notes=notes)

    def prepare(self, run: TrainingRun) -> None:
        """Checks what only a run can tell.

        Raises:
            ValueError: Samples or batches do not divide evenly among the processes.
        """
        cfg = self.config
        check_batches(run, "RWRConfig.", {"samples_per_round": cfg.samples_per_round, "batch_size": cfg.batch_size})

    def step(self, run: TrainingRun) -> RWRMetrics:
        """Does one round: draws and scores samples, weighs them, and takes its updates."""
        cfg = self.config
        with requested_again_on_failure(run):
            request = draw_requests(run, self.prompts, cfg.samples_per_round)
            scored = self.collector.collect(run, [request])
        rewards = request.gathered(run, scored.rewards)
        clean = run.gather(scored.trajectory.latents[:, -1])
        if cfg.weighting == "softmax":
            groups = request.prompts if cfg.per_prompt else None
            weights = softmax_weights(rewards, inverse_temperature=cfg.inverse_temperature, prompts=groups)
        else:
            weights = sparse_weights(rewards, percentile=cfg.percentile)

        start = time.perf_counter()
        weighted = weights.nonzero().flatten()
        count = max(1, round(cfg.epochs_per_round * len(weighted) / cfg.batch_size))
        epochs = math.ceil(count * cfg.batch_size / len(weighted))
        order = torch.cat([weighted[torch.randperm(len(weighted), generator=run.generator)] for _ in range(epochs)])
        updates = [
            self._update(run, samples, request.prompts, clean, weights)
            for samples in order[: count * cfg.batch_size].split(cfg.batch_size)
        ]
        return RWRMetrics(
            reward=float(rewards.mean()),
            reward_std=float(rewards.std(correction=0)),
            loss=fmean(loss for loss, _ in updates),
            grad_norm=fmean(norm for _, norm in updates),
            effective_samples=float(weights.sum() ** 2 / weights.square().sum()),
            updates=count,
            retries=scored.retries,
            seconds_sampling=scored.seconds_sampling,
            seconds_reward=scored.seconds_reward,
            seconds_update=time.perf_counter() - start,
        )

    def resize(self, sizes: Mapping[str, Count]) -> None:
        """Takes other sizes of its parts; see `overpaint.training.memory`."""
        self.config = replace(self.config, **sizes)
        self.collector.batch_size = self.config.sampling_batch_size

    def tagged(self, metrics: RWRMetrics, run: TrainingRun) -> dict[str, float]:
        """Returns what was measured under the tags that docs/rwr.md defines."""
        values = tagged(metrics, (run.iteration + 1) * self.config.samples_per_round)
        values["train/effective_samples"] = metrics.effective_samples
        values["train/updates"] = metrics.updates
        return values

    def evaluate(self, run: TrainingRun) -> None:
        """Evaluates the held-out prompts, drawn as in a round."""
        evaluate_held_out(run, self, eta=self.config.eta)

    # The parts of a round.

    def _update(
        self, run: TrainingRun, samples: Tensor, prompts: Sequence[str], clean: Latents, weights: PerSample
    ) -> tuple[float, float]:
        """Takes one gradient step on the weighted loss of some samples; returns the loss and the gradient's norm."""
        # Timesteps and noises of the whole batch, the same in all processes, of which each takes its part.
        timesteps = torch.randint(self.policy.num_timesteps, (len(samples),), generator=run.generator)
        noises = torch.randn(len(samples), *clean.shape[1:], generator=run.generator)
        mine = [run.shard(part) for part in (samples, timesteps, noises)]
        count, total = len(mine[0]), torch.zeros((), device=run.device)
        parts = list(zip(*(part.split(self.config.minibatch_size) for part in mine), strict=True))
        for number, (picked, times, noise) in enumerate(parts):
            conditioning = self.policy.encode([prompts[sample] for sample in picked.tolist()])
            with run.autocast():
                losses = self._losses(clean[picked.to(clean.device)], conditioning, times, noise)
            loss = (weights[picked].to(losses) * losses).sum() / count
            run.backward(loss, sync=number == len(parts) - 1)
            total += loss.detach()
        return run.mean(total), run.update()

    def _losses(self, clean: Latents, conditioning: Conditioning, timesteps: Tensor, noise: Latents) -> PerSample:
        """Returns the squared error of the guided prediction of each sample, averaged over its elements."""
        timesteps, noise = timesteps.to(clean.device), noise.to(clean.device)
        noised = self.policy.add_noise(clean, noise, timesteps)
        predicted = self.policy.predict_direction(noised, timesteps, conditioning, self.guidance)
        return ((predicted - self.policy.direction(clean, noise)) ** 2).flatten(1).mean(dim=1)
