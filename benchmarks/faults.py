"""How often each promise of reliability was put to the proof, and how often it held: the table of docs/reliability.md.

    python benchmarks/faults.py
    python benchmarks/faults.py --tests tests/rewards --workers 1

The proofs are the tests with the marker `proof`, wherever they stand, slow ones too. A test that passes has
proved once what its marker says, and as often as it counted what it recorded by pytest's
`record_property(promise, times)`. One that fails has proved nothing, and is named.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import tyro

from overpaint.settings import AnyPath, Field, settings

ROOT = Path(__file__).resolve().parents[1]


@settings
class Config:
    """Which proofs are run, and how."""

    tests: AnyPath = ROOT / "tests"
    """Folder or file of the tests."""

    workers: int = Field(2, ge=1)
    """Processes that prove."""


class Tally(NamedTuple):
    """What a run of the proofs came to."""

    held: Counter[str]
    """Times that each promise held."""

    failed: list[str]
    """Names of the tests that failed."""


def tally(results: Path) -> Tally:
    """Reads the results that pytest wrote as JUnit's XML."""
    held: Counter[str] = Counter()
    failed: list[str] = []
    for case in ET.parse(results).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        else:
            for entry in case.iter("property"):
                held[entry.attrib["name"]] += int(entry.attrib["value"])
    return Tally(held, failed)


def prove(config: Config) -> Tally:
    """Runs the proofs, whose own output goes where this program's goes."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", str(config.tests), "-c", str(ROOT / "pyproject.toml"), "-m", "proof"]
        command += ["-q", "-n", str(config.workers), f"--junitxml={results}", "-o", "junit_family=xunit1"]
        subprocess.run(command, cwd=ROOT, check=False)
        if not results.is_file():
            raise SystemExit("the proofs did not run; pytest's message is above")
        return tally(results)


def table(found: Tally) -> str:
    """Writes the counts, and which tests failed."""
    lines = ["| promise | held |", "| --- | ---: |"]
    lines += [f"| {promise} | {times:,} |" for promise, times in sorted(found.held.items())]
    return "\n".join([*lines, "", f"failed: {', '.join(found.failed) or 'none'}"])


def main(config: Config) -> None:
    """Prints the table; ends with 1 where a proof failed."""
    found = prove(config)
    print(table(found))
    if found.failed or not found.held:
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
