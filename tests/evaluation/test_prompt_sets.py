"""Sets of prompts: what is read, which part of it, and how bad rows are refused."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

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
    assert prompt.extras == {
        "": "0",
        "categories": "hate, violence",
        "nudity_percentage": "10.0",
        "evaluation_guidance": "13",
    }


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
        ("t.txt", "a\n\nb\n", r"t\.txt must hold a prompt in every row, got '' in row 2"),
        ("t.csv", "prompt,n\na,1\n  ,2\n", r"t\.csv must hold a prompt in every row, got '  ' in row 2"),
        ("t.json", '[{"prompt": "a"}, {"prompt": 3}]', r"must hold a prompt in every row, got 3 in row 2"),
        ("t.json", '[{"prompt": "a"}, {"text": "b"}]', r"must hold a prompt in every row, got None in row 2"),
        ("t.jsonl", '{"prompt": "a"}\n{"x": 1}\n', r"must hold a prompt in every row, got None in row 2"),
        ("t.csv", "name,n\na,1\n", r"must have a column prompt or prompts or text or caption, got 'name', 'n'"),
        ("t.csv", "id,prompt\nx,a\ny,b\nx,c\n", r"must name every prompt once, got 'x' in rows 1 and 3"),
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
        ("t.json", '{"prompt": "a"}', r"must hold a list, got dict"),
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
