"""CLIP's tokenizer: the ids of transformers, from either form of its files."""

import json
from pathlib import Path

import pytest

from rewards.clip_encoder import ClipTokenizer

PROMPTS = ["a red cat", "", "A RED  Cat!", "Ünïcode 漢字", "<|endoftext|> cat", "don't 123", "the dog " * 9]


def test_ids_and_mask_are_those_of_transformers(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)(PROMPTS, padding="max_length", truncation=True, max_length=12)
    ours = tokenizer(PROMPTS, 12)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert ours.mask.tolist() == theirs["attention_mask"]


def test_long_prompt_keeps_its_end(tokenizer: ClipTokenizer) -> None:
    tokens = tokenizer(["the dog " * 9], 12)
    assert tokens.ids.shape == (1, 12)
    assert tokens.ids[0, -1] == tokenizer.end_id
    assert (tokens.ids[0, :-1] != tokenizer.end_id).all()


def test_folder_with_tokenizer_json_alone_gives_the_same_ids(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    model = {"vocab": tokenizer.vocabulary, "merges": tokenizer.merges}
    older = {"vocab": tokenizer.vocabulary, "merges": [f"{left} {right}" for left, right in tokenizer.merges]}
    for written in (model, older):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": written}), encoding="utf-8")
        read = ClipTokenizer.from_folder(tmp_path)
        assert read.vocabulary == tokenizer.vocabulary
        assert read.merges == tokenizer.merges


def test_saved_tokenizer_is_read_back(tokenizer: ClipTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "folder")
    read = ClipTokenizer.from_folder(tmp_path / "folder")
    assert read.vocabulary == tokenizer.vocabulary
    assert read.merges == tokenizer.merges


def test_folder_without_a_tokenizer_is_refused_and_says_what_to_fetch(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"must hold vocab\.json and merges\.txt, or tokenizer\.json.*hf download"
    ):
        ClipTokenizer.from_folder(tmp_path)


def test_broken_vocabularies_are_refused(tokenizer: ClipTokenizer) -> None:
    with pytest.raises(ValueError, match=r"must number its \d+ pieces 0, 1, 2"):
        ClipTokenizer(tokenizer.vocabulary | {"more": 5}, tokenizer.merges)
    with pytest.raises(ValueError, match=r"got one without <\|endoftext\|>, <\|startoftext\|>"):
        ClipTokenizer({"a": 0, "b": 1}, [])
    with pytest.raises(ValueError, match=r"got one without zebra, zebraa"):
        ClipTokenizer(tokenizer.vocabulary, [("zebra", "a")])
