"""The program that compares algorithms of reward fine-tuning: which runs it takes as its own, and what it refuses."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program with runs that end at once."""
    monkeypatch.syspath_prepend(EXAMPLES)  # programs import one another as scripts do
    module = importlib.import_module("ddpo_compare")

    def run(config: Any) -> None:
        config.output_dir.mkdir(parents=True)
        lines = [{"iteration": k, module.REWARD: k / 2, module.HELD_OUT: k / 4} for k in (0, config.rounds)]
        (config.output_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (config.output_dir / "comparison.json").write_text("{}")

    monkeypatch.setattr(module.ddpo_finetune, "main", run)
    return module


def test_runs_of_other_settings_are_not_shown_as_its_own(program: Any, tmp_path: Path) -> None:
    made = {"algorithms": ("ddpo-is",), "seeds": (0,), "queries": 128, "output_dir": tmp_path}
    program.main(program.Config(**made))
    bands = program.main(program.Config(**made | {"algorithms": ("ddpo-is", "ddpo-sf"), "seeds": (1, 0)}))
    assert [x for x, _ in bands[program.REWARD]["ddpo-sf"]] == [0, 128]
    for name, value in {"policy": "tinyworld-flow", "queries": 192, "prompts_per_split": 3}.items():
        with pytest.raises(ValueError, match=rf"hold the same comparison, .* has another {name}$"):
            program.main(program.Config(**made | {name: value}))
    program.main(program.Config(**made | {"queries": 192, "task": "compressibility"}))  # in a folder of its own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"queries": 63, "algorithms": ("ddpo-is",)},
            "queries must be at least the 64 of one round of ddpo-is, got 63",
        ),
        ({"policy": "a/model"}, "queries must be at least the 10240 of one round of rwr, got 1920"),
        ({"task": "aesthetic"}, "task must be one of .* in the tiny world, got 'aesthetic'"),
    ],
)
def test_what_cannot_be_made_claims_no_folder(
    program: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        program.main(program.Config(**options, output_dir=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_there_claims_no_folder(program: Any, tmp_path: Path) -> None:
    missing = {"policy": str(tmp_path / "missing"), "algorithms": ("ddpo-is",), "output_dir": tmp_path / "runs"}
    with pytest.raises((ValueError, OSError), match="missing"):
        program.main(program.Config(**missing))
    assert not list(tmp_path.iterdir())
