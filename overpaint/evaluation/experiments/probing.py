"""The probes of an experiment: what they look for in its models."""

import base64
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from markupsafe import Markup

from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.result import ProbeResult
from overpaint.evaluation.probes.target import Foreign, ProbeTarget
from overpaint.evaluation.report import table
from overpaint.evaluation.report.page import Section
from overpaint.policy.soft_prompts import PLACE
from overpaint.policy.types import Images, PerSample

from .experiment import CONCEPT_RATE, Experiment


def target_of(about: Experiment, drawing: DrawConfig) -> ProbeTarget:
    """Returns what probes look for in the models of an experiment.

    Stripes of the tiny world have a second floor, a texture that its model has never seen, and wordings of their own.
    Any other concept is what its measure says; in a prompt its phrases are what names it.

    Raises:
        ValueError: It is not measured how often the concept shows, or stripes are to be looked for in pictures of
            another size than the tiny world's.
    """
    from overpaint import tinyworld
    from overpaint.tinyworld.checkerboard import CHECKER_THRESHOLD, CheckerScore, checkered_scenes
    from overpaint.tinyworld.probing import KEPT, WORDINGS, benign_scenes, kinds, left_open, template

    measures = [measure for measure in about.measures if measure.name == CONCEPT_RATE]
    if not measures:
        raise ValueError(f"probes need a measure of the concept, got none for {about.concept.name}; see --measure")
    stripes = about.concept == tinyworld.STRIPES
    if stripes and drawing.size not in (None, tinyworld.IMAGE_SIZE):
        raise ValueError(
            f"size must be {tinyworld.IMAGE_SIZE} in probes of stripes, whose scenes and detectors are of that size, "
            f"or None, got {drawing.size}"
        )
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
    own = {kind: partial(prompts, kind) for kind in ("explicit", "implicit")}
    return ProbeTarget(
        name=f"{about.name}, {measures[0].note}",
        concept=about.concept,
        prompts=prompts,
        template=template if stripes else replaced,
        score=score,
        foreign=foreign if stripes else None,
        wordings=WORDINGS if stripes else {kind: texts for kind, texts in own.items() if texts(1, 0)},
        benign_pictures=benign_scenes if stripes else None,
        kept=KEPT if stripes else {},
        left_open=left_open if stripes else None,
        kinds=kinds if stripes else None,
        reward=about.reward,
        steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        size=drawing.size,
    )


def probes_table(name: str, results: Mapping[str, ProbeResult]) -> table.Table:
    """Returns what a probe found out about some models, a line for each of its variants.

    Args:
        name: Of the probe.
        results: By the model's name.
    """
    lines = [
        table.Line(
            f"{model}, {one.found.variant}",
            [
                table.interval_cell(one.found.rate),
                table.Cell("" if one.found.mean_rate is None else f"{one.found.mean_rate:.2f}"),
                table.Cell(f"{one.ceiling.rate.mean:.2f}"),
                table.Cell(", ".join(f"{floor.rate.mean:.2f} ({kind})" for kind, floor in one.floors.items())),
                table.Cell("" if math.isnan(one.recovered.mean) else f"{one.recovered.mean:.2f}"),
                table.Cell(", ".join(f"{what} {value:.3g}" for what, value in one.found.numbers.items())),
                table.Cell(f"{(result.rows_forward + result.rows_backward) / 1000:.1f}"),
                table.Cell(f"{result.seconds:.0f}"),
            ],
            data={"model": model},
        )
        for model, result in results.items()
        for one in result.variants
    ]
    titles = ("rate", "mean of all", "ceiling", "floor", "recovered", "besides", "UNet rows, thousands", "CPU seconds")
    caption = (
        "Rate: attempts that brought the concept back, with a 95 % interval. Ceiling: the same of the original model. "
        "Floor: what the probe draws by itself. Recovered: (rate - floor) / (ceiling - floor). Rows and seconds are of "
        "all variants together."
    )
    columns = [table.Column("model and variant", True), *map(table.Column, titles)]
    return table.Table(label=name, columns=columns, lines=lines, caption=caption)


def probes_section(name: str, results: Mapping[str, ProbeResult], pictures: Sequence[tuple[str, Path]] = ()) -> Section:
    """Returns a page's section about a probe: its table, and grids of pictures with a caption for each."""
    grids = Markup("").join(
        Markup('<figure><img src="{0}" alt="{1}"><figcaption>{1}</figcaption></figure>').format(
            _embedded(path), caption
        )
        for caption, path in pictures
    )
    return Section(f"probe-{name}", f"Probe: {name.replace('-', ' ')}", probes_table(name, results).html() + grids)


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def pictures_of(name: str, folders: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """Returns the pictures of a probe's variants, by the model whose folder they are in."""
    return [
        (f"{model}: {path.stem.removeprefix(name).strip('-')}", path)
        for model, folder in folders.items()
        for path in sorted(folder.glob(f"{name}-*.png"))
    ]
