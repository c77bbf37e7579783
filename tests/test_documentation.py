"""What README and docs show runs as it stands.

A page's Python blocks run one after the other, as a reader would paste them, on the tiny world: hub ids of
Stable Diffusion and of ImageReward stand for its weights, and the presets of the erasure methods make two updates. What
a reader is expected to have already (`prompts`, a `detector`) is defined in a comment `<!-- setup ... -->` of the page,
which is not shown. A block that cannot run here follows a comment `<!-- not run: why -->`; its imports run
nevertheless.

`python tests/test_documentation.py` writes the file map of docs/architecture.md anew.
"""

import ast
import os
import pkgutil
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from erasure import METHODS
from erasure.methods.sa import FisherConfig
from overpaint import DiffusionPolicy, tinyworld
from rewards import ImageReward

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
    if re.search(r"^ *```python$", path.read_text(), re.MULTILINE)
)
README_SECONDS = 120
METHOD_HEADINGS = ["Equations", "Example", "Settings", "Departures from the paper", "Results", "Limits"]
FOLDERS = ("overpaint", "rewards", "erasure", "refl", "ddpo", "examples", "benchmarks")


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
    assert len(shown) >= 3
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", "\n".join(shown)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < README_SECONDS
    assert (tmp_path / "runs/recovered/lora/pytorch_lora_weights.safetensors").is_file()


def shortened(config: Any) -> Any:
    """The settings of a method with two updates, and few pictures."""
    short: dict[str, Any] = {"images": 4, "steps": 4, "fisher": FisherConfig(images=2, timesteps=2)}
    fields = {name: value for name, value in short.items() if hasattr(config, name)}
    if hasattr(config, "descent"):
        fields["descent"] = replace(config.descent, iterations=2, batch_size=2)
    return replace(config, **fields)


@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = DiffusionPolicy.from_pretrained.__func__

    def from_pretrained(cls: type[DiffusionPolicy], path: str | Path, **options: Any) -> DiffusionPolicy:
        return load(cls, tinyworld.pipeline_dir() if str(path).startswith("CompVis/") else path, **options)

    monkeypatch.setattr(DiffusionPolicy, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(ImageReward, "load", lambda *args, **options: tinyworld.load_reward())
    presets = {name: shortened(config) for name, config in tinyworld.PRESETS.items()}
    monkeypatch.setattr(tinyworld, "PRESETS", presets)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks((ROOT / page).read_text()):
        code = block.code if block.runs else imports_of(block.code)
        exec(compile("\n" * block.line + code, page, "exec"), namespace)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_code_of_readme_and_docs_is_under_80_columns() -> None:
    # What programs print, in blocks without a language, is as wide as it is printed.
    wide = [
        f"{path.relative_to(ROOT)}: {line}"
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for block in re.findall(r"^ *```\w+$.*?^ *```$", path.read_text(), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if len(line) >= 80
    ]
    assert wide == []


def test_type_checkers_accept_the_readmes_python(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    shown = [block.code for block in blocks((ROOT / "README.md").read_text())]
    (tmp_path / "readme.py").write_text("\n".join(shown))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "--config-file",
         str(ROOT / "pyproject.toml"), "readme.py"],
        cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_of_readme_and_docs_lead_to_files() -> None:
    broken = [
        (path.name, target)
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_every_page_is_in_the_navigation_once() -> None:
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\ntheme:")[0]
    assert sorted(re.findall(r": (\S+\.md)$", nav, re.MULTILINE)) == sorted(pages)


def test_every_method_has_a_page_with_the_same_headings() -> None:
    pages = {path.stem: path.read_text() for path in (ROOT / "docs/methods").glob("*.md")}
    assert pages.keys() == METHODS.keys()
    headings = {name: re.findall(r"^## (.+)$", text, re.MULTILINE) for name, text in pages.items()}
    assert headings == dict.fromkeys(METHODS, METHOD_HEADINGS)


def test_every_tag_that_rwr_logs_is_defined_on_its_page() -> None:
    shared = re.findall(r'^        "(\S+)": ', (ROOT / "ddpo/collect.py").read_text(), re.MULTILINE)
    tags = {*shared, *re.findall(r'values\["(\S+)"\] =', (ROOT / "ddpo/rwr.py").read_text())}
    assert {"reward/mean", "train/updates"} <= tags
    text = (ROOT / "docs/rwr.md").read_text()
    assert [tag for tag in sorted(tags) if f"`{tag}`" not in text] == []


def is_there(name: str) -> bool:
    """Whether a dotted name can be imported: of a module, or of what a module holds."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_names_and_files_of_this_project_exist() -> None:
    # The log and the changelog name what was there once.
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md"]
    missing = []
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages):
        text = path.read_text()
        names = re.findall(r"`((?:overpaint|rewards|erasure|refl|ddpo)(?:\.(?!py`)\w+)+)`", text)
        files = re.findall(rf"`((?:{'|'.join(FOLDERS)}|tests|docs)/[\w/]+\.\w+)`", text)
        missing += [(path.name, name) for name in names if not is_there(name)]
        missing += [(path.name, file) for file in files if not (ROOT / file).exists()]
    assert missing == []


def first_lines() -> dict[str, str]:
    """The first line of the docstring of every file that the file map lists."""
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if path.name == "__init__.py":
            continue
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, path
        found[path.relative_to(ROOT).as_posix()] = docstring.splitlines()[0].rstrip(".")
    return found


def with_file_map(text: str) -> str:
    """The text of docs/architecture.md with the tables below its folders' headings made anew."""
    parts = re.split(r"^(### .+\n)", text, flags=re.MULTILINE)
    lines = first_lines()
    for place in range(1, len(parts), 2):
        folder = parts[place].removeprefix("### ").strip()
        rows = [
            f"| `{name.removeprefix(f'{folder}/')}` | {line} |"
            for name, line in lines.items()
            if name.startswith(f"{folder}/") and (folder != "overpaint" or name.count("/") == 1)
        ]
        parts[place + 1] = "\n".join(["", "| file | holds |", "|---|---|", *rows, "", ""])
    return "".join(parts).rstrip() + "\n"


def test_the_file_map_gives_the_first_line_of_every_file() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    assert text == with_file_map(text)
    folders = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert "overpaint" in folders
    assert [name for name in first_lines() if not name.startswith(tuple(f"{folder}/" for folder in folders))] == []


if __name__ == "__main__":
    architecture = ROOT / "docs/architecture.md"
    architecture.write_text(with_file_map(architecture.read_text()))
