"""The study of reward-constrained erasure, as a program and at the smallest size."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples import erasure_pareto
from overpaint import tinyworld
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.evaluation.probes.registry import PROBES


def config_of(*options: str) -> Any:
    return settings_from_command_line(erasure_pareto.Config, erasure_pareto.complete, list(options))


SMALL = (
    *("--methods", "uce", "--forms", "recovered", "--seeds", "0", "--prompts-per-kind", "2", "--probes", "noise"),
    *("--attempts", "2", "--iterations", "1", "--evaluation-steps", "4", "--workers", "1"),
)


def test_models_are_made_measured_probed_and_judged_once(tmp_path: Path) -> None:
    config = config_of(*SMALL, "--output-dir", str(tmp_path))
    text = erasure_pareto.main(config)
    for name in ("original", "deaf", "uce-plain", "uce-recovered"):
        assert f"| {name} |" in text
    assert " of 1 methods; stays gone under attack and tuning: " in text
    page = (tmp_path / "report.html").read_text()
    assert page.count('<img src="data:image/png') >= 3  # of the probe, for each model
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        *("front.svg", "recovered-violation.svg", "recovered-weight.svg")
    }
    models = {(one.method, one.form): one for one in erasure_pareto.models_of(erasure_pareto.complete(config))}
    assert set(models) == {("original", "plain"), ("deaf", "plain"), ("uce", "plain"), ("uce", "recovered")}
    assert models["uce", "recovered"].rows > 0
    assert models["original", "plain"].probes["noise"].worst.recovered.mean == 1

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*s*.json") if path.parent.name == "seed-0"}
    (tmp_path / "uce" / "recovered" / "seed-0" / "probes" / "noise.json").unlink()  # as if interrupted before
    assert erasure_pareto.main(config) == text
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with pytest.raises(ValueError, match="has another attempts"):
        erasure_pareto.main(config_of(*SMALL, "--attempts", "3", "--output-dir", str(tmp_path)))


def test_stages_need_those_before_them_alone() -> None:
    config = erasure_pareto.complete(config_of("--methods", "uce", "esd", "--seeds", "0", "1"))
    first, plain, others = erasure_pareto.stages_of(config)
    assert [(cell.method, cell.seed) for cell in first] == [("original", 0), ("original", 1), ("deaf", 0)]
    assert first[0].probes(config) == list(PROBES)
    assert first[1].probes(config) == ["textual-inversion", "soft-prompt"]
    assert {(cell.method, cell.form) for cell in plain} == {("uce", "plain"), ("esd", "plain")}
    assert {cell.form for cell in others} == {"unconstrained", "floor", "recovered", "attacked"}
    assert len(others) == 4 * 2 * 2


def test_no_text_reaches_the_control() -> None:
    policy = erasure_pareto.without_cross_attention(tinyworld.load_policy())
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    with torch.no_grad():
        seen = [policy.predict_noise(latents, timesteps, policy.encode([text] * 2)) for text in ("a striped star", "")]
        other = tinyworld.load_policy()
        told = other.predict_noise(latents, timesteps, other.encode(["a striped star"] * 2))
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)
    assert (seen[0] - told).abs().max() > 0.01


def test_fast_is_small_where_nothing_else_is_asked_for() -> None:
    fast = erasure_pareto.complete(config_of("--fast"))
    assert (fast.methods, fast.seeds, fast.attempts) == (("uce", "esd"), (0,), 8)
    mine = erasure_pareto.complete(config_of("--fast", "--methods", "mace", "--attempts", "4"))
    assert (mine.methods, mine.seeds, mine.attempts) == (("mace",), (0,), 4)


def test_each_form_has_a_constraint_of_its_own() -> None:
    config = erasure_pareto.complete(config_of("--methods", "uce"))
    found = {
        form: erasure_pareto.settings_of(erasure_pareto.Cell("uce", form, 3), config)
        for form in ("unconstrained", "recovered", "attacked")
    }
    assert [(one.constraint, one.attacked, one.iterations) for one in found.values()] == [
        ("none", False, 40),
        (None, False, 40),
        ("destruction", True, 240),
    ]
    assert [one.training.learning_rate for one in found.values()] == [1e-3, 1e-3, 3e-3]
    refl = [one.refl for one in found.values() if one.refl is not None]
    assert [(one.steps, one.first_reward_step, one.last_reward_step) for one in refl] == [(10, 5, 9)] * 3
    assert [one.pretraining_weight for one in refl] == [1.0, 1.0, 8.0]
    mine = erasure_pareto.complete(config_of("--methods", "uce", "--learning-rate", "0.1", "--constraint", "reference"))
    one = erasure_pareto.settings_of(erasure_pareto.Cell("uce", "attacked", 3), mine)
    assert (one.constraint, one.training.learning_rate, one.seed) == ("reference", 0.1, 3)


def test_seeds_can_be_had_one_after_the_other(tmp_path: Path) -> None:
    small = ("--methods", "uce", "--forms", "plain", "--prompts-per-kind", "1", "--evaluation-steps", "1", "--probes")
    for seeds in (("0",), ("1",), ("1", "0")):
        erasure_pareto.main(config_of(*small, "--workers", "1", "--output-dir", str(tmp_path), "--seeds", *seeds))
    models = {"original", "deaf", "uce"}
    for seed in ("seed-0", "seed-1"):
        assert {path.name for path in (tmp_path / "pictures" / seed).iterdir() if path.is_dir()} == models
    assert (tmp_path / "report.html").read_text().count('class="shot"') > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("original", "a/model"), ("erasure", "runs/erasure"), ("seed", "3"), ("attacked", None), ("resume", None)),
        ("push_to_hub", "me/mine"),
    ],
)
def test_options_of_a_single_recovery_are_refused(option: str, value: str | None) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be left out, since .*; got {value or True}$"):
        config_of(f"--{option.replace('_', '-')}", *([] if value is None else [value]))
