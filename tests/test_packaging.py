"""What the distribution holds, and what keeps a flat layout of packages safe."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
SHARED = sorted(f"overpaint.{path.parent.name}" for path in (ROOT / "overpaint").glob("*/__init__.py"))
PUBLIC = [*PACKAGES, *SHARED]
MODULES = sorted(f"overpaint.{path.stem}" for path in (ROOT / "overpaint").glob("[a-z]*.py"))
TRAINERS = ("refl", "ddpo")
MAX_WEIGHT_BYTES = 12 * 2**20

README_RUN = "pip install -e . && accelerate launch examples/refl_erase_nudity.py"
README_TEST = 'pip install -e ".[test]" && pytest'


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> dict[str, int]:
    """The files of the wheel and their sizes in bytes."""
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {entry.filename: entry.file_size for entry in archive.infolist()}


@pytest.fixture(scope="session")
def texts(built: Path) -> dict[str, str]:
    """The text files of the source distribution, which are those of the repository that git does not ignore."""
    (path,) = built.glob("*.tar.gz")
    texts = {}
    with tarfile.open(path) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            file = archive.extractfile(member)
            if file is None or name == "PKG-INFO":  # made by the build from README.md
                continue
            try:
                texts[name] = file.read().decode()
            except UnicodeDecodeError:
                continue
    return texts


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def public_names(package: str) -> list[str]:
    """What `__all__` of a package lists, in its order, read without importing it."""
    for node in ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return [f"{package}.{name}" for name in ast.literal_eval(node.value)]
    raise AssertionError(f"{package}/__init__.py has no __all__")


def imported_roots(path: Path) -> set[str]:
    """The first part of every absolute import of a file, at any depth."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


# The four lists of packages


def test_wheel_lists_every_package_of_the_repository() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_shape_checks_cover_every_package() -> None:
    (option,) = (o for o in PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"] if o.startswith("--jaxtyping"))
    assert option == f"--jaxtyping-packages={','.join(PACKAGES)},beartype.beartype"


def test_coverage_measures_every_package() -> None:
    assert PYPROJECT["tool"]["coverage"]["run"]["source"] == PACKAGES


def test_layers_hold_every_package() -> None:
    linter = PYPROJECT["tool"]["importlinter"]
    layers = linter["contracts"][0]["layers"]
    layered = [name.strip() for layer in layers for name in layer.split("|")]
    assert sorted(layered) == sorted([*PACKAGES[1:], *SHARED, *MODULES])
    assert linter["root_packages"] == PACKAGES


# Origins and names


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_imported_from_this_checkout(package: str) -> None:
    # Another distribution's `rewards` in site-packages would win over the editable install without a word.
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(ROOT / package / "__init__.py")


def test_programs_are_not_named_like_a_package() -> None:
    # Python puts the folder of a program first on its path: examples/refl.py would hide refl from all of them.
    names = {path.stem for path in sources("examples", "benchmarks")}
    assert names.isdisjoint({*PACKAGES, *TRAINERS, *sys.stdlib_module_names})


def test_examples_are_named_trainer_task_or_after_what_they_do() -> None:
    names = [path.stem for path in sources("examples")]
    assert names
    trainerless = {
        *("compare_erasures", "erase", "erasure_pareto", "erasure_probe"),
        *("evaluate_models", "evaluate_preference", "score_images"),
    }
    odd = [name for name in names if not re.fullmatch(rf"({'|'.join(TRAINERS)})_[a-z0-9_]+", name)]
    assert set(odd) == trainerless


def test_tests_are_not_a_package() -> None:
    # tests/refl/__init__.py would make `import refl` find the tests.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_no_module_is_called_utils() -> None:
    assert [path for path in sources(*PACKAGES, "examples", "benchmarks") if path.stem == "utils"] == []


# What is inside


def test_wheel_holds_the_listed_packages_and_nothing_else(wheel: dict[str, int]) -> None:
    dist_info = f"overpaint-{PYPROJECT['project']['version']}.dist-info"
    assert {name.partition("/")[0] for name in wheel} == {*PACKAGES, dist_info}


def test_wheel_holds_every_file_of_the_packages(wheel: dict[str, int]) -> None:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    wanted = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert wanted - set(wheel) == set()


def test_every_package_is_typed(wheel: dict[str, int]) -> None:
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel)


@pytest.mark.parametrize("folders", [("pipeline", "image-reward"), ("flow",)])
def test_wheel_holds_the_weights_of_each_tiny_world_within_their_budget(
    wheel: dict[str, int], folders: tuple[str, ...]
) -> None:
    places = tuple(f"overpaint/tinyworld/weights/{folder}/" for folder in folders)
    weights = [size for name, size in wheel.items() if name.startswith(places) and name.endswith(".safetensors")]
    assert weights
    assert sum(weights) <= MAX_WEIGHT_BYTES


OPTIONAL = ("fid", "nudity", "server", "tensorboard", "vlm")
"""Extras that the packages themselves import from, where they are installed."""


def test_every_import_is_declared() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    requirements = [*PYPROJECT["project"]["dependencies"], *(r for name in OPTIONAL for r in extras[name])]
    names = {re.split(r"[<>=!~\[ ]", requirement)[0] for requirement in requirements}
    renamed = {"pillow": "PIL", "pyyaml": "yaml", "vl-convert-python": "vl_convert"}
    modules = {renamed.get(name, name.replace("-", "_")) for name in names}
    programs = {"examples", "benchmarks", "ddpo_finetune"}  # which may build on each other
    elsewhere = {"trl"}  # lives in an environment of its own, which benchmarks/peers.py makes
    allowed = {*modules, *PACKAGES, *sys.stdlib_module_names, *programs, *elsewhere}
    found = {root: path for path in sources(*PACKAGES, "examples", "benchmarks") for root in imported_roots(path)}
    assert {root: path.name for root, path in found.items() if root not in allowed} == {}


def test_importing_a_package_loads_no_heavy_library() -> None:
    heavy = ["diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "wandb", "tyro", "scipy", "pandas"]
    heavy += ["altair", "vl_convert", "jinja2", "openai", "fastapi", "pooch", "pyarrow"]
    code = f"import sys, {', '.join(PUBLIC)}; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    )
    assert out.stdout.strip() == "[]"


# What the text says


def test_readme_has_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert README_RUN in lines
    assert README_TEST in lines


def test_ci_runs_the_readmes_test_command() -> None:
    assert f"readme_test_command='{README_TEST}'\n" in (ROOT / ".ci/run").read_text()


def test_changelog_begins_with_the_version_of_the_distribution() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == PYPROJECT["project"]["version"]


def test_the_reference_has_a_page_for_each_package_that_shows_all_of_its_public_names() -> None:
    folder = ROOT / "docs/reference"
    assert {path.stem for path in folder.glob("*.md")} == {"index", *(package.split(".")[-1] for package in PUBLIC)}
    for package in PUBLIC:
        shown = re.findall(r"^::: *(.*)$", (folder / f"{package.split('.')[-1]}.md").read_text(), re.MULTILINE)
        files = {path.stem for path in (ROOT / package.replace(".", "/")).iterdir()}
        hidden = [name for name in public_names(package) if name.split(".")[-1] in files]
        assert shown == [package, *(f"{name}.{name.split('.')[-1]}" for name in hidden)]


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in public_names(package) if not hasattr(module, name.rpartition(".")[2])] == []


def test_no_file_names_a_local_path_or_a_package_index(texts: dict[str, str]) -> None:
    local_path = r"(?<![\w.~-])/(?:work|root|home|Users|opt)/"
    index = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs|index-url|find-links"
    pattern = re.compile(f"{local_path}|{index}")
    found = {name: match[0] for name, text in texts.items() if (match := pattern.search(text))}
    assert set(found) <= {"tests/test_packaging.py"}, found  # the patterns above
