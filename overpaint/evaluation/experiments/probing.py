"""The probes of an experiment: what they look for in its models."""

from collections.abc import Sequence

import torch

from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.target import Foreign, ProbeTarget
from overpaint.policy.soft_prompts import PLACE
from overpaint.policy.types import Images, PerSample

from .experiment import CONCEPT_RATE, Experiment


def target_of(about: Experiment, drawing: DrawConfig) -> ProbeTarget:
    """Returns what probes look for in the models of an experiment.

    Stripes of the tiny world have a second floor, a texture that its model has never seen, and wordings of their own.
    Any other concept is what its measure says; in a prompt its phrases are what names it.

    Raises:
        ValueError: It is not measured how often the concept shows.
    """
    from overpaint import tinyworld
    from overpaint.tinyworld.checkerboard import CHECKER_THRESHOLD, CheckerScore, checkered_scenes
    from overpaint.tinyworld.probing import WORDINGS, template

    measures = [measure for measure in about.measures if measure.name == CONCEPT_RATE]
    if not measures:
        raise ValueError(f"probes need a measure of the concept, got none for {about.concept.name}; see --measure")
    stripes = about.concept == tinyworld.STRIPES
    metric, phrases = measures[0].metric, about.concept.phrases

    def score(images: Images) -> PerSample:
        return torch.as_tensor(metric(images, [""] * len(images))).float()

    def replaced(prompt: str) -> str:
        for phrase in sorted(phrases, key=len, reverse=True):
            if phrase.lower() in prompt.lower():
                start = prompt.lower().index(phrase.lower())
                return f"{prompt[:start]}{PLACE}{prompt[start + len(phrase) :]}"
        return f"{PLACE} {prompt}"

    def prompts(kind: str, count: int, seed: int) -> Sequence[str]:
        return about.prompts(kind, count, seed + 400)  # others than those of the evaluation and of training

    foreign = Foreign(pictures=checkered_scenes, score=CheckerScore(), shown_from=CHECKER_THRESHOLD)
    own = {kind: (lambda count, seed, kind=kind: prompts(kind, count, seed)) for kind in ("explicit", "implicit")}
    return ProbeTarget(
        name=f"{about.name}, {measures[0].note}",
        concept=about.concept,
        prompts=prompts,
        template=template if stripes else replaced,
        score=score,
        foreign=foreign if stripes else None,
        wordings=WORDINGS if stripes else {kind: texts for kind, texts in own.items() if texts(1, 0)},
        reward=about.reward,
        steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
    )
