"""The GPU benchmark runs, on tiny networks, and says what it could not measure."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.random_models import BUILDERS, FamilyName
from overpaint.policy.parts import network_of


def test_without_a_cuda_device_it_says_so_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs a CUDA device.*--tiny"):
        gpu.main(gpu.Config())


@pytest.mark.parametrize("batch_sizes", [(), (4, 0)])
def test_batch_sizes_out_of_range_are_refused(batch_sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="batch_sizes"):
        gpu.Config(batch_sizes=batch_sizes)


def test_counts_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        gpu.Config(repeats=0)
    with pytest.raises(ValueError, match="sampling_steps must be at least 1, got 0"):
        gpu.Config(sampling_steps=0)


def test_tiny_run_measures_every_variant_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "variants", lambda config: [gpu.Switches("LoRA", checkpointing=True)])
    rows = gpu.main(gpu.Config(tiny=True, batch_sizes=(2,), repeats=1, output=tmp_path / "gpu.json"))

    assert [(row.task, row.switches, row.batch_size) for row in rows] == [
        ("refl", "LoRA, checkpointing", 2),
        ("sampling", "nothing", 2),
    ]
    assert all(row.rate > 0 and row.peak_share > 0 and math.isnan(row.peak_gib) for row in rows)
    assert gpu.table(rows) in capsys.readouterr().out
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert [row["rate"] for row in written] == [row.rate for row in rows]
    assert [row["peak_gib"] for row in written] == [None, None]


def test_full_run_has_every_switch() -> None:
    names = {str(switches) for switches in gpu.variants(gpu.Config())}
    assert names == {
        "LoRA",
        "LoRA, checkpointing",
        "LoRA, compile",
        "LoRA, checkpointing, compile",
        "full",
        "full, checkpointing",
        "full, checkpointing, AdamW8bit",
    }
    assert not any(switches.compile for switches in gpu.variants(gpu.Config(compile=False)))


def test_table_has_a_dash_for_what_was_not_measured() -> None:
    rows = [
        gpu.Row("refl", "LoRA", 4, 0.5, 20.25, 0.123),
        gpu.Row("sampling", "nothing", 16, math.nan, math.nan, math.nan),
    ]
    lines = gpu.table(rows).splitlines()
    assert lines[2] == "| refl | LoRA | 4 | 0.500 iterations/s | 20.2 | 12.3 % |"
    assert lines[3] == "| sampling | nothing | 16 | out of memory | - | - |"
    assert {line.count("|") for line in lines} == {7}


def test_work_that_runs_out_of_memory_gives_a_row_and_no_error() -> None:
    def work() -> None:
        raise torch.OutOfMemoryError

    assert all(math.isnan(number) for number in gpu.measure(work, torch.device("cpu"), 1, 1.0))


def test_share_of_the_peak_is_the_time_at_the_peak_over_the_time_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.timing, "seconds", lambda work, device: 4.0)
    rate, _, share = gpu.measure(lambda: None, torch.device("cpu"), 3, 1.0)
    assert (rate, share) == (0.25, 0.25)


def test_operations_of_a_matrix_product_are_two_for_each_multiplication() -> None:
    assert gpu.operations(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("sd", 859_520_964), ("sdxl", 2_567_463_684), ("sd3", 2_243_171_520), ("flux", 11_901_408_320)],
)
def test_full_size_networks_have_the_parameters_of_the_published_ones(family: FamilyName, parameters: int) -> None:
    pipeline = BUILDERS[family](torch.device("meta"), tiny=False)
    assert sum(p.numel() for p in network_of(pipeline).parameters()) == parameters
    if family == "sd":
        assert sum(p.numel() for p in pipeline.vae.parameters()) == 83_653_863
        assert pipeline.text_encoder.get_input_embeddings().embedding_dim == pipeline.unet.config.cross_attention_dim


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_tiny_run_of_another_family(family: FamilyName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "variants", lambda config: [gpu.Switches("LoRA")])
    rows = gpu.main(gpu.Config(tiny=True, batch_sizes=(1,), repeats=1, family=family))
    assert [row.task for row in rows] == ["refl", "sampling"]
    assert all(row.rate > 0 for row in rows)
