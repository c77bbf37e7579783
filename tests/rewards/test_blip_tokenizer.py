"""BLIP's tokenizer."""

from pathlib import Path

import pytest

from rewards import BlipTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s"]


def test_prompts_become_word_pieces_padded_to_the_length() -> None:
    tokens = BlipTokenizer(WORDS)(["A cats", "dog"], 6)
    assert tokens.ids.tolist() == [[2, 5, 6, 7, 3, 0], [2, 1, 3, 0, 0, 0]]
    assert tokens.mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]


def test_long_prompts_are_cut_and_keep_the_last_separator() -> None:
    assert BlipTokenizer(WORDS)(["cat cat cat cat"], 4).ids.tolist() == [[2, 6, 6, 3]]


def test_saved_vocabulary_gives_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = BlipTokenizer([*WORDS, "[DEC]", "[ENC]"])
    tokenizer.save(tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") == "\n".join(WORDS) + "\n"
    loaded = BlipTokenizer.from_file(tmp_path / "vocab.txt")
    assert len(loaded) == len(tokenizer) == 10
    assert loaded(["[ENC] cats"], 8).ids.tolist() == tokenizer(["[ENC] cats"], 8).ids.tolist()


def test_unusable_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got one without \[CLS\], \[MASK\]"):
        BlipTokenizer(["[PAD]", "[UNK]", "[SEP]"])
    with pytest.raises(ValueError, match=r"must begin with \[PAD\], got 'cat'"):
        BlipTokenizer(["cat", *WORDS[:6]])
    with pytest.raises(ValueError, match="must not repeat a word, got 1 repeated"):
        BlipTokenizer([*WORDS, "cat"])
