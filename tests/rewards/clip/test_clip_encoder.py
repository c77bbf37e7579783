"""CLIP's two towers: the numbers of transformers, whatever the form of the checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from rewards.blip_network import Tokens
from rewards.clip_encoder import ClipEncoder, ClipTokenizer
from rewards.preprocess import normalise, resize_and_crop

LEGACY_END = 2
"""What the configs of OpenAI's checkpoints say that the end token is."""


class ZeroPadding(ClipTokenizer):
    """Pads as open_clip does, with 0 and not with the end token, and says that all of it counts."""

    def __call__(self, prompts: Sequence[str], max_length: int) -> Tokens:
        ids, mask = super().__call__(prompts, max_length)
        return Tokens(ids * mask, torch.ones_like(mask))


def saved_bin(encoder: ClipEncoder, folder: Path, **extra: Any) -> Path:
    """Writes a checkpoint in the older form."""
    encoder.save_pretrained(folder)
    torch.save(load_file(folder / "model.safetensors") | extra, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_embeddings_are_unit_vectors(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    for vectors in (encoder.image_embeddings(pictures), encoder.text_embeddings(prompts)):
        assert vectors.shape == (5, encoder.dim)
        assert vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("legacy", [True, False])
def test_cosines_are_those_of_transformers(
    config: dict[str, Any], encoder: ClipEncoder, pictures: Tensor, prompts: list[str], legacy: bool
) -> None:
    from transformers import CLIPConfig, CLIPModel

    if legacy:
        config["text_config"]["eos_token_id"] = LEGACY_END
    theirs = CLIPModel(CLIPConfig.from_dict(config)).eval()
    theirs.load_state_dict(encoder.model.state_dict())
    tokens = encoder.tokenizer(prompts, 12)
    pixels = normalise(resize_and_crop(pictures, 32))
    output = theirs(input_ids=tokens.ids, attention_mask=tokens.mask, pixel_values=pixels)

    ours = ClipEncoder(config, encoder.tokenizer)
    ours.model.load_state_dict(encoder.model.state_dict())
    expected = output.logits_per_image.diagonal()
    torch.testing.assert_close(ours.logit_scale * ours.cosines(pictures, prompts), expected, rtol=0, atol=1e-5)


def test_padding_does_not_matter(encoder: ClipEncoder, prompts: list[str]) -> None:
    expected = encoder.text_embeddings(prompts)
    encoder.tokenizer = ZeroPadding(encoder.tokenizer.vocabulary, encoder.tokenizer.merges)
    torch.testing.assert_close(encoder.text_embeddings(prompts), expected, rtol=0, atol=1e-6)


def test_prompt_is_over_at_its_first_end_token(encoder: ClipEncoder) -> None:
    vectors = encoder.text_embeddings(["a cat", "a cat<|endoftext|> on the table", "a cat on the table"])
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=1e-6)
    assert (vectors[2] - vectors[0]).abs().max() > 1e-2


def test_every_word_and_its_place_matter_up_to_the_cut(encoder: ClipEncoder) -> None:
    first = "the red cat on a table the dog on a"  # 10 words, and a token at each end
    vectors = encoder.text_embeddings([first, f"{first} blue", first.replace("red", "blue"), f"red {first[:-2]}"])
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=1e-6)
    assert (vectors[2] - vectors[0]).abs().max() > 1e-2
    assert (vectors[3] - vectors[0]).abs().max() > 1e-2


def test_logit_scale_is_the_exponential_of_the_learned_number(encoder: ClipEncoder) -> None:
    encoder.model.logit_scale.data.fill_(4.6052)
    assert encoder.logit_scale.item() == pytest.approx(100.0, abs=0.01)


def test_loaded_weights_are_frozen_and_gradients_still_reach_the_images(
    encoder: ClipEncoder, pictures: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    loaded = ClipEncoder.from_folder(tmp_path)
    images = pictures.clone().requires_grad_()
    loaded.cosines(images, prompts).sum().backward()
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert images.grad is not None
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_checkpoint_of_either_form_gives_exactly_the_same(
    encoder: ClipEncoder, pictures: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    expected = encoder.cosines(pictures, prompts)
    encoder.save_pretrained(tmp_path / "new")
    assert torch.equal(ClipEncoder.from_folder(tmp_path / "new").cosines(pictures, prompts), expected)
    # Checkpoints written before transformers 4.31 carry the positions along.
    positions = {f"{tower}_model.embeddings.position_ids": torch.arange(5)[None] for tower in ("text", "vision")}
    old = saved_bin(encoder, tmp_path / "old", **positions)
    assert torch.equal(ClipEncoder.from_folder(old).cosines(pictures, prompts), expected)


def test_transformers_reads_what_is_saved(encoder: ClipEncoder, prompts: list[str], tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    encoder.save_pretrained(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path).eval()
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(prompts, padding=True, truncation=True, max_length=12)
    features = model.get_text_features(**{name: torch.tensor(value) for name, value in tokens.items()}).pooler_output
    torch.testing.assert_close(functional.normalize(features), encoder.text_embeddings(prompts), rtol=0, atol=1e-6)


def test_another_tokenizer_takes_the_place_of_the_folders(encoder: ClipEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink()
    assert ClipEncoder.from_folder(tmp_path, encoder.tokenizer).tokenizer is encoder.tokenizer


def test_loading_draws_no_random_numbers(encoder: ClipEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    ClipEncoder.from_folder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_network_saved_in_half_precision_loads_in_float32(encoder: ClipEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = ClipEncoder.from_folder(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], t.half().float()) for name, t in encoder.model.state_dict().items())


def test_config_that_asks_for_half_precision_gets_float32(
    config: dict[str, Any], encoder: ClipEncoder, tmp_path: Path
) -> None:
    encoder.save_pretrained(tmp_path)
    config["text_config"]["torch_dtype"] = config["vision_config"]["dtype"] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = ClipEncoder.from_folder(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.model.state_dict().items())


def test_bfloat16_network_answers_in_float32(encoder: ClipEncoder, pictures: Tensor, prompts: list[str]) -> None:
    full = encoder.cosines(pictures, prompts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encoder.cosines(pictures, prompts)
    half = encoder.to(torch.bfloat16).cosines(pictures.bfloat16(), prompts)
    for cosines in (mixed, half):
        assert cosines.dtype == torch.float32
        # A rounding to bfloat16 is 0.004 of a number; the cosines, of at most 0.06 here, were off by one of them.
        torch.testing.assert_close(cosines, full, rtol=0, atol=0.015)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("logit_scale"), "logit_scale is missing"),
        (lambda state: state.update(more=torch.zeros(1)), "more is unknown"),
        (
            lambda state: state.update({"text_projection.weight": torch.zeros(24, 23)}),
            r"text_projection\.weight has shape \[24, 23\] and not \[24, 24\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(encoder: ClipEncoder, tmp_path: Path, change: Any, message: str) -> None:
    encoder.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"weights must fit the config.*{message}"):
        ClipEncoder.from_folder(tmp_path)


def test_missing_files_are_named(encoder: ClipEncoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json, model\.safetensors"):
        ClipEncoder.from_folder(tmp_path)
    encoder.save_pretrained(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt"):
        ClipEncoder.from_folder(tmp_path)


def test_nothing_but_tensors_is_unpickled(encoder: ClipEncoder, tmp_path: Path) -> None:
    saved_bin(encoder, tmp_path, more=Path("an object that is no tensor"))
    with pytest.raises(ValueError, match=r"must hold tensors, numbers and texts only.* it needs pathlib"):
        ClipEncoder.from_folder(tmp_path)


def test_config_of_another_network_is_refused(encoder: ClipEncoder, config: dict[str, Any], tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type must be 'clip', got 'siglip'"):
        ClipEncoder.from_folder(tmp_path)
    config["text_config"]["vocab_size"] = 520
    with pytest.raises(ValueError, match=r"vocab_size must cover the tokenizer's \d+ ids, got 520"):
        ClipEncoder(config, encoder.tokenizer)


def test_config_is_left_as_it_was(encoder: ClipEncoder, config: dict[str, Any]) -> None:
    before = json.dumps(config)
    ClipEncoder(config, encoder.tokenizer)
    assert json.dumps(config) == before
