"""What a run writes and shows."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint.training import MetricsFile, TrainingConfig, TrainingRun, read_metrics
from overpaint.training.logging import Progress, postfix, progress_bar


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
