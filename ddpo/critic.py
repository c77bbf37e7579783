"""A critic: what a picture is going to score, guessed from the noisy states that lead to it.

Actor and critic of Sutton et al. (1999) for denoising, as in arXiv 2601.03213: the state is latents, noise level and
prompt; the score comes at the end only. Advantages are generalised ones, Schulman et al. (2015),
https://arxiv.org/abs/1506.02438, without a discount. The critic learns from a round after the policy has, so that no
advantage comes from a critic that has seen its round.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from overpaint.policy import DiffusionPolicy, Trajectory
from overpaint.policy.types import Latents
from overpaint.settings import Field, Share, settings
from overpaint.training import TrainingRun

STAGES = 3
"""Convolutions that halve the sides."""

MOMENTS = ("counts", "means", "variances")
"""What is known of the scores so far."""

Values = Float[Tensor, "samples steps"]


@settings
class CriticConfig:
    """How the critic is built, how it learns, and how advantages come from it."""

    width: int = Field(32, ge=1)
    """Channels of its convolutions."""

    passes: int = Field(4, ge=1)
    """Passes over the states of a round."""

    learning_rate: float = Field(1e-3, gt=0)
    """Of Adam."""

    batch_size: int = Field(64, ge=1)
    """States of an update of the critic, over all processes."""

    gae_lambda: float = Field(1.0, ge=0, le=1)
    """How far an advantage looks ahead: at 1 it is the reward less what the critic expected of the state; at 0 what the
    critic expects of the next state less that, which varies less and believes more."""


def generalised_advantages(values: Values, scores: Float[Tensor, " samples"], *, gae_lambda: Share) -> Values:
    """Returns the advantage of each step: sums of `lambda^k delta_{i+k}`, where `delta_i = V_{i+1} - V_i`.

    The last state's value is the score itself. Source: Schulman et al. (2015), equation 16, without a discount.

    Args:
        values: What was expected in the state before each step, from noise to image.
        scores: What came of it.
        gae_lambda: From 0 to 1.
    """
    advantages = torch.cat([values, scores[:, None]], dim=1).diff(dim=1)
    for step in reversed(range(advantages.shape[1] - 1)):
        advantages[:, step] += gae_lambda * advantages[:, step + 1]
    return advantages


def explained_variances(values: Values, scores: Float[Tensor, " samples"]) -> list[float]:
    """Returns 1 - Var(score - value) / Var(score) in the first, the middle and the last third of the steps.

    Thirds are rounded up, so that they overlap where the steps are no multiple of three. The scores must vary.
    """
    steps, variance = values.shape[1], float(scores.double().var(correction=0))
    errors = scores.double()[:, None] - values.double()
    third = math.ceil(steps / 3)
    parts = errors[:, :third], errors[:, steps // 3 : steps - steps // 3], errors[:, -third:]
    return [1 - float(part.var(correction=0)) / variance for part in parts]


class CriticNetwork(nn.Module):
    """A small convolutional network, which noise level and prompt scale and shift; in the first round it says zero.

    Args:
        channels: Of the latents.
        prompt_dim: Width of the encoded prompts.
        width: Channels of the network.
        scores: Numbers that it guesses.
    """

    def __init__(self, channels: int, prompt_dim: int, width: int, scores: int) -> None:
        super().__init__()
        self.condition = nn.Sequential(
            nn.Linear(prompt_dim + 2, 2 * width), nn.SiLU(), nn.Linear(2 * width, (STAGES + 1) * 2 * width)
        )
        halving = [nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(STAGES)]
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, width, 3, padding=1), *halving])
        self.last = nn.Linear(width, scores)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, latents: Latents, levels: Float[Tensor, "batch 2"], prompts: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "batch scores"]:
        """Returns a number for each state and score.

        Args:
            latents: The states.
            levels: Square roots of the cumulative alpha and of what it lacks to 1.
            prompts: Encoded prompts, the mean over their tokens.
        """
        hidden = latents
        changes = self.condition(torch.cat([levels, prompts], dim=1))[..., None, None].chunk(2 * (STAGES + 1), dim=1)
        for convolution, scale, shift in zip(self.convolutions, changes[::2], changes[1::2], strict=True):
            hidden = silu(convolution(hidden) * (1 + scale) + shift)
        return self.last(hidden.mean(dim=(2, 3)))


class Critic:
    """Guesses the scores of pictures from their noisy states, and learns from every round.

    Args:
        policy: Encodes the prompts, and knows the noise levels.
        config: Settings.
        scores: Numbers that a picture is given: its reward, and what else is known of it.
    """

    def __init__(self, policy: DiffusionPolicy, config: CriticConfig, *, scores: int = 1) -> None:
        self.policy = policy
        self.config = config
        self.scores = scores
        self._resumed: Mapping[str, Any] | None = None

    def start(self, run: TrainingRun) -> None:
        """Makes the network of a run, from the run's seed, or as it was when the run was interrupted."""
        width = self.policy.encode([""]).tokens.shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.config.seed)
            network = CriticNetwork(self.policy.latent_shape()[0], width, self.config.width, self.scores)
        self.network = network.to(run.device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=self.config.learning_rate)
        # Count, mean and variance of each score so far: what the network says is in standard deviations from the mean.
        self.counts, self.means, self.variances = (torch.zeros(self.scores, dtype=torch.float64) for _ in range(3))
        if self._resumed is not None:
            self.network.load_state_dict(self._resumed["network"])
            self.optimizer.load_state_dict(self._resumed["optimizer"])
            self.counts, self.means, self.variances = (self._resumed[name].clone() for name in MOMENTS)
            self._resumed = None

    @torch.no_grad()
    def values(self, trajectory: Trajectory) -> Float[Tensor, "samples steps scores"]:
        """Returns what each picture was expected to score before each of its steps; in float64, on the CPU."""
        samples, steps = trajectory.log_probs.shape
        pairs = torch.arange(samples * steps)
        parts = [self._says(trajectory, part // steps, part % steps) for part in pairs.split(self.config.batch_size)]
        said = torch.cat(parts).double().cpu().view(samples, steps, self.scores)
        return self.means + said * self.deviations

    def fit(
        self,
        run: TrainingRun,
        trajectory: Trajectory,
        mine: Int[Tensor, " mine"],
        scores: Float[Tensor, "all scores"],
    ) -> float:
        """Learns the scores of a round from all its states; returns the mean squared error of the last pass.

        Every process goes through the same shuffled batches, takes the states of its own samples, and adds its gradient
        to the others': so several processes make the same critic as one.

        Args:
            run: Its generator draws, and it joins the processes.
            trajectory: Of this process's samples.
            mine: The place of each of them among those of all processes.
            scores: Of all processes' samples; NaN where a score is unknown.

        Returns:
            The error in variances of the scores: 1 is that of the best constant.
        """
        self._note(scores)
        wanted = ((scores.double() - self.means) / self.deviations)[mine].to(run.device, torch.float32)
        places = torch.full((len(scores),), -1)
        places[mine] = torch.arange(len(mine))
        steps = trajectory.log_probs.shape[1]
        # One draw of the run's generator, however many passes and processes there are.
        seed = int(torch.randint(2**31 - 1, (), generator=run.generator))
        generator = torch.Generator().manual_seed(seed)
        error = 0.0
        for _ in range(self.config.passes):
            order, errors = torch.randperm(len(scores) * steps, generator=generator), []
            for batch in order.split(self.config.batch_size):
                samples = places[batch // steps]
                own = samples >= 0
                said = self._says(trajectory, samples[own], (batch % steps)[own])
                aim = wanted[samples[own].to(run.device)]
                loss = torch.where(aim.isnan(), 0.0, said - aim.nan_to_num()).square().sum() / len(batch)
                errors.append(self._update(run, loss) * len(batch))
            error = sum(errors) / (steps * int((~scores.isnan()).sum()))
        return error

    def state_dict(self) -> dict[str, Any]:
        """Returns the weights, the optimizer's moments, and the moments of the scores; once the run has begun."""
        moments = zip(MOMENTS, (self.counts, self.means, self.variances), strict=True)
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), **dict(moments)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes back what `state_dict` returned, at the start of the run that goes on."""
        self._resumed = state

    @property
    def deviations(self) -> Float[Tensor, " scores"]:
        """Standard deviation of each score; 1 as long as it has not varied."""
        return torch.where(self.variances > 0, self.variances.sqrt(), 1.0)

    def _says(
        self, trajectory: Trajectory, samples: Int[Tensor, " batch"], steps: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch scores"]:
        """Returns what the network says of states, in standard deviations from the mean score."""
        device = trajectory.latents.device
        samples, steps = samples.to(device), steps.to(device)
        timesteps = trajectory.timesteps[steps].to(self.policy.device)
        factors = self.policy.process.signal_and_noise(self.policy.process.levels(timesteps))
        levels = torch.stack(factors, dim=1).float().to(device)
        prompts = trajectory.conditioning.tokens[samples].float().mean(dim=1)
        return self.network(trajectory.latents[samples, steps].float(), levels, prompts)

    def _update(self, run: TrainingRun, loss: Float[Tensor, ""]) -> float:
        """Takes one step on the sum of all processes' losses, and returns that sum."""
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.network.parameters())
        told = torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in parameters if p.grad is not None)])
        if run.num_processes > 1:
            told = run.gather(told[None]).sum(dim=0)
            for parameter, part in zip(parameters, told[1:].split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        self.optimizer.step()
        return float(told[0])

    @torch.no_grad()
    def _note(self, scores: Float[Tensor, "all scores"]) -> None:
        """Takes notice of a round's scores, and moves the last layer so that what the critic expects stays the same.

        Source: PopArt, van Hasselt et al. (2016), https://arxiv.org/abs/1602.07714.
        """
        known = ~scores.isnan()
        fresh = known.sum(dim=0).double()
        means = scores.double().nanmean(dim=0).nan_to_num()  # of what is wholly unknown, no matter
        variances = (scores.double() - means).square().nanmean(dim=0).nan_to_num()
        old_means, old_deviations, first = self.means, self.deviations, not self.counts.any()
        total = self.counts + fresh
        share = fresh / total.clamp(min=1)
        self.means = self.means + share * (means - self.means)
        between = (1 - share) * share * (means - old_means).square()
        self.variances = (1 - share) * self.variances + share * variances + between
        self.counts = total
        if first:
            return  # nothing was expected yet
        last = self.network.last
        scale, shift = (
            number.to(last.weight)
            for number in (old_deviations / self.deviations, (old_means - self.means) / self.deviations)
        )
        last.weight.mul_(scale[:, None])
        last.bias.mul_(scale).add_(shift)
