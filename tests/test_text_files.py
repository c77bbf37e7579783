"""Texts that people give are decoded and cut into lines by one rule, or refused with their place."""

import codecs
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from overpaint import text_files
from overpaint.text_files import LARGEST, did_you_mean, read_json, read_json_lines, read_text, text_lines

TEXT = "ein Kätzchen\u2028grün\x85\nzwei\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    ],
    ids=["utf-8", "utf-8 with mark", "utf-16-le", "utf-16-be", "utf-32-le"],
)
def test_marks_of_byte_order_say_the_encoding(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    assert read_text(tmp_path / "t.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "eins\nKätzchen\n".encode("latin-1"),
            r"t\.txt must be UTF-8, got b'\\xe4' in line 2 \(byte 6\): .*; save it as",
        ),
        ("a\n".encode("utf-16-le"), r"t\.txt must be UTF-8, got a zero byte \(byte 1\), as UTF-16 without"),
        (codecs.BOM_UTF16_LE + b"a", r"must be UTF-16, as its byte order mark says, got b'a' in line 1"),
    ],
)
def test_other_encodings_are_refused_with_their_place(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "t.txt")


def test_lines_end_at_line_feeds_alone() -> None:
    assert text_lines(TEXT) == ["ein Kätzchen\u2028grün\x85", "zwei"]
    assert text_lines("a\r\nb\r\n\r\nc") == ["a", "b", "", "c"]
    assert text_lines("") == []


def test_json_lines_are_numbered_as_in_an_editor(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert read_json_lines(path) == {1: {"text": "a\u2028b"}, 3: {"text": "c"}}
    path.write_text('{}\n\n{"text"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.jsonl, line 3, must be JSON, got"):
        read_json_lines(path)


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("[1,", encoding="utf-8")
    with pytest.raises(ValueError, match=r"t\.json must be JSON, got Expecting value: line 1"):
        read_json(tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "t.json") == [1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "must be JSON of few levels, got more than"),
        ('{"a":' * 100_000, "must be JSON of few levels, got more than"),
        ("9" * 5000, "must be JSON, got Exceeds the limit"),
    ],
    ids=["lists", "objects", "digits"],
)
def test_json_that_the_parser_cannot_bear_is_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"t\.json {message}"):
        read_json(tmp_path / "t.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "t.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match=r"t\.json must have at most 134217728 bytes"):
        read_json(tmp_path / "t.json")


def test_a_pipe_ends_where_a_file_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST", 1000)
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor() as writer:
        writer.submit((tmp_path / "pipe").write_bytes, b"a" * 1001)
        with pytest.raises(ValueError, match="pipe must have at most 1000 bytes"):
            read_text(tmp_path / "pipe")


def test_a_near_name_is_told_in_any_case() -> None:
    assert did_you_mean("PROMT", ["prompt", "seed"]) == "; did you mean 'prompt'?"
    assert did_you_mean("promt", ["Prompt"]) == "; did you mean 'Prompt'?"
    assert did_you_mean("zebra", ["prompt"]) == ""
