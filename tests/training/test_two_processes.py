"""Two processes with half the batch each do what one does with the whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from overpaint.training import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def outputs(
    pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., str]
) -> tuple[Path, Path]:
    """Folders of the same program in one process and in two."""
    folders = []
    program = Path(__file__).with_name("two_processes_program.py")
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        torchrun(program, folder, pipeline_dir, processes=count)
        folders.append(folder)
    return folders[0], folders[1]


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "unequal" / "facts.json").read_text())


@pytest.mark.proof("several processes take the updates of one")
def test_two_processes_give_the_update_of_one(outputs: tuple[Path, Path]) -> None:
    one, two = outputs
    for name in ("weights", "average"):
        ours, theirs = (load_file(folder / "unequal" / f"{name}.safetensors") for folder in (two, one))
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6)
    assert facts(two)["norms"] == pytest.approx(facts(one)["norms"], rel=1e-5)
    assert len(facts(one)["norms"]) == 5


@pytest.mark.proof("several processes take the updates of one")
def test_two_processes_give_the_lora_of_one(outputs: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "lora" / "weights.safetensors") for folder in outputs)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6)
    assert any(tensor.abs().max() > 1e-4 for key, tensor in one.items() if "lora_B" in key)  # zero before training


def test_loss_that_is_not_finite_in_one_process_skips_the_update_in_both(outputs: tuple[Path, Path]) -> None:
    assert [facts(folder)["skipped"] for folder in outputs] == [1, 1]


def test_gather_undoes_shard(outputs: tuple[Path, Path]) -> None:
    assert [facts(folder)["processes"] for folder in outputs] == [1, 2]
    assert [facts(folder)["gathered"] for folder in outputs] == [list(range(8))] * 2


def test_only_the_main_process_writes_and_what_it_writes_are_means(outputs: tuple[Path, Path]) -> None:
    one, two = (read_metrics(folder / "unequal" / "metrics.jsonl") for folder in outputs)
    assert [entry["iteration"] for entry in two] == list(range(6))
    assert [e["reward/mean"] for e in two] == pytest.approx([e["reward/mean"] for e in one], abs=1e-6)
