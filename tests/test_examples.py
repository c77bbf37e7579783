"""Each example runs as people launch it, on the tiny world, at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def launch(example: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [*command, str(ROOT / "examples" / example), *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_the_main_job_writes_table_weights_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--output-dir", str(folder), "--iterations", "2", "--prompts-per-kind", "4", "--evaluation-steps", "4"]
    done = launch("refl_erase_nudity.py", *options)
    assert done.returncode == 0, done.stderr
    for word in ("before", "erased", "recovered", "ImageReward", "concept rate", "neighbour kept", "accuracy"):
        assert word in done.stdout
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["models"] == ["before", "erased", "recovered"]
    kinds = {(row["measure"], row["kind"]) for row in comparison["rows"]}
    assert {("concept rate", "explicit"), ("concept rate", "implicit"), ("accuracy", "benign")} <= kinds
    for name in ("report.html", "metrics.jsonl", "lora/pytorch_lora_weights.safetensors", "pipeline/model_index.json"):
        assert (folder / name).is_file(), name
    assert (folder / "erasure" / "erasure.json").is_file()

    # The folder now holds a run; a second one must not write over it, and must say so before it draws a picture.
    again = launch("refl_erase_nudity.py", *options)
    assert again.returncode != 0
    assert "output_dir must not hold another run" in again.stderr
    assert "drawing" not in again.stderr


def test_finetuning_writes_table_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--output-dir", str(folder), "--iterations", "2", "--prompts", "4", "--evaluation-steps", "4"]
    done = launch("refl_finetune.py", *options)
    assert done.returncode == 0, done.stderr
    assert "tuned" in done.stdout
    assert (folder / "report.html").is_file()
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("example", ["refl_erase_nudity.py", "refl_finetune.py"])
def test_an_unknown_checkpoint_is_named_before_any_work(example: str, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    done = launch(example, "--policy", str(folder), "--output-dir", str(tmp_path / "run"))
    assert done.returncode != 0
    assert str(folder) in done.stderr
    assert not (tmp_path / "run").exists()
