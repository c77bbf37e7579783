"""The environment of peers.py's other side: TRL's last release with DDPO, beside the versions that are in use here."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SHARED = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors", "pillow", "jaxtyping", "tqdm",
)  # fmt: skip
"""What both environments have in the same version."""

LISTING = (
    "import json, importlib.metadata as m; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)


def requirements() -> dict[str, str]:
    """Returns the versions that the environment must have, by distribution."""
    # Builds of torch for different devices differ behind the plus sign.
    return {"trl": "0.23.1", **{name: version(name).partition("+")[0] for name in SHARED}}


def make_environment(folder: Path) -> Path:
    """Returns the Python of the environment in a folder, which is made or completed where that is needed.

    Raises:
        subprocess.CalledProcessError: Its packages could not be installed.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if missing := missing_requirements(installed(python)):
        print(f"installing {len(missing)} packages and what they need into {folder}", file=sys.stderr)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *missing], check=True)
    return python


def missing_requirements(installed: dict[str, str]) -> list[str]:
    """Returns what has to be installed, as pip wants it; all of it as soon as anything is missing.

    Args:
        installed: Versions by distribution.
    """
    wanted = requirements()
    if all(installed.get(name, "").partition("+")[0] == number for name, number in wanted.items()):
        return []
    return [f"{name}=={number}" for name, number in wanted.items()]


def installed(python: Path) -> dict[str, str]:
    """Returns the versions of all distributions that a Python finds."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    listed = subprocess.run([str(python), "-c", LISTING], check=True, capture_output=True, text=True, env=environment)
    return json.loads(listed.stdout)
