"""No text that is read becomes code: the few places that import or load by name are listed here, with their reasons."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("overpaint", "rewards", "erasure", "refl", "ddpo", "examples")

BUILTINS = {"__import__", "compile", "eval", "exec", "import_module", "run_module", "run_path"}
"""What runs code under its plain name."""

METHODS = {
    "import_module", "spec_from_file_location", "run_module", "run_path", "Popen", "call", "check_call", "check_output",
    "run", "system", "popen", "load", "loads", "read_pickle", "unpack_archive", "extract", "extractall",
}  # fmt: skip
OWNERS = {
    "builtins", "dill", "importlib", "importlib.util", "joblib", "marshal", "numpy", "np", "os", "pandas", "pickle",
    "runpy", "shelve", "shutil", "subprocess", "tarfile", "torch", "yaml", "zipfile",
}  # fmt: skip
"""What runs code, programs or pickles, or writes where an archive says, and the modules of which it is."""

ALLOWED = {
    ("overpaint/__init__.py", "import_module"): "the package's own names, of a table",
    ("rewards/nudity.py", "import_module"): "the names of two libraries, said in the code",
    ("rewards/named.py", "importlib.import_module"): "a name of the command line or of Python",
    ("rewards/named.py", "importlib.util.spec_from_file_location"): "a path of the command line or of Python",
    ("overpaint/policy/weight_files.py", "torch.load"): "with weights_only",
    ("overpaint/training/run.py", "torch.load"): "with weights_only, of what this process has just saved",
    ("overpaint/training/engine.py", "pickle.loads"): "of what this process has just pickled",
    ("overpaint/training/record.py", "subprocess.run"): "git, in this project's checkout",
    ("overpaint/evaluation/experiments/program.py", "yaml.load"): "with a safe loader",
}


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Returns the calls of a file that could run code, by what they call."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if (not owner and name in BUILTINS) or (owner in OWNERS and name in METHODS):
                found.append((ast.unparse(node.func), node))
    return found


@pytest.mark.proof
def test_only_the_listed_places_can_run_what_they_read(record_property: Callable[[str, object], None]) -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = {(path.relative_to(ROOT).as_posix(), name): call for path in files for name, call in calls(path)}
    assert found.keys() == ALLOWED.keys()
    loaded = [ast.unparse(call) for (_, name), call in found.items() if name == "torch.load"]
    assert all("weights_only=True" in call for call in loaded)
    assert "Loader=_Loader" in ast.unparse(found["overpaint/evaluation/experiments/program.py", "yaml.load"])
    trusting = re.compile(r"trust_remote_code(\"?: |=)True|custom_pipeline|weights_only=False\)")
    assert [path.name for path in files if trusting.search(path.read_text(encoding="utf-8"))] == ["weight_files.py"]
    others = len(files) - len({name for name, _ in found})
    record_property("source files that neither import by name nor unpickle", others)
