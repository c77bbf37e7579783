"""Tables and folders of pairs: how they are read and written."""

import json
from pathlib import Path

import pytest
from PIL import Image

from overpaint.evaluation.images.pairs import read_pairs
from overpaint.evaluation.tables import check_output, read_table, write_table

ROWS = [
    {"image": "a.png", "prompt": "ein Kätzchen, grün", "seed": 1, "tags": ["x", "y"]},
    {"image": "b/c.png", "prompt": "two\nlines", "seed": None, "tags": []},
]


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def test_json_lines_fill_in_missing_keys(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png"}\n\n{"seed": 2, "image": "b.png"}\n', encoding="utf-8")
    assert read_table(tmp_path / "t.jsonl") == [{"image": "a.png", "seed": None}, {"image": "b.png", "seed": 2}]


def test_parquet_keeps_the_types_of_columns(tmp_path: Path) -> None:
    write_table(ROWS, {"clip": [0.1, None]}, tmp_path / "new" / "t.parquet")
    rows = read_table(tmp_path / "new" / "t.parquet")
    assert [{**row, "clip": None} for row in rows] == [{**row, "clip": None} for row in ROWS]
    assert rows[0]["clip"] == pytest.approx(0.1, rel=1e-7)
    assert rows[1]["clip"] is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.parquet"]


def test_csv_holds_what_is_no_text_as_text(tmp_path: Path) -> None:
    write_table(ROWS, {"clip": [0.1, None]}, tmp_path / "t.csv")
    assert read_table(tmp_path / "t.csv") == [
        {"image": "a.png", "prompt": "ein Kätzchen, grün", "seed": "1", "tags": '["x", "y"]', "clip": "0.1"},
        {"image": "b/c.png", "prompt": "two\nlines", "seed": "", "tags": "[]", "clip": ""},
    ]


@pytest.mark.parametrize("score", [1 / 3, -99.30799865722656, 1e-8, 3.0])
def test_scores_of_a_csv_are_exact_in_float32(score: float, tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    write_table([{"image": "a.png"}], {"clip": [score]}, tmp_path / "t.csv")
    assert numpy.float32(read_table(tmp_path / "t.csv")[0]["clip"]) == numpy.float32(score)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"image,prompt\na.png\n", r"must have 2 cells in every row, got \['a.png'\] in row 1"),
        ("t.csv", b"image,image\na.png,b\n", "must name every column once"),
        ("t.csv", b'image\n"a"b\n', "must be a table with as many cells in every row, got: .* expected after"),
        ("t.csv", b"image\n\xff\n", r"must be UTF-8, got b'\\xff' in line 2"),
        ("t.csv", b"image,prompt\na.png,b\na,b,c\n", "as many cells in every row, got: Expected 2 .* in line 3, saw 3"),
        ("t.jsonl", b'{"image": "a.png"}\n{"image"\n', "line 2, must be JSON, got"),
        ("t.jsonl", b'["a.png"]\n', r"must hold an object in every line, got \['a.png'\] in line 1"),
        ("t.parquet", b"image\na.png\n", "must be a Parquet file"),
        ("t.txt", b"a.png\n", r"a table must be named \*\.csv or \*\.jsonl or \*\.parquet, got"),
        ("t.csv", b"image\n", "must hold at least one row, got none"),
        ("t.csv", b"\n\r\n", "must hold at least one row, got none"),
        ("t.csv", b"", "must hold at least one row, got none"),
        ("t.csv", b"picture,prompt\na.png,b\n", "must have a column 'image', got picture, prompt"),
        ("t.csv", b"image,prompt\n,b\n", "must name a file in column 'image', got '' in row 1"),
        ("t.jsonl", b'{"image": {"bytes": ""}}\n', "must name a file in column 'image', got {'bytes': ''} in row 1"),
        ("t.jsonl", b'{"image": "a.png", "prompt": 3}\n', "must hold prompts that are text, got 3 in row 1"),
    ],
)
def test_a_table_that_is_none_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / name)


def test_a_table_may_begin_with_a_mark_of_its_byte_order(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfimage,prompt\r\na.png,b\r\n\r\n")
    (pair,) = read_pairs(tmp_path / "t.csv")
    assert (pair.name, pair.path, pair.prompt) == ("a.png", tmp_path / "a.png", "b")


def test_cells_of_text_stay_what_they_are(tmp_path: Path) -> None:
    content = 'image,id,note,n\r\na.png,007,NA,1.50\r\n\r\n"b\r\nc.png",1e3,"say ""no""",\r\n'
    (tmp_path / "t.csv").write_text(content, encoding="utf-8", newline="")
    assert read_table(tmp_path / "t.csv") == [
        {"image": "a.png", "id": "007", "note": "NA", "n": "1.50"},
        {"image": "b\r\nc.png", "id": "1e3", "note": 'say "no"', "n": ""},
    ]


def test_a_row_of_one_empty_cell_is_no_blank_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('prompt\n""\n\n  \n', encoding="utf-8")
    assert read_table(tmp_path / "t.csv") == [{"prompt": ""}, {"prompt": "  "}]


def test_a_prompt_for_all_is_for_tables_without(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\na.png\n", encoding="utf-8")
    assert read_pairs(tmp_path / "t.csv", prompt="a cat")[0].row == {"image": "a.png", "prompt": "a cat"}
    (tmp_path / "u.csv").write_text("image,prompt\na.png,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must not be given with a table that has prompts of its own, got 'a cat'"):
        read_pairs(tmp_path / "u.csv", prompt="a cat")
    with pytest.raises(ValueError, match=r"prompts must not be given with a table, got .*u\.csv"):
        read_pairs(tmp_path / "t.csv", prompts=tmp_path / "u.csv")


def test_a_folder_is_read_with_its_subfolders_but_not_what_is_hidden(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", ".hidden/c.png", "a/.d.png"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    pairs = read_pairs(tmp_path)
    assert [pair.row for pair in pairs] == [{"image": "a/z.JPG"}, {"image": "b.png"}]
    assert [pair.prompt for pair in pairs] == [None, None]


def test_prompts_of_drawn_images_are_found_in_their_manifest(tmp_path: Path) -> None:
    picture(tmp_path / "base" / "benign-0001_0.png")
    manifest = {"format": 1, "steps": 4, "images": [{"id": "benign-0001", "prompt": "a cat", "seed": 3}]}
    (tmp_path / "prompts.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert [pair.prompt for pair in read_pairs(tmp_path, prompts=tmp_path / "prompts.json")] == ["a cat"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '[{"id": "dog", "prompt": "b"}]', r"every image a prompt, got none for 1, the first cat_0\.png"),
        ("p.json", '[{"id": "cat"}]', r'must be a list of \{"id", "prompt"\}, got KeyError'),
        ("p.json", "{", r'must be a list of \{"id", "prompt"\}, got ValueError\(.*must be JSON'),
        ("p.json", '[{"id": "cat", "prompt": null}]', "must give every image a prompt, got none in row 1"),
        ("p.json", '[{"id": "cat", "prompt": "a"}, {"id": "cat", "prompt": "b"}]', "must give 'cat' one prompt, got"),
        ("p.csv", "image,text\ncat_0.png,a\n", "must have a column 'prompt', got image, text"),
        ("p.txt", "a cat", r"prompts must be one of \*\.csv, \*\.jsonl, \*\.parquet, \*\.json, got"),
    ],
)
def test_prompts_that_do_not_fit_the_images_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "cat_0.png")
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "images", prompts=tmp_path / name)


def test_images_that_are_not_named_by_identifiers_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "cat.png")
    (tmp_path / "p.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"images must be named <id>_<k> to find their prompts in .*, got cat\.png"):
        read_pairs(tmp_path / "images", prompts=tmp_path / "p.json")


def test_a_source_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold images \(\.avif, .*\), got none"):
        read_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder or table at"):
        read_pairs(tmp_path / "nothing")
    with pytest.raises(ValueError, match="prompt and prompts must not be given both"):
        read_pairs(tmp_path, prompt="a", prompts=tmp_path)


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output must be named \*\.csv or \*\.parquet, got .*t\.xlsx"):
        check_output(ROWS, ["clip"], tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match="rewards must not be named like columns of the table, got 'seed'"):
        check_output(ROWS, ["clip", "seed"], tmp_path / "t.csv")
    with pytest.raises(ValueError, match="column 'seed' must hold values of one type to be written as Parquet"):
        check_output([{"seed": 1}, {"seed": "x"}], ["clip"], tmp_path / "t.parquet")
