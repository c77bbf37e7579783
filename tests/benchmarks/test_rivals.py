"""The benchmark of weights and bounds: it measures what it says, and that once."""

from pathlib import Path

import pytest

from benchmarks import rivals
from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world


def test_runs_are_made_measured_and_compared_once(tmp_path: Path) -> None:
    names = ("dual weight", "floor, slack 0")
    config = rivals.Config(
        seeds=(0,), names=names, iterations=1, prompts_per_kind=2, steps=4, workers=1, output_dir=tmp_path
    )
    # In the place of ESD's, which takes half a minute.
    UCE(tinyworld.PRESETS["uce"]).erase(tinyworld.load_policy(), tiny_world().concept).save(tmp_path / "esd" / "seed-0")
    text = rivals.main(config)
    found = {name: rivals.Run(name, 0).found(config) for name in names}
    for name, numbers in found.items():
        assert numbers is not None
        assert numbers["UNet rows, thousands"] > 0
        assert f"| {name} | {numbers['violation integral']:.3f}" in text
    assert (tmp_path / "bounds.svg").read_text().startswith("<svg")
    with pytest.raises(ValueError, match=r"names must be of dual weight, .* got 'dual'"):
        rivals.Config(names=("dual",))
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("found.json")}
    assert rivals.main(config) == text
    assert {path: path.stat().st_mtime_ns for path in made} == made
