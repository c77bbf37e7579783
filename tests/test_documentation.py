"""What README and docs show runs as it stands.

A page's Python blocks run one after the other, as a reader would paste them, on the tiny world: hub ids of
Stable Diffusion and of ImageReward stand for its weights. What a reader is expected to have already (`prompts`, a
`detector`) is defined in a comment `<!-- setup ... -->` of the page, which is not shown. A block that cannot run here
follows a comment `<!-- not run: why -->`; its imports run nevertheless.
"""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from overpaint import DiffusionPolicy, tinyworld
from rewards import ImageReward

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
    if re.search(r"^ *```python$", path.read_text(), re.MULTILINE)
)
README_SECONDS = 120


class Block(NamedTuple):
    """A piece of a page's Python."""

    line: int
    code: str
    runs: bool


def blocks(text: str) -> list[Block]:
    """The Python of a page, in order, that of hidden comments included."""
    pattern = r"<!-- setup\n(?P<setup>.*?)-->|(?P<skip><!-- not run: .+? -->\n+)?^```python\n(?P<shown>.*?)^```$"
    return [
        Block(
            text.count("\n", 0, found.start("setup" if found["setup"] is not None else "shown")),
            found["setup"] or found["shown"],
            found["skip"] is None,
        )
        for found in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    ]


def imports_of(code: str) -> str:
    """The imports of a block, and nothing else of it."""
    body: list[ast.stmt] = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return ast.unparse(ast.Module(body, []))


def test_blocks_are_found_with_what_stands_before_them() -> None:
    text = "a\n<!-- setup\nx = 1\n-->\n```python\ny = x\n```\n\n"
    text += "<!-- not run: needs a GPU -->\n```python\nimport z\nz.go()\n```\n"
    assert blocks(text) == [
        Block(2, "x = 1\n", True),
        Block(5, "y = x\n", True),
        Block(10, "import z\nz.go()\n", False),
    ]
    assert imports_of("import z\nz.go()\n") == "import z"


def test_the_readmes_python_runs_as_it_stands_in_two_minutes(tmp_path: Path) -> None:
    shown = [block.code for block in blocks((ROOT / "README.md").read_text())]
    assert len(shown) >= 4
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", "\n".join(shown)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < README_SECONDS
    assert (tmp_path / "runs/recovered/lora/pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = DiffusionPolicy.from_pretrained.__func__

    def from_pretrained(cls: type[DiffusionPolicy], path: str, **options: Any) -> DiffusionPolicy:
        return load(cls, tinyworld.pipeline_dir() if path.startswith("CompVis/") else path, **options)

    monkeypatch.setattr(DiffusionPolicy, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(ImageReward, "load", lambda *args, **options: tinyworld.load_reward())
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks((ROOT / page).read_text()):
        code = block.code if block.runs else imports_of(block.code)
        exec(compile("\n" * block.line + code, page, "exec"), namespace)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_links_of_readme_and_docs_lead_to_files() -> None:
    broken = [
        (path.name, target)
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_the_file_map_gives_the_first_line_of_every_file() -> None:
    wanted = {}
    for folder in ("overpaint", "rewards", "erasure", "refl", "ddpo", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name == "__init__.py" or path == ROOT / "overpaint/settings.py":
                continue
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring, path
            wanted[path.relative_to(ROOT).as_posix()] = docstring.splitlines()[0].rstrip(".")
    listed, folder = {}, ""
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if line.startswith("### "):
            folder = line.removeprefix("### ")
        elif found := re.fullmatch(r"\| `(.+\.py)` \| (.+) \|", line):
            listed[f"{folder}/{found[1]}"] = found[2]
    assert listed == wanted
