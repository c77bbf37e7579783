"""What a run writes and shows."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint.training import MetricsFile, TrainingConfig, TrainingRun, read_metrics
from overpaint.training.logging import Progress, log_image, postfix, progress_bar


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    margin: float = 2.0
    folder: Path = Path("somewhere")


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(output_dir=tmp_path / "run", iterations=2, progress=False)


def test_every_run_writes_its_settings(stand_in: Callable, config: TrainingConfig) -> None:
    with TrainingRun(stand_in(), config, configs={"refl": TrainerConfig()}):
        record = json.loads((config.output_dir / "run_config.json").read_text())
    assert record["training"]["learning_rate"] == 1e-5
    assert record["training"]["output_dir"] == str(config.output_dir)
    assert record["refl"] == {"margin": 2.0, "folder": "somewhere"}


def test_resuming_with_other_settings_of_the_trainer_is_refused(stand_in: Callable, config: TrainingConfig) -> None:
    with TrainingRun(stand_in(), config, configs={"refl": TrainerConfig()}) as run:
        for _ in run.iterations():
            pass
    resumed = TrainingConfig(output_dir=config.output_dir, iterations=3, resume=True, progress=False)
    run = TrainingRun(stand_in(), resumed, configs={"refl": TrainerConfig(margin=1.0)})
    with pytest.raises(ValueError, match=r"refl\.margin 1.0 instead of 2.0"):
        run.__enter__()


def test_metrics_have_a_line_for_each_log_with_its_iteration(stand_in: Callable, config: TrainingConfig) -> None:
    with TrainingRun(stand_in(), config) as run:
        for iteration in run.iterations():
            run.log({"train/loss": torch.tensor(0.5, requires_grad=True), "train/count": iteration})
            run.log({"reward/mean": np.float32(0.25), "train/grad_norm": float("inf")})
        run.log({"reward/final": 1.0})
    assert read_metrics(config.output_dir / "metrics.jsonl") == [
        {"iteration": 0, "train/loss": 0.5, "train/count": 0.0},
        {"iteration": 0, "reward/mean": 0.25, "train/grad_norm": None},
        {"iteration": 1, "train/loss": 0.5, "train/count": 1.0},
        {"iteration": 1, "reward/mean": 0.25, "train/grad_norm": None},
        {"iteration": 2, "reward/final": 1.0},
    ]


def test_metrics_lines_reach_the_file_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", start=0)
    file.write(0, {"a": 0.1})
    assert read_metrics(file.path) == [{"iteration": 0, "a": 0.1}]
    file.close()


def test_images_are_written_with_the_iteration_in_their_name(stand_in: Callable, config: TrainingConfig) -> None:
    with TrainingRun(stand_in(), config) as run:
        for _ in run.iterations():
            run.log_images("samples/train", torch.rand(3, 3, 8, 8), ["a", "b", "c"])
    names = sorted(path.name for path in (config.output_dir / "images").iterdir())
    assert names == ["samples-train-000000.png", "samples-train-000001.png"]
    with Image.open(config.output_dir / "images" / names[0]) as image:
        assert image.size == (2 * 136 + 8, 2 * (136 + 17) + 8)


def test_bar_shows_reward_then_constraint_and_keeps_the_latest(capsys: pytest.CaptureFixture) -> None:
    bar = Progress(name="ReFL", total=3, done=1, shown=True, told="2 of 3 are left")
    bar.show({"train/loss": 0.5, "erasure/violation": -0.02, "train/grad_norm": 1.0}, 0)
    bar.show({"reward/mean": 0.51234}, 2)
    bar.advance()
    bar.close()
    shown = capsys.readouterr().err
    assert "reward/mean 0.512, erasure/violation -0.02, train/loss 0.5, skipped 2" in shown
    assert "2/3" in shown
    assert "\rReFL: " in shown
    assert shown.startswith("2 of 3 are left\n")
    assert "grad_norm" not in shown
    assert postfix({"train/other": 1.0}, 0) == ""


def test_bar_writes_little_into_a_file(capsys: pytest.CaptureFixture) -> None:
    for _ in progress_bar(range(50), desc="drawing"):
        time.sleep(0.005)
    drawn = [part for part in capsys.readouterr().err.split("\r") if part.strip()]
    assert [" 0/50" in drawn[0], "50/50" in drawn[-1], len(drawn)] == [True, True, 2]


def test_a_run_tells_what_runs_where(stand_in: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with TrainingRun(stand_in(), TrainingConfig(output_dir=tmp_path, iterations=2)) as run:
        count = sum(weight.numel() for weight in run.policy.trainable_parameters())
        list(run.iterations())
    told = capsys.readouterr().err.split("\n")[0]
    assert told == f"2 iterations, {count:,} trained weights, cpu, one process, float32: {tmp_path}"


@pytest.mark.parametrize("shown", [True, False])
def test_bar_can_be_switched_off(
    shown: bool, stand_in: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = TrainingConfig(output_dir=tmp_path, iterations=2, progress=shown)
    with TrainingRun(stand_in(), config) as run:
        for _ in run.iterations():
            run.log({"reward/mean": 0.25})
    assert ("reward/mean 0.25" in capsys.readouterr().err) == shown


def test_missing_tracker_is_refused_at_once(
    stand_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainingConfig(output_dir=tmp_path, iterations=1, trackers=("tensorboard",))
    with pytest.raises(ValueError, match="trackers must be installed, got 'tensorboard'"):
        TrainingRun(stand_in(), config)


def test_tracker_gets_settings_metrics_and_images(
    stand_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    calls: list[tuple[Any, ...]] = []

    class Recorder(tracking.GeneralTracker):
        name = "wandb"
        requires_logging_directory = False

        def __init__(self, project: str, **options: Any) -> None:
            super().__init__()
            calls.append(("init", project, options))

        tracker = None

        def start(self) -> None:
            calls.append(("start",))

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            calls.append(("config", values))

        def log(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
            calls.append(("log", values, step))

        def log_images(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
            calls.append(("images", {name: array.shape for name, array in values.items()}, step))

        def log_table(self, name: str, *, columns: list[str], data: list[list[Any]], step: int) -> None:
            calls.append(("table", name, columns, [[row[0], row[1], row[2].image.size, row[3]] for row in data], step))

        def finish(self) -> None:
            calls.append(("finish",))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    ids = []
    for resume in (False, True):
        calls.clear()
        config = TrainingConfig(
            output_dir=tmp_path, iterations=1 + resume, trackers=("wandb",), progress=False, resume=resume
        )
        about = {"model": {"weights": "abc", "lora": {"rank": 4}}, "notes": {"seeds": [1, 2]}}
        with TrainingRun(stand_in(), config, configs={"refl": TrainerConfig()}, about=about) as run:
            for _ in run.iterations():
                run.log({"reward/mean": 0.5})
                run.log_images("samples", torch.zeros(1, 3, 128, 128))
                run.log_images("round", torch.zeros(2, 3, 128, 128), ["a", "b"], rewards=torch.tensor([0.5, -1.0]))
        (_, project, options), _, (_, settings), *logged = calls
        ids.append(options["id"])
        assert project == "overpaint"
        assert settings["training/learning_rate"] == 1e-5
        assert settings["training/adam_betas"] == "[0.9, 0.999]"
        assert settings["refl/margin"] == 2.0
        assert (settings["model/weights"], settings["model/lora/rank"], settings["notes/seeds"]) == ("abc", 4, "[1, 2]")
        assert settings["run/precision"] == "no"
        assert settings["libraries/torch"] == torch.__version__
        step = int(resume)
        assert logged == [
            ("log", {"reward/mean": 0.5}, step),
            ("images", {"samples": (1, 144, 144, 3)}, step),
            ("images", {"round": (1, 161, 280, 3)}, step),
            (
                "table",
                "round_table",
                ["iteration", "prompt", "image", "reward"],
                [[step, "a", (128, 128), 0.5], [step, "b", (128, 128), -1.0]],
                step,
            ),
            ("finish",),
        ]
    assert ids[0] == ids[1]  # a resumed run goes on in the same curves


def test_wandb_takes_record_grid_and_table(stand_in: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    config = TrainingConfig(output_dir=tmp_path, iterations=1, trackers=("wandb",), progress=False)
    with TrainingRun(stand_in(), config, about={"model": {"weights": "abc"}}) as run:
        for _ in run.iterations():
            run.log_images("round", torch.rand(2, 3, 8, 8), ["a cat", "a dog"], rewards=torch.tensor([0.5, 1.0]))
    files = tmp_path / "wandb" / "latest-run" / "files" / "media"
    (table,) = (files / "table").glob("round_table*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["iteration", "prompt", "image", "reward"]
    assert content["data"] == [[0, "a cat", "Image", 0.5], [0, "a dog", "Image", 1.0]]
    assert list((files / "images").glob("round*.png"))  # the grid
    staged = [file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert sum(content.startswith(b"\x89PNG") for content in staged) == 2  # the table's own, in an artifact of the run


def test_tensorboard_is_told_the_axes_of_an_image() -> None:
    calls = []

    def tracker(name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, log_images=lambda values, **options: calls.append((name, values, options)))

    accelerator = SimpleNamespace(trackers=[tracker("wandb"), tracker("tensorboard")])
    log_image(accelerator, "samples", Image.new("RGB", (4, 2)), 7)  # ty: ignore[invalid-argument-type]
    assert [(name, options) for name, _, options in calls] == [
        ("wandb", {"step": 7}),
        ("tensorboard", {"step": 7, "dataformats": "NHWC"}),
    ]
    assert all(values["samples"].shape == (1, 2, 4, 3) for _, values, _ in calls)


def test_shard_and_gather_and_mean_in_one_process(stand_in: Callable, config: TrainingConfig) -> None:
    with TrainingRun(stand_in(), config) as run:
        assert run.shard(["a", "b"]) == ["a", "b"]
        assert torch.equal(run.shard(torch.arange(3)), torch.arange(3))
        with pytest.raises(ValueError, match="batch must divide evenly among 1 processes, got 0 items"):
            run.shard([])
        values = torch.arange(4.0, requires_grad=True)
        gathered = run.gather(values)
        assert torch.equal(gathered, values)
        assert not gathered.requires_grad
        assert run.mean(values) == 1.5
        assert run.mean(2) == 2.0
    # What the run knows of the processes stays true after it.
    assert (run.is_main, run.process_index, run.num_processes, run.device.type) == (True, 0, 1, "cpu")
    assert run.mean(torch.arange(3)) == 1.0


def test_import_is_light() -> None:
    code = (
        "import sys, overpaint.training; "
        "heavy = {'accelerate', 'bitsandbytes', 'wandb', 'diffusers', 'transformers', 'peft', 'tensorboard'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stderr) == (0, "")
