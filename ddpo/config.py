"""Settings of DDPO."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from overpaint.training import require

ESTIMATORS = ("importance", "score")
BASELINES = ("prompt", "group", "centred", "round")
STEP_WEIGHTS = ("equal", "signal")

_require = partial(require, "DDPOConfig")


@dataclass(frozen=True, kw_only=True)
class DDPOConfig:
    """What DDPO does in a round; by default the authors' settings for compressibility.

    Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, and kvablack/ddpo-pytorch, `config/`.
    """

    estimator: Literal["importance", "score"] = "importance"
    """The clipped importance-sampled estimator (DDPO-IS), or the score function (DDPO-SF), which is right for one
    update a round only."""

    samples_per_round: int = 256
    """Images that are drawn and graded in a round, over all processes."""

    updates_per_round: int = 4
    """Updates a round, each on an equal part of its samples. The authors take 2 for aesthetics and alignment."""

    sampling_batch_size: int = 8
    """Images that a process draws at a time."""

    minibatch_size: int = 8
    """Pairs of sample and step that go through the UNet at a time in an update. The gradient is the same for any; where
    it equals `sampling_batch_size`, old log-probabilities are those of the rollout to the last bit."""

    steps: int = 50
    """Denoising steps of an image."""

    guidance_scale: float = 5.0
    """Classifier-free guidance, in sampling and in the update alike; other than 1, UNet calls have twice the batch."""

    eta: float = 1.0
    """Noise of the rollout in (0, 1]; 1 is the authors' ancestral sampling."""

    clip_range: float = 1e-4
    """Distance from 1 at which ratios are clipped. It belongs to log-probabilities that are means over the latent."""

    baseline: Literal["prompt", "group", "centred", "round"] = "prompt"
    """What rewards are compared with: earlier ones of the same prompt; those of the same prompt in this round, which
    needs `images_per_prompt`, divided by their own standard deviation ("group") or by that of the whole round
    ("centred"); or all of this round."""

    images_per_prompt: int = 1
    """Images drawn for each prompt that a round draws."""

    buffer_size: int = 32
    """Rewards that are remembered of each prompt; 16 or 32 in the authors' code. Only with the baseline "prompt"."""

    min_count: int = 16
    """Remembered rewards of a prompt below which the round's mean and standard deviation are taken instead."""

    max_advantage: float = 5.0
    """Advantages are clipped to this distance from 0, in standard deviations."""

    step_weights: Literal["equal", "signal"] = "equal"
    """Weight of each denoising step in the loss: the same for all, as in the paper, or by how much a step tells about
    the reward, see `signal_weights`."""

    timestep_fraction: float = 1.0
    """Share of each sample's steps that an update trains on, in (0, 1]: drawn anew for each sample with equal weights,
    and otherwise the steps that weigh most."""

    kl_weight: float = 0.0
    """Weight of the divergence of each step from the reference policy's (DPOK); other than 0, it costs a further UNet
    call without gradient for each."""

    erasure_samples_per_round: int = 64
    """Images of the concept that are drawn beside the others in a round; only with a constraint."""

    evaluate_every: int = 10
    """Rounds between two looks at the held-out prompts, if there are any."""

    patience: int = 0
    """Looks in a row with the trained reward above its start and the held-out one below its best, after which training
    stops; 0 never stops. Needs held-out prompts."""

    kl_every: int = 1
    """Rounds between two measurements of the divergence from the reference policy, where it is not part of the loss."""

    pictures_every: int = 1
    """Rounds between two grids of pictures with prompts and rewards."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: A field breaks its rule.
        """
        positive = (
            "samples_per_round", "updates_per_round", "sampling_batch_size", "minibatch_size", "steps",
            "images_per_prompt", "buffer_size", "min_count", "erasure_samples_per_round", "evaluate_every",
            "kl_every", "pictures_every",
        )  # fmt: skip
        for name in positive:
            _require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        _require(self.estimator in ESTIMATORS, "estimator", f"be one of {ESTIMATORS}", self.estimator)
        _require(self.baseline in BASELINES, "baseline", f"be one of {BASELINES}", self.baseline)
        _require(self.step_weights in STEP_WEIGHTS, "step_weights", f"be one of {STEP_WEIGHTS}", self.step_weights)
        if self.estimator == "score":
            _require(self.updates_per_round == 1, "updates_per_round", "be 1 with 'score'", self.updates_per_round)
        count, updates, images = self.samples_per_round, self.updates_per_round, self.images_per_prompt
        _require(count % updates == 0, "samples_per_round", f"divide evenly among updates_per_round={updates}", count)
        _require(count % images == 0, "samples_per_round", f"divide by images_per_prompt={images}", count)
        _require(
            self.min_count <= self.buffer_size,
            "min_count",
            f"be at most buffer_size={self.buffer_size}",
            self.min_count,
        )
        if self.baseline in ("group", "centred"):
            rule = f"be at least 2 with {self.baseline!r}"
            _require(self.images_per_prompt >= 2, "images_per_prompt", rule, self.images_per_prompt)
        _require(0 < self.eta <= 1, "eta", "be above 0, where steps have a density, and at most 1", self.eta)
        _require(0 < self.clip_range < 1, "clip_range", "lie between 0 and 1", self.clip_range)
        _require(self.max_advantage > 0, "max_advantage", "be positive", self.max_advantage)
        _require(0 < self.timestep_fraction <= 1, "timestep_fraction", "lie in (0, 1]", self.timestep_fraction)
        for name in ("guidance_scale", "kl_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "be finite and not negative", value)
        _require(self.patience >= 0, "patience", "not be negative", self.patience)

    @property
    def trained_steps(self) -> int:
        """Steps of each sample that an update trains on."""
        return max(1, round(self.steps * self.timestep_fraction))
