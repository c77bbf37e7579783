"""How noise becomes an image: the levels that sampling visits, and the Gaussian of each step.

Every process noises an image as `signal * clean + noise_share * noise`, where both factors follow from a level, and
leads from one level to the next by a mean `next_signal * clean + direction * noise` with what its network guesses of
clean latents and noise. `Diffusion` and `RectifiedFlow` differ in their levels, in what a network predicts, and in how
much noise a step adds; `ddim` and `flow` have the arithmetic.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from . import ddim, flow
from .ddim import PredictionType
from .flow import Chain
from .types import Latents, PerSample, Plan

Size = tuple[int, int]
"""Height and width of latents."""


@runtime_checkable
class Process(Protocol):
    """What a policy asks of a process; all levels and latents are of one batch, and on one device."""

    config: dict[str, Any]
    """Of the checkpoint's scheduler."""

    @property
    def prediction_type(self) -> str:
        """What a network predicts: "epsilon", "v_prediction" or "sample" in diffusion, "velocity" in a flow."""
        ...

    @property
    def num_timesteps(self) -> int:
        """How many timesteps training has: from 0, an image or nearly, to one less than that, nearly noise."""
        ...

    def plan(self, steps: int, size: Size, device: torch.device) -> Plan:
        """Returns the levels of a sampling with that many steps, of latents of a size.

        Raises:
            ValueError: `steps` is out of its range.
        """
        ...

    def stochastic_steps(self, steps: int, eta: float) -> tuple[int, ...]:
        """Returns the indices of the steps that have a density.

        Raises:
            ValueError: `steps` or `eta` is out of its range, or a diffusion's last step would be deterministic.
        """
        ...

    def trained_steps(self, steps: int, eta: float) -> tuple[int, ...]:
        """Returns those of them that a policy gradient learns from.

        Raises:
            ValueError: As `stochastic_steps`, or there are none.
        """
        ...

    def levels(self, timesteps: Shaped[Tensor, " batch"]) -> PerSample:
        """Returns the levels of timesteps of training."""
        ...

    def signal_and_noise(self, levels: PerSample) -> tuple[PerSample, PerSample]:
        """Returns the factors of image and noise at levels."""
        ...

    def clean(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """Returns the clean latents that a network's prediction amounts to, without another step."""
        ...

    def noise(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """Returns the noise that a network's prediction amounts to."""
        ...

    def target(self, clean: Latents, noise: Latents, levels: PerSample) -> Latents:
        """Returns what the network should predict for clean latents that were noised."""
        ...

    def direction(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """Returns a prediction in the units in which errors weigh alike at all levels: noise, or a flow's velocity."""
        ...

    def direction_of(self, clean: Latents, noise: Latents) -> Latents:
        """Returns the same of latents and the noise that was added to them."""
        ...

    def noise_scale(self, levels: PerSample) -> PerSample:
        """Returns by what a difference of two predictions is multiplied to be a difference of noise."""
        ...

    def mean_and_std(
        self, latents: Latents, prediction: Latents, plan: Plan, steps: Int[Tensor, " batch"], eta: float
    ) -> tuple[Latents, PerSample]:
        """Returns the Gaussian of one step of each sample."""
        ...

    @property
    def reverses_noising(self) -> bool:
        """Whether a step with eta 1 draws from where `noising` may have come from."""
        ...

    def noising(self, latents: Latents, plan: Plan, step: int) -> tuple[Latents, PerSample]:
        """Returns the Gaussian of what a step of a sampling started from, given where it led: forward noising."""
        ...

    def scales(self, plan: Plan, eta: float) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
        """Returns the standard deviation of each step, and by how much its mean follows the prediction; in float64."""
        ...


def add_noise(process: Process, clean: Latents, noise: Latents, levels: PerSample) -> Latents:
    """Returns latents noised forward to levels."""
    signal, share = (factor.view(-1, 1, 1, 1) for factor in process.signal_and_noise(levels))
    return signal * clean + share * noise


class Diffusion:
    """Denoising by DDIM, of which ancestral sampling is eta = 1; a `Process`.

    Args:
        config: The scheduler's configuration.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.prediction_type = cast(PredictionType, config.get("prediction_type", "epsilon"))
        self._alphas = ddim.cumulative_alphas(config)
        self._plans: dict[tuple[int, torch.device], Plan] = {}

    @property
    def num_timesteps(self) -> int:
        """How many timesteps training had."""
        return len(self._alphas)

    def plan(self, steps: int, size: Size, device: torch.device) -> Plan:
        """See `Process`; the size does not matter, and levels are copied to a device once."""
        if (steps, device) not in self._plans:
            self._plans[steps, device] = Plan(*(part.to(device) for part in ddim.schedule(self.config, steps)))
        return self._plans[steps, device]

    def stochastic_steps(self, steps: int, eta: float) -> tuple[int, ...]:
        """See `Process`; all of them."""
        check_noise(eta)
        if int(self.plan(steps, (0, 0), torch.device("cpu")).timesteps[-1]) == 0:
            spacing = self.config.get("timestep_spacing")
            raise ValueError(
                f"the last step must start above timestep 0 to have a log-probability, got 0 from steps={steps} and "
                f"the checkpoint's timestep_spacing={spacing!r}"
            )
        return tuple(range(steps))

    def trained_steps(self, steps: int, eta: float) -> tuple[int, ...]:
        """See `Process`; all of them."""
        return self.stochastic_steps(steps, eta)

    def levels(self, timesteps: Shaped[Tensor, " batch"]) -> PerSample:
        """See `Process`; cumulative alphas, which are copied to a device once."""
        if self._alphas.device != timesteps.device:
            self._alphas = self._alphas.to(timesteps.device)
        return self._alphas[timesteps]

    def signal_and_noise(self, levels: PerSample) -> tuple[PerSample, PerSample]:
        """See `Process`."""
        return levels.sqrt(), (1 - levels).sqrt()

    def clean(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """See `Process`."""
        return ddim.predict_clean(latents, prediction, levels, self.prediction_type)

    def noise(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """See `Process`."""
        return ddim.predict_epsilon(latents, prediction, levels, self.prediction_type)

    def target(self, clean: Latents, noise: Latents, levels: PerSample) -> Latents:
        """See `Process`."""
        return ddim.prediction_target(clean, noise, levels, self.prediction_type)

    def direction(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """See `Process`; the noise."""
        return self.noise(latents, prediction, levels)

    def direction_of(self, clean: Latents, noise: Latents) -> Latents:
        """See `Process`; the noise."""
        return noise

    def noise_scale(self, levels: PerSample) -> PerSample:
        """See `Process`."""
        return ddim.noise_scale(levels, self.prediction_type)

    def mean_and_std(
        self, latents: Latents, prediction: Latents, plan: Plan, steps: Int[Tensor, " batch"], eta: float
    ) -> tuple[Latents, PerSample]:
        """See `Process`."""
        levels = plan.levels[steps], plan.next_levels[steps]
        return ddim.ddim_mean_and_std(latents, prediction, *levels, eta=eta, prediction_type=self.prediction_type)

    @property
    def reverses_noising(self) -> bool:
        """See `Process`; it always does."""
        return True

    def noising(self, latents: Latents, plan: Plan, step: int) -> tuple[Latents, PerSample]:
        """See `Process`."""
        return ddim.noising_mean_and_std(latents, *_levels_of(plan, step, latents))

    def scales(self, plan: Plan, eta: float) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
        """See `Process`."""
        levels = plan.levels.double(), plan.next_levels.double()
        blank = levels[0].new_zeros(len(plan.levels), 1, 1, 1)
        _, std = ddim.ddim_mean_and_std(blank, blank, *levels, eta=eta, prediction_type=self.prediction_type)
        return std, ddim.mean_sensitivity(*levels, eta=eta, prediction_type=self.prediction_type)


class RectifiedFlow:
    """Straight ways from noise to images, as Stable Diffusion 3 and FLUX have them; a `Process`.

    Args:
        config: Of the checkpoint's scheduler.
        chain: Which noise a stochastic step adds, see `flow`.
        patch: Side of the square of latents that the network reads as one token.
        even: Whether the unshifted levels are evenly spaced down to 1 / steps, see `flow.flow_schedule`.
    """

    prediction_type = "velocity"
    num_timesteps = 1000

    def __init__(self, config: Mapping[str, Any], *, chain: Chain = "sde", patch: int = 2, even: bool) -> None:
        self.config, self.chain, self.patch, self.even = dict(config), chain, patch, even
        self._plans: dict[tuple[int, int, torch.device], Plan] = {}

    def plan(self, steps: int, size: Size, device: torch.device) -> Plan:
        """See `Process`."""
        tokens = (size[0] // self.patch) * (size[1] // self.patch)
        if (steps, tokens, device) not in self._plans:
            found = flow.flow_schedule(self.config, steps, tokens=tokens, even=self.even)
            self._plans[steps, tokens, device] = Plan(*(part.to(device) for part in found))
        return self._plans[steps, tokens, device]

    def stochastic_steps(self, steps: int, eta: float) -> tuple[int, ...]:
        """See `Process`; all of them, but for the last one of cps and of ancestral."""
        check_noise(eta)
        check_steps(steps)
        return tuple(range(steps - 1 if self.chain in ("cps", "ancestral") else steps))

    def trained_steps(self, steps: int, eta: float) -> tuple[int, ...]:
        """See `Process`; all but the last, whose deviation is tiny or none: Flow-GRPO leaves it out, too."""
        if steps < 2:
            raise ValueError(f"steps must be at least 2 to learn from any but the last, got {steps}")
        return tuple(step for step in self.stochastic_steps(steps, eta) if step < steps - 1)

    def levels(self, timesteps: Shaped[Tensor, " batch"]) -> PerSample:
        """See `Process`; shares of the noise, from 0 at an image to 1."""
        return timesteps / self.num_timesteps

    def signal_and_noise(self, levels: PerSample) -> tuple[PerSample, PerSample]:
        """See `Process`."""
        return 1 - levels, levels

    def clean(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """See `Process`."""
        return flow.clean_of(latents, prediction, levels)

    def noise(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """See `Process`."""
        return flow.noise_of(latents, prediction, levels)

    def target(self, clean: Latents, noise: Latents, levels: PerSample) -> Latents:
        """See `Process`; the velocity."""
        return noise - clean

    def direction(self, latents: Latents, prediction: Latents, levels: PerSample) -> Latents:
        """See `Process`; the velocity: an error of the noise is 1 - s times one of it, and tells nothing at s = 1."""
        return prediction

    def direction_of(self, clean: Latents, noise: Latents) -> Latents:
        """See `Process`; the velocity."""
        return noise - clean

    def noise_scale(self, levels: PerSample) -> PerSample:
        """See `Process`."""
        return 1 - levels

    def mean_and_std(
        self, latents: Latents, prediction: Latents, plan: Plan, steps: Int[Tensor, " batch"], eta: float
    ) -> tuple[Latents, PerSample]:
        """See `Process`."""
        levels = plan.levels[steps], plan.next_levels[steps]
        return flow.flow_mean_and_std(latents, prediction, *levels, **self._noise_added(plan, eta))

    @property
    def reverses_noising(self) -> bool:
        """See `Process`; the ancestral chain does."""
        return self.chain == "ancestral"

    def noising(self, latents: Latents, plan: Plan, step: int) -> tuple[Latents, PerSample]:
        """See `Process`."""
        return flow.noising_mean_and_std(latents, *_levels_of(plan, step, latents))

    def scales(self, plan: Plan, eta: float) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
        """See `Process`."""
        levels, added = (plan.levels.double(), plan.next_levels.double()), self._noise_added(plan, eta)
        std, _ = flow.deviation_and_direction(*levels, **added)
        return std, flow.mean_slope(*levels, **added)

    def _noise_added(self, plan: Plan, eta: float) -> dict[str, Any]:
        return {"eta": eta, "chain": self.chain, "second_level": plan.next_levels[0]}


def _levels_of(plan: Plan, step: int, latents: Latents) -> tuple[PerSample, PerSample]:
    """Returns the levels before and after a step, for each of some latents."""
    return plan.levels[step].expand(len(latents)), plan.next_levels[step].expand(len(latents))


def check_steps(steps: int) -> None:
    """Checks a number of steps.

    Raises:
        ValueError: It is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def check_chosen(stochastic: Sequence[int], possible: Sequence[int]) -> frozenset[int]:
    """Checks which steps are to have a density, and returns them.

    Raises:
        ValueError: One of them cannot have one.
    """
    for step in stochastic:
        if step not in possible:
            raise ValueError(f"step {step} must have a density, and only {list(possible)} can have one")
    return frozenset(stochastic)


def check_eta(eta: float) -> None:
    """Checks the share of the noise of ancestral sampling.

    Raises:
        ValueError: It is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")


def check_noise(eta: float) -> None:
    """Checks that steps have a density.

    Raises:
        ValueError: `eta` is not in (0, 1].
    """
    check_eta(eta)
    if eta == 0:
        raise ValueError("eta must be above 0 for log-probabilities, as a deterministic step has none, got 0")


def check_step(step: int, steps: int) -> None:
    """Checks the index of a step.

    Raises:
        ValueError: There is no such step.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be from 0 to {steps - 1}, the last of {steps} steps, got {step}")


def check_span(start: int, until: int | None, steps: int, *, given: bool) -> None:
    """Checks which steps are to be taken: those from `start` on and before `until`, or to the end.

    Raises:
        ValueError: There are no such steps, or `start` is above 0 and the latents before it are not `given`.
    """
    if until is not None and not 0 <= until <= steps:
        raise ValueError(f"until must be from 0 to steps={steps}, got {until}")
    last = steps if until is None else until
    if not 0 <= start <= last:
        raise ValueError(f"start must be from 0 to {last}, where sampling ends, got {start}")
    if start > 0 and not given:
        raise ValueError(f"latents must be given with start={start}, got None")
