"""The updates of a round: stored steps are evaluated again under the present weights, and made more or less likely."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from erasure.gradient_conflict import gradient_cosine
from overpaint.policy import DiffusionPolicy, Guidance, Trajectory
from overpaint.policy.ddim import gaussian_kl, gaussian_log_prob
from overpaint.policy.process import RectifiedFlow
from overpaint.policy.types import Latents, PerSample
from overpaint.training import TrainingRun

from .config import DDPOConfig
from .loss import clipped_surrogate, guarded_log_ratio, ratio_statistics, score_function
from .requests import Pairs

TOLERATED = 0.1
"""Share of the clip range by which a ratio may be off before anything was updated."""

PROBED_PAIRS = 16
"""Pairs, at least, on which that is looked at."""

KL_PAIRS = 16
"""Pairs on which a process measures the divergence from the reference where it is not part of the loss."""


class Term(NamedTuple):
    """Pairs whose loss is added up in an update."""

    pairs: Pairs
    weight: float = 1.0
    """Of the policy gradient."""
    divergence_weight: float = 0.0
    """Of the divergence from the reference policy; other than 0, it costs a further UNet call without gradient."""


class Update(NamedTuple):
    """What one update measured on this process's pairs; on the device, but for the last two."""

    means: Float[Tensor, " 5"]
    """Loss, clip fraction, k1, k3, divergence from the reference."""
    ratio_max: Float[Tensor, ""]
    """Largest |ratio - 1|."""
    grad_norm: float
    gradient_cosine: float
    """Between the gradient of the prompts' samples and that of the erasure; 0 where either is missing."""


class Tally:
    """Adds up what the minibatches of an update measure, without a transfer from the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(6, device=device)
        self.ratio_max = torch.zeros((), device=device)

    def add(self, losses: PerSample, log_probs: PerSample, old_log_probs: PerSample, *, clip_range: float) -> None:
        """Adds the losses of some pairs, and how far their probabilities have parted."""
        off, ratio_sums = ratio_statistics(log_probs, old_log_probs, clip_range=clip_range)
        self.sums[0] += losses.detach().sum()
        self.sums[1:4] += ratio_sums
        self.ratio_max = torch.maximum(self.ratio_max, off)

    def add_divergence(self, divergence: PerSample) -> None:
        """Adds divergences from the reference policy, which may be known of fewer pairs."""
        self.sums[4] += divergence.detach().sum()
        self.sums[5] += len(divergence)

    def means(self, pairs: int) -> Float[Tensor, " 5"]:
        """Returns what `Update.means` holds; zeros without pairs."""
        return self.sums[:5] / torch.cat([torch.full_like(self.sums[:4], max(1, pairs)), self.sums[5:].clamp(min=1)])


class PolicyGradient:
    """Takes gradient steps on stored trajectories.

    Args:
        policy: What is tuned.
        config: Settings.
        guidance: That of the rollouts.
        step_weights: Weight of each denoising step in the loss.

    Raises:
        ValueError: The guarded ratio is asked for, and the policy is of diffusion.
    """

    def __init__(
        self, policy: DiffusionPolicy, config: DDPOConfig, guidance: Guidance, step_weights: Float[Tensor, " steps"]
    ) -> None:
        self.policy = policy
        self.config = config
        self.guidance = guidance
        self.step_weights = step_weights
        plan = policy.plan(config.steps, config.height, config.width)
        self.slopes = policy.process.scales(plan, config.eta)[1]
        """By how much the mean of each step follows the network's prediction."""
        if config.ratio == "guard":
            if not isinstance(policy.process, RectifiedFlow):
                raise ValueError(
                    "DDPOConfig.ratio must be 'plain' for diffusion: its steps have no length, got 'guard'"
                )
            self.step_weights = step_weights / (plan.levels - plan.next_levels).cpu()

    @torch.no_grad()
    def with_old_log_probs(self, run: TrainingRun, trajectory: Trajectory, parts: Sequence[Pairs]) -> Trajectory:
        """Returns the trajectory with log-probabilities that the unchanged policy reproduces in the updates' shapes.

        In other shapes than those of the rollout the network may round differently, in half precision by more than the
        clip range. So there, all log-probabilities are taken again, in the very minibatches of the updates, which costs
        one more forward of each; in float32 some minibatches tell whether that is needed.

        Args:
            run: Its precision counts.
            trajectory: Of this process's samples.
            parts: The pairs of each update, those of the prompts and of the concept each for themselves.
        """
        cfg = self.config
        whole = all(len(pairs.samples) % cfg.minibatch_size == 0 for pairs in parts)
        if cfg.estimator == "score" or (whole and cfg.minibatch_size == cfg.sampling_batch_size):
            return trajectory
        log_probs, means = trajectory.log_probs.clone(), trajectory.means
        means = None if means is None else means.clone()
        undecided = self.policy.dtype == torch.float32 and run.config.mixed_precision == "no"
        seen, off = 0, 0.0
        for pairs in (part for update in parts for part in update.minibatches(cfg.minibatch_size)):
            taken, mean, std = self._stored_steps(run, trajectory, pairs)
            fresh = gaussian_log_prob(taken, mean, std)
            if undecided:
                off = max(off, float((fresh - log_probs[pairs.samples, pairs.steps]).expm1().abs().max()))
                seen += len(fresh)
                undecided = seen < PROBED_PAIRS
                if not undecided and not run.in_any(off > TOLERATED * cfg.clip_range):
                    return trajectory
            log_probs[pairs.samples, pairs.steps] = fresh
            if means is not None:
                means[pairs.samples, pairs.steps] = mean
        return trajectory._replace(log_probs=log_probs, means=means)

    def update(
        self,
        run: TrainingRun,
        prompts: Term | None,
        trajectory: Trajectory,
        advantages: Float[Tensor, "samples steps"],
        *,
        concept: Term | None = None,
        measure_kl: bool = True,
        compare: bool = False,
    ) -> Update:
        """Takes one gradient step on the mean loss of some pairs; what was added to the gradient before counts too.

        Args:
            run: Goes backward and updates.
            prompts: What the loss is the mean of: pairs of the prompts' samples.
            trajectory: Of this process's samples, with the log-probabilities that ratios compare with.
            advantages: One for each step of each sample, on the device.
            concept: Further pairs, of the concept's samples, which come first.
            measure_kl: Whether to measure the divergence from the reference, on a few pairs, where it is not in the
                loss.
            compare: Whether to compare the gradient of the prompts' samples with all that was added before.
        """
        terms = [term for term in (concept, prompts) if term is not None]
        total = sum(len(term.pairs.samples) for term in terms)
        tally = Tally(run.device)
        erasing: list[Tensor] = []
        for number, term in enumerate(terms):
            if compare and term is prompts:
                erasing = self._gradients()
            last = number == len(terms) - 1
            measure = measure_kl and last
            self._accumulate(run, term, total, trajectory, advantages, tally, measure_kl=measure, last=last)
        if not terms:  # what was added before has to be averaged over the processes
            run.backward(torch.stack([0.0 * p.sum() for p in self.policy.trainable_parameters()]).sum(), sync=True)
        cosine = 0.0
        if erasing:
            erasing = [run.gather(part[None]).mean(dim=0) for part in erasing]  # as the other now is
            cosine = gradient_cosine(
                erasing, [both - part for both, part in zip(self._gradients(), erasing, strict=True)]
            )
        return Update(tally.means(total), tally.ratio_max, run.update(), cosine)

    @torch.no_grad()
    def divergence(self, run: TrainingRun, pairs: Pairs, trajectory: Trajectory) -> Float[Tensor, ""]:
        """Returns how far a few pairs are from the reference policy's on the mean, where no loss takes it."""
        part = Pairs(*(values[:KL_PAIRS] for values in pairs)).minibatches(self.config.minibatch_size)[0]
        reference_mean = self._reference_mean(run, trajectory, part, all_pairs=False)
        _, mean, std = self._stored_steps(run, trajectory, part)
        return self._divergence(mean, reference_mean, std, part.steps).mean()

    def _accumulate(
        self,
        run: TrainingRun,
        term: Term,
        total: int,
        trajectory: Trajectory,
        advantages: Float[Tensor, "samples steps"],
        tally: Tally,
        *,
        measure_kl: bool,
        last: bool,
    ) -> None:
        """Adds the gradient of a term, a part of a mean over `total` pairs, and what it measures."""
        cfg, in_loss = self.config, term.divergence_weight > 0
        step_weights = self.step_weights.to(run.device)
        minibatches = term.pairs.minibatches(cfg.minibatch_size)
        for number, part in enumerate(minibatches):
            # The reference goes first: it borrows the network, which the gradient must find as it was.
            reference_mean = None
            if in_loss or (measure_kl and number == 0):
                reference_mean = self._reference_mean(run, trajectory, part, all_pairs=in_loss)

            taken, mean, std = self._stored_steps(run, trajectory, part)
            log_probs = gaussian_log_prob(taken, mean, std)
            old_log_probs = trajectory.log_probs[part.samples, part.steps]
            if cfg.ratio == "guard":
                assert trajectory.means is not None, "the rollout has kept them"
                old_mean = trajectory.means[part.samples, part.steps]
                log_probs, old_log_probs = (
                    guarded_log_ratio(taken, mean, old_mean, std),
                    torch.zeros_like(old_log_probs),
                )
            wanted = advantages[part.samples, part.steps]
            if cfg.estimator == "score":
                losses = score_function(log_probs, wanted)
            else:
                losses = clipped_surrogate(log_probs, old_log_probs, wanted, clip_range=cfg.clip_range)
            losses = term.weight * losses * step_weights[part.steps]
            if reference_mean is not None:
                count = len(reference_mean)
                divergence = self._divergence(mean[:count], reference_mean, std[:count], part.steps[:count])
                tally.add_divergence(divergence)
                if in_loss:
                    losses = losses + term.divergence_weight * divergence
            run.backward(losses.sum() / total, sync=last and number == len(minibatches) - 1)
            tally.add(losses, log_probs, old_log_probs, clip_range=cfg.clip_range)

    def _stored_steps(
        self, run: TrainingRun, trajectory: Trajectory, pairs: Pairs
    ) -> tuple[Latents, Latents, PerSample]:
        """Returns where stored steps led, and the Gaussians that they come from now."""
        with run.autocast():
            return self.policy.stored_steps(
                trajectory, pairs.samples, pairs.steps, guidance=self.guidance, eta=self.config.eta
            )

    def _divergence(
        self, mean: Latents, reference_mean: Latents, std: PerSample, steps: Int[Tensor, " batch"]
    ) -> PerSample:
        """Returns how far some steps are from the reference policy's, as the settings measure it.

        The mean of a step is linear in the network's prediction, so that its slope leads back to that.
        """
        if self.config.kl == "step":
            return gaussian_kl(mean, reference_mean, std)
        return ((mean - reference_mean) ** 2).flatten(1).mean(dim=1) / self.slopes.to(mean)[steps] ** 2

    def _gradients(self) -> list[Tensor]:
        """Returns the gradient of each trained weight as it has been added up so far."""
        parameters = self.policy.trainable_parameters()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    def _reference_mean(self, run: TrainingRun, trajectory: Trajectory, pairs: Pairs, *, all_pairs: bool) -> Latents:
        """Returns where the reference policy would go, of all pairs or of a few."""
        if not all_pairs:
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
        "gradient_cosine": fmean(update.gradient_cosine for update in updates),
        "kl": kl if kl_in_loss else float(means[0, 4]),
        "approx_kl_k1": k1,
        "approx_kl_k3": k3,
        "clip_fraction": clip_fraction,
        "ratio_max": float(ratios.max()),
        "ratio_start": float(ratios[0]),
    }
