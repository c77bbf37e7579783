"""Classifier guidance, alone and with noise: a classifier of latents pulls pictures towards the concept.

    ε ← ε_guided - s √(1-ᾱ_t) ∇_x log sigmoid(f(x_t, t))

is the prediction that DDIM follows, where ε_guided is that of the prompt with classifier-free guidance, and a guard, at
work; with noise, the step is that of `noise` with v = 1. Source: "When are concepts erased" (2025),
https://arxiv.org/abs/2505.17013, classifier-guided probing, and Dhariwal and Nichol (2021),
https://arxiv.org/abs/2105.05233, algorithm 2. Every prompt is drawn with every strength s, alone, and with every pair
of s and η, with noise; the best picture counts.

Departures: theirs is trained on photographs of ImageNet; here the original model draws what the classifier learns, for
the concept's prompts and for benign ones, so that the probe needs nothing but the two models and the detector. Each way
of drawing has a seed of its own, as in `noise`.

Added here, and used in the tiny world: `fitted` draws with one way only, that which is the smallest that brings the
concept best into pictures of *benign* prompts by the original model; what is under test has no part in it. With the
concept's prompts the original shows it at any strength. Where no way brings anything, as on a floor, all are tried, and
the best picture counts: that floor is no lower than the floor of any one way.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Latents
from overpaint.settings import Distinct, Field, NonNegative, settings

from .latent_classifier import LatentClassifier, LatentClassifierConfig, train_classifier
from .noise import PAPER_ETAS, Way, draw_ways
from .probe import Attempt, Floor, Need, ProbeTask, best_of
from .seeds import seed_of


@settings
class ClassifierGuidanceConfig:
    """Settings of classifier guidance; by default those of "When are concepts erased"."""

    strengths: Distinct[NonNegative] = tuple(float(strength) for strength in range(25, 194, 7))
    """Strengths (s) without noise; 25 in their file, 24 in the paper."""

    noisy_strengths: Distinct[NonNegative] = (30.0, 50.0, 75.0, 125.0)
    """Strengths with noise; each is tried with each of `etas`."""

    etas: Distinct[NonNegative] = PAPER_ETAS
    """Shares of the noise of ancestral sampling (η), which may be above 1."""

    fitted: bool = False
    """Whether only the way is drawn that the original model chose; see the top of this file."""

    shown_pictures: int = Field(1300, ge=2)
    """Pictures of the concept that the classifier learns; theirs are about as many photographs of a class."""

    other_pictures: int = Field(5000, ge=2)
    """Pictures without it that the classifier learns."""

    classifier: LatentClassifierConfig = LatentClassifierConfig()
    """How it learns."""

    batch_size: int = Field(64, ge=1)
    """Pictures that are drawn together; results do not depend on it."""

    def __post_init__(self) -> None:
        """Checks that there is something to try."""
        if not self.strengths and not (self.noisy_strengths and self.etas):
            raise ValueError("strengths, or noisy_strengths and etas, must hold something, got neither")


class ClassifierGuidance:
    """Draws the concept's prompts with a classifier's help."""

    name: ClassVar[str] = "classifier-guidance"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")
    needs: ClassVar[tuple[Need, ...]] = ("diffusion",)

    def __init__(self, config: ClassifierGuidanceConfig | None = None) -> None:
        self.config = config or ClassifierGuidanceConfig()

    def prepare(self, task: ProbeTask) -> None:
        """Trains the classifier, and chooses the ways that are drawn."""
        for name in self._variants():
            self._chosen(name, task)

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Draws in the chosen ways: without noise, and with it."""
        found = []
        for name in self._variants():
            ways = self._chosen(name, task)
            candidates = self._drawn(policy, task, task.prompts, ways, name)
            images, best, scores = best_of(candidates, task.score)
            rates = [task.rate(one) for one in scores]
            strengths = [way.strength for way in ways]
            curve = [
                (strength, sum(values) / len(values))
                for strength in sorted(set(strengths))
                if (values := [rate for other, rate in zip(strengths, rates, strict=True) if other == strength])
            ]
            numbers = {"strength": strengths[0], "eta": ways[0].eta} if len(ways) == 1 else {}
            found.append(
                Attempt(name, images, best, mean_rate=sum(rates) / len(rates), numbers=numbers, curve=tuple(curve))
            )
        return found

    def _variants(self) -> dict[str, list[Way]]:
        """Returns all ways of each variant, weaker ones first."""
        cfg = self.config
        alone = [Way(0.0, purpose=f"{self.name} {s:g}", strength=s) for s in sorted(cfg.strengths)]
        noisy = [
            Way(eta, purpose=f"{self.name} {s:g} {eta:g}", strength=s)
            for s in sorted(cfg.noisy_strengths)
            for eta in sorted(cfg.etas)
        ]
        return {name: ways for name, ways in (("alone", alone), ("with noise", noisy)) if ways}

    def _chosen(self, name: str, task: ProbeTask) -> list[Way]:
        """Returns the ways of a variant that are drawn."""
        ways = self._variants()[name]
        if not self.config.fitted or len(ways) == 1:
            self._classifier(task)
            return ways

        def fit() -> list[Way]:
            candidates = self._drawn(task.original, task, task.benign, ways, f"fitting {name}")
            rates = [task.rate(task.score(images)) for images in candidates]
            return [ways[rates.index(max(rates))]] if max(rates) > 0 else ways

        return task.once(f"{self.name}: {name}, {self.config}", fit)

    def _drawn(
        self, policy: DiffusionPolicy, task: ProbeTask, prompts: Sequence[str], ways: list[Way], desc: str
    ) -> list[torch.Tensor]:
        classifier = self._classifier(task).to(policy.device)
        return draw_ways(
            policy, task, prompts, ways, push=classifier.push, batch_size=self.config.batch_size, desc=desc
        )

    def _classifier(self, task: ProbeTask) -> LatentClassifier:
        """Returns the classifier of a task, trained on what its original model draws."""
        cfg = self.config

        def trained() -> LatentClassifier:
            if task.examples is None:
                shown = drawn_latents(task, task.prompts, cfg.shown_pictures, "shown", cfg.batch_size)
            else:
                shown = task.original.encode_images(task.examples(cfg.shown_pictures)[1])
            others = drawn_latents(task, task.benign, cfg.other_pictures, "other", cfg.batch_size)
            seed = seed_of("classifier", task.seeds[0])
            return train_classifier(task.original, shown, others, cfg.classifier, seed=seed, progress=task.progress)

        about = cfg.shown_pictures, cfg.other_pictures, cfg.classifier
        return task.once(f"classifier: {about}", trained)


def drawn_latents(task: ProbeTask, prompts: Sequence[str], count: int, purpose: str, batch_size: int) -> Latents:
    """Returns latents that the original model draws for prompts in turn, with seeds of their own."""
    policy, parts = task.original, []
    for first in range(0, count, batch_size):
        places = range(first, min(first + batch_size, count))
        texts = [prompts[place % len(prompts)] for place in places]
        seeds = [seed_of(f"classifier {purpose} {place}", task.seeds[0]) for place in places]
        latents = policy.sample(
            policy.encode(texts), steps=task.steps, guidance=task.guidance, seeds=seeds, height=task.size,
            width=task.size,
        )  # fmt: skip
        parts.append(latents)
    return torch.cat(parts)


TINY = ClassifierGuidanceConfig(
    strengths=(30.0,),
    noisy_strengths=(30.0,),
    etas=(1.34,),
    fitted=True,
    shown_pictures=96,
    other_pictures=96,
    classifier=LatentClassifierConfig(widths=(128, 64), learning_rate=1e-3),
)
"""For the tiny world. With noise, 40 brings no more into pictures of benign prompts, and 60 spoils others."""
