"""The environment of peers.py's other side: TRL's last release with DDPO, beside the versions that are in use here."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SHARED = (
    "torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "safetensors", "pillow", "jaxtyping", "tqdm",
    "pydantic", "httpx2",
)  # fmt: skip
"""What both environments have in the same version."""


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
    print(f"installing what {folder} lacks of TRL and our versions, if anything", file=sys.stderr)
    wanted = [f"{name}=={number}" for name, number in requirements().items()]
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python
