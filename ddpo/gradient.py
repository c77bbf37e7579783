"""The updates of a round: stored steps are evaluated again under the present weights, and made more or less likely."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy, Guidance, Trajectory
from overpaint.policy.ddim import gaussian_kl, gaussian_log_prob
from overpaint.policy.types import Latents, PerSample
from overpaint.training import TrainingRun

from .config import DDPOConfig
from .loss import clipped_surrogate, ratio_statistics, score_function
from .requests import Pairs

TOLERATED = 0.1
"""Share of the clip range by which a ratio may be off before anything was updated."""

PROBED_PAIRS = 16
"""Pairs, at least, on which that is looked at."""

KL_PAIRS = 16
"""Pairs on which a process measures the divergence from the reference where it is not part of the loss."""


class Update(NamedTuple):
    """What one update measured on this process's pairs; on the device, but for the norm."""

    means: Float[Tensor, " 5"]
    """Loss, clip fraction, k1, k3, divergence from the reference."""
    ratio_max: Float[Tensor, ""]
    """Largest |ratio - 1|."""
    grad_norm: float


class PolicyGradient:
    """Takes gradient steps on stored trajectories.

    Args:
        policy: What is tuned.
        config: Settings.
        guidance: That of the rollouts.
        step_weights: Weight of each denoising step in the loss.
    """

    def __init__(
        self, policy: DiffusionPolicy, config: DDPOConfig, guidance: Guidance, step_weights: Float[Tensor, " steps"]
    ) -> None:
        self.policy = policy
        self.config = config
        self.guidance = guidance
        self.step_weights = step_weights

    @torch.no_grad()
    def with_old_log_probs(self, run: TrainingRun, trajectory: Trajectory, parts: Sequence[Pairs]) -> Trajectory:
        """Returns the trajectory with log-probabilities that the unchanged policy reproduces in the updates' shapes.

        In other shapes than those of the rollout the network may round differently, in half precision by more than the
        clip range. So there, all log-probabilities are taken again, in the very minibatches of the updates, which costs
        one more forward of each; in float32 some minibatches tell whether that is needed.

        Args:
            run: Its precision counts.
            trajectory: Of this process's samples.
            parts: The pairs of each update.
        """
        cfg = self.config
        if cfg.estimator == "score" or cfg.minibatch_size == cfg.sampling_batch_size:
            return trajectory
        log_probs = trajectory.log_probs.clone()
        undecided = self.policy.dtype == torch.float32 and run.config.mixed_precision == "no"
        seen, off = 0, 0.0
        for pairs in (part for update in parts for part in update.minibatches(cfg.minibatch_size)):
            fresh = gaussian_log_prob(*self._stored_steps(run, trajectory, pairs))
            if undecided:
                off = max(off, float((fresh - log_probs[pairs.samples, pairs.steps]).expm1().abs().max()))
                seen += len(fresh)
                undecided = seen < PROBED_PAIRS
                if not undecided and not run.in_any(off > TOLERATED * cfg.clip_range):
                    return trajectory
            log_probs[pairs.samples, pairs.steps] = fresh
        return trajectory._replace(log_probs=log_probs)

    def update(
        self,
        run: TrainingRun,
        pairs: Pairs,
        trajectory: Trajectory,
        advantages: Float[Tensor, " samples"],
        *,
        measure_kl: bool = True,
    ) -> Update:
        """Takes one gradient step on the mean loss of some pairs; what was added to the gradient before counts too.

        Args:
            run: Goes backward and updates.
            pairs: What the loss is the mean of; whole minibatches.
            trajectory: Of this process's samples, with the log-probabilities that ratios compare with.
            advantages: One for each sample, on the device.
            measure_kl: Whether to measure the divergence from the reference, on a few pairs, where it is not in the
                loss.
        """
        cfg, total = self.config, len(pairs.samples)
        sums = torch.zeros(5, device=run.device)
        ratio_max = torch.zeros((), device=run.device)
        step_weights = self.step_weights.to(run.device)
        minibatches = pairs.minibatches(cfg.minibatch_size)
        for number, part in enumerate(minibatches):
            # The reference goes first: it borrows the network, which the gradient must find as it was.
            wants_kl = cfg.kl_weight > 0 or (measure_kl and number == 0)
            reference_mean = self._reference_mean(run, trajectory, part) if wants_kl else None

            taken, mean, std = self._stored_steps(run, trajectory, part)
            log_probs = gaussian_log_prob(taken, mean, std)
            old_log_probs = trajectory.log_probs[part.samples, part.steps]
            if cfg.estimator == "score":
                losses = score_function(log_probs, advantages[part.samples])
            else:
                losses = clipped_surrogate(
                    log_probs, old_log_probs, advantages[part.samples], clip_range=cfg.clip_range
                )
            losses = losses * step_weights[part.steps]
            if reference_mean is not None:
                count = len(reference_mean)
                divergence = gaussian_kl(mean[:count], reference_mean, std[:count])
                sums[4] += divergence.detach().sum() * (1.0 if cfg.kl_weight else total / count)
                if cfg.kl_weight:
                    losses = losses + cfg.kl_weight * divergence
            run.backward(losses.sum() / total, sync=number == len(minibatches) - 1)

            off, ratio_sums = ratio_statistics(log_probs, old_log_probs, clip_range=cfg.clip_range)
            sums[0] += losses.detach().sum()
            sums[1:4] += ratio_sums
            ratio_max = torch.maximum(ratio_max, off)
        return Update(sums / total, ratio_max, run.update())

    def _stored_steps(
        self, run: TrainingRun, trajectory: Trajectory, pairs: Pairs
    ) -> tuple[Latents, Latents, PerSample]:
        """Returns where stored steps led, and the Gaussians that they come from now."""
        with run.autocast():
            return self.policy.stored_steps(
                trajectory, pairs.samples, pairs.steps, guidance=self.guidance, eta=self.config.eta
            )

    def _reference_mean(self, run: TrainingRun, trajectory: Trajectory, pairs: Pairs) -> Latents:
        """Returns where the reference policy would go: of all pairs where that is in the loss, or else of a few."""
        if not self.config.kl_weight:
            pairs = Pairs(*(part[:KL_PAIRS] for part in pairs))
        with self.policy.reference():
            return self._stored_steps(run, trajectory, pairs)[1]


def measured_by(run: TrainingRun, updates: Sequence[Update], *, kl_in_loss: bool) -> dict[str, float]:
    """Returns what the updates of a round measured, over all processes, by the names in `DDPOMetrics`."""
    means = run.gather(torch.stack([update.means for update in updates])).view(-1, len(updates), 5).mean(dim=0)
    ratios = run.gather(torch.stack([update.ratio_max for update in updates])).view(-1, len(updates)).amax(dim=0)
    loss, clip_fraction, k1, k3, kl = means.mean(dim=0).tolist()
    return {
        "loss": loss,
        "grad_norm": fmean(update.grad_norm for update in updates),
        "kl": kl if kl_in_loss else float(means[0, 4]),
        "approx_kl_k1": k1,
        "approx_kl_k3": k3,
        "clip_fraction": clip_fraction,
        "ratio_max": float(ratios.max()),
        "ratio_start": float(ratios[0]),
    }
