"""SAFREE: words that bring a concept are taken out of prompts, without training and without a change of weights.

Source: Yoon et al. (2024), https://arxiv.org/abs/2410.12761, written from its equations. The authors' code,
jaehong31/SAFREE at commit b8b2c3f, has no licence: none of it was read for this file; what it computes is known from
stored numbers (tests/golden/safree.json). See docs/erasure.md for each departure.
"""

import dataclasses
import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from overpaint.policy import ClassifierFree, DiffusionPolicy, Guidance, StepContext
from overpaint.policy.parts import Pipeline, UNet
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.types import Embeddings

from .concept import NUDITY, Concept, check_words
from .erased import Erasure
from .prompt_filter import PromptFilter, last_filtered_step
from .reattention import Reattention

NUDITY_CONCEPTS = (
    *("Sexual Acts", "Content Meant to Arouse Sexual Excitement", "Nudity", "Pornography", "Erotic Art", "Lustful"),
    *("Seductive", "Orgasmic", "Libido", "Kinky", "Sexual Orientation", "Sexual Attraction", "Sexual Intercourse"),
    *("Sexual Pleasure", "Sexual Fantasy", "Carnal Desires", "Sexual Gratification"),
)
"""The authors' list for nudity."""

PUBLISHED_STEPS = 50
"""Denoising steps of the authors' runs, in which the number of filtered steps is counted."""

SETTINGS_FILE = "safree.json"


@dataclass(frozen=True, kw_only=True)
class SAFREEConfig:
    """Settings of SAFREE; the authors' for nudity by default. How strongly to act is an argument of `SAFREE.erase`."""

    variant: Literal["paper", "released"] = "paper"
    """``released``: as the authors' code, in which latent re-attention does nothing, whatever the settings say."""

    concepts: tuple[str, ...] | None = None
    """Texts of what is kept out. None takes the authors' list for `NUDITY`, and else the concept's phrases."""

    alpha: float = 0.01
    """A token is a trigger if without it the prompt is farther from the concepts than without the other tokens, by
    this share."""

    filtered_steps: int = 10
    """How many of 50 denoising steps see the filtered prompt, at the most (the paper's upper limit of t')."""

    steepness: float = 2.5
    """How sharply the number of filtered steps grows with the change of the prompt (k); 3.5 for artists."""

    midpoint: float = 5.333
    """Ten times the change of the prompt at which half of them are filtered (t0); 5.5 for artists."""

    negative_prompt: bool = True
    """Whether guidance leads away from the joined concepts, in place of the empty prompt."""

    latent_reattention: bool = True
    """Whether low frequencies of the UNet's skip features are damped, see `erasure.reattention`."""

    coarse_factor: float = 0.9
    """Factor at the UNet's widest features, 1280 in Stable Diffusion v1 (s1)."""

    fine_factor: float = 0.2
    """Factor at the next width, 640 in Stable Diffusion v1 (s2)."""

    fourier_filter: Literal["scaled", "released"] = "scaled"
    """``scaled`` multiplies low frequencies by the factor; ``released`` puts the factor in their place, as the
    filter in the authors' code would."""

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "released"):
            raise ValueError(f"SAFREEConfig.variant must be 'paper' or 'released', got {self.variant!r}")
        if self.fourier_filter not in ("scaled", "released"):
            raise ValueError(f"SAFREEConfig.fourier_filter must be 'scaled' or 'released', got {self.fourier_filter!r}")
        if self.concepts is not None and (
            not isinstance(self.concepts, tuple) or not self.concepts or not all(text.strip() for text in self.concepts)
        ):
            raise ValueError(f"SAFREEConfig.concepts must be a tuple of texts, none blank, got {self.concepts!r}")
        for name in ("alpha", "filtered_steps", "steepness", "coarse_factor", "fine_factor"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"SAFREEConfig.{name} must be finite and at least 0, got {getattr(self, name)}")
        if not math.isfinite(self.midpoint):
            raise ValueError(f"SAFREEConfig.midpoint must be finite, got {self.midpoint}")

    @classmethod
    def tiny_world(cls) -> "SAFREEConfig":
        """Returns the settings for the tiny world's stripes, found by experiment.

        Each prompt is filtered all the way: of its 24 tokens the few that are not replaced bring stripes back in steps
        that are not. Re-attention is off: its four low frequencies are all there is of features of 2 x 2.
        """
        concepts = ("striped", "with stripes", "zebra", "in prison", "at the circus")
        return cls(concepts=concepts, alpha=0.05, filtered_steps=50, midpoint=3.0, latent_reattention=False)

    def last_step(self, change: float, strength: float = 1.0) -> int:
        """Returns the index of the last of 50 steps that sees a prompt filtered, see `last_filtered_step`."""
        limit = strength * self.filtered_steps
        return last_filtered_step(change, limit=limit, steepness=self.steepness, midpoint=self.midpoint)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SAFREEConfig":
        """Returns the settings whose fields JSON holds."""
        fields: dict[str, Any] = {**saved, "concepts": tuple(saved["concepts"])}
        return cls(**fields)


class SAFREE:
    """Keeps a concept out of pictures by what it does to prompts while sampling.

    Args:
        config: Settings; the authors' for nudity by default.
    """

    name = "SAFREE"

    def __init__(self, config: SAFREEConfig | None = None) -> None:
        self.config = config or SAFREEConfig()

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: float = 1.0) -> Erasure:
        """Returns the guard against a concept. Nothing is computed before it is applied.

        Args:
            policy: Whose tokenizer has to take each of the concept's texts whole.
            concept: What is kept out of pictures.
            strength: Multiplies the upper limit of filtered steps, and up to 1 also how far guidance goes from the
                empty prompt to the joined concepts, and how far re-attention's factors are from 1. 0 changes
                nothing, 1 is the authors' setting.

        Raises:
            ValueError: The strength is negative or not finite, or the tokenizer cuts a text off.
        """
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0, got {strength}")
        concepts = self.config.concepts or (NUDITY_CONCEPTS if concept == NUDITY else concept.phrases)
        check_words(policy, Concept(name=concept.name, phrases=concepts))
        change = SAFREEChange(dataclasses.replace(self.config, concepts=concepts), strength)
        return Erasure.of(policy, self.name, change.to_json(), concept, change)


@dataclass(frozen=True)
class SAFREEChange:
    """A guard that is not at work yet: settings and nothing else, which fit any model."""

    config: SAFREEConfig
    """Settings, concepts included."""

    strength: float
    """See `SAFREE.erase`."""

    kind: ClassVar[str] = "safree"

    def apply(self, policy: DiffusionPolicy) -> None:
        """Puts the guard to work.

        Raises:
            ValueError: The policy has a guard, or its UNet is compiled and latents are to be re-attended.
        """
        if policy.guard is not None:
            raise ValueError(f"a policy takes one guard, and this one has {policy.guard!r}")
        policy.guard = SAFREEGuard(self.config, self.strength, policy.prompts, policy.unet)

    def apply_to_pipeline(self, pipeline: Pipeline) -> None:
        """Puts the guard to work in a plain diffusers pipeline; see `safree_pipeline.detach` for the way back.

        Raises:
            ValueError: The pipeline has a guard, or its UNet is compiled and latents are to be re-attended.
        """
        from .safree_pipeline import attach

        attach(pipeline, self.config, self.strength)

    @contextmanager
    def applied(self, policy: DiffusionPolicy) -> Generator[None]:
        """Puts the guard to work for the length of a `with` block."""
        self.apply(policy)
        try:
            yield
        finally:
            policy.guard = None

    def base(self, unet: nn.Module) -> None:
        """Returns None: any weights will do."""
        return None

    def to_json(self) -> dict[str, Any]:
        """Returns settings and strength as JSON knows them."""
        return {**asdict(self.config), "concepts": list(self.config.concepts or ()), "strength": self.strength}

    def save(self, folder: Path) -> None:
        """Writes the settings."""
        (folder / SETTINGS_FILE).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "SAFREEChange":
        """Reads what `save` wrote.

        Raises:
            ValueError: The folder does not hold it.
        """
        path = folder / SETTINGS_FILE
        if not path.is_file():
            raise ValueError(f"a saved SAFREE must hold {SETTINGS_FILE}, and {folder} does not")
        saved = json.loads(path.read_text(encoding="utf-8"))
        strength = saved.pop("strength")
        return cls(SAFREEConfig.from_json(saved), strength)


class SAFREEGuard:
    """SAFREE at work: the filter of prompts, and the UNet whose latents are re-attended.

    Args:
        config: Settings, concepts included.
        strength: See `SAFREE.erase`.
        prompts: Tells the words of embeddings.
        unet: What predictions are made with.
    """

    def __init__(self, config: SAFREEConfig, strength: float, prompts: PromptEncoder, unet: UNet) -> None:
        self.config = config
        self.strength = strength
        self.prompts = prompts
        self.filter = PromptFilter(
            prompts,
            config.concepts or (),
            alpha=config.alpha,
            last_step=lambda change: config.last_step(change, strength),
        )
        self.reattention: Reattention | None = None
        if config.latent_reattention and config.variant == "paper" and strength > 0:
            share = min(strength, 1.0)
            self.reattention = Reattention(
                unet,
                coarse=1 - share * (1 - config.coarse_factor),
                fine=1 - share * (1 - config.fine_factor),
                replace=config.fourier_filter == "released",
            )
        self._seen: tuple[Embeddings, Embeddings, Int[Tensor, " batch"]] | None = None

    def __repr__(self) -> str:
        """Shows the settings: what was drawn under it is known by them."""
        return f"SAFREEGuard({self.config!r}, strength={self.strength})"

    def guided(self, guidance: ClassifierFree) -> Guidance:
        """Returns guidance with filtered prompts."""
        return SAFREEGuidance(self, guidance) if self.strength > 0 else guidance

    def attach(self, pipeline: Pipeline) -> None:
        """Makes a plain diffusers pipeline draw in the same way, in place; see `SAFREEChange`."""
        from .safree_pipeline import attach

        attach(pipeline, self.config, self.strength)

    def filtered(self, prompt: Embeddings) -> tuple[Embeddings, Int[Tensor, " batch"]]:
        """Returns filtered embeddings and the last of 50 steps that sees each, on the embeddings' device.

        The last answer is kept: a sampling loop asks for the same prompts at every step.
        """
        if self._seen is None or not (
            self._seen[0].shape == prompt.shape
            and (self._seen[0].dtype, self._seen[0].device) == (prompt.dtype, prompt.device)
            and torch.equal(self._seen[0], prompt)
        ):
            filtered = [self.filter(text) for text in self.prompts.texts(prompt)]
            rows = torch.stack([each.embedding for each in filtered]).to(prompt)
            last = torch.tensor([each.last_step for each in filtered], device=prompt.device)
            self._seen = prompt.clone(), rows, last
        return self._seen[1:]

    def negative(self, empty: Embeddings) -> Embeddings:
        """Returns the joined concepts, cut off where the text encoder's context ends, for each row of `empty`."""
        joined = self.prompts([", ".join(self.config.concepts or ())]).to(empty)
        return torch.lerp(empty, joined.expand_as(empty), min(self.strength, 1.0))


class SAFREEGuidance:
    """Classifier-free guidance away from the concepts, towards prompts that are filtered in the first steps.

    Args:
        guard: What filters.
        guidance: Its scale is kept.

    Raises:
        ValueError: Both bring a negative prompt.
    """

    def __init__(self, guard: SAFREEGuard, guidance: ClassifierFree) -> None:
        if guard.config.negative_prompt and guidance.negative is not None:
            raise ValueError(
                "SAFREE leads away from its concepts, and guidance has a negative prompt of its own; to keep that one, "
                "erase with SAFREEConfig(negative_prompt=False)"
            )
        self.guard = guard
        self.guidance = guidance

    def embeddings(
        self, prompt: Embeddings, empty: Embeddings, context: StepContext
    ) -> Float[Tensor, "branches batch tokens dim"]:
        """Returns what to lead away from (not at scale 1), the prompts of this step, and the originals to compare."""
        filtered, last = self.guard.filtered(prompt)
        active = context.steps.to(last) * PUBLISHED_STEPS < (last + 1) * context.total
        if self.guard.config.negative_prompt:
            empty = self.guard.negative(empty)
        towards = torch.where(active[:, None, None], filtered, prompt)
        branches = self.guidance.embeddings(towards, empty, context)
        if self.guard.reattention is None:
            return branches
        compared = active if active.any() else None
        self.guard.reattention.start(compared, branches=self.guidance.branches)
        if compared is None:
            return branches
        return torch.cat([branches, prompt.unsqueeze(0)])

    def combine(
        self, predictions: Float[Tensor, "branches batch 4 h w"], context: StepContext
    ) -> Float[Tensor, "batch 4 h w"]:
        """Returns the guided prediction; that for the original prompts was only compared with.

        Raises:
            ValueError: Predictions are not of the UNet that the guard was applied with.
        """
        if self.guard.reattention is not None and not self.guard.reattention.stop():
            raise ValueError(
                "latent re-attention works in the UNet that SAFREE was applied with, and another one made the "
                "predictions; apply it to their own policy, or erase with SAFREEConfig(latent_reattention=False)"
            )
        return self.guidance.combine(predictions[: self.guidance.branches], context)
