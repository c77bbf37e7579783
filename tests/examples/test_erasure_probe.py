"""The program that tries to bring an erased concept back, on the tiny world and at the smallest size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import UCE, Erasure
from erasure.changes import WeightChange
from examples import erasure_probe
from overpaint import LoRAConfig, tinyworld
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.evaluation.probes.result import Outcomes, ProbeResult, VariantResult
from overpaint.policy import WeightDelta


@pytest.fixture(scope="module")
def erasure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("erasure")
    UCE().erase(tinyworld.load_policy(), tinyworld.STRIPES).save(folder)
    return folder


def config_of(*options: str) -> Any:
    words = ["--evaluation-steps", "6", "--attempts", "2", "--probes", "noise", "semantics", *options]
    return settings_from_command_line(erasure_probe.Config, erasure_probe.complete, words)


def test_it_reports_each_probe_and_goes_on(erasure: Path, tmp_path: Path) -> None:
    config = config_of("--erasure", str(erasure), "--output-dir", str(tmp_path))
    text = erasure_probe.main(config)
    found = ProbeResult.load(tmp_path / "probes" / "noise.json").variants[0]
    assert found.ceiling.rate.mean > found.found.rate.mean
    assert "noise\n\n" in text
    assert "UCE, best of 3" in text
    page = (tmp_path / "report.html").read_text()
    assert "Is stripes gone?" in page
    assert page.count('<img src="data:image/png') >= 8  # a grid for each variant
    kept = (tmp_path / "probes" / "noise.json").stat().st_mtime_ns
    assert erasure_probe.main(config) == text
    assert (tmp_path / "probes" / "noise.json").stat().st_mtime_ns == kept


def test_another_model_does_not_go_on_in_the_same_folder(erasure: Path, tmp_path: Path) -> None:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=3, alpha=3.0))
    Erasure.load(erasure).apply(policy)
    for parameter in policy.trainable_parameters():
        parameter.data += 0.01
    policy.save_lora(tmp_path / "lora")
    options = ("--erasure", str(erasure), "--output-dir", str(tmp_path / "run"), "--probes", "semantics")
    erasure_probe.main(config_of(*options))
    with pytest.raises(ValueError, match="has another tested"):  # the LoRA's rank is its own, and is no trouble
        erasure_probe.main(config_of(*options, "--lora-file", str(tmp_path / "lora")))


def test_without_the_original_it_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="original must be given with an erased policy"):
        erasure_probe.main(config_of("--output-dir", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_tried_is_left_out_and_said_or_refused_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure_probe, "run_probe", lambda probe, *_, **__: result(probe.name, 1))
    flow = tinyworld.load_flow_policy()
    change = WeightChange(WeightDelta({"pos_embed.proj.bias": torch.ones_like(flow.model.pos_embed.proj.bias)}))
    Erasure.of(flow, "ESD", {}, tinyworld.STRIPES, change).save(tmp_path / "erasure")
    words = [
        "--policy",
        "tinyworld-flow",
        "--erasure",
        str(tmp_path / "erasure"),
        "--output-dir",
        str(tmp_path / "run"),
    ]

    def run(*options: str) -> str:
        config = settings_from_command_line(erasure_probe.Config, erasure_probe.complete, [*words, *options])
        return erasure_probe.main(config)

    with pytest.raises(ValueError, match=r"as can be tried on the model, got noise: a model of diffusion is needed"):
        run("--probes", "completion", "noise")
    assert not (tmp_path / "run").exists()
    text, page = run(), (tmp_path / "run" / "report.html").read_text()
    said = (
        "Left out: textual-inversion, adversarial-prompt, soft-prompt (a model with one text encoder is needed, and a "
        "StableDiffusion3Pipeline has several); noise, classifier-guidance, inverted-latents (a model of diffusion is "
        "needed, and a StableDiffusion3Pipeline is a rectified flow)."
    )
    assert said in text
    assert said in page
    left = {"completion", "inpainting", "tracing", "resurgence", "relearning", "semantics"}
    assert {path.stem for path in (tmp_path / "run" / "probes").glob("*.json")} == left
    assert "Left out: noise (a model of" in run("--fast")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "xattn"], "train must be left out, since nothing is trained; got xattn"),
        (["--resume"], "resume must be left out, since the same command goes on where it was interrupted; got True"),
        (["--prompts-per-kind", "5"], "prompts_per_kind must be left out, since the number of pictures is --attempts"),
    ],
)
def test_options_of_a_recovery_are_refused(options: list[str], message: str) -> None:
    with pytest.raises((ValueError, SystemExit)) as refused:
        config_of(*options)
    assert message in str(refused.value)


def test_numbers_of_other_prompts_are_not_taken_up(tmp_path: Path) -> None:
    config = config_of("--erasure", "e", "--concept", "star", "--anchor", "circle")
    decides = [
        erasure_probe.deciding(replace(config, **change), {})
        for change in ({}, {"anchor": "cross"}, {"prompts_file": tmp_path}, {"reward": "clip"}, {"preserve": ("a",)})
    ]
    assert len({str(one) for one in decides}) == 5


def result(probe: str, shown: int, ceiling: int = 4) -> ProbeResult:
    def outcomes(count: int) -> Outcomes:
        return Outcomes(variant="v", shown=(True,) * count + (False,) * (4 - count))

    variant = VariantResult(found=outcomes(shown), ceiling=outcomes(ceiling), floors={})
    return ProbeResult(
        probe=probe, config={}, count=4, seed=0, rows_forward=0, rows_backward=0, seconds=0.0, variants=(variant,)
    )


def test_the_verdict_says_what_the_numbers_say() -> None:
    def verdict(*results: ProbeResult) -> str:
        return erasure_probe.verdict_of({one.probe: one for one in results}, "stripes")

    assert "Of 2 probes the soft prompt (v) brings back most of stripes: it shows in 3 of 4 pictures, 75 %".replace(
        " %", "%"
    ) in verdict(result("noise", 1), result("soft-prompt", 3))
    assert verdict(result("noise", 0), result("completion", 0)).startswith("None of 2 probes brings stripes back")
    assert verdict(result("relearning", 4)) == ""  # which teaches it
    assert verdict(result("noise", 0, ceiling=0)) == ""  # which tells nothing
