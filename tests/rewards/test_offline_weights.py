"""Official checkpoints and BERT's vocabulary as people have them on a machine without a network."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from golden_case import Record
from safetensors.torch import load_file

from rewards import BlipTokenizer, ImageReward, ImageRewardConfig


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.fixture
def downloaded(golden_weights: Path, tmp_path: Path) -> Path:
    """A folder with ImageReward.pt, as `hf download` leaves it: the tensors of the small network, by `torch.save`."""
    folder = tmp_path / "downloaded"
    (folder / ".cache").mkdir(parents=True)
    torch.save(load_file(golden_weights), folder / "ImageReward.pt")
    return folder


def write_vocabulary(words: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".txt":
        path.write_text("\n".join(words) + "\n", encoding="utf-8")
    else:
        tokenizer = {"version": "1.0", "model": {"type": "WordPiece", "vocab": {w: k for k, w in enumerate(words)}}}
        path.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("where", ["beside", "file", "folder"])
def test_a_downloaded_folder_and_a_vocabulary_are_all_that_is_needed(
    file: str,
    where: str,
    downloaded: Path,
    tmp_path: Path,
    golden_config: ImageRewardConfig,
    golden_case: Record,
    golden_reward: ImageReward,
) -> None:
    bert = downloaded if where == "beside" else tmp_path / "bert"
    write_vocabulary(golden_case["vocab"], bert / file)
    vocab = {"beside": None, "file": bert / file, "folder": bert}[where]
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    expected = golden_reward(images, golden_case["prompts"][:2])
    for name in (downloaded, str(downloaded), downloaded / "ImageReward.pt"):
        loaded = ImageReward.load(name, vocab=vocab, config=golden_config)
        assert torch.equal(loaded(images, golden_case["prompts"][:2]), expected)
        assert not loaded.training


@pytest.mark.usefixtures("no_hub")
def test_berts_own_files_beside_the_checkpoint_are_not_taken_for_it(
    downloaded: Path, golden_config: ImageRewardConfig, golden_case: Record
) -> None:
    write_vocabulary(golden_case["vocab"], downloaded / "vocab.txt")
    (downloaded / "config.json").write_text('{"model_type": "bert"}')
    (downloaded / "model.safetensors").write_bytes(b"of a BERT")
    assert ImageReward.load(downloaded, config=golden_config).config == golden_config


@pytest.mark.usefixtures("no_hub")
def test_a_path_that_begins_at_home_is_found(
    downloaded: Path, golden_config: ImageRewardConfig, golden_case: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vocabulary(golden_case["vocab"], downloaded / "vocab.txt")
    monkeypatch.setenv("HOME", str(downloaded.parent))
    assert (
        ImageReward.load("~/downloaded", vocab="~/downloaded/vocab.txt", config=golden_config).config == golden_config
    )


def test_without_a_vocabulary_the_message_says_where_to_put_it(
    downloaded: Path, golden_config: ImageRewardConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(OSError, match=r"could not get vocab\.txt .* --vocab; or put vocab\.txt beside"):
        ImageReward.load(downloaded, config=golden_config)


def test_another_vocabulary_is_refused(
    downloaded: Path, golden_config: ImageRewardConfig, golden_case: Record, tmp_path: Path
) -> None:
    cased = tmp_path / "cased" / "vocab.txt"
    write_vocabulary(golden_case["vocab"][:-3], cased)
    words = golden_config.vocab_size - 2
    with pytest.raises(ValueError, match=f"vocab must hold the {words} word pieces .* got {words - 3}; bert-base-unc"):
        ImageReward.load(downloaded, vocab=cased, config=golden_config)


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {"vocab": [["a", 0.5]]}}'])
def test_a_json_file_that_is_no_tokenizer_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json must be the tokenizer\.json of a BERT, got"):
        BlipTokenizer.from_file(tmp_path)


def test_a_vocabulary_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "vocab.txt"):
        with pytest.raises(FileNotFoundError, match=r"BERT's vocabulary must be vocab\.txt or tokenizer"):
            BlipTokenizer.from_file(path)


def test_a_folder_with_neither_names_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold ImageReward\.pt, or what save_pretrained wrote, got"):
        ImageReward.load(tmp_path)
