"""The policy: a text-to-image model as a decision process.

A state is (prompt, timestep, latents), an action the next latents, drawn from a Gaussian whose mean the network gives
and whose standard deviation the process gives. Everything that is particular to a family of models stays in this
package.

What was left out: samplers other than DDIM (of which ancestral DDPM sampling is eta = 1) and a flow's Euler steps.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from overpaint.settings import Count, Index, Seed, Share

from . import ddim
from .conditioning import Conditioning
from .denoiser import all_at, mean_and_std, predict, predict_at, predicted, steps_of
from .guidance import DEFAULT_GUIDANCE, Guidance
from .model import TextToImageModel
from .noise import check_seeds
from .process import add_noise, check_chosen, check_eta, check_span, check_step
from .prompts import check_prompts
from .trajectory import Trajectory
from .types import Images, Latents, PerSample, Plan


class DiffusionPolicy(TextToImageModel):
    """Draws images from prompts, tells how likely its steps were, and carries the weights that are trained.

    Latents are float32 everywhere; only what goes into a network is rounded to its precision. Stored trajectories are
    therefore exact, and the log-probability of a step is that of the very latents that were stored.

    What recurs in its methods: `conditioning` are prompts, from `encode`; `steps` the number of denoising steps of a
    whole image, and `step` the index of one, counted from noise; `guidance` what makes one prediction of several, by
    default classifier-free guidance of 5; `eta` the share of the noise of ancestral sampling, in [0, 1], where 0 is
    deterministic; `seeds` one for each sample, whose noise depends on nothing else; `height` and `width` those of the
    image in pixels, by default the size of training. What is out of its range raises a `ValueError`, and so do seeds
    that are not as many as prompts, a side that the VAE's factor does not divide, and a step without a density where
    a log-probability is asked for.

    Arguments and errors of loading are those of `TextToImageModel`.
    """

    def predict_noise(
        self,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        guidance: Guidance | None = None,
        *,
        steps: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """Returns the noise that the UNet sees in noised latents, whatever kind of prediction it makes.

        Args:
            latents: Noised latents.
            timesteps: The scheduler's integer of each sample.
            conditioning: The prompt of each sample.
            guidance: None is the prediction for the prompt alone, without guidance.
            steps: Index of each sample's step, for a guidance that changes on the way; by default that of its timestep
                among all of training's.
        """
        return self.process.noise(latents, *predicted(self, latents, timesteps, conditioning, guidance, steps))

    def predict_direction(
        self,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
        guidance: Guidance | None = None,
        *,
        steps: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """Returns what `predict_noise` does in diffusion, and the velocity in a flow; arguments as there.

        Losses compare these, since errors of them weigh alike at all levels; a flow's noise is `1 - s` times as wrong
        as its velocity, which at its first level says nothing.
        """
        return self.process.direction(latents, *predicted(self, latents, timesteps, conditioning, guidance, steps))

    def direction(self, clean: Latents, noise: Latents) -> Latents:
        """Returns what `predict_direction` should see in clean latents with noise: the noise, or the velocity."""
        return self.process.direction_of(clean, noise)

    def predict(
        self,
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        conditioning: Conditioning,
    ) -> Latents:
        """Returns what the network predicts for the prompts alone, of its own kind: see `process.prediction_type`."""
        return predict(self, latents, timesteps, conditioning)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        *,
        steps: Count = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: Share = 0.0,
        seeds: Sequence[Seed],
        until: Index | None = None,
        latents: Latents | None = None,
        start: Index = 0,
        height: Count | None = None,
        width: Count | None = None,
    ) -> Latents:
        """Denoises from noise, or from latents before a step `start`, and stops before `until`, or at the end."""
        plan = self.plan(steps, height, width)
        check_span(start, until, steps, given=latents is not None)
        check_eta(eta)
        noise = self._noise(seeds, conditioning, height, width)
        state = noise.draw() if latents is None else latents
        for state, _, _ in steps_of(self, state, conditioning, plan, guidance, eta, noise, until, start):  # noqa: B007, B020
            pass
        return state

    @torch.no_grad()
    def rollout(
        self,
        conditioning: Conditioning,
        *,
        steps: Count = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: Share = 1.0,
        seeds: Sequence[Seed],
        height: Count | None = None,
        width: Count | None = None,
        stochastic: Sequence[Index] | None = None,
        keep_means: bool = False,
    ) -> Trajectory:
        """Samples as `sample` does, to the end, and keeps every state and the log-probability of every step.

        Only the steps `stochastic`, by default all that can, draw from their Gaussian; others go to where they lead
        without noise, and their log-probability is NaN. Every step takes its noise from the sample's stream, used or
        not, so that the choice moves no other noise.
        """
        possible = self.process.stochastic_steps(steps, eta)
        chosen = check_chosen(possible if stochastic is None else stochastic, possible)
        plan = self.plan(steps, height, width)
        noise = self._noise(seeds, conditioning, height, width)
        states, log_probs, means = [noise.draw()], [], []
        taken = steps_of(self, states[0], conditioning, plan, guidance, eta, noise, stochastic=chosen)
        for step, (latents, mean, std) in enumerate(taken):
            states.append(latents)
            density = (
                ddim.gaussian_log_prob(latents, mean, std)
                if step in chosen
                else torch.full_like(std, torch.nan).double()
            )
            log_probs.append(density)
            if keep_means:
                means.append(mean)
        kept = torch.stack(means, dim=1) if keep_means else None
        return Trajectory(torch.stack(states, dim=1), torch.stack(log_probs, dim=1), plan.timesteps, conditioning, kept)

    def log_prob(
        self,
        trajectory: Trajectory,
        samples: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        *,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: Share = 1.0,
    ) -> PerSample:
        """Returns the log-probability of stored steps; with the rollout's weights and shape it is the stored number."""
        return ddim.gaussian_log_prob(*self.stored_steps(trajectory, samples, steps, guidance=guidance, eta=eta))

    def stored_steps(
        self,
        trajectory: Trajectory,
        samples: Int[Tensor, " batch"],
        steps: Int[Tensor, " batch"],
        *,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: Share = 1.0,
    ) -> tuple[Latents, Latents, PerSample]:
        """Returns where stored steps led, and the Gaussians that the present weights would draw them from.

        Args:
            trajectory: From `rollout`, with the same guidance and eta; may lie on another device.
            samples: Index of the sample of each wanted pair.
            steps: Index of the step of each wanted pair.
            guidance: As in the rollout.
            eta: As in the rollout.

        Returns:
            The latents after each step, the mean, with gradient where it is enabled, and the standard deviation.
        """
        states = trajectory.latents
        self.process.stochastic_steps(len(trajectory.timesteps), eta)
        plan = self.process.plan(len(trajectory.timesteps), _size_of(states), self.device)
        conditioning = trajectory.conditioning[samples].to(self.device)
        samples, steps = samples.to(states.device), steps.to(states.device)
        before, after = (states[samples, at].to(self.device) for at in (steps, steps + 1))
        moments = mean_and_std(self, before, conditioning, plan, steps.to(self.device), guidance, eta)
        return after, *moments

    def denoise(
        self,
        latents: Latents,
        conditioning: Conditioning,
        *,
        step: Index,
        steps: Count = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: Share = 0.0,
        noise: Latents | None = None,
    ) -> Latents:
        """Takes one step, with gradient where it is enabled; with eta above 0 it adds the noise, scaled by its std."""
        plan = self.process.plan(steps, _size_of(latents), self.device)
        check_step(step, steps)
        check_eta(eta)
        if eta > 0 and noise is None:
            raise ValueError(f"noise must be given with eta={eta}, got None")
        mean, std = mean_and_std(self, latents, conditioning, plan, all_at(step, latents), guidance, eta)
        return mean if noise is None else mean + std.view(-1, 1, 1, 1) * noise

    def predict_clean(
        self,
        latents: Latents,
        conditioning: Conditioning,
        *,
        step: Index,
        steps: Count = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
    ) -> Latents:
        """Returns the clean latents as one call of the UNet guesses them, with gradient where it is enabled."""
        plan = self.process.plan(steps, _size_of(latents), self.device)
        check_step(step, steps)
        indices = all_at(step, latents)
        prediction = predict_at(self, latents, conditioning, plan, indices, guidance)
        return self.process.clean(latents, prediction, plan.levels[indices])

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[Seed],
        steps: Count = 50,
        guidance: Guidance = DEFAULT_GUIDANCE,
        eta: Share = 0.0,
        batch_size: Count = 16,
        height: Count | None = None,
        width: Count | None = None,
    ) -> Images:
        """Draws an image for each prompt: encodes, samples and decodes, `batch_size` at a time."""
        wanted = check_prompts(prompts)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        check_seeds(seeds, len(wanted))
        images = []
        for start in range(0, len(wanted), batch_size):
            part = slice(start, start + batch_size)
            latents = self.sample(
                self.encode(wanted[part]), steps=steps, guidance=guidance, eta=eta, seeds=seeds[part], height=height,
                width=width,
            )  # fmt: skip
            images.append(self.decode(latents))
        return torch.cat(images)

    # Forward noising, for losses on images that exist.

    @property
    def num_timesteps(self) -> int:
        """How many timesteps training had: from 0, nearly an image, to one less, nearly noise."""
        return self.process.num_timesteps

    def plan(self, steps: Count, height: Count | None = None, width: Count | None = None) -> Plan:
        """Returns the timesteps and levels that sampling with that many steps visits, on the policy's device."""
        return self.process.plan(steps, self.latent_shape(height, width)[1:], self.device)

    def add_noise(self, clean: Latents, noise: Latents, timesteps: Shaped[Tensor, " batch"]) -> Latents:
        """Returns clean latents noised forward to the timestep of each sample."""
        return add_noise(self.process, clean, noise, self.process.levels(timesteps.to(clean.device)))

    def denoising_loss(
        self, latents: Latents, conditioning: Conditioning, timesteps: Shaped[Tensor, " batch"], noise: Latents
    ) -> PerSample:
        """Returns the loss of pretraining for each sample: the mean squared error of the network's own prediction.

        The prediction is without guidance, and of noise, velocity or clean latents as the network makes it: so the
        error is finite at every timestep, also where a schedule ends without any signal. `timesteps` are uniform over
        training's in pretraining, `noise` standard normal. Source: Ho et al. (2020), https://arxiv.org/abs/2006.11239,
        equation 14.
        """
        noised = self.add_noise(latents, noise, timesteps)
        prediction = predict(self, noised, timesteps, conditioning)
        target = self.process.target(latents, noise, self.process.levels(timesteps.to(latents.device)))
        return ((prediction - target) ** 2).flatten(1).mean(dim=1)


def _size_of(latents: Tensor) -> tuple[int, int]:
    """Returns height and width of latents, or of states of a trajectory."""
    return latents.shape[-2], latents.shape[-1]
