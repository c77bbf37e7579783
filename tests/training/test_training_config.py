"""Settings of a run that break a rule."""

from pathlib import Path
from typing import Any

import pytest

from training import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("iterations", 0, "be at least 1"),
        ("checkpoint_every", 0, "be at least 1"),
        ("keep_checkpoints", -1, "be at least 1"),
        ("learning_rate", 0.0, "be positive and finite"),
        ("learning_rate", float("nan"), "be positive and finite"),
        ("adam_epsilon", float("inf"), "be positive and finite"),
        ("adam_betas", (0.9, 1.0), "be two numbers in"),
        ("weight_decay", -0.1, "be finite and not negative"),
        ("max_grad_norm", 0.0, "be positive"),
        ("ema_decay", 1.0, "be None or lie between 0 and 1"),
        ("trackers", ("wandb", "wandb"), "be different names among"),
        ("project", "", "not be empty"),
        ("seed", -1, "lie in"),
        ("max_skipped", -1, "not be negative"),
    ],
)
def test_error_names_field_rule_and_value(field: str, value: Any, rule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"iterations": 1} | {field: value}
    with pytest.raises(ValueError, match=f"^{field} must {rule}") as caught:
        TrainingConfig(output_dir=tmp_path, **settings)
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("field", "value"), [("optimizer", "sgd"), ("mixed_precision", "fp8"), ("trackers", ("mlflow",))]
)
def test_unknown_names_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(Exception, match=field):
        TrainingConfig(output_dir=tmp_path, iterations=1, **settings)
