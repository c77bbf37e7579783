"""The README knows every file."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "policy",
    "training",
    "rewards",
    "tinyworld",
    "erasure",
    "refl",
    "ddpo",
    "evaluation",
    "examples",
    "benchmarks",
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_file_map_has_a_line_for_each_file(folder: str) -> None:
    section = (ROOT / "README.md").read_text().split(f"**{folder}/**")[1].split("\n**")[0].split("\n## ")[0]
    files = {file.name for file in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    listed = {line.split("`")[1] for line in section.splitlines() if line.startswith("| `")}
    assert listed == files
