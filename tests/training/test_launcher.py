"""What accelerate's launcher asks for is honoured or refused, and never ignored."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from overpaint.policy.loading import default_device
from overpaint.training import TrainingConfig, TrainingRun, default_precision, process_state
from overpaint.training.launcher import RANKS, UNSUPPORTED, resolved_precision, wants_cpu

PRECISION = "ACCELERATE_MIXED_PRECISION"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in (*RANKS, "MASTER_ADDR")]:
        monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(output_dir=tmp_path / "run", iterations=1, progress=False)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that emulates bfloat16 only, as torch tells of a T4."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


@pytest.mark.parametrize(
    ("launched", "wanted", "precision"),
    [
        (None, None, "no"), ("no", None, "no"), ("bf16", None, "bf16"), ("BF16", None, "bf16"),
        (None, "bf16", "bf16"), ("no", "bf16", "bf16"), ("bf16", "bf16", "bf16"), (None, "no", "no"),
    ],
)  # fmt: skip
def test_precision_is_the_launchers_unless_the_settings_say_one(
    launched: str | None, wanted: str | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launched is not None:
        monkeypatch.setenv(PRECISION, launched)
    assert resolved_precision(wanted, CPU) == precision  # ty: ignore[invalid-argument-type]


@pytest.mark.parametrize(("launched", "wanted"), [("bf16", "no"), ("fp16", "bf16"), ("bf16", "fp16")])
def test_two_precisions_are_refused(launched: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRECISION, launched)
    with pytest.raises(ValueError, match=rf"launched or configured with, '{launched}', or left out, got '{wanted}'"):
        resolved_precision(wanted, CPU)  # ty: ignore[invalid-argument-type]


def test_a_run_computes_in_the_launchers_precision_and_records_it(
    stand_in: Callable, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PRECISION, "bf16")
    policy = stand_in()
    with TrainingRun(policy, config) as run, run.autocast():
        assert policy.unet[0](torch.zeros(2, 4)).dtype == torch.bfloat16
        assert run.config.mixed_precision == "bf16"
    assert '"mixed_precision": "bf16"' in (config.output_dir / "run_config.json").read_text()


def test_resuming_in_another_launched_precision_is_refused(
    stand_in: Callable, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrainingRun(stand_in(), config) as run:
        list(run.iterations())
    monkeypatch.setenv(PRECISION, "bf16")
    resumed = TrainingConfig(output_dir=config.output_dir, iterations=2, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"training.mixed_precision 'bf16' instead of 'no'"):
        TrainingRun(stand_in(), resumed).__enter__()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (PRECISION, "fp8", "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        (PRECISION, "fp16", "mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", r"gradient_accumulation_steps must be 1.*got 4"),
        *((variable, "true", f"configured without {name}") for variable, name in UNSUPPORTED.items()),
    ],
)
def test_what_would_be_ignored_is_refused_before_anything_is_written(
    variable: str, value: str, message: str, stand_in: Callable, config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        TrainingRun(stand_in(), config).__enter__()
    assert not config.output_dir.exists()


@pytest.mark.parametrize("asked", [None, "bf16"])
def test_an_old_gpu_gets_fp16_and_refuses_bf16(
    asked: str | None, old_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert default_precision(GPU) == "fp16"
    if asked is not None:
        monkeypatch.setenv(PRECISION, asked)
    with pytest.raises(ValueError, match=r"'fp16' or 'no' on Tesla T4, which has no bfloat16, got 'bf16'"):
        resolved_precision(None if asked else "bf16", GPU)


def test_default_precision_follows_launcher_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert (default_precision(GPU), default_precision("cpu")) == ("bf16", "no")
    monkeypatch.setenv(PRECISION, "fp16")
    assert (default_precision(GPU), default_precision("cpu")) == ("fp16", "fp16")


def test_launching_on_the_cpu_keeps_a_gpu_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (wants_cpu(), default_device()) == (False, GPU)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert (wants_cpu(), default_device()) == (True, CPU)
    assert str(process_state().device) == "cpu"


LAUNCHED = """
from overpaint.training.launcher import check_launcher
try:
    check_launcher()
except ValueError as error:
    raise SystemExit(f"refused: {error}")
print("accepted")
"""


@pytest.mark.parametrize(("processes", "accepted"), [("2", False), ("1", True)])
def test_several_processes_on_cpus_are_refused_where_the_launcher_starts_one(
    processes: str, accepted: bool, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(LAUNCHED)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    command = [*launcher, "--num_processes", processes, "--num_machines", "1", "--quiet", str(program)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ("accepted" in done.stdout) == accepted
    assert ("refused: accelerate launch --cpu must come with --num_processes 1" in done.stderr) == (not accepted)
