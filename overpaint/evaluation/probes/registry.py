"""The probes by name, with their papers' settings or those found for the tiny world."""

from collections.abc import Mapping
from typing import Any, Literal

from . import (
    adversarial_prompt,
    classifier_guidance,
    completion,
    inpainting,
    inverted_latents,
    noise,
    relearning,
    resurgence,
    semantics,
    soft_prompt,
    textual_inversion,
    tracing,
)
from .probe import Probe

ProbeName = Literal[
    "textual-inversion", "adversarial-prompt", "soft-prompt", "completion", "inpainting", "noise",
    "classifier-guidance", "inverted-latents", "tracing", "resurgence", "relearning", "semantics",
]  # fmt: skip
"""The names of `PROBES`, for the type of a setting."""

PROBES: Mapping[str, tuple[Any, Any]] = {
    "textual-inversion": (textual_inversion.TextualInversion, textual_inversion.TINY),
    "adversarial-prompt": (adversarial_prompt.AdversarialPrompt, adversarial_prompt.TINY),
    "soft-prompt": (soft_prompt.SoftPrompt, soft_prompt.TINY),
    "completion": (completion.Completion, completion.TINY),
    "inpainting": (inpainting.Inpainting, inpainting.TINY),
    "noise": (noise.Noise, noise.TINY),
    "classifier-guidance": (classifier_guidance.ClassifierGuidance, classifier_guidance.TINY),
    "inverted-latents": (inverted_latents.InvertedLatents, inverted_latents.TINY),
    "tracing": (tracing.Tracing, tracing.TINY),
    "resurgence": (resurgence.Resurgence, resurgence.TINY),
    "relearning": (relearning.Relearning, relearning.TINY),
    "semantics": (semantics.Semantics, semantics.TINY),
}
"""The class of each probe, and its settings for the tiny world."""


HEADLINE = ("adversarial-prompt", "soft-prompt", "completion", "noise", "classifier-guidance", "inverted-latents")
"""Probes whose highest number is a model's worst: they take the model as it is, where others tune it or ask again."""


def probe_named(name: str, *, tiny: bool = False) -> Probe:
    """Makes a probe.

    Args:
        name: One of `PROBES`.
        tiny: Whether its settings are those found for the tiny world, and else its paper's.

    Raises:
        ValueError: There is no such probe.
    """
    if name not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(PROBES)}, got {name!r}")
    kind, settings = PROBES[name]
    return kind(settings) if tiny else kind()
