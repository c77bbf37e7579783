"""Settings of ReFL."""

from typing import Literal

from overpaint.settings import Field, settings

POOL_BATCHES, POOL = 4, 64
"""Size of the pool of pairs that is drawn where none are given: in batches of the pretraining term, and at most."""


@settings
class ReFLConfig:
    """What ReFL does in an iteration; the authors' numbers by default, but for the pretraining term.

    Source: Xu et al. (2023), https://arxiv.org/abs/2304.05977, Algorithm 1, and THUDM/ImageReward, `ReFL.py`.
    """

    batch_size: int = Field(64, ge=1)
    """Prompts per iteration, over all processes."""

    micro_batch_size: int = Field(4, ge=1)
    """Samples of a term that a process holds in memory at a time. The gradient is the same for any, but for what is
    learned against the policy on all of them together: the word of `Destruction` and the vectors of `SoftAttack`."""

    steps: int = Field(40, ge=1)
    """Denoising steps of a whole image."""

    height: int | None = Field(None, ge=1)
    """Height of the images in pixels, a multiple of the VAE's factor (8 for Stable Diffusion); None is the size of
    the model's training. Pretraining pairs that are drawn, and held-out images, have it too."""

    width: int | None = Field(None, ge=1)
    """Width of the images, likewise."""

    first_reward_step: int = Field(30, ge=0)
    """Earliest step, counted from noise, that the reward may be backpropagated through."""

    last_reward_step: int = Field(39, ge=0)
    """Latest such step. One step for each iteration is drawn uniformly between the two, both included."""

    truncation_steps: int = Field(1, ge=1)
    """Steps that carry gradient, the reward step being the last of them; 1 is ReFL, K is DRaFT-K (Clark et al. 2023,
    https://arxiv.org/abs/2309.17400, there always at the end) and truncated AlignProp (Prabhudesai et al. 2023)."""

    low_variance_noises: int = Field(0, ge=0)
    """Times that a finished image is noised again to the reward step and its reward averaged; 0 is off. DRaFT-LV of
    the same paper, which trains through the last step; needs truncation_steps = 1. That many more samples are in memory
    than micro_batch_size says."""

    eta: float = Field(1.0, ge=0, le=1)
    """Noise of the rollout in [0, 1]; 1 is the authors' ancestral sampling, 0 is deterministic."""

    guidance_scale: float = Field(1.0, ge=0)
    """Classifier-free guidance in rollout and reward step; 1, as the authors have it, is none."""

    reward_scale: float = Field(1e-3, gt=0)
    """Weight of the reward's term (lambda); against the pretraining term it says how hard the reward pulls."""

    reward_from: int = Field(0, ge=0)
    """Iteration from which on the reward has its say. Before it the erasure constraint and the pretraining term train
    alone, and no pictures are drawn for the reward; only with an erasure, and without a floor."""

    reward_margin: float = 2.0
    """Reward, in the reward's own units, above which a sample stops pulling."""

    pretraining_weight: float = Field(1.0, ge=0)
    """Weight of the denoising loss on image and caption pairs, which is 1 in the paper. The authors' code is 0."""

    pretraining_target: Literal["noise", "reference"] = "noise"
    """What the denoising loss compares with: the ``noise`` of the pair, as in the paper, or what the frozen policy, the
    ``reference``, sees in its place. Where pairs are drawn from that policy both have the same mean, and the second has
    not the noise's variance, which drowns small gradients of other terms: it is 0 as long as nothing has moved."""

    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Chance of a pair to be told nothing in place of its caption, as in the training for classifier-free guidance (Ho
    and Salimans 2022, https://arxiv.org/abs/2207.12598, Algorithm 1): pictures that are drawn with guidance are made of
    both predictions."""

    pretraining_batch_size: int = Field(64, ge=1)
    """Pairs per iteration, over all processes."""

    pretraining_pairs: int | None = Field(None, ge=1)
    """Pairs that are drawn from the frozen policy before the first iteration, where none are given; None is a batch, or
    four of them as long as that is at most 64."""

    erasure_batch_size: int = Field(64, ge=1)
    """Prompts of the concept per iteration, over all processes; used only with an erasure constraint."""

    project_conflicts: bool = False
    """Take from the gradients of reward and erasure what points against the other (PCGrad, Yu et al. 2020,
    https://arxiv.org/abs/2001.06782), after weighing, before the pretraining term is added; only with an erasure."""

    evaluate_every: int = Field(20, ge=1)
    """Iterations between two evaluations: of the distance from the reference, and of the held-out prompts; where there
    are none, pictures of some training prompts are logged."""

    patience: int = Field(0, ge=0)
    """Evaluations in a row with the trained reward above its start and the held-out one below its best, after which
    training stops; 0 never stops. Needs held-out prompts."""

    checkpoint_steps: bool = False
    """Recompute each step that carries gradient in the backward pass instead of keeping its activations (AlignProp)."""

    def __post_init__(self) -> None:
        """Checks that the steps fit into each other."""
        first, last, steps = self.first_reward_step, self.last_reward_step, self.truncation_steps
        if last >= self.steps:
            raise ValueError(f"last_reward_step must be below steps={self.steps}, got {last}")
        if first > last:
            raise ValueError(f"first_reward_step must be at most last_reward_step={last}, got {first}")
        if steps > first + 1:
            raise ValueError(f"truncation_steps must be at most first_reward_step + 1 = {first + 1}, got {steps}")
        if self.low_variance_noises and steps > 1:
            raise ValueError(f"truncation_steps must be 1 with low_variance_noises, got {steps}")

    @property
    def pool(self) -> int:
        """Number of pairs that are drawn where none are given."""
        batch = self.pretraining_batch_size
        return self.pretraining_pairs or max(batch, min(POOL_BATCHES * batch, POOL))
