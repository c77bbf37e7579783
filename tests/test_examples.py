"""Each example runs as people launch it, on the tiny world, at a small size."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tyro
from safetensors.torch import load_file

from ddpo import NFTConfig, RWRConfig
from examples import compare_erasures, ddpo_finetune, erase, refl_erase_nudity, refl_finetune
from overpaint import LoRAConfig
from overpaint.evaluation.experiments.program import settings_from_command_line

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_programs_that_may_run_in_several_processes_leave_them_last(example: Path) -> None:
    # Otherwise gloo aborts one process of two in a quarter of all runs.
    code = example.read_text(encoding="utf-8")
    assert ("process_state" in code) is code.endswith("    process_state().destroy_process_group()\n")


SMALL_REFL = [
    *("--refl.batch-size", "2", "--refl.steps", "4", "--refl.first-reward-step", "2", "--refl.last-reward-step", "3"),
    *("--refl.pretraining-batch-size", "2", "--refl.pretraining-pairs", "2"),
]


SMALL_DDPO = [
    *("--ddpo.samples-per-round", "8", "--ddpo.erasure-samples-per-round", "8", "--ddpo.updates-per-round", "2"),
    *("--ddpo.sampling-batch-size", "8", "--ddpo.minibatch-size", "8", "--ddpo.steps", "4"),
]


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


def run(program: Any, *options: str) -> None:
    """Runs a program in this process, which has what takes the longest of a small run: its libraries, imported."""
    program.main(settings_from_command_line(program.Config, program.complete, list(options)))


def test_the_main_job_writes_table_weights_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = ["--output-dir", str(folder), "--iterations", "2", "--prompts-per-kind", "4", "--evaluation-steps", "4"]
    options += [*SMALL_REFL, "--refl.erasure-batch-size", "2", "--destruction.pictures", "2"]
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
    with pytest.raises(ValueError, match="output_dir must not hold another run"):
        run(refl_erase_nudity, *options)
    assert "drawing" not in capsys.readouterr().err


def test_finetuning_writes_table_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    options = ["--output-dir", str(folder), "--iterations", "2", "--prompts-per-split", "4", "--evaluation-steps", "4"]
    run(refl_finetune, *options, *SMALL_REFL)
    assert "tuned" in capsys.readouterr().out
    assert (folder / "report.html").is_file()
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "program", [refl_erase_nudity, refl_finetune, ddpo_finetune], ids=lambda one: one.__name__.rpartition(".")[2]
)
def test_an_unknown_checkpoint_is_named_before_any_work(program: Any, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises((ValueError, OSError), match=str(folder)):
        run(program, "--policy", str(folder), "--output-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_ddpo_from_an_erased_model_writes_table_and_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--output-dir", str(folder), "--rounds", "1", "--prompts-per-split", "4"]
    run(ddpo_finetune, "--erased", "--constrained", *options, *SMALL_DDPO)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["models"] == ["before", "tuned"]
    kinds = {(row["measure"], row["kind"]) for row in comparison["rows"]}
    assert {("image-reward", "unseen-pairs"), ("stripes", "explicit"), ("stripes", "implicit")} <= kinds
    assert "Weight of the constraint" in (folder / "report.html").read_text()
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert (folder / "images" / "round-000000.png").is_file()


def test_nft_is_one_of_the_algorithms(tmp_path: Path) -> None:
    options = ["--output-dir", str(tmp_path), "--rounds", "1", "--prompts-per-split", "2", "--task", "compressibility"]
    options += ["--nft.samples-per-round", "8", "--nft.images-per-prompt", "4", "--nft.trained-levels", "1"]
    run(ddpo_finetune, "--algorithm", "nft", *options)
    lora = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in lora.items() if "lora_B" in name or "lora.up" in name)
    assert json.loads((tmp_path / "run_config.json").read_text()).keys() == {"training", "nft"}


def test_settings_of_one_algorithm_are_refused_with_another() -> None:
    grpo = ddpo_finetune.complete(ddpo_finetune.Config(policy="somebody/sd3", algorithm="grpo"))
    assert grpo.ddpo is not None
    assert (grpo.ddpo.images_per_prompt, grpo.ddpo.baseline, grpo.lora) == (24, "group", LoRAConfig(rank=32, alpha=64))
    for wrong in (
        ddpo_finetune.Config(algorithm="grpo", nft=NFTConfig()),
        ddpo_finetune.Config(algorithm="nft", rwr=RWRConfig()),
    ):
        with pytest.raises(ValueError, match=f"must be None with {wrong.algorithm}"):
            ddpo_finetune.complete(wrong)


def test_comparison_of_algorithms_makes_missing_runs_and_draws_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # as Python does for the program, which takes from another
    compare = importlib.import_module("ddpo_compare")
    options = ["--output-dir", str(tmp_path), "--task", "compressibility", "--queries", "64", "--seeds", "0"]
    options += ["--prompts-per-split", "4", "--algorithms", "ddpo-sf"]
    for drawn in (True, False):  # the second time everything is there
        compare.main(tyro.cli(compare.Config, args=options))
        told = capsys.readouterr()
        assert ("drawing before" in told.err) is drawn
        assert "ddpo-sf" in told.out
    curves = json.loads((tmp_path / "compressibility" / "curves.json").read_text())
    assert curves["reward/validation"]["ddpo-sf"]["x"] == [0.0, 64.0]
    assert (tmp_path / "compressibility" / "reward_held_out.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "aesthetic"], "task must be one of"),
        (["--algorithm", "rwr", "--constrained"], "constrained must be off but with DDPO, got rwr"),
        (["--reward", "json:nothing"], "reward must name something that its module has, got 'json:nothing'"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        run(ddpo_finetune, "--output-dir", str(tmp_path / "run"), *options)
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


def test_erasing_keeps_the_erasure_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--prompts-per-kind", "2", "--evaluation-steps", "2"]
    run(erase, "--method", "uce", "--output-dir", str(tmp_path / "uce"), *small)
    assert "UCE took" in capsys.readouterr().out
    assert (tmp_path / "uce" / "erasure" / "erasure.json").is_file()
    assert "<h1>Stripes " in (tmp_path / "uce" / "report.html").read_text()

    onto = ["--method", "sld", "--onto", str(tmp_path / "uce" / "erasure"), "--output-dir", str(tmp_path / "sld")]
    run(erase, *onto, *small)
    assert json.loads((tmp_path / "sld" / "comparison.json").read_text())["models"] == ["before", "erased"]

    with pytest.raises(ValueError, match="output_dir must not hold another erasure"):
        run(erase, *onto, *small)


def test_comparison_of_erasures_goes_on_and_writes_table_and_page(
    tmp_path: Path, look_at: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--methods", "uce", "--seeds", "0", "--prompts-per-kind", "2", "--evaluation-steps", "2"]
    options += ["--recovery-iterations", "1", "--workers", "1", "--output-dir", str(tmp_path), *SMALL_REFL]
    options += ["--refl.erasure-batch-size", "2"]
    made = []
    for _ in range(2):  # the second time everything is there
        run(compare_erasures, *options)
        assert "ImageReward, recovered" in capsys.readouterr().out
        made.append([path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("scores.json"))])
    assert len(made[0]) == 3
    assert made[0] == made[1]
    rows = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", "before", "uce"]
    assert "uce-recovered" in (tmp_path / "report.html").read_text()
    seen = look_at(tmp_path / "report.html")
    assert seen.pictures == 4 * 2 * 3  # kinds, prompts of each, models
    assert seen.tables >= 4  # the results, all methods, the published ones, all numbers
    assert seen.charts == 1
