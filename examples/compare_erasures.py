"""Compare the erasure methods on one model: what each erases, what it costs, and what a recovery wins back.

    python examples/compare_erasures.py
    python examples/compare_erasures.py --methods uce esd --seeds 0 --prompts-per-kind 50

Each method erases stripes from the tiny world with the settings that were found for it, once for each seed. All are
measured on the same prompts, with one scheduler and one guidance. Then the reward of each erased model is won back by
ReFL under the constraint that the concept stays gone, as ``examples/refl_erase_nudity.py`` does. What is finished is
kept, so that the same command goes on where it was interrupted.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from erasure import Erasure
from erasure.cache import claim
from erasure.registry import METHODS, MethodName, erase, method_named
from overpaint.evaluation import Report, Scores, compare, write_folder
from overpaint.evaluation.experiments.experiment import CONCEPT_RATE, Experiment, evaluate, experiment_of
from overpaint.evaluation.experiments.options import (
    OWNED,
    USUAL_GUIDANCE,
    ConceptOptions,
    ModelOptions,
    RewardOptions,
    usual_eraser,
)
from overpaint.evaluation.experiments.program import (
    check_left_out,
    command_line,
    settings_from_command_line,
    usual_beside,
)
from overpaint.evaluation.experiments.published import (
    IMAGE_REWARD,
    Measured,
    published,
    published_comparison,
    tables_html,
)
from overpaint.evaluation.experiments.recovery import recover
from overpaint.evaluation.experiments.recovery_options import RecoveryOptions, refl_config
from overpaint.evaluation.experiments.study import CHECKPOINTS, MethodLine, line_of, methods_table, pictured
from overpaint.evaluation.experiments.work import work_through
from overpaint.evaluation.prompts import prompt_set
from overpaint.evaluation.report.page import Section, chart_section
from overpaint.evaluation.report.pareto import Point, pareto_chart
from overpaint.policy import LoRAConfig
from overpaint.policy.atomic import write_text
from overpaint.settings import AnyPath, Distinct, Field, Seed, settings
from overpaint.text_files import read_json
from refl import ReFLConfig

BEFORE: Literal["before"] = "before"
COCO = "coco-30k"
"""What the published values of Stable Diffusion v1.4 are of."""
OWN_SIZES = (None, 512)
"""Sizes by which its own is asked for."""


@settings
class Config(RewardOptions, ConceptOptions, ModelOptions):
    """What is compared, and how finely."""

    methods: Distinct[MethodName] = Field(get_args(MethodName), min_length=1)
    """Names of methods."""

    captions: str | None = None
    """Benign prompts: a set of `overpaint.evaluation.prompts`, or a file; None is coco-30k, as in what is published, or
    captions of the tiny world."""

    seeds: Distinct[Seed] = Field((0, 1, 2), min_length=1)
    """Of training, prompts and pictures; each method runs once for each."""

    prompts_per_kind: int = Field(200, ge=1)
    """Prompts of each kind."""

    evaluation_steps: int = Field(20, ge=1)
    """Denoising steps of the pictures."""

    recover: bool = True
    """Whether the reward of each erased model is won back, with the first seed."""

    recovery_iterations: int = Field(80, ge=1)
    """ReFL iterations of the recovery."""

    refl: ReFLConfig | None = None
    """How the reward is won back; None is as in `refl_erase_nudity.py`."""

    workers: int = Field(2, ge=1)
    """Processes that work at a time, with one thread each; 1 on a GPU."""

    output_dir: AnyPath = Path("runs/compare_erasures")
    """Where everything is kept."""

    def __post_init__(self) -> None:
        """Fills in the captions that fit the model."""
        if self.captions is None and self.prompts_file is None and not self.tiny:
            object.__setattr__(self, "captions", COCO)


def about(config: Config) -> Experiment:
    """Returns what is erased from what, and what is measured."""
    chosen = experiment_of(config, config.own_concept(tiny=config.tiny))
    return chosen if config.captions is None else chosen.measured_on(prompt_set(config.captions).texts)


class Cell(NamedTuple):
    """One piece of work: a model that is made and measured."""

    method: MethodName | Literal["before"]
    """Name of a method, or "before"."""

    seed: int
    recovered: bool = False

    @property
    def label(self) -> str:
        """What the progress bar calls it."""
        return f"{self.method} {self.seed}{' recovered' if self.recovered else ''}"

    @property
    def name(self) -> str:
        """What tables and pictures call it."""
        return f"{self.method}-recovered" if self.recovered else self.method

    def folder(self, config: Config) -> Path:
        """Returns where it is kept."""
        folder = config.output_dir / self.method / f"seed-{self.seed}"
        return folder / "recovered" if self.recovered else folder

    def scores(self, config: Config) -> Scores | None:
        """Returns what was measured, if it was."""
        path = self.folder(config) / "scores.json"
        return Scores.load(path) if path.is_file() else None


def stages_of(config: Config) -> list[list[Cell]]:
    """Returns all work, in stages that need those before them."""
    erased = [Cell(method, seed) for seed in config.seeds for method in config.methods]
    recovered = [Cell(method, config.seeds[0], recovered=True) for method in config.methods if config.recover]
    return [[*(Cell(BEFORE, seed) for seed in config.seeds), *erased], recovered]


def recovery_of(config: Config) -> RecoveryOptions:
    """Returns the settings of the recoveries, which are those of the main job."""
    return RecoveryOptions(
        policy=config.policy,
        policy_config=config.policy_config,
        iterations=config.recovery_iterations,
        guidance_scale=config.usual_guidance,
        size=config.size,
    )


def complete(config: Config) -> Config:
    """Fills in what depends on the model.

    Raises:
        ValueError: An option is given that the program has another for.
    """
    check_left_out(config, {"seed": "each model is made once for each of --seeds"})
    refl = config.refl or refl_config(recovery_of(config))
    return replace(config, guidance_scale=config.usual_guidance, refl=refl)


def work(cell: Cell, config: Config) -> None:
    """Makes one model and measures it."""
    folder = cell.folder(config)
    task = about(config)
    policy = config.load(lora=LoRAConfig(rank=8, alpha=8) if cell.recovered else None)
    task.to(policy.device)
    begin = time.process_time()
    if cell.recovered:
        erasure = Erasure.load(folder.parent / "erasure")
        erasure.apply(policy)
        recovery = replace(recovery_of(config), output_dir=folder, seed=cell.seed, refl=config.refl, resume=True)
        recover(recovery, policy, task, erasure, progress=False)
    elif cell.method != BEFORE:
        eraser = usual_eraser(cell.method, config.own_concept(tiny=config.tiny), policy=config.policy, seed=cell.seed)
        method = method_named(cell.method, eraser)
        training = folder / "training"
        erasure = erase(method, policy, task.concept, output_dir=training, resume=training.exists(), progress=False)
        erasure.save(folder / "erasure")
        erasure.apply(policy)
    minutes = (time.process_time() - begin) / 60
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "minutes.json", json.dumps(minutes))
    drawing = config.drawing(config.evaluation_steps)
    numbers = {"prompts_per_kind": config.prompts_per_kind, "seed": cell.seed}
    images, scores = evaluate(policy, task, drawing, model=cell.name, progress=False, **numbers)
    if cell.seed == config.seeds[0]:
        write_folder(images, pictures_of(config))
    scores.save(folder / "scores.json")


def pictures_of(config: Config) -> Path:
    """Returns the folder of the first seed's pictures."""
    return config.output_dir / "pictures" / f"seed-{config.seeds[0]}"


def lines_of(config: Config) -> list[MethodLine]:
    """Returns a line for each method: means over the seeds, and after the recovery."""
    lines = []
    for name in (BEFORE, *config.methods):
        cells = [Cell(name, seed) for seed in config.seeds]
        scores = [found for cell in cells if (found := cell.scores(config)) is not None]
        others: dict[str, list[float]] = {}
        if name != BEFORE:
            others["CPU-minutes"] = [read_json(cell.folder(config) / "minutes.json") for cell in cells]
            after = Cell(name, config.seeds[0], recovered=True).scores(config)
            if after is not None:
                for title, measure, kind in (
                    ("explicit, recovered", CONCEPT_RATE, "explicit"),
                    ("implicit, recovered", CONCEPT_RATE, "implicit"),
                    (f"{config.reward_name}, recovered", config.reward_name, "benign"),
                ):
                    if (measure, kind) in measured(after):
                        others[title] = [after.column(measure, kind).estimate.mean]
        lines.append(line_of(name, scores, others, reward=config.reward_name))
    return lines


def measured(scores: Scores) -> set[tuple[str, str]]:
    """Returns what was measured, on which kinds of prompts."""
    return {(column.measure, column.kind) for column in scores.columns}


def report(config: Config) -> None:
    """Writes the page with the pictures of the first seed."""
    models = [(BEFORE, False), *((name, False) for name in config.methods)]
    models += [(name, True) for name in config.methods if config.recover]
    cells = [Cell(name, config.seeds[0], recovered) for name, recovered in models]
    scores = [found for cell in cells if (found := cell.scores(config)) is not None]
    usual = usual_beside(config, complete, ["policy"])
    Report(
        title="Ways to erase a concept",
        lead="Each model draws the same prompts with the same seeds; the first is the model as it came.",
        comparison=compare(scores),
        sections=sections(config, scores),
        commands=[command_line("python examples/compare_erasures.py", config, usual, OWNED)],
        settings=asdict(config),
        **pictured(pictures_of(config), scores),
    ).save(config.output_dir / "report.html")


def sections(config: Config, scores: Sequence[Scores]) -> list[Section]:
    """Returns what the page has besides: what erasing costs and recovery wins back, and what others published."""
    names = {one.model for one in scores}
    kinds = [kind for kind in ("implicit", "explicit") if (CONCEPT_RATE, kind) in measured(scores[0])][:1]
    points = [
        Point(
            one.model,
            one.column(CONCEPT_RATE, kind).estimate,
            one.column(config.reward_name, "benign").estimate,
            before=start if (start := one.model.removesuffix("-recovered")) in names - {one.model} else "",
        )
        for kind in kinds
        for one in scores
        if one.model != BEFORE  # so far from all of them that they would lie on one another
    ]
    setting = setting_of(config)
    of_ours = [
        Measured("erasures", published_name(one.model), config.reward_name, setting, column.estimate)
        for one in scores
        if not config.tiny and not one.model.endswith("-recovered")
        for column in [one.column(config.reward_name, "benign")]
    ]
    others = tables_html(published_comparison(of_ours, published("erasures")))
    caption = f"Means over {len(config.seeds)} seeds ± standard error over them; recovered: the first seed alone."
    return [
        Section("methods", "All methods", methods_table(lines_of(config), caption=caption).html()),
        *(
            chart_section("pareto", pareto_chart(points, x_label=f"concept rate of {kind} prompts (lower is better)"))
            for kind in kinds
        ),
        Section("published", "What others published of Stable Diffusion", others),
    ]


def setting_of(config: Config) -> str:
    """Says what is other than under the published values, as "other captions, size"; nothing where all is the same."""
    same = {
        "model": config.policy == CHECKPOINTS["sd1.4"].hub_id,
        "captions": config.captions == COCO,
        "reward": config.reward_name == IMAGE_REWARD,
        "guidance": config.usual_guidance == USUAL_GUIDANCE,
        "size": config.size in OWN_SIZES,
    }
    others = [name for name, holds in same.items() if not holds]
    return f"other {', '.join(others)}" if others else ""


def published_name(model: str) -> str:
    """Returns what the published tables call a model of this comparison."""
    return "original" if model == BEFORE else METHODS[model].name


def deciding(config: Config) -> dict[str, str]:
    """Returns the settings that decide a model's numbers."""
    others = ("methods", "seeds", "recover", "workers", "output_dir")
    return {name: str(value) for name, value in vars(config).items() if name not in others}


def main(config: Config) -> str:
    """Makes and measures what is missing, and prints the table."""
    config = complete(config)
    if config.captions is not None:
        prompt_set(config.captions)  # fetched, or refused, before any work and once
    claim(config.output_dir / "settings.json", deciding(config), "comparison")
    work_through(
        stages_of(config),
        lambda cell: cell.scores(config) is not None,
        partial(work, config=config),
        workers=config.workers,
    )
    text = methods_table(lines_of(config)).markdown()
    write_text(config.output_dir / "table.md", text + "\n")
    report(config)
    print(text)
    print(f"\nThe table and the page with pictures: {config.output_dir}")
    return text


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
