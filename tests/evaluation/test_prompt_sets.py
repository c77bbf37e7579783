"""Sets of prompts: what is read, which part of it, and how bad rows are refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from overpaint import tinyworld
from overpaint.evaluation.prompts import BY_HAND, FETCHED, NAMES, TINY_KINDS, Prompt, PromptSet, prompt_set
from overpaint.evaluation.tables import write_table

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


# What is read


@pytest.mark.parametrize(
    ("name", "count", "first", "last", "seeds"),
    [
        ("coco-30k", 30_000, "000000203564", "000000399516", (41337, 82410)),
        ("imagereward-100", 100, "005695-0057", "000562-0011", (None, None)),
        ("imagereward-test", 466, "005658-0040", None, (None, None)),
        ("diffusiondb", 10_000, "000044-0048", "013913-0073", (None, None)),
    ],
)
def test_public_sets_are_read_whole(
    name: str, count: int, first: str, last: str | None, seeds: tuple[int | None, int | None], shared: Path
) -> None:
    found = prompt_set(name, folder=shared / "data")
    assert (found.name, len(found.prompts)) == (name, count)
    assert found.source == FETCHED[name].source
    assert found.prompts[0].id == first
    assert last in (None, found.prompts[-1].id)
    assert (found.prompts[0].seed, found.prompts[-1].seed) == seeds
    assert len({prompt.id for prompt in found.prompts}) == count
    assert set(found.prompts[0].extras) == {"coco-30k": {"source"}, "imagereward-test": {"generations", "ranking"}}.get(
        name, set()
    )


def test_extras_are_the_other_columns(shared: Path) -> None:
    first = prompt_set("imagereward-test", folder=shared / "data", limit=1).prompts[0]
    assert first.extras["ranking"] == [1, 2, 5, 3]
    assert len(first.extras["generations"]) == 4


def test_a_fetched_set_is_asked_for_by_its_pin(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    path = write("prompts.json", '[{"id": "a", "prompt": "a cat"}]')
    monkeypatch.setattr(
        "overpaint.evaluation.prompts.sets.fetch", lambda file, folder: asked.append((file, folder)) or path
    )
    assert prompt_set("imagereward-100").texts == ("a cat",)
    assert asked == [(FETCHED["imagereward-100"], None)]


def test_every_address_names_a_version() -> None:
    assert all(len([part for part in file.url.split("/") if len(part) == 40]) == 1 for file in FETCHED.values())


def test_drawbench_columns_are_read(write: Write) -> None:
    found = prompt_set(write("DrawBench.csv", 'Prompts,Category\n"a red car, parked",Colors\nb,Text\n'))
    assert found.name == "DrawBench"
    assert found.prompts == (
        Prompt("00001", "a red car, parked", None, {"Category": "Colors"}),
        Prompt("00002", "b", None, {"Category": "Text"}),
    )


def test_quotation_marks_of_partiprompts_are_part_of_the_text(write: Write) -> None:
    content = (
        'Prompt\tCategory\tChallenge\tNote\n"A B" on a wall\tArts\tBasic\t\na "c\tArts\tBasic\tDescription of "c"\n'
    )
    found = prompt_set(write("PartiPrompts.tsv", content))
    assert found.texts == ('"A B" on a wall', 'a "c')
    assert found.prompts[1].extras == {"Category": "Arts", "Challenge": "Basic", "Note": 'Description of "c"'}


def test_i2p_columns_are_read_with_seed_and_case_number(write: Write) -> None:
    header = ",prompt,categories,nudity_percentage,evaluation_seed,evaluation_guidance,case_number\n"
    found = prompt_set(write("i2p.csv", header + '0,"a b, c ","hate, violence",10.0,4261553411,13,7\n'))
    (prompt,) = found.prompts
    assert (prompt.id, prompt.text, prompt.seed) == ("7", "a b, c ", 4261553411)
    assert prompt.guidance == 13
    assert prompt.extras == {"": "0", "categories": "hate, violence", "nudity_percentage": "10.0"}


def test_rows_without_a_prompt_are_left_out_and_told(write: Write) -> None:
    header = ",prompt,evaluation_seed,evaluation_guidance,case_number\n"
    path = write("i2p.csv", header + "0,a beach ,4261553411,7,10\n1,,4261564198,7,11\n2,a crowd,12345,7.5,12\n")
    with pytest.warns(UserWarning, match=r"i2p\.csv: row 2 holds no prompt and will be left out"):
        found = prompt_set(path).prompts
    assert found == (
        Prompt("10", "a beach ", 4261553411, {"": "0"}, 7.0),
        Prompt("12", "a crowd", 12345, {"": "2"}, 7.5),
    )
    # Ids that are numbers of rows do not shift.
    with pytest.warns(UserWarning, match=r"t\.txt: 2 rows \(2, 4\) hold no prompt"):
        assert [prompt.id for prompt in prompt_set(write("t.txt", "a\n\nb\n \n")).prompts] == ["00001", "00003"]
    with pytest.warns(UserWarning, match=r"t\.jsonl: row 2 holds no prompt"):
        assert prompt_set(write("t.jsonl", '{"prompt": "a"}\n{"x": 1}\n')).texts == ("a",)
    with pytest.raises(ValueError, match="must hold at least one prompt, got 2 rows without text"):
        prompt_set(write("t.txt", "\n\n"))


def test_captions_of_coco_are_read_as_published(write: Write) -> None:
    annotations = [
        {"image_id": 42, "id": 641, "caption": "A dog on a rug."},
        {"image_id": 42, "id": 650, "caption": "A brown dog rests. "},
        {"image_id": 43, "id": 651, "caption": "A dog on a rug."},
    ]
    content = {"info": {}, "licenses": [], "images": [{"id": 42}], "annotations": annotations}
    assert prompt_set(write("captions_val2014.json", json.dumps(content))).prompts == (
        Prompt("641", "A dog on a rug.", None, {"image_id": 42}),
        Prompt("650", "A brown dog rests. ", None, {"image_id": 42}),
        Prompt("651", "A dog on a rug.", None, {"image_id": 43}),
    )
    boxes = {"annotations": [{"id": 1, "image_id": 2, "bbox": []}]}
    with pytest.raises(ValueError, match=r"must have a column prompt .*, got 'id', 'image_id', 'bbox'"):
        prompt_set(write("instances.json", json.dumps(boxes)))


def test_an_image_names_its_prompt_only_if_it_has_one(write: Write) -> None:
    one = prompt_set(write("a.csv", "image_id,caption\n42,a dog\n43,a cat\n")).prompts
    several = prompt_set(write("b.csv", "image_id,caption\n42,a dog\n42,a cat\n")).prompts
    assert [prompt.id for prompt in one] == ["42", "43"]
    assert [(prompt.id, prompt.extras) for prompt in several] == [
        ("00001", {"image_id": "42"}),
        ("00002", {"image_id": "42"}),
    ]


def test_any_column_is_taken_by_its_name(write: Write) -> None:
    path = write("t.csv", "Beschreibung,prompt,Nummer,Saat,Stärke\na cat,x,n1,7.0,9\na dog,y,n2,,\n")
    found = prompt_set(
        path, text_column="Beschreibung", id_column="Nummer", seed_column="Saat", guidance_column="Stärke"
    )
    assert found.prompts == (
        Prompt("n1", "a cat", 7, {"prompt": "x"}, 9.0),
        Prompt("n2", "a dog", None, {"prompt": "y"}, None),
    )


@pytest.mark.parametrize("option", ["text_column", "id_column", "seed_column", "guidance_column"])
def test_a_column_that_is_not_there_is_refused_with_those_that_are(option: str, write: Write) -> None:
    path = write("t.csv", "Prompt,numbers\na,1\n")
    message = rf"{option} must be a column of .*, which has 'Prompt', 'numbers', got 'number'; did you mean 'numbers'"
    wrong: dict[str, Any] = {option: "number"}
    with pytest.raises(ValueError, match=message):
        prompt_set(path, **wrong)


def test_all_kinds_of_files_give_the_same_prompts(write: Write, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "ein Kätzchen", "seed": 3}, {"id": "b-1", "prompt": "zwei\u2028Zeilen", "seed": None}]
    write_table(rows, {}, tmp_path / "t.parquet")
    files = [
        write("t.csv", "id,prompt,seed\na,ein Kätzchen,3\nb-1,zwei\u2028Zeilen,\n"),
        write("t.tsv", "id\tprompt\tseed\r\na\tein Kätzchen\t3\r\nb-1\tzwei\u2028Zeilen\t\r\n"),
        write("t.json", json.dumps(rows)),
        write("t.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
        tmp_path / "t.parquet",
    ]
    expected = (Prompt("a", "ein Kätzchen", 3, {}), Prompt("b-1", "zwei\u2028Zeilen", None, {}))
    assert [prompt_set(path).prompts for path in files] == [expected] * 5
    texts = tuple(prompt.text for prompt in expected)
    assert prompt_set(write("t.txt", "\ufeffein Kätzchen\r\nzwei\u2028Zeilen\n")).texts == texts
    assert prompt_set(str(write("list.json", '["ein Kätzchen"]'))).texts == ("ein Kätzchen",)


def test_numbers_serve_as_ids_and_the_first_known_column_is_taken(write: Write) -> None:
    (prompt,) = prompt_set(write("t.jsonl", '{"case_number": 12, "caption": "x", "Prompt": "a cat"}\n')).prompts
    assert prompt == Prompt("12", "a cat", None, {"caption": "x"})


@pytest.mark.parametrize("name", TINY_KINDS)
def test_tiny_sets_are_captions_of_their_kind(name: str) -> None:
    found = prompt_set(name, limit=5, seed=3)
    assert found.texts == tuple(tinyworld.captions(TINY_KINDS[name], 5, 3))
    assert found.prompts[4].id == f"{name}-0004"
    assert len(prompt_set(name).prompts) == 200


# Which part


def test_limit_takes_evenly_spaced_prompts(write: Write) -> None:
    path = write("t.txt", "".join(f"prompt {k}\n" for k in range(10)))
    assert [prompt.id for prompt in prompt_set(path, limit=4).prompts] == ["00001", "00003", "00006", "00008"]
    assert prompt_set(path, limit=10) == prompt_set(path, limit=99) == prompt_set(path) == prompt_set(path, seed=5)


def test_a_seed_chooses_at_random_in_order_and_nested(write: Write) -> None:
    path = write("t.txt", "".join(f"prompt {k}\n" for k in range(300)))
    chosen = [[prompt.id for prompt in prompt_set(path, limit=count, seed=1).prompts] for count in (20, 60)]
    assert [len(ids) for ids in chosen] == [20, 60]
    assert all(ids == sorted(ids) for ids in chosen)
    assert set(chosen[0]) < set(chosen[1])
    others = [{prompt.id for prompt in prompt_set(path, limit=100, seed=seed).prompts} for seed in range(30)]
    # Each of 300 prompts is in a third of the choices: 10 of 30 on average, with a deviation of 2.6.
    often = Counter(one for ids in others for one in ids)
    assert len({frozenset(ids) for ids in others}) == 30
    assert len(often) == 300
    assert max(often.values()) <= 21


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_an_error(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit must be at least 1, got {limit}"):
        prompt_set("tiny-benign", limit=limit)


# What is refused


@pytest.mark.parametrize("name", BY_HAND)
def test_a_set_without_a_hash_says_where_to_get_it_and_how_to_give_it(name: str) -> None:
    about = BY_HAND[name]
    with pytest.raises(ValueError, match=f"{name} must be given as a file") as caught:
        prompt_set(name)
    assert all(word in str(caught.value) for word in (about.url, about.file, *about.columns, f"in place of {name!r}"))


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"prompts must be one of coco-30k, .*tiny-held-out, or a file, got 'koko'"):
        prompt_set("koko")
    assert len(set(NAMES)) == len(NAMES) == 12


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file of prompts at .*no\.csv"):
        prompt_set(tmp_path / "no.csv")
    with pytest.raises(FileNotFoundError, match=r"folder must hold coco_30k\.csv"):
        prompt_set("coco-30k", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", '[{"prompt": "a"}, {"prompt": 3}]', r"must hold text in column 'prompt', got 3 in row 2"),
        ("t.csv", "promt,n\na,1\n", r"got 'promt', 'n'; did you mean 'prompt'.*; any other is given as text_column"),
        ("t.csv", "prompt,guidance\na,high\n", r"column 'guidance' numbers from 0 on, got 'high' in row 1"),
        ("t.csv", "prompt,guidance\na,-1\n", r"column 'guidance' numbers from 0 on, got '-1' in row 1"),
        ("t.csv", "prompt,guidance\na,nan\n", r"column 'guidance' numbers from 0 on, got 'nan' in row 1"),
        ("t.csv", "name,n\na,1\n", r"must have a column prompt or prompts or text or caption, got 'name', 'n'"),
        (
            "t.csv",
            "id,prompt\nx,a\ny,b\nx,c\n",
            r"must name every prompt once in column 'id', got 'x' in rows 1 and 3; another",
        ),
        ("t.csv", "id,prompt\na/b,a\n", r"column 'id' letters, .*got 'a/b' in row 1"),
        ("t.json", '[{"id": true, "prompt": "a"}]', r"column 'id' letters, .*got True in row 1"),
        ("t.csv", "prompt,seed\na,1\nb,2.5\n", r"column 'seed' whole numbers .*, got '2\.5' in row 2"),
        ("t.csv", "prompt,seed\na,-1\n", r"column 'seed' whole numbers .*, got '-1' in row 1"),
        ("t.json", '[{"prompt": "a", "seed": 18446744073709551616}]', r"got 18446744073709551616 in row 1"),
        ("t.json", '[{"prompt": "a", "seed": true}]', r"got True in row 1"),
        ("t.txt", b"a\nb\xff\n", r"must be UTF-8, got b'\\xff' in line 2"),
        ("t.csv", b"prompt\na\n\xe4\n", r"must be UTF-8, got b'\\xe4' in line 3"),
        ("t.json", b'["\xe4"]', r"must be UTF-8, got b'\\xe4' in line 1"),
        ("t.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe4"}\n', r"must be UTF-8, got b'\\xe4' in line 2"),
        ("t.tsv", "prompt\tn\na\t1\nb\n", r"must have 2 cells in every row, got \['b'\] in row 2"),
        ("t.tsv", "prompt\na\n\nb\n", r"must have 1 cells in every row, got \[\] in row 2"),
        ("t.tsv", "a\ta\n", r"must name every column once, got \['a', 'a'\]"),
        ("t.csv", "prompt,n\na\n", r"must have 2 cells in every row, got \['a'\] in row 1"),
        ("t.json", "[", r"must be JSON, got "),
        (
            "t.json",
            '{"prompt": "a"}',
            r"must hold a list, or MS-COCO's object with 'annotations', got an object with 'prompt'",
        ),
        ("t.json", "[3]", r"must hold objects or texts, got 3 in row 1"),
        ("t.jsonl", "[3]\n", r"must hold an object in every line, got \[3\] in line 1"),
        ("t.txt", "", r"must hold at least one prompt, got none"),
        ("t.tsv", "", r"must hold at least one prompt, got none"),
        ("t.json", "[]", r"must hold at least one prompt, got none"),
        ("t.csv", "prompt\n", r"must hold at least one prompt, got none"),
        ("t.parquet", b"no table", r"must be a Parquet file"),
        ("t.doc", "a", r"must be named \*\.txt or .*, got .*t\.doc"),
    ],
)
def test_a_bad_file_is_an_error_that_says_where(name: str, content: str | bytes, message: str, write: Write) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_set(write(name, content))


def test_a_set_without_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompts must hold at least one, got none in mine"):
        PromptSet(name="mine", prompts=(), source="me")
