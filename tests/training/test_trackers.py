"""Trackers: what they are told, and that nothing that befalls them stops a training."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from overpaint.training import TrainingConfig, TrainingRun, load_checkpoint, read_metrics
from overpaint.training.trackers import Trackers

Record = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    margin: float = 2.0


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
        assert settings["libraries/torch"] == version("torch")
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


def kinds() -> dict[str, Any]:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    return LOGGER_TYPE_TO_CLASS


def recorder(name: str, **methods: Any) -> Any:
    """Returns a kind of tracker that does nothing but what it is given."""
    tracking = pytest.importorskip("accelerate.tracking")

    class Recorder(tracking.GeneralTracker):
        requires_logging_directory = name == "tensorboard"
        tracker = None

        def __init__(self, project: str, **options: Any) -> None:
            super().__init__()

        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

        def log(self, values: dict[str, Any], step: int | None, **options: Any) -> None: ...

        def log_images(self, values: dict[str, Any], step: int | None, **options: Any) -> None: ...

        def log_table(self, name: str, **options: Any) -> None: ...

        def finish(self) -> None: ...

    Recorder.name = name
    for method, does in methods.items():
        setattr(Recorder, method, does)
    return Recorder


def test_tensorboard_is_told_the_axes_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def log_images(self: Any, values: dict[str, Any], step: int, **options: Any) -> None:
        calls.append((self.name, {name: array.shape for name, array in values.items()}, step, options))

    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(kinds(), name, recorder(name, log_images=log_images))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    config = TrainingConfig(output_dir=tmp_path, iterations=1, trackers=("wandb", "tensorboard"))
    trackers = Trackers(config, {})
    trackers.log_image("samples", Image.new("RGB", (4, 2)), 7)
    trackers.finish()
    assert sorted(calls) == [
        ("tensorboard", {"samples": (1, 2, 4, 3)}, 7, {"dataformats": "NHWC"}),
        ("wandb", {"samples": (1, 2, 4, 3)}, 7, {}),
    ]


# What goes wrong.


@pytest.fixture
def undisturbed(train: Callable[..., Any], tmp_path: Path) -> Any:
    """What a run leaves that has no trackers."""
    return train(tmp_path / "undisturbed", pictures=True)


def fail(*arguments: Any, **options: Any) -> None:
    raise ConnectionResetError("the tracker has gone")


def leave(*arguments: Any, **options: Any) -> None:
    raise SystemExit(1)


@pytest.mark.proof
@pytest.mark.parametrize("does", [fail, leave])
@pytest.mark.parametrize("when", ["start", "store_init_configuration", "log", "log_images", "log_table", "finish"])
def test_a_tracker_that_fails_changes_no_number_and_is_told_of_once(
    when: str,
    does: Callable[..., None],
    train: Callable[..., Any],
    same: Callable[..., None],
    undisturbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Record,
) -> None:
    monkeypatch.setitem(kinds(), "wandb", recorder("wandb", **{when: does}))
    same(train(tmp_path / "run", pictures=True, trackers=("wandb",)), undisturbed)
    assert capsys.readouterr().err.count("the tracker wandb failed, and the run goes on without it") == 1
    record_property("trackers: failures that stopped nothing", 1)


@pytest.mark.proof
def test_a_tracker_that_hangs_is_left_to_itself_and_holds_no_memory(
    train: Callable[..., Any],
    same: Callable[..., None],
    undisturbed: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Record,
) -> None:
    released = threading.Event()
    monkeypatch.setitem(kinds(), "wandb", recorder("wandb", log=lambda *_, **__: released.wait(60)))
    monkeypatch.setattr("overpaint.training.trackers.PATIENCE", 0.2)
    monkeypatch.setattr("overpaint.training.trackers.GRACE", 0.2)
    same(train(tmp_path / "few", pictures=True, trackers=("wandb",)), undisturbed)
    assert "has not taken everything within 0.2 s" in capsys.readouterr().err
    monkeypatch.setattr("overpaint.training.trackers.WAITING", 3)
    same(train(tmp_path / "many", pictures=True, trackers=("wandb",)), undisturbed)
    assert "has not taken the last 3 messages" in capsys.readouterr().err
    released.set()
    record_property("trackers: hangs that stopped nothing", 2)


def ran(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end."""
    program, root = Path(__file__).with_name("tracked_program.py"), Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(program), str(folder), *options], env=os.environ | {"PYTHONPATH": str(root)} | environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def untracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a program without a tracker."""
    folder = tmp_path_factory.mktemp("untracked") / "run"
    ran(folder, "--untracked")
    return folder


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("trouble", ["none", "killed", "a file for a folder", "read-only", "unreachable"])
def test_wandb_stops_no_training(
    trouble: str, untracked: Path, request: pytest.FixtureRequest, tmp_path: Path, record_property: Record
) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    settings = {"MODE": "offline", "DATA_DIR": str(tmp_path / "data"), "CACHE_DIR": str(tmp_path / "cache")}
    with ExitStack() as stack:
        if trouble == "a file for a folder":
            folder.mkdir()
            (folder / "wandb").write_text("")
        elif trouble == "read-only":
            disk = request.getfixturevalue("small_disk")
            folder = disk.path / "run"
            (folder / "wandb").mkdir(parents=True)
            stack.enter_context(disk.read_only(folder / "wandb"))
        elif trouble == "unreachable":
            settings |= {"MODE": "online", "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "1", "API_KEY": "0" * 40}
        environment = {f"WANDB_{name}": value for name, value in settings.items()}
        done = ran(folder, *(["--kill"] if trouble == "killed" else []), **environment)
    assert ("the tracker wandb failed" in done.stderr) == (trouble != "none")
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(untracked / "metrics.jsonl")
    found, expected = (load_checkpoint(one / "checkpoints" / "iteration-00000007") for one in (folder, untracked))
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())
    record_property("trackers: failures that stopped nothing", int(trouble != "none"))
