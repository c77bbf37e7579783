"""Settings of a program: from the command line and from YAML, completed, and written so that they are read again."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from overpaint.evaluation.experiments.options import ConceptOptions, RewardOptions
from overpaint.evaluation.experiments.program import (
    CODE,
    check_same,
    command_line,
    read_settings,
    settings_from_command_line,
    settings_yaml,
    updated,
    usual_beside,
)
from overpaint.settings import AnyPath, Field, settings

EVALUATION = Path(__file__).resolve().parents[2] / "overpaint" / "evaluation"
NAMING = re.compile(r"(reward_named|concept_measure|object_named)\(")


@settings
class Named:
    """What can name code."""

    reward: str | None = None
    """A reward."""
    measure: str | None = None
    """A measure."""


@settings
class Inner:
    """A group within a group."""

    rate: float = Field(1.0, ge=0)
    """A rate."""


@settings
class Group:
    """A group."""

    size: int = 4
    """A size."""
    names: tuple[str, ...] = ("a",)
    """Names."""
    inner: Inner = Inner()
    """More."""
    keep: bool = True
    """Whether."""


@settings
class Config:
    """What the program does."""

    kind: Literal["small", "large"] = "small"
    """Decides the group."""
    rate: float | None = Field(None, ge=0)
    """A rate."""
    folder: AnyPath = Path("here")
    """A folder."""
    group: Group | None = None
    """The group."""


def complete(config: Config) -> Config:
    size = 4 if config.kind == "small" else 400
    return replace(config, rate=0.5 if config.rate is None else config.rate, group=config.group or Group(size=size))


def read(*args: str) -> Config:
    return settings_from_command_line(Config, complete, list(args))


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "settings.yaml")

    return write


def test_groups_have_the_values_that_fit_what_decides_them() -> None:
    assert read().group == Group(size=4)
    assert read("--kind", "large").group == Group(size=400)
    assert read("--kind", "large", "--group.inner.rate", "2", "--group.no-keep").group == Group(
        size=400, inner=Inner(rate=2.0), keep=False
    )


def test_zero_is_not_left_out() -> None:
    assert read("--rate", "0").rate == 0.0
    assert read().rate == 0.5


def test_options_win_over_a_file_and_later_files_over_earlier_ones(written: Any, tmp_path: Path) -> None:
    path = written("kind: large\nrate: 1e-4\ngroup:\n  size: 7\n  inner: {rate: .5}\n")
    found = read("--settings", path)
    assert found == Config(kind="large", rate=1e-4, group=Group(size=7, inner=Inner(rate=0.5)))
    assert read("--settings", path, "--group.size", "8", "--rate", "0").group == Group(size=8, inner=Inner(rate=0.5))
    (tmp_path / "more.yaml").write_text("group: {names: [x, y]}\n")
    both = read(f"--settings={path}", "--settings", str(tmp_path / "more.yaml"))
    assert both.group == Group(size=7, names=("x", "y"), inner=Inner(rate=0.5))


def test_what_is_written_is_read_as_the_same_settings(written: Any) -> None:
    config = complete(Config(kind="large", folder=Path("~/a b"), group=Group(names=("ä", "1"), keep=False)))
    assert read("--settings", written(settings_yaml(config))) == config
    assert "size" not in settings_yaml(config, {"group": ("size",)})


def test_the_command_names_what_differs_within_groups_as_well() -> None:
    config = read("--kind", "large", "--group.names", "x", "y z", "--group.inner.rate", "0", "--group.no-keep")
    command = command_line("it", config, complete(Config(kind="large")))
    assert command == "it --group.names x 'y z' --group.inner.rate 0.0 --group.no-keep"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kinds: large\n", r"settings must be among kind, .*, got kinds; did you mean kind\?"),
        ("group:\n  siz: 3\n", r"settings must be among size, .*, got group\.siz; did you mean size\?"),
        ("group:\n  inner:\n    rate: -1\n", r"Inner\.rate must be at least 0, got -1"),
        ("group: 3\n", r"Config\.group must be an instance of Group, got 3"),
        ("rate: {size: 3}\n", r"rate must be one value, got the group"),
        ("rate: fast\n", r"Config\.rate must be a valid number, got 'fast'"),
        ("- a\n", r"settings must be a mapping of names to values, got \['a'\]"),
        ("a: [\n", r"settings must be YAML, without aliases, got .*settings\.yaml"),
        ("a: &a [1]\nb: *a\n", r"settings must be YAML, without aliases, got (.|\n)*found the alias \*a"),
        (f"a: {'[' * 100_000}", r"settings must be YAML of few levels, got .*settings\.yaml"),
    ],
)
def test_a_wrong_file_is_refused_in_words(text: str, message: str, written: Any) -> None:
    with pytest.raises(ValueError, match=message):
        read("--settings", written(text))


@pytest.mark.parametrize("name", ["reward", "measure"])
@pytest.mark.parametrize("code", ["evil_module:score", "~/evil.py:score", "os:system"])
def test_a_file_names_no_code_but_the_command_line_does(name: str, code: str, written: Any) -> None:
    def read_named(*args: str) -> Named:
        return settings_from_command_line(Named, lambda config: config, list(args))

    path = written(f"{name}: {code}\n")
    with pytest.raises(ValueError, match=rf"{name} in a settings file must be a short name or .*, got '{code}'"):
        read_named("--settings", path)
    assert getattr(read_named("--settings", path, f"--{name}", code), name) == code
    assert getattr(read_named("--settings", path, f"--{name}=clip"), name) == "clip"
    for plain in ("clip", "http://here:8000/score"):
        assert getattr(read_named("--settings", written(f"{name}: {plain}\n")), name) == plain


def test_every_setting_of_a_program_that_can_name_code_is_known() -> None:
    known = {field.name for options in (RewardOptions, ConceptOptions) for field in dataclasses.fields(options)}
    assert set(CODE) <= known
    callers = [path.name for path in EVALUATION.rglob("*.py") if NAMING.search(path.read_text(encoding="utf-8"))]
    assert sorted(callers) == ["experiment.py", "options.py"]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"settings must be a YAML file, got 'no\.yaml', which is not there"):
        read_settings("no.yaml")
    with pytest.raises(ValueError, match="--settings must be followed by a YAML file, got nothing"):
        read("--settings")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("--kind", "smal"), "did you mean small?"),
        (("--kid", "small"), "--kind"),
        (("--group.siz", "3"), "--group.size"),
    ],
)
def test_a_wrong_option_is_answered_with_the_nearest(args: tuple[str, ...], told: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        read(*args)
    assert told in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_shows_the_values_that_hold(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        read("--kind", "large", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--group.size INT A size. (default: 400)" in shown
    assert "--settings FILE.yaml" in shown


def test_what_decides_other_settings_is_told_and_they_are_not() -> None:
    config = read("--kind", "large", "--group.names", "x")
    assert command_line("it", config, usual_beside(config, complete, ["kind"])) == "it --kind large --group.names x"


def test_what_the_program_has_options_of_its_own_for_is_told_once() -> None:
    config = read("--group.size", "9", "--group.keep")
    assert command_line("it", config, complete(Config()), {"group": ("size",)}) == "it"
    assert command_line("it", config, complete(Config())) == "it --group.size 9"


def test_a_group_may_not_contradict_the_programs_own_options() -> None:
    check_same("group", Group(), size=4, keep=True)
    with pytest.raises(ValueError, match=r"group\.size must be the program's own, 5, got 4; set that instead"):
        check_same("group", Group(), size=5)


def test_updating_leaves_the_rest() -> None:
    assert updated(Group(), {"names": ["x"]}) == Group(names=("x",))
