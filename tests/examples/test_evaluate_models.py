"""The program that compares models: what it draws, measures, keeps and tells, and what it refuses."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.evaluate_models import Config, main
from overpaint.evaluation.experiments.published import CLIP, DALLE2, IMAGE_REWARD, OWN_SIZE, SD14, SD21, Measured
from overpaint.evaluation.experiments.study import (
    Cell,
    Result,
    cells_of,
    checkpoint_of,
    file_name_of,
    guidance_curves,
    load_drawable,
    means_by_metric,
    measured,
    published_as,
)
from overpaint.evaluation.images.drawable import PipelineDrawable, read_record
from overpaint.evaluation.report.table import MINUS, agreement, rank_table
from overpaint.policy import DiffusionPolicy

HERE = Path(__file__).parent
BRIGHTNESS = "made_up_rewards:Brightness"


@pytest.fixture(autouse=True)
def made_up_rewards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the rewards of this folder known by name."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"id": f"p-{k}", "prompt": "a red circle" + " x" * k} for k in range(3)]))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Config:
    return Config(limit=3, steps=1, guidance_scales=(1.5, 3.0), device="cpu", output_dir=tmp_path / "run")


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Pictures and scores; a picture that is drawn again shows by its time."""
    found = [path for path in folder.rglob("*") if path.suffix in (".png", ".jsonl")]
    times = [path.stat().st_mtime_ns if path.suffix == ".png" else 0 for path in found]
    return {str(path.relative_to(folder)): (path.read_bytes(), time) for path, time in zip(found, times, strict=True)}


# From end to end


def test_captions_give_a_table_curves_and_pictures_and_a_second_call_draws_nothing(
    tiny: Config, capsys: pytest.CaptureFixture[str], look_at: Callable[[Path], Any]
) -> None:
    results = main(tiny)
    assert [result.cell[1:] for result in results] == [(32, 1.5), (32, 3.0), (64, 1.5), (64, 3.0)]
    assert [result.setting for result in results] == [
        "32² → 64², CFG 1.5", "32² → 64², CFG 3", "64², CFG 1.5", "64², CFG 3",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "tinyworld: 12 images to draw (4 settings, 1 steps each), which will take about" in printed
    folder = tiny.output_dir / "captions"
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {"tiny ImageReward", "true utility", "accuracy", "prompt", "seed"} <= set(rows[0])
    with Image.open(folder / "32-cfg3" / "tinyworld" / "tiny-benign-0001_0.png") as picture:
        assert picture.size == (32, 32)
    page = (folder / "report.html").read_text(encoding="utf-8")
    for words in (
        "Best by tiny ImageReward: ",
        "tiny ImageReward by guidance",
        "not run",
        f"{MINUS}1.5598",
        "data:image/png",
        "32² → 64², CFG 1.5",
    ):
        assert words in page
    assert read_record(folder / "32-cfg3" / "tinyworld")["weights"] in page
    before = files(folder)
    assert len(before) == 12 + 4 + 4  # pictures, their rows, scores
    again = main(tiny)
    assert [result.scores for result in again] == [result.scores for result in results]
    assert files(folder) == before
    assert "images to draw" not in capsys.readouterr().out
    seen = look_at(folder / "report.html")
    assert seen.tables >= 4  # three measures, settings
    assert seen.charts == 3
    assert seen.pictures == 3 * 2  # prompts, sizes


def test_prompts_of_the_tiny_world_rank_its_settings_by_their_true_utility(
    tiny: Config, capsys: pytest.CaptureFixture[str], look_at: Callable[[Path], Any]
) -> None:
    results = main(replace(tiny, experiment="prompts", images_per_prompt=2, sizes=(), guidance_scales=(1.0, 3.0)))
    assert [len(result.scores.columns[0].images) for result in results] == [6, 6]
    worth = {result.setting: result.scores.column("true utility", "benign").estimate.mean for result in results}
    liked = {result.setting: result.scores.column("tiny ImageReward", "benign").estimate.mean for result in results}
    best, worst = sorted(worth, key=lambda name: -worth[name])
    lines = capsys.readouterr().out.split("\n")
    head = next(k for k, line in enumerate(lines) if line.startswith("| model | tiny ImageReward |"))
    assert lines[head].endswith("| true utility |")  # which is last, as the judge
    assert [line.split(" | ")[0] for line in lines[head + 2 : head + 4]] == [f"| {best}", f"| {worst}"]
    correlation = 1.0 if liked[best] > liked[worst] else -1.0
    assert lines[head + 4].startswith(f"| Spearman with true utility | {correlation:.2f} |".replace("-", MINUS))
    page = (tiny.output_dir / "prompts" / "report.html").read_text(encoding="utf-8")
    assert "Models in order" in page
    seen = look_at(tiny.output_dir / "prompts" / "report.html")
    assert seen.tables >= 3
    assert seen.pictures == 3


def test_checkpoints_and_given_images_stand_side_by_side(
    pipeline_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for k in range(3):
        Image.new("RGB", (20, 20), (51, 51, 51)).save(given / f"p-{k}_0.png")
    config = Config(
        experiment="prompts",
        models=(str(pipeline_dir), f"dalle2={given}"),
        prompts=str(prompts),
        images_per_prompt=1,
        steps=1,
        rewards=(BRIGHTNESS,),
        scored_size=16,
        device="cpu",
        output_dir=tmp_path / "run",
    )
    drawn, other = main(config)
    assert (drawn.side, other.side) == (64, 20)
    assert other.scores.columns[0].values == pytest.approx([0.2] * 3)
    assert len(set(drawn.scores.columns[0].values)) == 3
    page = (tmp_path / "run" / "prompts" / "report.html").read_text(encoding="utf-8")
    assert DALLE2 in page
    assert "0.2114" in page
    assert f"| {DALLE2} |" in capsys.readouterr().out
    unscaled, _ = main(replace(config, scored_size=None))
    assert unscaled.scores.columns[0].values != drawn.scores.columns[0].values


def test_the_pipelines_own_scheduler_is_asked_for_and_told(pipeline_dir: Path, prompts: Path, tmp_path: Path) -> None:
    config = Config(
        models=(str(pipeline_dir),),
        prompts=str(prompts),
        guidance_scales=(2.0,),
        steps=2,
        rewards=(BRIGHTNESS,),
        own_scheduler=True,
        device="cpu",
        output_dir=tmp_path / "run",
    )
    main(config)
    folder = tmp_path / "run" / "captions" / "own-cfg2" / pipeline_dir.name
    assert read_record(folder)["scheduler"]["class"] == "PNDMScheduler"
    with pytest.raises(ValueError, match="was drawn by another model, with class"):
        main(replace(config, own_scheduler=False))


@pytest.mark.slow
def test_two_processes_write_what_one_alone_does(
    pipeline_dir: Path, prompts: Path, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    root = HERE.parents[1]
    options = ["--models", pipeline_dir, "--prompts", prompts, "--guidance-scales", "1", "3", "--steps", "2"]
    options += ["--batch-size", "2", "--rewards", BRIGHTNESS, "--device", "cpu"]
    for processes, name in ((2, "two"), (1, "one")):
        command = [root / "examples" / "evaluate_models.py", *options, "--output-dir", tmp_path / name]
        printed = torchrun(*command, processes=processes, PYTHONPATH=f"{root}:{HERE}")
        assert printed.count("The report: ") == 1
        assert "6 images to draw" in printed
    one, two = (tmp_path / name / "captions" for name in ("one", "two"))
    assert (one / "scores.csv").read_bytes() == (two / "scores.csv").read_bytes()
    assert (one / "means.json").read_bytes() == (two / "means.json").read_bytes()


# What fits an experiment, and what does not


def test_what_is_not_said_follows_the_published_experiments() -> None:
    captions = Config(models=("sd1.4",))
    assert (captions.prompts, captions.images_per_prompt, captions.steps) == ("coco-30k", 1, 50)
    assert captions.guidance_scales == (1.5, 2.0, 3.0, 4.0, 5.0)
    users = Config(models=("sd1.4", "openjourney"), experiment="prompts")
    assert (users.prompts, users.images_per_prompt, users.guidance_scales) == ("imagereward-100", 10, (7.5,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ()}, "models must have at least 1 item"),
        ({"models": ("sd1.4", "sd1.4=there")}, "models must hold each once, got sd1.4 sd1.4=there"),
        ({"models": ("tinyworld", "sd1.4")}, "models must not be beside tinyworld"),
        ({"sizes": (64, 64)}, r"sizes must hold each once, got \(64, 64\)"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_models_have_their_hub_ids_file_names_and_published_names(pipeline_dir: Path) -> None:
    assert checkpoint_of("sd1.4") == "CompVis/stable-diffusion-v1-4"
    assert checkpoint_of("somebody/something") == "somebody/something"
    assert (published_as("sd1.4"), published_as("dalle2"), published_as("a/b")) == (SD14, DALLE2, "a/b")
    assert [file_name_of(name) for name in ("sd2.1", "prompthero/openjourney", "/x/my model!")] == [
        "sd2.1", "openjourney", "my-model-",
    ]  # fmt: skip
    assert isinstance(load_drawable(str(pipeline_dir), device="cpu"), DiffusionPolicy)
    assert isinstance(load_drawable(str(pipeline_dir), own_scheduler=True, device="cpu"), PipelineDrawable)


# In the words of published numbers


def result(model: str, size: int | None, scale: float | None, *, side: int, scored: int | None, mean: float) -> Result:
    from overpaint.evaluation import Column, PlannedImage, Scores

    images = tuple(PlannedImage("benign", f"p-{k}", 0, "a", k) for k in range(2))
    column = Column(
        measure=IMAGE_REWARD,
        kind="benign",
        is_rate=False,
        better="higher",
        note="",
        images=images,
        values=(mean - 1.0, mean + 1.0),
    )
    return Result(Cell(model, size, scale), side, scored, Scores(model="m", config=None, columns=(column,)))


def keys(numbers: list[Measured]) -> list[tuple[str, str, float]]:
    return [(one.model, one.setting, one.estimate.mean) for one in numbers]


def test_settings_are_named_as_the_published_ones() -> None:
    results = [
        result("sd1.4", 256, 1.5, side=256, scored=None, mean=-2.0),
        result("sd1.4", 512, 7.5, side=512, scored=512, mean=0.25),
        result("sd1.4", None, 3.0, side=512, scored=256, mean=0.5),
        result("dalle2=there", None, None, side=256, scored=256, mean=0.75),
    ]
    assert keys(measured("captions", results)) == [
        (SD14, "256², CFG 1.5", -2.0),
        (SD14, "512²", 0.25),
        (SD14, "512² → 256², CFG 3", 0.5),
        (DALLE2, "256²", 0.75),
    ]
    assert keys(measured("prompts", results[1:2], name_settings=False)) == [(SD14, "", 0.25)]


def test_the_best_guidance_at_the_own_size_is_told_only_where_all_of_the_papers_ran() -> None:
    scales = (1.5, 2.0, 3.0, 4.0, 5.0)
    results = [
        result(model, None, scale, side=512, scored=256, mean=-abs(scale - 3.0))
        for model in ("sd1.4", "sd2.1")
        for scale in scales
    ]
    told = [one for one in keys(measured("captions", results)) if one[1] == OWN_SIZE]
    assert told == [(SD14, OWN_SIZE, 0.0), (SD21, OWN_SIZE, 0.0)]
    assert OWN_SIZE not in [one[1] for one in keys(measured("captions", results[1:5]))]
    large = [one._replace(scored_size=512) for one in results]
    assert OWN_SIZE not in [one[1] for one in keys(measured("captions", large))]


def test_curves_have_a_line_for_each_model_and_size_and_split_when_there_are_many() -> None:
    def sections(*models: str) -> list[str]:
        return [section.heading for section in guidance_curves([
            result(model, size, scale, side=size, scored=None, mean=scale)
            for model in models for size in (256, 512) for scale in (3.0, 1.5)
        ])]  # fmt: skip

    assert sections("sd1.4", "sd2.1", "openjourney") == ["ImageReward by guidance"]
    assert len(sections("sd1.4", "sd2.1", "openjourney", "other")) == 4
    assert guidance_curves([result("sd1.4", 256, 3.0, side=256, scored=None, mean=0.0)]) == []


def test_cells_are_every_size_and_scale_of_what_draws_and_one_of_what_is_there() -> None:
    assert cells_of(["a", "b=there"], [256, 512], [1.0, 2.0]) == [
        Cell("a", 256, 1.0), Cell("a", 256, 2.0), Cell("a", 512, 1.0), Cell("a", 512, 2.0), Cell("b=there", None, None),
    ]  # fmt: skip
    assert [cell.setting for cell in cells_of(["a", "b=c"], [], [7.5])] == ["own-cfg7.5", "given"]


@pytest.fixture
def order() -> Callable[[], tuple[dict[str, dict[str, float]], dict[str, float]]]:
    return lambda: (
        {IMAGE_REWARD: {"a": 0.3, "b": 0.2, "c": -1.0, "strange": 9.0}, CLIP: {"a": 0.25, "b": 0.27}},
        {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0},
    )


def test_rankings_agree_where_the_orders_do(order: Any) -> None:
    means, people = order()
    assert agreement(means, people) == pytest.approx({IMAGE_REWARD: 1.0, CLIP: -1.0}, abs=1e-12)
    text = rank_table(means, people, ranked_by="people").markdown()
    assert "| b | 0.2000 (2) | 0.2700 (1) | 2 |" in text
    assert f"| c | {MINUS}1.0000 (3) | not run | 3 |" in text
    assert "strange" not in text
    assert f"| Spearman with people | 1.00 | {MINUS}1.00 |  |" in text
    page = rank_table(means, people, ranked_by="<people>", caption="Of & with.").html()
    assert "&lt;people&gt;" in page
    assert f'<td class="number">1.00</td><td class="number">{MINUS}1.00</td>' in page


def test_published_means_of_six_models_give_the_published_agreement() -> None:
    from overpaint.evaluation.experiments.published import published

    ours = [
        Measured("prompts", one.model, one.metric, "", result("x", None, None, side=1, scored=None, mean=one.value)
                 .scores.columns[0].estimate)
        for one in published("prompts", source="ImageReward") if one.metric in (IMAGE_REWARD, CLIP)
    ]  # fmt: skip
    people = {one.model: one.value for one in published("prompts", "human rank")}
    found = agreement(means_by_metric(ours), people)
    assert (round(found[IMAGE_REWARD], 2), round(found[CLIP], 2)) == (1.0, 0.6)


def test_seeds_and_guidance_of_a_file_of_prompts_are_used_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.csv"
    header = "case_number,prompt,evaluation_seed,evaluation_guidance\n"
    path.write_text(header + "0,a red circle,4261553411,7\n1,a blue square,,2.5\n", encoding="utf-8")
    config = Config(experiment="prompts", prompts=str(path), images_per_prompt=1, steps=1, output_dir=tmp_path / "own")
    main(config)
    printed = capsys.readouterr().out
    assert "Noise: 1 of 2 prompts from the seed that p gives" in printed
    assert "Guidance: 2 of 2 as p says, 2.5 to 7" in printed
    (manifest,) = (tmp_path / "own").glob("prompts/*/prompts.json")
    first, second = json.loads(manifest.read_text(encoding="utf-8"))["images"]
    assert (first["seed"], first["guidance_scale"], second["guidance_scale"]) == (4261553411, 7.0, 2.5)
    assert "from the seed that p gives" in (tmp_path / "own/prompts/report.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="guidance_scales must not be given for prompts with a guidance of their own"):
        main(replace(config, guidance_scales=(3.0,)))
    put_aside = {"own_seeds": False, "own_guidance": False, "output_dir": tmp_path / "run", "guidance_scales": (3.0,)}
    main(replace(config, **put_aside))
    (manifest,) = (tmp_path / "run").glob("prompts/*cfg3/prompts.json")
    images = json.loads(manifest.read_text(encoding="utf-8"))["images"]
    assert images[1]["seed"] == second["seed"]
    assert images[0]["seed"] != first["seed"]
    assert all("guidance_scale" not in image for image in images)
