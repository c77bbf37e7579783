"""Settings of DDPO."""

from typing import Literal

from overpaint.settings import AnyFloat, Count, Field, Index, settings

from .critic import CriticConfig


@settings
class DDPOConfig:
    """What DDPO does in a round; by default the authors' settings for compressibility.

    Source: Black et al. (2023), https://arxiv.org/abs/2305.13301, and kvablack/ddpo-pytorch, `config/`.
    """

    estimator: Literal["importance", "score"] = "importance"
    """The clipped importance-sampled estimator (DDPO-IS), or the score function (DDPO-SF), which is right for one
    update a round only."""

    samples_per_round: int = Field(256, ge=1)
    """Images that are drawn and scored in a round, over all processes."""

    updates_per_round: int = Field(4, ge=1)
    """Updates a round, each on an equal part of its samples. The authors take 2 for aesthetics and alignment."""

    inner_epochs: int = Field(1, ge=1)
    """Passes over a round's samples, each with `updates_per_round` updates and its pairs drawn anew."""

    sampling_batch_size: int = Field(8, ge=1)
    """Images that a process draws at a time."""

    minibatch_size: int = Field(8, ge=1)
    """Pairs of sample and step that go through the UNet at a time in an update. The gradient is the same for any; where
    it equals `sampling_batch_size`, old log-probabilities are those of the rollout to the last bit."""

    steps: int = Field(50, ge=1)
    """Denoising steps of an image."""

    height: int | None = Field(None, ge=1)
    """Height of the images in pixels, a multiple of the VAE's factor (8 for Stable Diffusion); None is the size of
    the model's training. Held-out images have it too."""

    width: int | None = Field(None, ge=1)
    """Width of the images, likewise."""

    guidance_scale: float = Field(5.0, ge=0)
    """Classifier-free guidance, in sampling and in the update alike; other than 1, UNet calls have twice the batch."""

    eta: float = Field(1.0, gt=0, le=1)
    """Noise of the rollout in (0, 1]; 1 is the authors' ancestral sampling."""

    clip_range: float = Field(1e-4, gt=0, lt=1)
    """Distance from 1 at which ratios are clipped. It belongs to log-probabilities that are means over the latent."""

    baseline: Literal["prompt", "group", "centred", "round", "critic"] = "prompt"
    """What rewards are compared with: earlier ones of the same prompt; those of the same prompt in this round, which
    needs `images_per_prompt`, divided by their own standard deviation ("group") or by that of the whole round
    ("centred"); all of this round; or, at each step, what a critic expects of the state before it."""

    critic: CriticConfig = CriticConfig()
    """How the critic is built and learns; only with the baseline "critic"."""

    images_per_prompt: int = Field(1, ge=1)
    """Images drawn for each prompt that a round draws."""

    buffer_size: int = Field(32, ge=1)
    """Rewards that are remembered of each prompt; 16 or 32 in the authors' code. Only with the baseline "prompt"."""

    min_count: int = Field(16, ge=1)
    """Remembered rewards of a prompt below which the round's mean and standard deviation are taken instead."""

    max_advantage: AnyFloat = Field(5.0, gt=0)
    """Advantages are clipped to this distance from 0, in standard deviations."""

    step_weights: Literal["equal", "signal"] = "equal"
    """Weight of each denoising step in the loss: the same for all, as in the paper, or by how much a step tells about
    the reward, see `signal_weights`."""

    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of each sample's steps that an update trains on, in (0, 1]: drawn anew for each sample with equal weights,
    and otherwise the steps that weigh most."""

    window: int = Field(0, ge=0)
    """Steps in a row, at a place that each round draws anew, that alone are stochastic and trained on; 0 is all steps.
    The others of a sample go where they lead without noise. Source: Flow-GRPO-Fast in yifan123/flow_grpo, with 2 or 3;
    MixGRPO, https://arxiv.org/abs/2507.21802, whose window slides."""

    window_span: float = Field(0.5, gt=0, le=1)
    """Share of the steps, from noise on, that a window lies in."""

    ratio: Literal["plain", "guard"] = "plain"
    """What is clipped: the ratio of probabilities, or, of a flow, one that is centred and has one scale at all steps:
    GRPO-Guard, https://arxiv.org/abs/2510.22319, with a clip range of 2e-6 to 4e-6. Its loss is divided by the step's
    length. Departure: the centre is each sample's own, and not the mean over the minibatch."""

    kl: Literal["step", "velocity"] = "step"
    """The divergence from the reference policy: of the Gaussians of a step, which grows without bound where a step has
    little noise; or the mean squared difference of the network's predictions. Source of the latter: DiffusionNFT,
    https://arxiv.org/abs/2509.16117."""

    kl_weight: float = Field(0.0, ge=0)
    """Weight of the divergence of each step from the reference policy's (DPOK); other than 0, it costs a further UNet
    call without gradient for each."""

    erasure_samples_per_round: int = Field(64, ge=1)
    """Images of the concept that are drawn beside the others in a round; only with a constraint."""

    evaluate_every: int = Field(10, ge=1)
    """Rounds between two evaluations of the held-out prompts, if there are any."""

    patience: int = Field(0, ge=0)
    """Evaluations in a row with the trained reward above its start and the held-out one below its best, after which
    training stops; 0 never stops. Needs held-out prompts."""

    kl_every: int = Field(1, ge=1)
    """Rounds between two measurements of the divergence from the reference policy, where it is not part of the loss."""

    pictures_every: int = Field(1, ge=1)
    """Rounds between two grids of pictures with prompts and rewards."""

    def __post_init__(self) -> None:
        """Checks what joins several fields."""
        count, updates, images = self.samples_per_round, self.updates_per_round, self.images_per_prompt
        if self.estimator == "score" and updates != 1:
            raise ValueError(f"updates_per_round must be 1 with 'score', got {updates}")
        if self.estimator == "score" and self.inner_epochs != 1:
            raise ValueError(f"inner_epochs must be 1 with 'score', got {self.inner_epochs}")
        if count % updates:
            raise ValueError(f"samples_per_round must divide evenly among updates_per_round={updates}, got {count}")
        if count % images:
            raise ValueError(f"samples_per_round must divide by images_per_prompt={images}, got {count}")
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count must be at most buffer_size={self.buffer_size}, got {self.min_count}")
        if self.baseline in ("group", "centred") and images < 2:
            raise ValueError(f"images_per_prompt must be at least 2 with {self.baseline!r}, got {images}")
        if self.window > self.steps:
            raise ValueError(f"window must be at most steps={self.steps}, got {self.window}")
        if self.window and self.step_weights != "equal":
            raise ValueError(f"window must be 0 with step_weights {self.step_weights!r}, got {self.window}")
        if self.ratio == "guard" and self.estimator != "importance":
            raise ValueError(f"ratio must be 'plain' with the estimator {self.estimator!r}, got 'guard'")

    def trained_of(self, possible: Count) -> int:
        """Returns how many steps of each sample an update trains on, of those that it can or of a window of them."""
        return max(1, round((self.window or possible) * self.timestep_fraction))

    def check_shares(
        self, processes: Count, *, trained_steps: Index, concept_images: Index, with_erasure: bool
    ) -> None:
        """Checks that a round divides evenly among processes, updates and batches.

        Args:
            processes: How many there are.
            trained_steps: Steps of each sample that an update trains on.
            concept_images: Images of the concept that a round draws.
            with_erasure: Whether there is an erasure constraint, on images or not.

        Raises:
            ValueError: It does not.
        """
        updates, images = self.updates_per_round, self.images_per_prompt
        names = ("samples_per_round", "erasure_samples_per_round") if with_erasure else ("samples_per_round",)
        for name in names:
            count = getattr(self, name)
            if count % (updates * processes):
                raise ValueError(
                    f"DDPOConfig.{name} must divide evenly among updates_per_round={updates} times {processes} "
                    f"processes, got {count}"
                )
            if count % images:
                raise ValueError(f"DDPOConfig.{name} must divide by images_per_prompt={images}, got {count}")
        samples = (self.samples_per_round + concept_images) // processes
        if samples % self.sampling_batch_size:
            raise ValueError(
                f"DDPOConfig.sampling_batch_size must divide the {samples} samples that a process draws in a round, "
                f"got {self.sampling_batch_size}"
            )
        pairs = samples // updates * trained_steps
        if pairs % self.minibatch_size:
            raise ValueError(
                f"DDPOConfig.minibatch_size must divide the {pairs} pairs of sample and step that a process trains on "
                f"in an update, got {self.minibatch_size}"
            )
