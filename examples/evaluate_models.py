"""Compare text-to-image models: reward by size and guidance on captions, or several images of each of users' prompts.

    python examples/evaluate_models.py
    python examples/evaluate_models.py --experiment prompts
    accelerate launch --num_processes 8 examples/evaluate_models.py --models sd1.4 sd2.1 openjourney --sizes 256 512
    python examples/evaluate_models.py --experiment prompts --models sd1.4 openjourney dalle2=generations/dalle2

By default the tiny world draws. Models are short names, folders, hub ids, or ``name=FOLDER`` for images that another
system drew, as ``<id>_<k>.png``. Pictures and scores are kept, so that the same command goes on where it was
interrupted; under accelerate all processes draw and score. At the end stands a report, with published numbers beside.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from accelerate.utils import gather_object
from markupsafe import Markup

from overpaint.evaluation import (
    Drawable,
    DrawConfig,
    DrawnImages,
    ImageFolder,
    ImageSource,
    Measure,
    PlannedImage,
    Report,
    generate,
    score,
)
from overpaint.evaluation.experiments.experiment import command_line
from overpaint.evaluation.experiments.options import TINY_WORLD, Dtype
from overpaint.evaluation.experiments.published import (
    CLIP,
    GUIDANCE_SCALES,
    IMAGE_REWARD,
    Measured,
    Published,
    published,
    published_comparison,
    tables_html,
    tables_markdown,
)
from overpaint.evaluation.experiments.study import (
    USUAL_SCALE,
    Cell,
    Result,
    cells_of,
    file_name_of,
    guidance_curves,
    load_drawable,
    means_by_metric,
    measured,
    published_as,
)
from overpaint.evaluation.images.drawable import read_record
from overpaint.evaluation.images.drawing import duration_text, seconds_per_image
from overpaint.evaluation.images.pairs import OtherImages
from overpaint.evaluation.images.plan import plan_named
from overpaint.evaluation.metrics.statistics import ranks
from overpaint.evaluation.prompts import PromptSet, prompt_set
from overpaint.evaluation.report.page import Section, contact_sheets, evenly_spaced
from overpaint.evaluation.report.table import Table, rank_table
from overpaint.evaluation.scoring.score import write_scores
from overpaint.policy.atomic import write_text
from overpaint.settings import AnyPath, Count, Distinct, Field, NonNegative, Seed, settings
from overpaint.tinyworld import IMAGE_SIZE
from overpaint.tinyworld import REWARDS as TINY_WORLD_REWARDS
from overpaint.training import from_main, process_state
from rewards import reward_named
from rewards.combine import to_device

REWARDS = ("image-reward", "clip")
METRICS = {"image-reward": IMAGE_REWARD, "clip": CLIP}
UTILITY = "true utility"
KIND = "benign"
SHOWN = 6


@settings
class Config:
    """Which models draw what, and what is measured of it. What is empty or None is chosen to fit the experiment."""

    experiment: Literal["captions", "prompts"] = "captions"
    """captions: every size and guidance scale, one image each; prompts: several images each, models ranked."""

    models: tuple[str, ...] = Field((TINY_WORLD,), min_length=1)
    """tinyworld, tinyworld-flow, sd1.4, sd2.1, openjourney, a folder, a hub id, or name=FOLDER of images that are
    there."""

    prompts: str | None = None
    """A set (coco-30k, imagereward-100, diffusiondb, ...) or a file; None is coco-30k, imagereward-100, or captions of
    the tiny world."""

    limit: int | None = Field(None, ge=1)
    """How many of the prompts; None is all of a set, or 60 captions of the tiny world."""

    images_per_prompt: int | None = Field(None, ge=1)
    """None is 1 for captions, and 10 for prompts, or 3 in the tiny world."""

    sizes: Distinct[Count] = ()
    """Sides of drawn images in pixels; empty is each model's own, or 32 and 64 for captions of the tiny world."""

    scored_size: int | None = Field(None, ge=1)
    """Side to which images are scaled before they are scored; None leaves them, but for the tiny world's 64."""

    guidance_scales: Distinct[NonNegative] = ()
    """Classifier-free guidance; empty is the paper's 1.5 to 5 for captions, and 7.5 for prompts. Prompts of the tiny
    world take 1, 1.5, 3 and 5, which stand for models of which some are worse."""

    steps: int | None = Field(None, ge=1)
    """Denoising steps; None is 50, or 20 for the tiny world."""

    rewards: Distinct[str] = ()
    """Names such as image-reward, or package.module:factory; empty is image-reward and clip, or the tiny world's reward
    model, its true utility and its accuracy."""

    own_seeds: bool = True
    """Whether the seeds that a file of prompts gives (evaluation_seed, sd_seed, seed) decide the noise."""

    own_guidance: bool = True
    """Whether prompts are drawn with the guidance that their file gives (evaluation_guidance, sd_guidance_scale), if it
    gives any, and others with 7.5; guidance_scales must not be given then."""

    own_scheduler: bool = False
    """Draw with the pipeline of diffusers and the scheduler of its files, in place of DDIM."""

    dtype: Dtype = "float32"
    """Precision of the weights."""

    batch_size: int = Field(16, ge=1)
    """Images that are drawn or scored at a time."""

    device: str | None = None
    """None is the accelerator if there is one, and else the CPU."""

    seed: Seed = 0
    """Chooses the noise of all images whose prompt has no seed of its own."""

    output_dir: AnyPath = Path("runs/evaluate_models")
    """Where pictures, scores and report are kept; the report of an experiment has its name."""

    def __post_init__(self) -> None:
        """Checks what can be checked before anything is loaded, and fills in what fits the experiment."""
        tiny, captions = TINY_WORLD in self.models, self.experiment == "captions"
        if len({model.partition("=")[0] for model in self.models}) < len(self.models):
            raise ValueError(f"models must hold each once, got {' '.join(self.models)}")
        if tiny and len(self.models) > 1:
            raise ValueError(f"models must not be beside {TINY_WORLD}, which knows other prompts, got {self.models}")
        scales = (1.0, 1.5, 3.0, 5.0) if tiny else (USUAL_SCALE,)
        usual = {
            "prompts": "tiny-benign" if tiny else "coco-30k" if captions else "imagereward-100",
            "limit": 60 if tiny else None,
            "images_per_prompt": 1 if captions else 3 if tiny else 10,
            "sizes": (32, 64) if tiny and captions else (),
            "scored_size": IMAGE_SIZE if tiny else None,
            "guidance_scales": tuple(map(float, GUIDANCE_SCALES)) if captions else scales,
            "steps": 20 if tiny else 50,
        }
        for name, value in usual.items():
            if getattr(self, name) in (None, ()):
                object.__setattr__(self, name, value)


def measures_of(config: Config, device: str) -> list[Measure]:
    """Loads what measures."""
    if config.rewards or TINY_WORLD not in config.models:
        rewards = {name: reward_named(name, TINY_WORLD_REWARDS) for name in config.rewards or REWARDS}
        for reward in rewards.values():
            to_device(reward, device)
        return [Measure(METRICS.get(name, name), reward) for name, reward in rewards.items()]
    from overpaint import tinyworld

    reward = tinyworld.load_reward()
    to_device(reward, device)
    return [
        Measure("tiny ImageReward", reward, note="The tiny world's own reward model, standardised."),
        Measure(UTILITY, tinyworld.utility, note="The public function that the reward model was trained to guess."),
        Measure("accuracy", tinyworld.matches, note="Everything that the caption names shows, and nothing forbidden."),
    ]


def root_of(config: Config, cell: Cell) -> Path:
    """Returns the folder of a setting, in which every model has one of its own."""
    return config.output_dir / config.experiment / cell.setting


def drawing(config: Config, cell: Cell) -> DrawConfig:
    """Returns how the images of a cell are drawn."""
    return DrawConfig(steps=config.steps or 1, guidance_scale=cell.scale or 1.0, size=cell.size)


def draw_all(config: Config, cells: Sequence[Cell], planned: Sequence[PlannedImage], device: str) -> None:
    """Draws what is missing, this process's part of it, one model in memory at a time."""
    state = process_state()
    for model in dict.fromkeys(cell.model for cell in cells if cell.scale is not None):
        own, name = [cell for cell in cells if cell.model == model], file_name_of(model)
        drawable = load_drawable(
            model, own_scheduler=config.own_scheduler, dtype=getattr(torch, config.dtype), device=device
        )
        # Others wait, so that what is missing is counted and timed while nobody draws.
        from_main(partial(tell_cost, config, drawable, own, planned, state.num_processes))
        for cell in own:
            generate(
                drawable,
                planned,
                root_of(config, cell),
                drawing(config, cell),
                model=name,
                batch_size=config.batch_size,
            )
    state.wait_for_everyone()


def tell_cost(
    config: Config, drawable: Drawable, cells: Sequence[Cell], planned: Sequence[PlannedImage], processes: int
) -> None:
    """Prints how much there is to draw and how long it will take, if there is anything."""
    name = file_name_of(cells[0].model)
    count, seconds = 0, 0.0
    timed: dict[tuple[int | None, bool], float] = {}
    for cell in cells:
        wanting = sum(not (root_of(config, cell) / name / image.file_name).exists() for image in planned)
        if wanting:
            count += wanting
            how = cell.size, cell.scale == 1.0  # without guidance half as much is computed
            if how not in timed:
                timed[how] = seconds_per_image(drawable, planned, drawing(config, cell), batch_size=config.batch_size)
            seconds += timed[how] * wanting / processes
    if count:
        settings = f"{len(cells)} settings, {config.steps} steps each"
        print(f"{name}: {count:,} images to draw ({settings}), which will take about {duration_text(seconds)}")


def images_of(config: Config, cell: Cell) -> ImageFolder | OtherImages:
    """Opens the images of a cell."""
    name = file_name_of(cell.name)
    if cell.scale is not None:
        return ImageFolder.open(root_of(config, cell), name)
    prompts = config.output_dir / config.experiment / "prompts.json"
    return OtherImages.open(Path(cell.model.partition("=")[2]), name, prompts, kind=KIND)


def score_all(config: Config, cells: Sequence[Cell], device: str) -> list[Result]:
    """Scores every cell; under several processes each its share of them."""
    state = process_state()
    mine = cells[state.process_index :: state.num_processes]
    measures = measures_of(config, device) if mine else []
    kept = "+".join(re.sub(r"[^A-Za-z0-9.]+", "-", measure.name) for measure in measures)
    results = []
    for cell in mine:
        images = images_of(config, cell)
        side = images.pixels([0]).shape[-1]
        folder = config.output_dir / config.experiment / "scores" / images.model
        journal = folder / f"{cell.setting}-at-{config.scored_size or side}-{kept}.jsonl"
        scores = score(
            images, measures, chunk=config.batch_size, size=config.scored_size, device=device, journal=journal
        )
        results.append(Result(cell, side, config.scored_size, scores))
    together = gather_object(results) if state.num_processes > 1 else results
    return sorted(together, key=lambda result: cells.index(result.cell))


def own_and_published(config: Config, results: Sequence[Result]) -> tuple[list[Measured], list[Published]]:
    """Returns what was measured, and what is published of the same metrics."""
    plain = config.experiment == "prompts" and not config.sizes and len(config.guidance_scales) == 1
    ours = measured(config.experiment, results, name_settings=not plain)
    return ours, [number for number in published(config.experiment) if number.metric in METRICS.values()]


def ranking(config: Config, results: Sequence[Result]) -> Table | None:
    """Returns the models' means beside the ranks that people gave; None where there is nothing to compare."""
    if config.experiment != "prompts":
        return None
    ours, _ = own_and_published(config, results)
    if TINY_WORLD in config.models:
        means = means_by_metric(ours, by_setting=True)
        if UTILITY not in means:
            return None
        worth = means.pop(UTILITY)
        people = dict(zip(worth, ranks(list(worth.values())), strict=True))
        ranked_by, caption = UTILITY, "Settings of one model stand for models; their true utility ranks them."
    else:
        people = {number.model: number.value for number in published("prompts", "human rank")}
        means = means_by_metric([one for one in ours if one.model in people and one.setting == ""])
        ranked_by, caption = "people", "Human ranks as published with ImageReward."
    # Neither one model nor a metric that is the same for all has an order.
    ordered = {metric: values for metric, values in means.items() if len(set(values.values())) > 1}
    if not ordered or len(set(people.values())) < 2:
        return None
    return rank_table(ordered, people, ranked_by=ranked_by, caption=caption)


def pictures(config: Config, results: Sequence[Result]) -> list[Section]:
    """Shows some prompts as the best settings of each model and size drew them, by the first measure."""
    best: dict[tuple[str, int], Result] = {}
    for result in results:
        key = result.cell.model, result.side
        if key not in best or best[key].scores.columns[0].estimate.mean < result.scores.columns[0].estimate.mean:
            best[key] = result
    shown: list[ImageSource] = []
    scores = []
    for result in list(best.values())[:SHOWN]:
        images = images_of(config, result.cell)
        if not isinstance(images, ImageFolder):
            continue
        first = [place for place, image in enumerate(images.planned) if image.copy == 0]
        places = [first[k] for k in evenly_spaced(range(len(first)), SHOWN)]
        label = f"{published_as(result.cell.name)}, {result.setting}"
        planned = tuple(images.planned[place] for place in places)
        shown.append(DrawnImages(model=label, planned=planned, config=images.config, stack=images.pixels(places)))
        scores.append(replace(result.scores, model=label))
    if not shown:
        return []
    note = Markup('<p class="note">Each model and size at the guidance with the best mean of the first measure.</p>')
    return [Section("pictures", "Pictures", note + contact_sheets(shown, per_kind=SHOWN, scores=scores))]


def extremes(results: Sequence[Result]) -> str:
    """Says which model in which setting is best and which is worst by the first measure."""

    def mean(result: Result) -> float:
        return result.scores.columns[0].estimate.mean

    best, worst = max(results, key=mean), min(results, key=mean)
    told = [f"{published_as(one.cell.name)} at {one.setting}, {mean(one):.3f}" for one in (best, worst)]
    name = results[0].scores.columns[0].measure
    return f"Best by {name}: {told[0]}." if best is worst else f"Best by {name}: {told[0]}; worst: {told[1]}."


def noise_and_guidance(prompts: PromptSet, planned: Sequence[PlannedImage]) -> str:
    """Says where the seeds of the images and their guidance come from."""
    by_id = {prompt.id: prompt for prompt in prompts.prompts}
    first = [image for image in planned if image.copy == 0]
    own = sum(image.seed == by_id[image.id].seed for image in first)
    told = f"Noise: {own} of {len(first)} prompts from the seed that {prompts.name} gives, the others from --seed."
    scales = sorted({image.guidance_scale for image in first if image.guidance_scale is not None})
    if scales:
        guided = sum(image.guidance_scale is not None for image in first)
        told += (
            f" Guidance: {guided} of {len(first)} as {prompts.name} says, {scales[0]:g} to {scales[-1]:g}, the others "
            f"{USUAL_SCALE:g}."
        )
    return told


def write_report(config: Config, results: Sequence[Result], prompts: PromptSet, started: datetime) -> Path:
    """Writes the values of all images, the means and the page; returns the page."""
    folder = config.output_dir / config.experiment
    named = [replace(result.scores, model=f"{published_as(result.cell.name)}, {result.setting}") for result in results]
    write_scores(named, folder / "scores.csv")
    ours, theirs = own_and_published(config, results)
    write_text(folder / "means.json", json.dumps([one._asdict() for one in ours], indent=1, default=str) + "\n")
    tiny = TINY_WORLD in config.models  # of other prompts and rewards, so that nothing is to be compared
    tables = tables_html(published_comparison(ours, [] if tiny else theirs))
    sections = [
        Section("measured", "Measured" if tiny else "Measured and published", tables),
        *guidance_curves(results),
    ]
    order = ranking(config, results)
    if order is not None:
        sections.append(Section("ranking", order.label, order.html()))
    sections += pictures(config, results)
    if tiny:
        others = tables_html(published_comparison([], theirs))
        sections.append(Section("published", "Published of other models", others))
    drawn = [result for result in results if result.cell.scale is not None]
    hashes = {
        result.cell.name: read_record(root_of(config, result.cell) / file_name_of(result.cell.model))["weights"]
        for result in drawn
    }
    columns = results[0].scores.columns
    page = folder / "report.html"
    Report(
        title="Models on captions, by size and guidance"
        if config.experiment == "captions"
        else "Models on users' prompts",
        lead=f"{len(prompts.prompts)} prompts of {prompts.name}, {len(columns[0].images)} images in each of "
        f"{len(results)} settings. {extremes(results)}",
        sections=sections,
        notes=[
            *(f"{column.measure}: {column.note}" for column in columns if column.note),
            *(noise_and_guidance(prompts, result.scores.columns[0].images) for result in drawn[:1]),
            f"Prompts: {prompts.source}. Errors take prompts as independent, not the images of one prompt.",
            f"Numbers that are published without a guidance scale stand beside ours at {USUAL_SCALE:g}, which is what "
            "diffusers takes where none is said.",
            "A size with an arrow was drawn at the first and scaled to the second before it was scored.",
        ],
        commands=[command_line("python examples/evaluate_models.py", config, usual_settings(config))],
        settings=asdict(config),
        started=started,
        hashes={name: value for name, value in hashes.items() if value},
    ).save(page)
    return page


def usual_settings(config: Config) -> dict[str, Any]:
    """Returns what each setting is where it is not said; of most that depends on the experiment and the models."""
    first = {"experiment": Config().experiment, "models": Config().models}
    return vars(Config(experiment=config.experiment, models=config.models)) | first


def main(config: Config) -> list[Result]:
    """Draws, scores, prints the tables and writes the report."""
    started = datetime.now(UTC)
    state = process_state()
    device = config.device or str(state.device)
    prompts = prompt_set(config.prompts or "", limit=config.limit)
    planned = plan_named(
        prompts.prompts,
        kind=KIND,
        images_per_prompt=config.images_per_prompt or 1,
        seed=config.seed,
        own_seeds=config.own_seeds,
        own_guidance=config.own_guidance,
    )
    entries = [{"id": prompt.id, "prompt": prompt.text} for prompt in prompts.prompts]
    path = config.output_dir / config.experiment / "prompts.json"
    from_main(lambda: write_text(path, json.dumps(entries, indent=1, ensure_ascii=False) + "\n"))
    own = any(image.guidance_scale is not None for image in planned)
    if own and config.guidance_scales != usual_settings(config)["guidance_scales"]:
        raise ValueError(
            f"guidance_scales must not be given for prompts with a guidance of their own, got {config.guidance_scales} "
            f"for {prompts.name}; --no-own-guidance draws all with these scales"
        )
    cells = cells_of(config.models, config.sizes, (USUAL_SCALE,) if own else config.guidance_scales)
    if state.is_main_process:
        print(noise_and_guidance(prompts, planned))
    draw_all(config, cells, planned, device)
    results = score_all(config, cells, device)
    if state.is_main_process:
        ours, theirs = own_and_published(config, results)
        print(f"\n{tables_markdown(published_comparison(ours, [] if TINY_WORLD in config.models else theirs))}\n")
        order = ranking(config, results)
        if order is not None:
            print(f"{order.markdown()}\n")
        print(f"The report: {write_report(config, results, prompts, started)}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Config))
    process_state().destroy_process_group()
