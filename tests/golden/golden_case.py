"""The stored numbers of the official implementations, which remember what was read of them.

A test module that keeps a `GoldenCase` under a name of its own reads all of it: where its tests passed and something of
the case was neither read nor named as left out with the reason, the module fails at its end. Fixtures make cases that
nobody holds to this. It is a plugin of pytest, which `tests/conftest.py` loads.
"""

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from rewards import ImageRewardConfig

GOLDEN = Path(__file__).resolve().parent

PROSE = (
    "case",
    "method",
    "what",
    "formula",
    "source",
    "schedule_source",
    "data",
    "provenance*",
    "note",
    "notes",
    "licence",
    "versions*",
    "tolerance_rule",
    "tensors/*",  # what each tensor is; the shapes and names are those of the tensors themselves
)
"""What a case says to people."""


class Record(Mapping[str, Any]):
    """A JSON object that notes which of its values were asked for, at any depth."""

    def __init__(self, content: dict[str, Any], read: set[str], path: str = "") -> None:
        self._content, self._read, self._path = content, read, path

    def __getitem__(self, key: str) -> Any:
        return _watched(self._content[key], self._read, f"{self._path}{key}")

    def __contains__(self, key: object) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __repr__(self) -> str:
        return repr(self._content)


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, which notes those that were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], read: set[str], prefix: str = "") -> None:
        self._tensors, self._read, self._prefix = tensors, read, prefix

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[self._prefix + name]
        self._read.add(self._prefix + name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def under(self, prefix: str) -> "Tensors":
        """The tensors whose names begin so, by the rest of their names; they are noted when they are asked for."""
        return Tensors(self._tensors, self._read, self._prefix + prefix)


class GoldenCase:
    """One case: `record` is what its JSON file says, `tensors` what its safetensors file holds.

    Args:
        name: Of both files, without the endings.
        left_out: What is not read, and why: patterns of paths in the record, such as `hyperparameters/cases/*/seed`, or
            of names of tensors. A pattern that everything was read of, or that fits nothing, is a complaint too.
    """

    def __init__(self, name: str, left_out: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.left_out = dict(left_out or {})
        self._read_values: set[str] = set()
        self._read_tensors: set[str] = set()

    @cached_property
    def record(self) -> Record:
        return Record(self._content, self._read_values)

    @cached_property
    def tensors(self) -> Tensors:
        return Tensors(self._stored, self._read_tensors)

    def tolerance(self, name: str | None = None) -> list[float]:
        """The numbers in what the record says about the tolerance of something, in the order of the words."""
        stated = self.record["tolerance"]
        return numbers(stated if name is None else stated[name])

    def complaints(self) -> list[str]:
        """What was neither read nor left out, and what is left out for nothing."""
        unread = {path for path in _leaves(self._content) if not _fits(path, PROSE)} - self._read_values
        unread |= self._stored.keys() - self._read_tensors
        found = [f"{name} was never read" for name in sorted(unread) if not _fits(name, self.left_out)]
        read = [p for p in self.left_out if not any(fnmatchcase(name, p) for name in unread)]
        found += [f"{pattern} is left out, and everything that fits it was read" for pattern in read]
        return [f"{self.name}: {complaint}" for complaint in found]

    @cached_property
    def _content(self) -> dict[str, Any]:
        return json.loads((GOLDEN / f"{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def _stored(self) -> dict[str, Tensor]:
        return load_file(GOLDEN / f"{self.name}.safetensors")


def numbers(words: str) -> list[float]:
    """The small numbers in a sentence: 1e-05 and 0.02 of "abs 1e-5 + rel 2 % (float32)"."""
    found = re.findall(r"(\d+(?:\.\d+)?e-\d+)|(\d+(?:\.\d+)?) %", words)
    return [float(plain) if plain else float(percent) / 100 for plain, percent in found]


def image_reward_config(record: Record) -> ImageRewardConfig:
    """Sizes of the small ImageReward that the cases `image_reward_small` and `refl_step` share."""
    text, vision = record["config"]["text"], record["config"]["vision"]
    return ImageRewardConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        vision_hidden_size=vision["hidden_size"],
        vision_layers=vision["depth"],
        vision_heads=vision["heads"],
        vision_intermediate_size=vision["hidden_size"] * vision["mlp_ratio"],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        text_layers=text["num_hidden_layers"],
        text_heads=text["num_attention_heads"],
        text_intermediate_size=text["intermediate_size"],
        max_positions=text["max_position_embeddings"],
    )


def _watched(value: Any, read: set[str], path: str) -> Any:
    if isinstance(value, dict):
        return Record(value, read, f"{path}/")
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return [_watched(part, read, f"{path}/{index}") for index, part in enumerate(value)]
    read.add(path)
    return value


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    """Paths of everything that is read as one: numbers, strings, and lists of them."""
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        parts = list(enumerate(value))
    else:
        yield path
        return
    for name, part in parts:
        yield from _leaves(part, f"{path}/{name}" if path else str(name))


def _fits(name: str, patterns: Sequence[str] | Mapping[str, str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# The plugin.

partly_run: set[Path] = set()
"""Modules of which a test was not chosen, was skipped or did not pass: what they leave unread says nothing."""


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    # What needs an accelerator or takes minutes is never chosen by default, and compares with the other tests' numbers.
    left = [item for item in items if not any(item.get_closest_marker(mark) for mark in ("gpu", "slow"))]
    partly_run.update(item.path for item in left)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not report.passed:
        partly_run.add(item.path)
    return report


@pytest.fixture(scope="module", autouse=True)
def golden_cases_are_read_whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a module that kept something of its cases unread."""
    yield
    if request.path in partly_run or any("::" in argument for argument in request.config.args):
        return
    cases = [value for value in vars(request.module).values() if isinstance(value, GoldenCase)]
    complaints = [complaint for case in cases for complaint in case.complaints()]
    if complaints:
        pytest.fail("\n".join(complaints), pytrace=False)
