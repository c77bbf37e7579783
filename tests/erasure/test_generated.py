"""Latents drawn before training: from the seed alone, and kept so that an interrupted drawing goes on."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from erasure import generated
from erasure.generated import generated_latents
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy

PROMPTS = ["a red circle", "a blue square", "a cat", "a dog", "a photo of a person"]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


@pytest.fixture(autouse=True)
def two_to_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "SHARD", 2)


FIVE_PROMPTS = Conditioning(("",) * 5, torch.zeros(5, 24, 16))


def drawn(policy: DiffusionPolicy, folder: Path | None = None, **changes: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"steps": 2, "guidance": ClassifierFree(3.0), "progress": False} | changes
    prompts, seeds = settings.pop("prompts", PROMPTS), settings.pop("seeds", SEEDS)
    return generated_latents(policy, prompts, seeds, folder=folder, **settings)


def count_samples(policy: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    sample = policy.sample

    def counted(conditioning: Conditioning, **options: Any) -> torch.Tensor:
        sizes.append(len(conditioning))
        return sample(conditioning, **options)

    monkeypatch.setattr(policy, "sample", counted)
    return sizes


def test_they_are_what_the_policy_samples(bare: DiffusionPolicy) -> None:
    latents = drawn(bare)
    expected = bare.sample(bare.encode(PROMPTS), steps=2, guidance=ClassifierFree(3.0), seeds=SEEDS)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)  # latents are of order 1
    assert latents.dtype == torch.float32
    assert latents.device.type == "cpu"


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_does_not_matter(bare: DiffusionPolicy, batch_size: int) -> None:
    torch.testing.assert_close(drawn(bare, batch_size=batch_size), drawn(bare), rtol=0, atol=1e-5)


def test_a_folder_gives_back_the_same_without_drawing(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(bare, tmp_path / "new")
    sizes = count_samples(bare, monkeypatch)
    assert torch.equal(drawn(bare, tmp_path / "new"), first)
    assert sizes == []
    assert len(list((tmp_path / "new").iterdir())) == 4  # three shards and the record, nothing left over


def test_an_interrupted_drawing_goes_on_to_the_same_latents(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(bare)
    sample, calls = bare.sample, 0

    def failing(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr(bare, "sample", failing)
    with pytest.raises(KeyboardInterrupt):
        drawn(bare, tmp_path)
    assert torch.equal(drawn(bare, tmp_path), whole)
    assert calls == 4  # one shard, the one that failed, and the last two


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-8],
        lambda content: b"",
        lambda content: None,
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: save({"latents": load(content)["latents"] + 1}),
    ],
    ids=["cut off", "empty", "missing", "a flipped bit", "without a seal"],
)
def test_a_damaged_file_is_drawn_again(
    bare: DiffusionPolicy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes | None],
) -> None:
    whole = drawn(bare, tmp_path)
    shard = tmp_path / "latents-000002.safetensors"
    content = damage(shard.read_bytes())
    shard.unlink() if content is None else shard.write_bytes(content)
    sizes = count_samples(bare, monkeypatch)
    assert torch.equal(drawn(bare, tmp_path), whole)
    assert sizes == [2]


def test_processes_begin_at_different_files_and_all_get_everything(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drawn(bare)
    for rank in (2, 0, 1):
        state = SimpleNamespace(process_index=rank, num_processes=3, is_main_process=rank == 0)
        monkeypatch.setattr(generated, "process_state", lambda state=state: state)
        seen: list[int] = []
        monkeypatch.setattr(generated, "_read", lambda path, count, seen=seen: seen.append(int(path.stem[-6:])))
        assert torch.equal(drawn(bare, tmp_path), whole)
        assert seen == [(2 * rank + place) % 6 for place in (0, 2, 4)]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"steps": 3}, "steps"),
        ({"guidance": ClassifierFree(2.0)}, "guidance_scale"),
        ({"seeds": [3, 1, 4, 1, 6]}, "seeds"),
        ({"prompts": [*PROMPTS[:4], "a dog"]}, "prompts"),
    ],
)
def test_a_folder_of_another_request_is_refused(
    bare: DiffusionPolicy, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    drawn(bare, tmp_path)
    with pytest.raises(ValueError, match=f"folder must be new or hold the same latents, .* has another {field}$"):
        drawn(bare, tmp_path, **changes)


def test_a_folder_of_another_model_or_negative_prompt_is_refused(bare: DiffusionPolicy, tmp_path: Path) -> None:
    drawn(bare, tmp_path)
    with pytest.raises(ValueError, match=r"has another negative$"):
        drawn(bare, tmp_path, guidance=ClassifierFree(3.0, bare.encode(["striped"])))
    for bias, changed in (
        (bare.unet.conv_in.bias, "unet"),
        (bare.text_encoder.final_layer_norm.bias, "text_encoder and another unet"),
    ):
        with torch.no_grad():
            bias[0] += 1e-3
        with pytest.raises(ValueError, match=rf"has another {changed}$"):
            drawn(bare, tmp_path)


def test_a_folder_of_another_schedule_or_of_texts_of_another_length_is_refused(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.scheduler.register_to_config(lambda_min_clipped=-math.inf)
    whole = drawn(bare, tmp_path)
    assert "Infinity" not in (tmp_path / generated.RECORD_FILE).read_text(encoding="utf-8")
    assert torch.equal(drawn(bare, tmp_path), whole)
    monkeypatch.setattr(bare.family, "max_sequence_length", 77)
    with pytest.raises(ValueError, match=r"has another max_sequence_length$"):
        drawn(bare, tmp_path)
    monkeypatch.undo()
    bare.scheduler.register_to_config(beta_end=0.013)
    with pytest.raises(ValueError, match=r"has another scheduler$"):
        drawn(bare, tmp_path)


def test_a_lora_that_is_off_does_not_make_another_model(policy: DiffusionPolicy, tmp_path: Path) -> None:
    with policy.reference():
        before = drawn(policy, tmp_path)
    with torch.no_grad():
        for weight in policy.trainable_parameters():
            weight.add_(0.1)
    with policy.reference():
        assert torch.equal(drawn(policy, tmp_path), before)
    with pytest.raises(ValueError, match=r"has another unet$"):
        drawn(policy, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "seeds must be one for each of 5 prompts, got 1"),
        ({"prompts": []}, "prompts must not be empty"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"guidance": ClassifierFree(3.0, Conditioning(("",) * 5, torch.zeros(5, 24, 16)))},
            "one negative prompt for all, got 5",
        ),
    ],
)
def test_wrong_arguments_are_refused(bare: DiffusionPolicy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(bare, **changes)


def test_latents_that_are_not_finite_are_refused(bare: DiffusionPolicy, tmp_path: Path) -> None:
    with torch.no_grad():
        bare.unet.conv_out.bias[0] = torch.nan
    with pytest.raises(ValueError, match="policy must draw finite latents"):
        drawn(bare, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
