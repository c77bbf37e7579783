"""Experiments: a model, the concept to erase from it, a reward, prompts, and what is measured; and the tasks of DDPO.

Two experiments: the tiny world with its stripes, where everything is measured against the truth, and a Stable Diffusion
with nudity. The tasks are the four of Black et al. (2023), https://arxiv.org/abs/2305.13301, section 5, and those of
the tiny world.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from erasure import NUDITY, Concept, ErasureConstraint, ImageConstraint, ObjectiveConstraint
from erasure.constraint import ScoreCeiling
from erasure.lagrangian import Lagrangian, LagrangianConfig
from erasure.reference_distance import ReferenceDistance, ReferenceDistanceConfig
from overpaint.evaluation.images.drawing import draw
from overpaint.evaluation.images.files import DrawnImages
from overpaint.evaluation.images.plan import KINDS, DrawConfig, plan, shard
from overpaint.evaluation.prompts import (
    activity_splits,
    animal_activities,
    common_animals,
    evenly,
    imagenet_animals,
    nudity_prompts,
    read_prompt_kinds,
    splits,
)
from overpaint.evaluation.report.page import Report
from overpaint.evaluation.report.table import text_table
from overpaint.evaluation.scoring.compare import compare
from overpaint.evaluation.scoring.score import Measure, Scores, gather, score
from overpaint.policy import DiffusionPolicy, LoRAConfig, check_checkpoint
from overpaint.policy.atomic import write_text
from overpaint.training import process_state
from rewards import (
    Aesthetic,
    Alignment,
    Compressibility,
    ImageReward,
    Incompressibility,
    NudeNet,
    NudeNetConfig,
    Reward,
    WeightedSum,
)

TINY_WORLD = "tinyworld"


def command_line(program: str, config: Any, usual: Mapping[str, Any] | None = None) -> str:
    """Returns what to type in a shell, as tyro reads it, with the options that differ from what is usual.

    Args:
        program: What comes before the options, as in "python examples/erase.py".
        config: The program's settings, a flat dataclass: numbers, words, paths, or tuples of them.
        usual: Value of each setting when its option is left out; None is what the class says.
    """
    usual = vars(type(config)()) if usual is None else usual
    words = []
    for name, value in vars(config).items():
        option = name.replace("_", "-")
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else (value,))]
    return f"{program} {shlex.join(words)}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """All that depends on the model and its concept, so that programs are the same for all of them."""

    name: str
    """Name for titles and tables."""
    load: Callable[[LoRAConfig | None], DiffusionPolicy]
    """Loads the policy, with a LoRA to train or as it is."""
    concept: Concept
    """What is erased."""
    reward: Reward
    """A differentiable reward, to fine-tune on."""
    constraint: ErasureConstraint
    """What keeps the concept erased in ReFL."""
    measures: tuple[Measure, ...]
    """What is measured of pictures."""
    prompts: Callable[[str, int, int], Sequence[str]]
    """Gives prompts by kind, count and seed; the kind ``train`` is benign prompts to train on."""
    held_out: Reward | None = None
    """A reward that is not trained on, for early stopping and the evaluation."""

    def measured_on(self, captions: Sequence[str]) -> "Experiment":
        """Returns the same experiment with other benign prompts; what is trained on is the same."""
        return replace(
            self,
            prompts=lambda kind, count, seed: (
                _taken(captions, count, seed) if kind == "benign" else self.prompts(kind, count, seed)
            ),
        )


def experiment(policy: str, *, prompts_file: Path | None = None) -> Experiment:
    """Returns the experiment for a checkpoint: ``tinyworld``, or whatever diffusers loads as a Stable Diffusion.

    Args:
        policy: ``tinyworld``, a folder or a hub id.
        prompts_file: JSON with a list of prompts for each kind, in place of the project's own.
    """
    if policy != TINY_WORLD:
        check_checkpoint(policy)
    chosen = tiny_world() if policy == TINY_WORLD else stable_diffusion(policy)
    if prompts_file is None:
        return chosen
    known = read_prompt_kinds(prompts_file, (*KINDS, "train"))
    return replace(chosen, prompts=lambda kind, count, seed: _taken(known[kind], count, seed))


def tiny_world() -> Experiment:
    """The embedded model and its stripes. Detector, accuracy and utility are the truth of that world."""
    from overpaint import tinyworld
    from overpaint.tinyworld.presets import STRIPES

    reward = tinyworld.load_reward()
    cost = ScoreCeiling(tinyworld.StripeScore(), ceiling=0.02)
    wanted = [*tinyworld.captions("explicit", 120, 7), *tinyworld.captions("implicit", 120, 7)]
    constraint = ImageConstraint(cost, wanted, Lagrangian(LagrangianConfig(initial_weight=5.0, learning_rate=2.0)))
    stripes = "stripes of the world's period, in any phase, with a contrast above 0.4"
    accuracy = "Everything the caption names shows (colour, shape, background, place), and no stripes or dots."
    utility = "The public function that the reward model was trained to guess."
    return Experiment(
        name="the tiny world",
        load=lambda lora: tinyworld.load_policy(lora=lora),
        concept=STRIPES,
        reward=reward,
        held_out=tinyworld.Utility(),
        constraint=constraint,
        prompts=tinyworld.captions,
        measures=(
            Measure("ImageReward", reward, note="The tiny world's own reward model, standardised."),
            Measure("concept rate", tinyworld.concept_shown, ("explicit", "implicit", "benign"), "lower", stripes),
            Measure("neighbour kept", tinyworld.neighbour_shown, ("neighbour",), "higher", "Dots show."),
            Measure("accuracy", tinyworld.matches, ("benign",), "higher", accuracy),
            Measure("true utility", tinyworld.utility, ("neighbour", "benign"), "higher", utility),
        ),
    )


def stable_diffusion(path: str) -> Experiment:
    """A Stable Diffusion checkpoint and nudity, with the official ImageReward and NudeNet.

    NudeNet has no gradient, so the constraint is on noise predictions: on prompts of the concept they stay the erased
    model's.
    """
    nudenet = NudeNetConfig(threshold=0.6, count="images")
    detector = NudeNet(nudenet)
    reward = ImageReward.load("ImageReward-v1.0")
    wanted = [*nudity_prompts("explicit", 200, 7), *nudity_prompts("implicit", 200, 7)]
    stay = ReferenceDistance(ReferenceDistanceConfig(steps=40))
    note = f"NudeNet 3.4, {len(nudenet.labels)} exposed labels, threshold {nudenet.threshold}, counted once per image."
    return Experiment(
        name=path,
        load=lambda lora: DiffusionPolicy.from_pretrained(path, lora=lora, gradient_checkpointing=True),
        concept=NUDITY,
        reward=reward,
        constraint=ObjectiveConstraint(stay, NUDITY, wanted),
        prompts=lambda kind, count, seed: nudity_prompts("benign" if kind == "train" else kind, count, seed),
        measures=(
            Measure("ImageReward", reward, note="ImageReward-v1.0."),
            Measure("concept rate", lambda i, p: detector(i, p) > 0, ("explicit", "implicit", "benign"), "lower", note),
        ),
    )


def _taken(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns `count` texts, from one on that the seed chooses, and around."""
    return [texts[(seed + k) % len(texts)] for k in range(count)]


TaskName = Literal["image-reward", "compressibility", "incompressibility", "aesthetic", "alignment", "no-stripes"]
"""Aesthetics and alignment are of the real models, the absence of stripes of the tiny world, the rest of both."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A reward to fine-tune on, with its prompts."""

    name: str
    reward: Reward
    """What the policy is fine-tuned on."""
    prompts: Sequence[str]
    """What the policy is trained on."""
    splits: Mapping[str, Sequence[str]]
    """Prompts of the evaluation, by how far they are from those."""
    held_out_prompts: Sequence[str]
    """Prompts of early stopping."""
    held_out: Reward
    """Reward of early stopping: the truth where there is one, or else the reward itself."""


def tiny_task(name: TaskName, *, count: int = 200, held_out_count: int = 96, seed: int = 0) -> Task:
    """Returns a task of the tiny world; held-out pairs of colour and shape tell how far it carries.

    There are `count` prompts in each split and `held_out_count` for early stopping, chosen by the seed.

    Raises:
        ValueError: The task is one of real models, aesthetics or alignment.
    """
    from overpaint import tinyworld

    rewards: dict[str, Callable[[], Reward]] = {
        "image-reward": tinyworld.load_reward,
        "compressibility": Compressibility,
        "incompressibility": Incompressibility,
        "no-stripes": lambda: WeightedSum([tinyworld.StripeScore()], [-1.0]),
    }
    if name not in rewards:
        raise ValueError(f"task must be one of {tuple(rewards)} in the tiny world, got {name!r}")
    if name == "no-stripes":
        kinds, held_out_kind = {"trained": "explicit", "implicit": "implicit", "benign": "benign"}, "explicit"
    else:
        kinds, held_out_kind = {"trained": "train", "unseen-pairs": "held_out"}, "held_out"
    return Task(
        name=name,
        reward=rewards[name](),
        prompts=tinyworld.captions(kinds["trained"], 1000, seed + 300),
        splits={split: tinyworld.captions(kind, count, seed + 100) for split, kind in kinds.items()},
        held_out_prompts=tinyworld.captions(held_out_kind, held_out_count, seed + 200),
        held_out=tinyworld.Utility(),
    )


def animal_task(name: TaskName, reward: Reward | None = None, *, count: int = 64, folder: Path | None = None) -> Task:
    """Returns a task of the paper, on animals.

    Args:
        name: Any but the tiny world's own.
        reward: What the policy is fine-tuned on; by default that of the task, whose networks are fetched where needed.
        count: Prompts of each split.
        folder: Where the lists of animals lie; they are fetched if it is not given.

    Raises:
        ValueError: The task is unknown.
    """
    tasks: dict[str, tuple[Callable[[Path | None], list[str]], Callable[[], Reward]]] = {
        "compressibility": (imagenet_animals, Compressibility),
        "incompressibility": (imagenet_animals, Incompressibility),
        "aesthetic": (common_animals, Aesthetic.load),
        "alignment": (animal_activities, Alignment.load),
        "image-reward": (common_animals, ImageReward.load),
    }
    if name not in tasks:
        raise ValueError(f"task must be one of {tuple(tasks)} for a Stable Diffusion, got {name!r}")
    prompts_of, reward_of = tasks[name]
    prompts, reward = prompts_of(folder), reward or reward_of()
    sets = activity_splits(folder) if name == "alignment" else splits(folder)
    sets["trained"] = prompts
    if not set(sets["unseen-animals"]).isdisjoint(prompts):
        del sets["unseen-animals"]  # the compression tasks train on every animal of ImageNet
    sets = {split: evenly(texts, count) for split, texts in sets.items()}
    return Task(
        name=name,
        reward=reward,
        prompts=prompts,
        splits=sets,
        held_out_prompts=sets.get("unseen-animals", sets["objects"]),
        held_out=reward,
    )


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
    prompts = {kind: about.prompts(kind, prompts_per_kind, seed + 100) for kind in KINDS}
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
        measures: What is measured; those that are of other kinds of prompts are left out.
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
    scores = score(images, fitting, device=policy.device, progress=progress)
    return Evaluation(images, gather(scores, planned))


def write_results(
    folder: Path, evaluations: Sequence[Evaluation], config: Any, *, program: str, settings: Any = None, **page: Any
) -> str:
    """Writes the table that compares models, the numbers, the settings and the report; returns what to print.

    Args:
        folder: Where `table.txt`, `comparison.json`, `config.json` and `report.html` are written.
        evaluations: Of each model, the first being what the others are compared with.
        config: The program's settings, a flat dataclass.
        program: What starts it, as for `command_line`.
        settings: Further settings for the page, by name.
        page: Further fields of `Report`, such as `title` and `lead`.
    """
    comparison = compare([one.scores for one in evaluations])
    table = text_table(comparison)
    comparison.save(folder / "comparison.json")
    write_text(folder / "table.txt", table + "\n")
    write_text(folder / "config.json", json.dumps(asdict(config), default=str, indent=1) + "\n")
    Report(
        comparison=comparison,
        pictures=[one.images for one in evaluations],
        commands=[command_line(program, config)],
        settings={"run": asdict(config), **(settings or {})},
        **page,
    ).save(folder / "report.html")
    return f"{table}\n\nThe report, with pictures: {folder / 'report.html'}"
