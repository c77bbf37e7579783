"""Settings dataclasses: strict types, rules beside their fields, errors that name all there is to know."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from overpaint.settings import AnyFloat, AnyPath, Field, settings


@settings
class Inner:
    """Within another."""

    share: float = Field(0.5, ge=0, le=1)
    """A share."""


@settings
class Outer:
    """What is set."""

    count: int = Field(1, ge=1)
    """How many."""

    names: tuple[Annotated[str, Field(min_length=1)], ...] = Field(("a",), min_length=1)
    """Names."""

    limit: AnyFloat = Field(math.inf, gt=0)
    """A limit, or none."""

    folder: AnyPath = Path("here")
    """Where."""

    inner: Inner = Inner()
    """More."""

    def __post_init__(self) -> None:
        if self.count > len(self.names) * 10:
            raise ValueError(f"count must be at most ten for each name, got {self.count}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "Outer.count must be at least 1, got 0"),
        ({"count": True}, "Outer.count must be a valid integer, got True"),
        ({"count": "1"}, "Outer.count must be a valid integer, got '1'"),
        ({"count": 1.0}, "Outer.count must be a valid integer, got 1.0"),
        ({"names": ("a", "")}, "Outer.names[1] must have at least 1 character, got ''"),
        ({"limit": -1.0}, "Outer.limit must be above 0, got -1.0"),
        ({"limit": math.nan}, "Outer.limit must be above 0, got nan"),
        ({"inner": {"share": 1.0}}, "Outer.inner must be an instance of Inner, got {'share': 1.0}"),
        ({"count": 11}, "Outer.count must be at most ten for each name, got 11"),
        (
            {"cuont": 1},
            "Outer.cuont must be one of count, names, limit, folder, inner, got cuont=1; did you mean count?",
        ),
    ],
)
def test_an_error_names_class_field_rule_and_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Outer(**values)


def test_every_broken_rule_is_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"count must be at least 1, got 0; Outer\.limit must be above 0, got 0"):
        Outer(count=0, limit=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.5"])
def test_a_number_is_finite_and_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Inner\.share must be"):
        Inner(share=value)


def test_what_fits_is_taken_over() -> None:
    outer = Outer(count=2, limit=3, folder=Path("there"), inner=Inner(share=1))
    assert dataclasses.asdict(outer) == {
        "count": 2, "names": ("a",), "limit": 3.0, "folder": Path("there"), "inner": {"share": 1.0}
    }  # fmt: skip
    assert isinstance(outer.limit, float)
    text: Any = "there"
    assert Outer(folder=text) == Outer(folder=Path("there"))


def test_replacing_checks_again() -> None:
    assert dataclasses.replace(Outer(), count=3) == Outer(count=3)
    with pytest.raises(ValueError, match=r"Outer\.count must be at least 1, got -1"):
        dataclasses.replace(Outer(), count=-1)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer().count = 2  # ty: ignore[invalid-assignment]


def test_tyro_reads_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert tyro.cli(Outer, args=["--count", "4", "--inner.share", "0.25"]) == Outer(count=4, inner=Inner(share=0.25))
    with pytest.raises(SystemExit):
        tyro.cli(Outer, args=["--help"])
    assert "How many." in capsys.readouterr().out


def test_a_paths_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Outer(folder=Path("~/runs")).folder == tmp_path / "runs"
    with pytest.raises(ValueError, match=r"Outer.folder must begin with a known home folder, got '~nobody-here/runs'"):
        Outer(folder=Path("~nobody-here/runs"))
