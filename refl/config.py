"""Settings of ReFL."""

import math
from dataclasses import dataclass
from functools import partial

from overpaint.training import require

_require = partial(require, "ReFLConfig")


@dataclass(frozen=True, kw_only=True)
class ReFLConfig:
    """What ReFL does in an iteration; the authors' numbers by default, but for the pretraining term.

    Source: Xu et al. (2023), https://arxiv.org/abs/2304.05977, Algorithm 1, and THUDM/ImageReward, `ReFL.py`.
    """

    batch_size: int = 64
    """Prompts per iteration, over all processes."""

    micro_batch_size: int = 4
    """Samples of a term that a process holds in memory at a time. The gradient is the same for any, but for an erasure
    objective that draws one denoising step for each batch that it is given."""

    steps: int = 40
    """Denoising steps of a whole image."""

    first_graded_step: int = 30
    """Earliest step, counted from noise, that the reward may be backpropagated through."""

    last_graded_step: int = 39
    """Latest such step. One step for each iteration is drawn uniformly between the two, both included."""

    truncation_steps: int = 1
    """Steps that carry gradient, the graded one being the last of them; 1 is ReFL, K is DRaFT-K (Clark et al. 2023,
    https://arxiv.org/abs/2309.17400, there always at the end) and truncated AlignProp (Prabhudesai et al. 2023)."""

    low_variance_noises: int = 0
    """Times that a finished image is noised again to the graded step and its reward averaged; 0 is off. DRaFT-LV of
    the same paper, which trains through the last step; needs truncation_steps = 1. That many more samples are in memory
    than micro_batch_size says."""

    eta: float = 1.0
    """Noise of the rollout in [0, 1]; 1 is the authors' ancestral sampling, 0 is deterministic."""

    guidance_scale: float = 1.0
    """Classifier-free guidance in rollout and graded step; 1, as the authors have it, is none."""

    reward_scale: float = 1e-3
    """Weight of the reward's term (lambda); against the pretraining term it says how hard the reward pulls."""

    reward_margin: float = 2.0
    """Reward, in the reward's own units, above which a sample stops pulling."""

    pretraining_weight: float = 1.0
    """Weight of the denoising loss on image and caption pairs, which is 1 in the paper. The authors' code is 0."""

    pretraining_batch_size: int = 64
    """Pairs per iteration, over all processes."""

    erasure_batch_size: int = 64
    """Prompts of the concept per iteration, over all processes; used only with an erasure constraint."""

    evaluate_every: int = 20
    """Iterations between two looks, at the distance from the reference and at the held-out prompts if there are any."""

    patience: int = 0
    """Looks in a row with the trained reward above its start and the held-out one below its best, after which training
    stops; 0 never stops. Needs held-out prompts."""

    checkpoint_steps: bool = False
    """Recompute each graded denoising step in the backward pass instead of keeping its activations (AlignProp)."""

    def __post_init__(self) -> None:
        """Checks every field.

        Raises:
            ValueError: A field breaks its rule.
        """
        positive = (
            "batch_size", "micro_batch_size", "steps", "truncation_steps", "pretraining_batch_size",
            "erasure_batch_size", "evaluate_every",
        )  # fmt: skip
        for name in positive:
            _require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))
        for name in ("low_variance_noises", "patience"):
            _require(getattr(self, name) >= 0, name, "not be negative", getattr(self, name))
        first, last, graded = self.first_graded_step, self.last_graded_step, self.truncation_steps
        _require(0 <= last < self.steps, "last_graded_step", f"lie in [0, steps={self.steps})", last)
        _require(0 <= first <= last, "first_graded_step", f"lie in [0, last_graded_step={last}]", first)
        _require(graded <= first + 1, "truncation_steps", f"be at most first_graded_step + 1 = {first + 1}", graded)
        if self.low_variance_noises:
            _require(graded == 1, "truncation_steps", "be 1 with low_variance_noises", graded)
        _require(0 <= self.eta <= 1, "eta", "lie in [0, 1]", self.eta)
        for name in ("guidance_scale", "pretraining_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, "be finite and not negative", value)
        _require(0 < self.reward_scale < math.inf, "reward_scale", "be finite and positive", self.reward_scale)
        _require(math.isfinite(self.reward_margin), "reward_margin", "be finite", self.reward_margin)
