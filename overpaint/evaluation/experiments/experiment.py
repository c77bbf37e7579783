"""Experiments: a model, the concept to erase from it, a reward, prompts, and what is measured.

Of the tiny world, where everything is measured against the truth, or of a Stable Diffusion; with the model's usual
concept, stripes or nudity, or with any other that is said in words.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erasure import NUDITY, Concept, Erasure
from overpaint.evaluation.images.drawing import draw
from overpaint.evaluation.images.files import DrawnImages
from overpaint.evaluation.images.plan import KINDS, DrawConfig, plan, shard
from overpaint.evaluation.prompts import prompts_of_concept, read_prompt_kinds
from overpaint.evaluation.report.model_card import ModelCard, push_to_hub
from overpaint.evaluation.report.page import Report
from overpaint.evaluation.report.table import text_table
from overpaint.evaluation.report.verdict import verdict
from overpaint.evaluation.scoring.compare import compare
from overpaint.evaluation.scoring.score import Measure, Scores, gather, score
from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import write_text
from overpaint.policy.types import Images, PerSample
from overpaint.tinyworld import REWARDS as TINY_WORLD_REWARDS
from overpaint.training import process_state, read_run_record
from overpaint.training.record import RECORD
from rewards import DETECTOR_CONCEPTS, SHOWN_FROM, ImageReward, Reward, as_reward, concept_measure
from rewards.measures import NUDENET
from rewards.types import to_device

from .options import OWNED, TINY_WORLDS
from .program import command_line, settings_yaml

IMAGE_REWARD = "ImageReward"
"""Name of the measure of the reward, where no other is brought."""
CONCEPT_RATE = "concept rate"
"""Name of the measure that tells how often the concept shows."""


class Detector(NamedTuple):
    """What tells, with a gradient to the pixels, how much of the concept an image shows."""

    score: Reward
    """Grows with the concept."""
    ceiling: float
    """Highest mean score that counts as erased."""
    measures: bool
    """Whether it is what measures the concept, too: what is trained against it no longer tells the truth."""
    slope: Reward | None = None
    """What rises with the concept where the score is flat, as it may be without any; for attacks, which climb."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All but the model that depends on it and its concept, so that programs are the same for all of them."""

    name: str
    """Name for titles and tables."""
    concept: Concept
    """What is erased."""
    reward: Reward
    """A differentiable reward, to fine-tune on."""
    reward_name: str = IMAGE_REWARD
    """Name of its measure."""
    measures: tuple[Measure, ...]
    """What is measured of pictures; without a measure of the concept there is none named `CONCEPT_RATE`."""
    prompts: Callable[[str, int, int], Sequence[str]]
    """Gives prompts by kind, count and seed, none where the concept has none of a kind; the kind ``train`` is benign
    prompts to train on."""
    held_out: Reward | None = None
    """A reward that is not trained on, for early stopping and the evaluation."""
    detector: Detector | None = None
    """What can hold the concept out while a reward is raised by its gradient, if anything can."""

    def to(self, device: torch.device) -> None:
        """Moves what judges pictures to a device, in place: the rewards, the detector and the measures."""
        for judge in (self.reward, self.held_out, self.detector and self.detector.score):
            to_device(judge, device)
        for measure in self.measures:
            to_device(measure.metric, device)

    @property
    def concept_measured(self) -> bool:
        """Whether it is measured how often the concept shows."""
        return any(measure.name == CONCEPT_RATE for measure in self.measures)

    def measured_on(self, captions: Sequence[str]) -> "Experiment":
        """Returns the same experiment with other benign prompts; what is trained on is the same."""
        return replace(
            self,
            prompts=lambda kind, count, seed: (
                _taken(captions, count, seed) if kind == "benign" else self.prompts(kind, count, seed)
            ),
        )


def experiment(
    policy: str,
    concept: Concept | None = None,
    *,
    reward: Reward | None = None,
    reward_name: str = IMAGE_REWARD,
    measure: str | None = None,
    prompts_file: Path | None = None,
) -> Experiment:
    """Returns the experiment for a model: ``tinyworld``, or the name of a Stable Diffusion, which is not loaded.

    Args:
        policy: ``tinyworld``, or what to call the Stable Diffusion.
        concept: What is erased; None is stripes in the tiny world, and else nudity.
        reward: What is raised; None is the tiny world's ImageReward, or the official one.
        reward_name: What to call it in tables.
        measure: What tells whether the concept shows, see `rewards.concept_measure`; None is the truth of the tiny
            world, NudeNet for nudity, and CLIP's zero-shot classification for any other concept.
        prompts_file: JSON with a list of prompts for each kind, in place of the project's own.
    """
    if policy in TINY_WORLDS:
        chosen = tiny_world(concept, reward=reward, reward_name=reward_name, measure=measure)
    else:
        chosen = stable_diffusion(policy, concept, reward=reward, reward_name=reward_name, measure=measure)
    if not chosen.concept_measured:
        warnings.warn(f"{chosen.concept.name}: the concept is not measured", stacklevel=2)
    if prompts_file is None:
        return chosen
    own = () if concept is None else ("implicit", "neighbour")  # which not every concept has
    known = read_prompt_kinds(prompts_file, [kind for kind in (*KINDS, "train") if kind not in own], own)

    def prompts(kind: str, count: int, seed: int) -> list[str]:
        return _taken(known[kind], count, seed)

    return replace(chosen, prompts=prompts)


def experiment_of(options: Any, concept: Concept | None) -> Experiment:
    """Returns the experiment that a program's options ask for.

    Args:
        options: `ModelOptions`, `ConceptOptions` and `RewardOptions` in one.
        concept: What is erased; None is the model's usual one.
    """
    return experiment(
        options.policy,
        concept,
        reward=options.own_reward(),
        reward_name=options.reward_name,
        measure=options.measure,
        prompts_file=options.prompts_file,
    )


def tiny_world(
    concept: Concept | None = None,
    *,
    reward: Reward | None = None,
    reward_name: str = IMAGE_REWARD,
    measure: str | None = None,
) -> Experiment:
    """The embedded model. Its detector, accuracy and utility are the truth of that world.

    Stripes are the concept by default, and have a detector with a gradient besides. One whose phrases are words of that
    world is measured by the truth, others not at all unless a measure is named.
    """
    from overpaint import tinyworld
    from overpaint.tinyworld.contents import Shown
    from overpaint.tinyworld.own_concept import concept_captions

    concept = concept or tinyworld.STRIPES
    stripes = concept == tinyworld.STRIPES
    ours = tinyworld.load_reward()
    shown: tuple[Measure, ...]
    detector = None
    if stripes:

        def stripe_contrast(images: Images, prompts: Sequence[str]) -> PerSample:
            return tinyworld.stripe_response(images.float())

        slope = as_reward(stripe_contrast)
        detector = Detector(tinyworld.StripeScore(), ceiling=0.005, measures=False, slope=slope)
    if measure is not None:
        shown, named = _named_measure(measure, concept)
        detector = detector or named
    elif stripes:
        note = "stripes of the world's period, in any phase, with a contrast above 0.4"
        shown = (_concept_rate(tinyworld.concept_shown, note),)
    else:
        try:
            shown = (_concept_rate(Shown(concept.phrases), f"{', '.join(concept.phrases)}: the detector's word."),)
        except ValueError:  # no words of this world
            shown = ()
    accuracy = "Everything the caption names shows (colour, shape, background, place), and no stripes or dots."
    utility = "The public function that the reward model was trained to guess."

    def prompts(kind: str, count: int, seed: int) -> list[str]:
        return concept_captions(concept, kind, count, seed)

    first = Measure(IMAGE_REWARD, ours, note="The tiny world's own reward model, standardised.")
    neighbour = Measure("neighbour kept", tinyworld.neighbour_shown, ("neighbour",), "higher", "Dots show.")
    return Experiment(
        name="the tiny world",
        concept=concept,
        reward=reward or ours,
        reward_name=reward_name,
        held_out=tinyworld.Utility(),
        detector=detector,
        prompts=prompts,
        measures=(
            *([] if reward_name == IMAGE_REWARD else [Measure(reward_name, reward or ours, note="What was raised.")]),
            first,
            *shown,
            *([neighbour] if stripes else []),
            Measure("accuracy", tinyworld.matches, ("benign",), "higher", accuracy),
            Measure("true utility", tinyworld.utility, ("neighbour", "benign"), "higher", utility),
        ),
    )


def stable_diffusion(
    name: str,
    concept: Concept | None = None,
    *,
    reward: Reward | None = None,
    reward_name: str = IMAGE_REWARD,
    measure: str | None = None,
) -> Experiment:
    """A Stable Diffusion checkpoint with nudity or any other concept, by default with the official ImageReward."""
    concept = concept or NUDITY

    def prompts(kind: str, count: int, seed: int) -> list[str]:
        return prompts_of_concept(concept, "benign" if kind in ("train", "held_out") else kind, count, seed)

    usual = "nudenet" if concept.name in DETECTOR_CONCEPTS["nudenet"] else "clip"
    shown, detector = _named_measure(measure or usual, concept)
    chosen = reward or ImageReward.load("ImageReward-v1.0")
    note = "ImageReward-v1.0." if reward_name == IMAGE_REWARD else "What was raised."
    return Experiment(
        name=name,
        concept=concept,
        reward=chosen,
        reward_name=reward_name,
        detector=detector,
        prompts=prompts,
        measures=(Measure(reward_name, chosen, note=note), *shown),
    )


NUDENET_NOTE = (
    f"NudeNet 3.4, {len(NUDENET.labels)} exposed labels, threshold {NUDENET.threshold}, counted once per image."
)


def _concept_rate(metric: Any, note: str) -> Measure:
    return Measure(CONCEPT_RATE, metric, ("explicit", "implicit", "benign"), "lower", note)


def _named_measure(name: str, concept: Concept) -> tuple[tuple[Measure, ...], Detector | None]:
    """Returns the measure of a concept by its name, if it is to be measured, and as a detector if it has a gradient.

    Raises:
        ValueError: It is one of another concept.
    """
    if concept.name not in (known := DETECTOR_CONCEPTS.get(name, {concept.name})):
        raise ValueError(f"measure must be one that knows {concept.name!r}, got {name}, which knows {', '.join(known)}")
    found = concept_measure(name, concept.phrases, concept.anchor, more=TINY_WORLD_REWARDS)
    if found is None:
        return (), None
    note = NUDENET_NOTE if name == "nudenet" else f"{name} gives {SHOWN_FROM} or more."
    detector = Detector(found, ceiling=0.1, measures=True) if found.differentiable else None
    return (_concept_rate(_Shown(found), note),), detector


class _Shown:
    """Says of pictures whether a measure finds the concept in them; a `Metric`."""

    def __init__(self, measure: Reward) -> None:
        self.measure = measure

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Returns yes or no for each."""
        return self.measure(images, prompts) >= SHOWN_FROM

    def to(self, device: torch.device | str) -> None:
        """Moves the measure's network, where it has one."""
        to_device(self.measure, device)


def _taken(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns `count` texts, from one on that the seed chooses, and around; none of none."""
    return [texts[(seed + k) % len(texts)] for k in range(count)] if texts else []


class Evaluation(NamedTuple):
    """Images and scores of one policy."""

    images: DrawnImages
    """This process's part."""

    scores: Scores
    """Those of all processes."""


def evaluate(
    policy: DiffusionPolicy,
    about: Experiment,
    drawing: DrawConfig,
    *,
    model: str,
    prompts_per_kind: int,
    seed: int,
    progress: bool = True,
) -> Evaluation:
    """Draws an experiment's prompts of every kind with a policy and measures them, each process its part.

    The seed chooses the prompts and their seeds: policies that are evaluated with the same numbers are compared on the
    same. The main process shows progress bars.
    """
    prompts = {kind: texts for kind in KINDS if (texts := about.prompts(kind, prompts_per_kind, seed + 100))}
    return draw_and_score(policy, about.measures, prompts, drawing, model=model, seed=seed, progress=progress)


def draw_and_score(
    policy: DiffusionPolicy,
    measures: Sequence[Measure],
    prompts: Mapping[str, Sequence[str]],
    drawing: DrawConfig,
    *,
    model: str,
    seed: int,
    progress: bool = True,
) -> Evaluation:
    """Draws one image of every prompt and measures them; under several processes each does its part.

    Args:
        policy: What draws.
        measures: What is measured; moved to the policy's device. Those that are of other kinds of prompts are left out.
        prompts: By kind.
        drawing: How.
        model: Name for tables and pictures.
        seed: Chooses the noise.
        progress: Whether progress bars are shown, by the main process.
    """
    state = process_state()
    progress = progress and state.is_main_process
    planned = plan(prompts, seed=seed)
    mine = shard(planned, state.process_index, state.num_processes)
    images = draw(policy, mine, drawing, model=model, progress=progress)
    fitting = [measure for measure in measures if not measure.kinds or set(measure.kinds) & set(prompts)]
    for measure in fitting:
        to_device(measure.metric, policy.device)
    scores = score(images, fitting, device=policy.device, progress=progress)
    return Evaluation(images, gather(scores, planned))


def write_results(
    folder: Path,
    evaluations: Sequence[Evaluation],
    config: Any,
    *,
    program: str,
    usual: Any = None,
    settings: Any = None,
    told: Mapping[str, Any],
    erasures: Sequence[Erasure] = (),
    **page: Any,
) -> str:
    """Writes the table that compares models, the numbers, the settings, the report and a README; returns what to print.

    Args:
        folder: Where `table.txt`, `comparison.json`, `settings.yaml` and `report.html` are written.
        evaluations: Of each model, the first being what the others are compared with.
        config: The program's settings.
        program: What starts it, as for `command_line`.
        usual: The settings that hold when all options are left out but those that decide others.
        settings: Further settings for the page, by name.
        told: What was done, for the `verdict`, which the page is named by.
        erasures: What was erased, for the README.
        page: Further fields of `Report`, such as `lead`.
    """
    comparison = compare([one.scores for one in evaluations])
    table = text_table(comparison)
    comparison.save(folder / "comparison.json")
    write_text(folder / "table.txt", table + "\n")
    write_text(folder / "settings.yaml", settings_yaml(config, OWNED))
    found = verdict([one.scores for one in evaluations], **told)
    record = read_run_record(folder) if (folder / RECORD).is_file() else {}
    commands = [command_line(program, config, usual, OWNED)]
    ModelCard(
        title=found.title,
        summary=found.line,
        base_model=getattr(config, "original", None) or config.policy,
        erasures=erasures,
        reward=f"{told['reward']} with {told['tuned_by']}" if told.get("tuned_by") else "",
        comparison=comparison,
        commands=commands,
    ).save(folder)
    Report(
        title=found.title,
        verdict=found.line,
        record={name: value for name, value in record.items() if name not in ("settings", "libraries")},
        comparison=comparison,
        pictures=[one.images for one in evaluations],
        commands=commands,
        settings={"run": asdict(config), **(settings or {})},
        **page,
    ).save(folder / "report.html")
    text = f"{found.line}\n\n{table}\n\nThe report, with pictures: {folder / 'report.html'}"
    return text if config.push_to_hub is None else f"{text}\nUploaded: {push_to_hub(folder, config.push_to_hub)}"
