"""The benchmark of the flow transformer: it trains, erases and measures what it says, and that once."""

import re
from pathlib import Path

import pytest

from benchmarks import flow
from erasure import ESD, DescentConfig, ESDConfig


def test_models_are_trained_erased_recovered_and_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ESDConfig(train="attn", steps=2, descent=DescentConfig(iterations=1, batch_size=2, learning_rate=1e-3))
    monkeypatch.setattr(flow, "HELD_OUT", 4)
    monkeypatch.setattr(flow, "eraser", lambda name, seed: ESD(quick))
    config = flow.Config(
        seeds=(0,),
        names=("ReFL", "ESD"),
        queries=64,
        recovery_iterations=1,
        pairs=4,
        prompts=2,
        workers=1,
        output_dir=tmp_path,
    )
    text = flow.main(config)
    rows = re.findall(r"^\| (ReFL|ESD|ESD, recovered) \|", text, re.MULTILINE)
    assert rows == ["ReFL", "ESD", "ESD, recovered"]
    found = flow.Run("ReFL", 0).found(config)
    assert found is not None
    assert found["queries per iteration"] == 8
    assert found["change"] == pytest.approx(found["after"] - found["before"], abs=1e-6)
    assert (tmp_path / "reward.svg").read_text().startswith("<svg")

    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")}
    assert len(made) == 3
    assert flow.main(config) == text
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with pytest.raises(ValueError, match=r"names must be of ReFL, .* got 'PPO'"):
        flow.Config(names=("PPO",))
