"""Settings of a run that break a rule."""

from pathlib import Path
from typing import Any

import pytest

from overpaint.training import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("iterations", 0, "be at least 1"),
        ("checkpoint_every", 0, "be at least 1"),
        ("keep_checkpoints", -1, "be at least 1"),
        ("learning_rate", 0.0, "be above 0"),
        ("learning_rate", float("nan"), "be a finite number"),
        ("adam_epsilon", float("inf"), "be a finite number"),
        ("adam_betas", (0.9, 1.0), "be below 1"),
        ("weight_decay", -0.1, "be at least 0"),
        ("max_grad_norm", 0.0, "be above 0"),
        ("ema_decay", 1.0, "be below 1"),
        ("trackers", ("wandb", "wandb"), "be different"),
        ("project", "", "have at least 1 character"),
        ("seed", -1, "be at least 0"),
        ("max_skipped", -1, "be at least 0"),
        ("warmup_iterations", -1, "be at least 0"),
        ("warmup_iterations", 2, "be at most iterations=1"),
        ("ema_warmup", True, "be False without ema_decay"),
    ],
)
def test_error_names_field_rule_and_value(field: str, value: Any, rule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"iterations": 1} | {field: value}
    with pytest.raises(ValueError, match=rf"{field}(\[1\])? must {rule}") as caught:
        TrainingConfig(output_dir=tmp_path, **settings)
    assert str(caught.value).endswith(f"got {value[1] if field == 'adam_betas' else value!r}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer", "sgd"), ("schedule", "step"), ("mixed_precision", "fp8"), ("trackers", ("mlflow",))],
)
def test_unknown_names_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(Exception, match=field):
        TrainingConfig(output_dir=tmp_path, iterations=1, **settings)


@pytest.mark.parametrize(("field", "value"), [("adam_betas", (0.5, 0.9)), ("adam_epsilon", 1e-6)])
def test_adafactor_refuses_what_it_would_not_read(field: str, value: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"{field} must be left alone with the optimizer 'adafactor', got"):
        TrainingConfig(output_dir=tmp_path, iterations=1, optimizer="adafactor", **settings)
