"""Two processes with half the batch each do what one does with the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training import read_metrics


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the same program in one process and in two."""
    folders = []
    program = Path(__file__).with_name("two_processes_program.py")
    environment = os.environ | {"PYTHONPATH": str(program.parents[2])}
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(count)]
        options = [
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ]
        result = subprocess.run(
            [*launch, *options, str(program), str(folder)], env=environment, capture_output=True, text=True, timeout=280
        )
        assert result.returncode == 0, result.stderr
        folders.append(folder)
    return folders[0], folders[1]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "unequal" / "facts.json").read_text())


@pytest.mark.slow
def test_two_processes_give_the_update_of_one(outputs: tuple[Path, Path]) -> None:
    one, two = outputs
    for name in ("weights", "average"):
        ours, theirs = (load_file(folder / "unequal" / f"{name}.safetensors") for folder in (two, one))
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6)
    assert facts(two)["norms"] == pytest.approx(facts(one)["norms"], rel=1e-5)
    assert len(facts(one)["norms"]) == 5


@pytest.mark.slow
def test_loss_that_is_not_finite_in_one_process_skips_the_update_in_both(outputs: tuple[Path, Path]) -> None:
    assert [facts(folder)["skipped"] for folder in outputs] == [1, 1]


@pytest.mark.slow
def test_gather_undoes_shard(outputs: tuple[Path, Path]) -> None:
    assert [facts(folder)["processes"] for folder in outputs] == [1, 2]
    assert [facts(folder)["gathered"] for folder in outputs] == [list(range(8))] * 2


@pytest.mark.slow
def test_only_the_main_process_writes_and_what_it_writes_are_means(outputs: tuple[Path, Path]) -> None:
    one, two = (read_metrics(folder / "unequal" / "metrics.jsonl") for folder in outputs)
    assert [entry["iteration"] for entry in two] == list(range(6))
    assert [e["reward/mean"] for e in two] == pytest.approx([e["reward/mean"] for e in one], abs=1e-6)
