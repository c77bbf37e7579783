"""The study of reward-constrained erasure: methods, with and without a constraint, and whether the concept stays gone.

    python examples/erasure_pareto.py
    python examples/erasure_pareto.py --fast
    python examples/erasure_pareto.py --methods uce esd --seeds 0 --probes soft-prompt noise

Each method erases stripes from the tiny world: as it is, above a floor of the reward, and as it is with the reward won
back by ReFL afterwards, without a constraint, under the constraint that the concept stays gone, and the same with
prompts under attack. All models draw the same prompts from the same seeds, and every probe tries to bring the concept
back from each. What is finished is kept, so that the same command goes on where it was interrupted; ``--fast`` is two
methods, one seed and few prompts, in minutes.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from erasure import Erasure
from erasure.cache import claim
from erasure.registry import MethodName, erase, method_named
from overpaint.evaluation import Report, Scores, compare, write_folder
from overpaint.evaluation.experiments.constrained_study import (
    CONSTRAINED,
    DEAF,
    FORMS,
    ORIGINAL,
    FormName,
    Model,
    best_form,
    lines,
    points,
    probed_lines,
    telling,
    verdict_of,
    verdicts_table,
)
from overpaint.evaluation.experiments.constraint_curves import Weighed, ends_table
from overpaint.evaluation.experiments.experiment import Experiment, evaluate
from overpaint.evaluation.experiments.options import OWNED, usual_eraser
from overpaint.evaluation.experiments.probing import pictures_of, probes_section, target_of
from overpaint.evaluation.experiments.program import (
    check_left_out,
    command_line,
    settings_from_command_line,
    usual_beside,
)
from overpaint.evaluation.experiments.recovery import recover, reference_of
from overpaint.evaluation.experiments.recovery_options import (
    RecoveryOptions,
    about_of,
    check_model,
    completed,
    refl_config,
)
from overpaint.evaluation.experiments.reward_floor import FOLDER as ERASING
from overpaint.evaluation.experiments.reward_floor import erase_above_floor
from overpaint.evaluation.experiments.study import methods_table, pictured
from overpaint.evaluation.experiments.work import work_through
from overpaint.evaluation.probes.registry import ProbeName, probe_named
from overpaint.evaluation.probes.result import ProbeResult
from overpaint.evaluation.probes.run import run_probe
from overpaint.evaluation.report.charts import svg
from overpaint.evaluation.report.page import Section, chart_section
from overpaint.evaluation.report.pareto import pareto_chart
from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import write_text
from overpaint.policy.loading import default_device
from overpaint.policy.unet_rows import counted_rows
from overpaint.settings import AnyPath, Distinct, Field, Seed, settings
from overpaint.text_files import read_json_object
from overpaint.training.folder import METRICS

FAST = {"methods": ("uce", "esd"), "seeds": (0,), "prompts_per_kind": 40, "probes": ("soft-prompt", "noise")}
"""What `--fast` takes in place of what was not asked for."""
FAST_ITERATIONS, FAST_ATTEMPTS = 20, 8
LEFT_OUT: Mapping[str, str] = {
    "original": "each method erases the model that --policy names",
    "erasure": "each method erases the policy anew; --concept, --anchor and --preserve say what",
    "seed": "each model is made once for each of --seeds",
    "attacked": "it is one of --forms",
    "resume": "the same command goes on where it was interrupted",
    "push_to_hub": "nothing is uploaded; `erase.py` and `refl_erase_nudity.py` upload one model",
}
"""Options of a single recovery that mean nothing here, and why."""
RECOVERED = (
    "Share of the concept that each probe brings back, by its worst variant. Worst: of the probes that do not bring it "
    "back from the control all the same."
)
"""What the table of probes says."""


@settings
class Config(RecoveryOptions):
    """What is compared, and how finely."""

    methods: Distinct[MethodName] = Field(get_args(MethodName), min_length=1)
    """Names of methods."""

    forms: Distinct[FormName] = Field(tuple(FORMS), min_length=1)
    """What is done with each method; the method as it is comes always."""

    seeds: Distinct[Seed] = Field((0, 1, 2), min_length=1)
    """Of training, prompts and pictures; each model is made once for each."""

    probes: Distinct[ProbeName] = get_args(ProbeName)
    """What tries to bring the concept back."""

    repeated_probes: Distinct[ProbeName] = ("soft-prompt", "textual-inversion")
    """Those of them that models of all seeds are probed with; the others take models of the first seed alone."""

    prompts_per_kind: int = Field(100, ge=1)
    """Prompts of each kind in the evaluation of each seed."""

    attempts: int = Field(16, ge=1)
    """Pictures that each probe tries to bring the concept back in."""

    slack: float = Field(0.0, ge=0)
    """Reward that may be lost in erasing above a floor, in its own units."""

    iterations: int = Field(40, ge=1)
    """ReFL iterations of a recovery."""

    attacked_iterations: int = Field(240, ge=1)
    """Of one under attack, which has more to unlearn: its constraint is the destruction, unless another is asked."""

    evaluation_steps: int = Field(10, ge=1)
    """Denoising steps of all pictures, in training too."""

    fast: bool = False
    """Two methods, one seed, few prompts and two probes, unless others are asked for."""

    workers: int = Field(2, ge=1)
    """Processes that work at a time, with one thread each; 1 on a GPU."""

    output_dir: AnyPath = Path("runs/erasure_pareto")
    """Where everything is kept."""


class Cell(NamedTuple):
    """One piece of work: a model that is made, measured and probed."""

    method: MethodName | Literal["original", "deaf"]
    """Which, or the model before it is erased, or that without cross-attention."""
    form: FormName
    seed: int

    @property
    def label(self) -> str:
        """What the progress bar calls it."""
        return f"{self.method}, {self.form}, seed {self.seed}"

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.method if self.form == "plain" else f"{self.method}-{self.form}"

    def probes(self, config: Config) -> list[ProbeName]:
        """Returns what it is probed with."""
        return [one for one in config.probes if self.seed == config.seeds[0] or one in config.repeated_probes]

    def folder(self, config: Config) -> Path:
        """Returns where it is kept."""
        return config.output_dir / self.method / self.form / f"seed-{self.seed}"

    def model(self, config: Config) -> Model | None:
        """Returns what was measured, if all of it was."""
        folder = self.folder(config)
        paths = {probe: folder / "probes" / f"{probe}.json" for probe in self.probes(config)}
        if not (folder / "scores.json").is_file() or not all(path.is_file() for path in paths.values()):
            return None
        cost = read_json_object(folder / "cost.json")
        probes: dict[str, ProbeResult] = {probe: ProbeResult.load(path) for probe, path in paths.items()}
        return Model(
            self.method,
            self.form,
            self.seed,
            Scores.load(folder / "scores.json"),
            probes,
            cost["minutes"],
            cost["rows"],
        )


def stages_of(config: Config) -> list[list[Cell]]:
    """Returns all work, in stages that need those before them; the originals' ceilings and floors come first."""
    everything = [(method, seed) for seed in config.seeds for method in config.methods]
    return [
        [*(Cell(ORIGINAL, "plain", seed) for seed in config.seeds), Cell(DEAF, "plain", config.seeds[0])],
        [Cell(method, "plain", seed) for method, seed in everything],
        [Cell(method, form, seed) for form in FORMS for method, seed in everything if form in config.forms[1:]],
    ]


def complete(config: Config) -> Config:
    """Fills in what depends on the model and on other options.

    Raises:
        ValueError: An option of a single recovery is given.
    """
    check_left_out(config, LEFT_OUT)
    if config.fast:
        usual = Config()
        fast = {name: value for name, value in FAST.items() if getattr(config, name) == getattr(usual, name)}
        if config.iterations == usual.iterations:
            fast["iterations"] = FAST_ITERATIONS
        if config.attacked_iterations == usual.attacked_iterations:
            fast["attacked_iterations"] = FAST_ITERATIONS
        if config.attempts == usual.attempts:
            fast["attempts"] = FAST_ATTEMPTS
        config = replace(config, **fast)
    forms = ("plain", *(form for form in FORMS if form in config.forms and form != "plain"))
    # What depends on the form is left to it.
    return replace(
        completed(replace(config, forms=forms)),
        learning_rate=config.learning_rate,
        lora=config.lora,
        refl=config.refl,
        destruction=config.destruction,
        run=None,
    )


def settings_of(cell: Cell, config: Config) -> Config:
    """Returns the settings of the work on one cell."""
    constraint, attacked = config.constraint, cell.form == "attacked"
    if cell.form == "unconstrained":
        constraint = "none"
    elif attacked:
        constraint = constraint or "destruction"
    own = replace(
        config,
        seed=cell.seed,
        output_dir=cell.folder(config),
        resume=True,
        constraint=constraint,
        attacked=attacked,
        iterations=config.attacked_iterations if attacked else config.iterations,
        run=None,
    )
    if own.refl is not None or not own.tiny:
        return own
    steps = own.evaluation_steps
    refl = replace(refl_config(own), steps=steps, first_reward_step=steps // 2, last_reward_step=steps - 1)
    return replace(own, refl=refl)


def make(cell: Cell, config: Config, about: Experiment) -> DiffusionPolicy:
    """Makes the model of a cell, keeps it, and returns it."""
    own, folder = settings_of(cell, config), cell.folder(config)
    if cell.method == ORIGINAL:
        return config.load()
    if cell.method == DEAF:
        return without_cross_attention(config.load())
    eraser = usual_eraser(cell.method, own.own_concept(tiny=own.tiny), policy=own.policy, seed=cell.seed)
    method = method_named(cell.method, eraser)
    if cell.form in ("plain", "floor"):
        policy = config.load()
        if cell.form == "floor":
            erasure, _ = erase_above_floor(method, policy, about, own, slack=config.slack)
        else:
            training = folder / "erasing"
            erasure = erase(
                method, policy, about.concept, output_dir=training, resume=training.exists(), progress=False
            )
        erasure.save(folder / "erasure")
        erasure.apply(policy)
        return policy
    tuned = completed(own)
    policy = config.load(lora=tuned.lora, train=tuned.train)
    erasure = Erasure.load(Cell(cell.method, "plain", cell.seed).folder(config) / "erasure")
    erasure.apply(policy, reference=reference_of(own, about))
    recover(own, policy, about, erasure, method=method, progress=False)
    own.save(policy, folder)
    return policy


@torch.no_grad()
def without_cross_attention(policy: DiffusionPolicy) -> DiffusionPolicy:
    """Sets what cross-attention adds to zero, and returns the policy."""
    for name, layer in policy.unet.named_modules():
        if name.endswith(".attn2.to_out.0"):
            for parameter in layer.parameters():
                parameter.zero_()
    return policy


def work(cell: Cell, config: Config) -> None:
    """Makes one model, measures it, and probes it."""
    folder, own = cell.folder(config), settings_of(cell, config)
    folder.mkdir(parents=True, exist_ok=True)
    about = about_of(config)
    about.to(default_device())
    start = time.process_time()
    with counted_rows() as rows:
        policy = make(cell, config, about)
    cost = {"minutes": (time.process_time() - start) / 60, "rows": rows.total}
    if not (folder / "cost.json").is_file():  # one that was made before is only taken up again
        write_text(folder / "cost.json", json.dumps(cost))

    drawing = config.drawing(config.evaluation_steps)
    numbers = {"prompts_per_kind": config.prompts_per_kind, "seed": cell.seed}
    if not (folder / "scores.json").is_file():
        images, scores = evaluate(policy, about, drawing, model=cell.name, progress=False, **numbers)
        if cell.seed == config.seeds[0]:
            write_folder(images, pictures_of_first(config))
        scores.save(folder / "scores.json")
    if not (probes := cell.probes(config)):
        return
    target = target_of(about, drawing)
    original = policy if cell.method == ORIGINAL else own.load()
    for name in probes:
        if (path := folder / "probes" / f"{name}.json").is_file():
            continue
        path.parent.mkdir(exist_ok=True)
        run_probe(
            probe_named(name, tiny=config.tiny),
            policy,
            original,
            target,
            count=config.attempts,
            seed=cell.seed,
            kept=config.output_dir / "kept",
            pictures=folder / "probes" if cell.seed == config.seeds[0] else None,
            progress=False,
        ).save(path)


def pictures_of_first(config: Config) -> Path:
    """Returns the folder of the first seed's pictures."""
    return config.output_dir / "pictures" / f"seed-{config.seeds[0]}"


def models_of(config: Config) -> list[Model]:
    """Returns all models that are finished."""
    found = [cell.model(config) for stage in stages_of(config) for cell in stage]
    return [one for one in found if one is not None]


def report(config: Config, models: Sequence[Model], about: Experiment) -> str:
    """Writes the page, and returns the tables as text."""
    reward, held_out = about.reward_name, "true utility" if config.tiny else None
    judged = partial(verdict_of, models, reward=reward, held_out=held_out)
    forms = [form for form in config.forms if form in CONSTRAINED]
    best = [best_form([judged(method, form) for form in forms]) for method in config.methods if forms]
    every, what_holds = methods_table(lines(models, held_out, reward=reward)), verdicts_table(best, reward)
    probed = methods_table(probed_lines(models), caption=RECOVERED)
    first = [one for one in models if one.seed == config.seeds[0]]
    kind = "explicit"
    told_by = set(telling(models)) & set(config.probes)
    x = "worst probe's recovery" if told_by else f"concept rate of {kind} prompts"
    weighed = [weighed_in(form, config, models) for form in forms]
    chosen = {(one.method, one.form) for one in best}
    shown = [one for one in models if one.form == "plain" or (one.method, one.form) in chosen]
    front = pareto_chart(
        points(shown, reward, kind),
        title="Each method as it is, and its best constrained form",
        x_label=f"{x} (lower is better)",
        y_label=reward,
        bars="standard errors over the seeds",
    )
    curves = {name: chart for one in weighed for name, chart in one.charts().items()}
    for name, chart in {"front": front, **curves}.items():
        write_text(config.output_dir / f"{name}.svg", svg(chart.spec))
    sections = [
        chart_section("front", front),
        Section("holds", "What holds of the best constrained form", what_holds.html()),
        Section("all", "All models", every.html()),
        Section("recovered", "What the probes recover", probed.html()),
        *(chart_section(name, chart) for name, chart in curves.items()),
        Section("ended", "Where the constraints ended", ends_table(weighed).html()),
        *(probe_section(probe, config, first) for probe in config.probes),
    ]
    usual = usual_beside(config, complete, ["policy", "fast"])
    Report(
        title="Erasing a concept, and keeping what people like",
        lead="Each model draws the same prompts with the same seeds; the first is the model as it came.",
        comparison=compare([one.scores for one in first]),
        sections=sections,
        commands=[command_line("python examples/erasure_pareto.py", config, usual, OWNED)],
        settings=asdict(config),
        **pictured(pictures_of_first(config), [one.scores for one in first]),
    ).save(config.output_dir / "report.html")
    counts = (sum(one.keeps_quality for one in best), sum(one.stays_gone for one in best))
    told = (
        f"As good and as gone: {counts[0]} of {len(best)} methods; stays gone under attack and tuning: {counts[1]} of "
        f"{len(best)}."
    )
    return "\n\n".join([every.markdown(), probed.markdown(), what_holds.markdown(), told])


def weighed_in(form: FormName, config: Config, models: Sequence[Model]) -> Weighed:
    """Returns how the constraint of a form was weighed in the models of all seeds."""
    own = {
        f"{one.scores.model}, seed {one.seed}": config.output_dir / one.method / form / f"seed-{one.seed}"
        for one in models
        if one.form == form
    }
    if form == "floor":
        return Weighed.read(form, "floor", {name: folder / ERASING / METRICS for name, folder in own.items()})
    return Weighed.read(form, "erasure", {name: folder / METRICS for name, folder in own.items()})


def probe_section(probe: str, config: Config, models: Sequence[Model]) -> Section:
    """Returns what a probe found out about some models, with pictures."""
    folders = {
        one.scores.model: config.output_dir / one.method / one.form / f"seed-{one.seed}" / "probes" for one in models
    }
    return probes_section(probe, {one.scores.model: one.probes[probe] for one in models}, pictures_of(probe, folders))


def deciding(config: Config) -> dict[str, str]:
    """Returns the settings that decide a model's numbers."""
    others = (
        "methods",
        "forms",
        "seeds",
        "probes",
        "repeated_probes",
        "fast",
        "workers",
        "output_dir",
        "run",
        "resume",
        "seed",
    )
    return {name: str(value) for name, value in vars(config).items() if name not in others}


def main(config: Config) -> str:
    """Makes, measures and probes what is missing, and prints the tables."""
    config = complete(config)
    check_model(config)
    about = about_of(config)
    claim(config.output_dir / "settings.json", deciding(config), "study")
    work_through(
        stages_of(config),
        lambda cell: cell.model(config) is not None,
        partial(work, config=config),
        workers=config.workers,
    )
    text = report(config, models_of(config), about)
    write_text(config.output_dir / "table.md", text + "\n")
    print(text)
    print(f"\nThe tables and the page with pictures: {config.output_dir}")
    return text


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
