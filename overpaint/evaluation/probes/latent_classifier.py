"""A classifier of noised latents: does the picture beneath the noise show the concept?

f(x, t) = W_2 drop(SiLU(W_1 drop(SiLU(A x + B [√ᾱ_t, √(1-ᾱ_t)])))), with biases; a logit. Trained with the binary
cross-entropy, in which pictures of the concept weigh as much together as the others, on noised copies at timesteps

    t = ⌊(T-1) u^(1/3)⌋,      u uniform in [0, 1): the noisier, the more of them

Source: "When are concepts erased" (2025), https://arxiv.org/abs/2505.17013, written from the procedure.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Count, Field, settings
from overpaint.training.logging import progress_bar

VALIDATION_SHARE = 0.1
VALIDATION_COPIES = 3
"""Noised copies of a picture whose logits are averaged in validation."""


@settings
class LatentClassifierConfig:
    """Settings of the classifier and of its training; by default those of "When are concepts erased"."""

    widths: tuple[Count, Count] = (1024, 512)
    """Units of the two hidden layers."""

    dropout: float = Field(0.3, ge=0, lt=1)
    """Share of the units that are left out in training."""

    epochs: int = Field(70, ge=1)
    """Times that all pictures are gone through; the weights with the lowest loss on a held-out tenth are kept."""

    batch_size: int = Field(8, ge=1)
    """Pictures of an update."""

    copies: int = Field(7, ge=1)
    """Noised copies of each picture in an update."""

    timestep_power: float = Field(3.0, gt=0)
    """1 draws timesteps evenly; the higher, the noisier."""

    learning_rate: float = Field(1e-4, gt=0)
    """Of AdamW."""

    weight_decay: float = Field(1e-3, ge=0)
    """Of AdamW."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""


class LatentClassifier(nn.Module):
    """Tells from noised latents whether the picture shows something.

    Args:
        size: Numbers in the latents of a picture.
        config: Settings.
    """

    def __init__(self, size: int, config: LatentClassifierConfig) -> None:
        super().__init__()
        first, second = config.widths
        self.of_latents = nn.Linear(size, first)
        self.of_level = nn.Linear(2, first)
        self.head = nn.Sequential(
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(first, second),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(second, 1),
        )

    def forward(self, latents: Latents, alphas: PerSample) -> PerSample:
        """Returns the logit of each sample, by its latents and their cumulative alpha."""
        level = torch.stack([alphas.sqrt(), (1 - alphas).sqrt()], dim=1)
        return self.head(self.of_latents(latents.flatten(1)) + self.of_level(level))[:, 0]

    def push(self, latents: Latents, alphas: PerSample) -> Latents:
        """Returns what guidance of strength 1 adds to the predicted noise: -√(1-ᾱ) ∇_x log sigmoid(f(x, t))."""
        with torch.enable_grad():
            seen = latents.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.logsigmoid(self(seen, alphas)).sum(), [seen])
        return -(1 - alphas).sqrt().view(-1, 1, 1, 1) * gradient


def train_classifier(
    policy: DiffusionPolicy,
    shown: Float[Tensor, "shown channels h w"],
    others: Float[Tensor, "others channels h w"],
    config: LatentClassifierConfig,
    *,
    seed: int,
    progress: bool = True,
) -> LatentClassifier:
    """Trains a classifier, frozen afterwards, that tells some pictures from others.

    Args:
        policy: Has the noise schedule; the classifier is trained on its device.
        shown: Latents of pictures that show what is looked for, at least two.
        others: Latents of pictures that do not, at least two.
        config: Settings.
        seed: Of weights, noise and order.
        progress: Whether a bar is shown.

    Raises:
        ValueError: There are too few latents.
    """
    if min(len(shown), len(others)) < 2:
        raise ValueError(f"a classifier needs two pictures of each kind, got {len(shown)} and {len(others)}")
    device = policy.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed % 2**63)
        classifier = LatentClassifier(shown[0].numel(), config).to(device)
        _fit(classifier, policy, shown.to(device), others.to(device), config, progress)
    return classifier.eval().requires_grad_(False)


def _fit(
    classifier: LatentClassifier,
    policy: DiffusionPolicy,
    shown: Float[Tensor, "shown channels h w"],
    others: Float[Tensor, "others channels h w"],
    config: LatentClassifierConfig,
    progress: bool,
) -> None:
    """Trains, and puts the best weights in place; everything random comes from torch's global generators."""
    latents = torch.cat([shown, others])
    labels = torch.arange(len(latents), device=latents.device) < len(shown)
    held_out = torch.cat([_tenth(len(shown)), len(shown) + _tenth(len(others))]).to(latents.device)
    training = torch.ones(len(latents), dtype=torch.bool)
    training[held_out.cpu()] = False
    learned = training.nonzero()[:, 0].to(latents.device)
    weight = latents.new_tensor(len(others) / len(shown))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    lowest, best = float("inf"), classifier.state_dict()
    for _ in progress_bar(range(config.epochs), desc="training the classifier", shown=progress, leave=False):
        classifier.train()
        for part in learned[torch.randperm(len(learned)).to(learned.device)].split(config.batch_size):
            rows = part.repeat(config.copies)
            loss = F.binary_cross_entropy_with_logits(
                _logits(classifier, policy, latents[rows], config), labels[rows].float(), pos_weight=weight
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(classifier.parameters(), config.max_grad_norm)
            optimizer.step()
        found = _validation_loss(classifier.eval(), policy, latents[held_out], labels[held_out], weight, config)
        if found < lowest:
            lowest, best = found, {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.load_state_dict(best)


def _tenth(count: int) -> Int[Tensor, " held_out"]:
    """Returns the places that are held out of so many: a tenth, and at least one."""
    return torch.randperm(count)[: max(1, int(VALIDATION_SHARE * count))]


def _logits(
    classifier: LatentClassifier, policy: DiffusionPolicy, latents: Latents, config: LatentClassifierConfig
) -> PerSample:
    """Returns the logits of latents that are noised to timesteps drawn for each."""
    uniform = torch.rand(len(latents), device=latents.device)
    timesteps = drawn_timesteps(uniform, policy.num_timesteps, config.timestep_power)
    noised = policy.add_noise(latents, torch.randn_like(latents), timesteps)
    return classifier(noised, policy.process.levels(timesteps))


def drawn_timesteps(uniform: PerSample, total: int, power: float) -> Int[Tensor, " batch"]:
    """Returns timesteps of training from numbers that are uniform in [0, 1)."""
    return ((total - 1) * uniform ** (1 / power)).long()


@torch.no_grad()
def _validation_loss(
    classifier: LatentClassifier,
    policy: DiffusionPolicy,
    latents: Latents,
    labels: Bool[Tensor, " batch"],
    weight: Float[Tensor, ""],
    config: LatentClassifierConfig,
) -> float:
    logits = torch.stack([_logits(classifier, policy, latents, config) for _ in range(VALIDATION_COPIES)]).mean(dim=0)
    return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weight).item()
