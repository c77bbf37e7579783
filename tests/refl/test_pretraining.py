"""The pairs of the pretraining term, and its loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import Latents
from overpaint.training import TrainingConfig, TrainingRun, read_metrics
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer, pairs_from_folder, pairs_from_policy
from refl.pretraining import denoising_loss, pretraining_term, reference_loss

COLOURS = {"b.png": "red", "a.jpg": "green", "below/c.webp": "blue"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of different sizes, one of them in a subfolder and with transparency."""
    path = tmp_path / "images"
    (path / "below").mkdir(parents=True)
    for k, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGBA" if name.endswith("webp") else "RGB", (70 + 40 * k, 100), colour).save(path / name)
    return path


def write_captions(folder: Path, *lines: Any) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")


# From a folder.


def test_captions_come_from_metadata_and_images_at_the_policys_size(policy: DiffusionPolicy, folder: Path) -> None:
    write_captions(folder, *({"file_name": name, "text": f"a {colour} picture"} for name, colour in COLOURS.items()))
    pairs = pairs_from_folder(policy, folder, batch_size=2)
    assert pairs.captions == ["a green picture", "a red picture", "a blue picture"]  # in the order of the paths
    assert pairs.latents.shape == (3, 4, 8, 8)
    plain = torch.zeros(2, 3, 64, 64)
    plain[0, 0] = plain[1, 2] = 1.0  # red, blue
    torch.testing.assert_close(pairs.latents[1:], policy.encode_images(plain), rtol=0, atol=2e-2)  # webp is lossy
    torch.testing.assert_close(pairs.latents[1:2], policy.encode_images(plain[:1]), rtol=0, atol=1e-5)


def test_captions_come_from_text_files_where_metadata_has_none(policy: DiffusionPolicy, folder: Path) -> None:
    write_captions(folder, {"file_name": "b.png", "text": "listed"}, "")
    for name in ("a.txt", "b.txt", "below/c.txt"):
        (folder / name).write_text(f" {name}, written \n", encoding="utf-8")
    assert pairs_from_folder(policy, folder).captions == ["a.txt, written", "listed", "below/c.txt, written"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"file_name": "b.png", "text": "red"}], "every image must have a caption .* got none for 'a.jpg'"),
        (["{"], r"metadata.jsonl, line 1, must be JSON, got"),
        ([{"file_name": "b.png", "text": "red"}, {"file_name": "a.jpg"}], "two strings, on every line, .* on line 2"),
        ([{"file_name": "b.png", "text": 3}], "two strings, on every line, .* on line 1"),
        (['["b.png", "red"]'], "must hold an object in every line, got .* in line 1"),
        ([{"file_name": "d.png", "text": "red"}], "must name images of its folder, got 'd.png', which is not there"),
    ],
)
def test_bad_captions_are_refused(policy: DiffusionPolicy, folder: Path, lines: list[Any], message: str) -> None:
    write_captions(folder, *lines)
    with pytest.raises(ValueError, match=message):
        pairs_from_folder(policy, folder)


def test_captions_may_be_a_csv_and_begin_with_a_mark_of_the_byte_order(policy: DiffusionPolicy, folder: Path) -> None:
    rows = 'file_name,text\r\nb.png,"red, or so"\r\n./a.jpg,green\u2028grass\r\nbelow/c.webp,"two\nlines"\r\n'
    (folder / "metadata.csv").write_text(rows, encoding="utf-8-sig", newline="")
    assert pairs_from_folder(policy, folder).captions == ["green\u2028grass", "red, or so", "two\nlines"]
    (folder / "metadata.csv").write_text("file_name,caption\nb.png,red\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.csv must have file_name and text, .*'caption': 'red'.* on line 2"):
        pairs_from_folder(policy, folder)
    write_captions(folder, {"file_name": "b.png", "text": "red"})
    with pytest.raises(ValueError, match=r"must hold metadata\.jsonl or metadata\.csv, got both"):
        pairs_from_folder(policy, folder)


def test_captions_may_lie_in_a_caption_file_and_hidden_files_do_not_count(
    policy: DiffusionPolicy, folder: Path
) -> None:
    for name in ("a.caption", "b.txt", "below/c.caption"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + name.encode())
    for name in ("._b.png", ".DS_Store"):
        (folder / name).write_bytes(b"\0\5")
    assert pairs_from_folder(policy, folder).captions == ["a.caption", "b.txt", "below/c.caption"]
    (folder / "b.txt").write_bytes(b"rot\xe4")
    with pytest.raises(ValueError, match=r"b\.txt must be UTF-8, got b'\\xe4' in line 1 \(byte 3\)"):
        pairs_from_folder(policy, folder)


def test_damaged_images_are_named_or_left_out_with_their_captions(policy: DiffusionPolicy, folder: Path) -> None:
    write_captions(folder, *({"file_name": name, "text": colour} for name, colour in COLOURS.items()))
    whole = pairs_from_folder(policy, folder)
    cut_off = folder / "b.png"
    Image.effect_noise((64, 64), 80).save(cut_off)
    cut_off.write_bytes(cut_off.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"b\.png cannot be read: .*truncated; .* or give skip_damaged=True"):
        pairs_from_folder(policy, folder)
    (folder / "a.jpg").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"2 of 3 images are left out: a\.jpg .*; b\.png cannot be read: .*truncated"):
        pairs = pairs_from_folder(policy, folder, batch_size=1, skip_damaged=True)
    assert pairs.captions == ["blue"]
    torch.testing.assert_close(pairs.latents, whole.latents[2:], rtol=0, atol=1e-5)
    (folder / "below/c.webp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"folder must hold at least one image that can be read, got a\.jpg"):
        pairs_from_folder(policy, folder, skip_damaged=True)


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_folder_without_images_is_refused(policy: DiffusionPolicy, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"folder must hold images .*got .*{name}' without any"):
        pairs_from_folder(policy, tmp_path / name)


# From the frozen policy.


@pytest.mark.parametrize("trained", [{}, {"train": "xattn"}], ids=["lora", "xattn"])
def test_pairs_are_those_of_the_policy_before_training(
    trained: dict[str, Any],
    policy: DiffusionPolicy,
    make_policy: Callable[..., DiffusionPolicy],
    stir: Callable[[DiffusionPolicy], None],
) -> None:
    tuned = make_policy(**trained) if trained else policy

    def draw() -> PretrainingPairs:
        return pairs_from_policy(tuned, ["a cat", "a dog"], count=3, steps=3, seed=5, batch_size=2)

    before = draw()
    stir(tuned)
    after = draw()
    assert before.captions == after.captions == ["a cat", "a dog", "a cat"]
    assert torch.equal(before.latents, after.latents)
    alone = make_policy().sample(tuned.encode(["a cat"]), steps=3, seeds=[7])
    torch.testing.assert_close(before.latents[2:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"count": 0}, {"batch_size": 0}])
def test_numbers_below_one_are_refused(policy: DiffusionPolicy, changes: dict[str, int]) -> None:
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        pairs_from_policy(policy, ["a cat"], **({"count": 1} | changes))  # ty: ignore[invalid-argument-type]


def test_trainer_draws_pairs_where_none_are_given(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    trainer = ReFLTrainer(policy, redness, prompts, small(pretraining_weight=1.0))
    with TrainingRun(policy, run_config(seed=3)) as run:
        trainer.prepare(run)
    assert trainer.pretraining is not None
    expected = pairs_from_policy(policy, prompts, count=16, steps=4, guidance=ClassifierFree(1.0), seed=2_000_003)
    assert trainer.pretraining.captions == expected.captions
    assert torch.equal(trainer.pretraining.latents, expected.latents)
    captions = ["blue", "green"]
    trainer = ReFLTrainer(policy, redness, prompts, small(pretraining_weight=1.0), pretraining=captions)
    with TrainingRun(policy, run_config("captions", seed=3)) as run:
        trainer.prepare(run)
    assert trainer.pretraining is not None
    assert trainer.pretraining.captions == captions * 8


def test_weight_of_zero_skips_the_term(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    trainer = ReFLTrainer(policy, redness, prompts, small(pretraining_weight=0.0))
    config = run_config(iterations=1)
    metrics = trainer.train(config)
    assert trainer.pretraining is None
    assert metrics is not None
    assert metrics.pretraining_loss == 0.0
    assert not any("train/pretraining_loss" in line for line in read_metrics(config.output_dir / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("latents", "captions"), [(torch.zeros(0, 4, 8, 8), []), (torch.zeros(2, 4, 8, 8), ["one"])], ids=["none", "one"]
)
def test_pairs_that_are_none_are_refused(
    policy: DiffusionPolicy, redness: Any, prompts: list[str], latents: Latents, captions: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"pretraining must hold at least one pair and a caption for each"):
        ReFLTrainer(policy, redness, prompts, pretraining=PretrainingPairs(latents, captions))


# The loss.


def losses_one_by_one(policy: DiffusionPolicy, pairs: PretrainingPairs, seeds: list[int]) -> Tensor:
    parts = []
    for k, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        timestep = torch.randint(policy.num_timesteps, (1,), generator=generator)
        noise = torch.randn(1, *pairs.latents.shape[1:], generator=generator)
        embedding = policy.encode(pairs.captions[k : k + 1])
        parts.append(policy.denoising_loss(pairs.latents[k : k + 1], embedding, timestep, noise))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["policy", "v_policy", "sample"])
def test_loss_of_a_batch_is_the_policys_own_of_each_sample(
    kind: str, request: pytest.FixtureRequest, pairs: PretrainingPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: DiffusionPolicy = request.getfixturevalue("policy" if kind == "sample" else kind)
    if kind == "sample":
        monkeypatch.setattr(policy.process, "prediction_type", "sample")
    seeds = [3, 4, 5, 6, 7, 8]
    loss = denoising_loss(policy, pairs.latents, policy.encode(pairs.captions), seeds=seeds)
    torch.testing.assert_close(loss, losses_one_by_one(policy, pairs, seeds), rtol=1e-4, atol=1e-6)


def test_loss_is_finite_and_the_velocitys_where_a_schedule_ends_without_signal(v_pipeline_dir: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(v_pipeline_dir)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    policy = DiffusionPolicy(pipeline, train="xattn", device="cpu")
    last = policy.num_timesteps - 1
    assert policy.process.levels(torch.tensor([last])) == 0
    seed = next(k for k in range(10**5) if torch.randint(last + 1, (), generator=seeded(k)) == last)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embedding = policy.encode(["a red circle"])
    loss = denoising_loss(policy, latents, embedding, seeds=[seed])
    generator = seeded(seed)
    torch.randint(last + 1, (), generator=generator)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    velocity = policy.unet(noise, torch.tensor([last]), encoder_hidden_states=embedding.tokens).sample
    torch.testing.assert_close(loss, (velocity + latents).square().mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    gradients = [parameter.grad for parameter in policy.trainable_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pretraining_loss_is_added_with_its_weight(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    pairs: PretrainingPairs,
    small: Callable[..., ReFLConfig],
    gradients: Callable[[ReFLTrainer], dict[str, Tensor]],
    assert_equal_gradients: Callable,
) -> None:
    stir(policy)
    start = policy.trainable_state()
    taken = []
    for weight in (0.5, 1.0, 2.0):
        policy.load_trainable_state(start)
        config = small(pretraining_weight=weight, pretraining_batch_size=8)
        taken.append(gradients(ReFLTrainer(policy, redness, prompts, config, pretraining=pairs)))
    half, once, twice = taken
    expected = {name: once[name] + 2 * (once[name] - half[name]) for name in once}
    assert_equal_gradients(expected, twice)
    assert max(float((once[name] - half[name]).abs().max()) for name in half) > 0


def test_pretraining_alone_brings_the_policy_back_to_the_frozen_one(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    # A denoiser that predicts nothing is better on random weights' images than a stirred one: the loss falls.
    stir(policy)
    config = run_config(iterations=12, learning_rate=2e-2)
    settings = small(reward_margin=0.0, pretraining_weight=1.0, pretraining_batch_size=16, micro_batch_size=16)
    ReFLTrainer(policy, redness, prompts, settings).train(config)
    lines = read_metrics(config.output_dir / "metrics.jsonl")
    losses = [line["train/pretraining_loss"] for line in lines if "train/pretraining_loss" in line]
    assert sum(losses[-4:]) < 0.98 * sum(losses[:4])


def test_a_folders_images_fill_the_size_that_is_asked_for(policy: DiffusionPolicy, tmp_path: Path) -> None:
    halves = numpy.zeros((40, 120, 3), numpy.uint8)
    halves[:, 60:] = 255
    Image.fromarray(halves).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("halves")
    wide = pairs_from_folder(policy, tmp_path, height=32, width=64).latents
    assert wide.shape[2:] == (4, 8)
    expected = torch.zeros(1, 3, 32, 64)
    expected[..., 32:] = 1
    torch.testing.assert_close(wide, policy.encode_images(expected), rtol=0, atol=0.05)
    assert pairs_from_folder(policy, tmp_path, height=16, width=16).latents.shape[2:] == (2, 2)


# Compared with the reference.


def test_loss_against_the_reference_is_zero_at_first_and_then_the_distance(
    policy: DiffusionPolicy, stir: Callable[[DiffusionPolicy], None], pairs: PretrainingPairs
) -> None:
    seeds, conditioning = [3, 4, 5, 6, 7, 8], policy.encode(pairs.captions)
    assert reference_loss(policy, pairs.latents, conditioning, seeds=seeds).abs().max() == 0
    stir(policy)
    loss = reference_loss(policy, pairs.latents, conditioning, seeds=seeds)
    parts = []
    for k, seed in enumerate(seeds):
        generator = seeded(seed)
        timestep = torch.randint(policy.num_timesteps, (1,), generator=generator)
        noise = torch.randn(1, *pairs.latents.shape[1:], generator=generator)
        arguments = policy.add_noise(pairs.latents[k : k + 1], noise, timestep), timestep, conditioning[[k]]
        with policy.reference():
            target = policy.predict_noise(*arguments)
        parts.append((policy.predict_noise(*arguments) - target).square().mean())
    torch.testing.assert_close(loss, torch.stack(parts), rtol=1e-4, atol=1e-8)
    assert loss.min() > 0


def test_trainer_compares_with_what_its_settings_say(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    pairs: PretrainingPairs,
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    first = {}
    for target in ("noise", "reference"):
        config = run_config(target, iterations=1)
        settings = small(pretraining_weight=1.0, pretraining_batch_size=8, pretraining_target=target)
        ReFLTrainer(policy, redness, prompts, settings, pretraining=pairs).train(config)
        lines = read_metrics(config.output_dir / "metrics.jsonl")
        first[target] = next(line["train/pretraining_loss"] for line in lines if "train/pretraining_loss" in line)
        policy.load_trainable_state({name: torch.zeros_like(one) for name, one in policy.trainable_state().items()})
    assert first["noise"] > 0.1
    assert first["reference"] < 1e-3 * first["noise"]


def test_some_pairs_are_told_nothing(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    pairs: PretrainingPairs,
    small: Callable[..., ReFLConfig],
) -> None:
    stir(policy)
    indices, seeds = [k % 6 for k in range(200)], list(range(200))

    def losses(dropout: float) -> torch.Tensor:
        return pretraining_term(policy, pairs, small(caption_dropout=dropout))(indices, seeds).losses.detach()

    captioned, untold, mixed = losses(0.0), losses(1.0), losses(0.25)
    nothing = denoising_loss(policy, pairs.latents[indices], policy.encode([""] * 200), seeds=seeds)
    torch.testing.assert_close(untold, nothing, rtol=1e-4, atol=1e-6)
    dropped = (mixed - captioned).abs() > 1e-5
    assert 30 < int(dropped.sum()) < 70
    torch.testing.assert_close(mixed, torch.where(dropped, untold, captioned), rtol=1e-4, atol=1e-5)
