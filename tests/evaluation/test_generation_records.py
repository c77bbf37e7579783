"""What a folder of drawn images says of itself, what it refuses, and a disk that is full."""

import errno
import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from overpaint.evaluation import DrawConfig, ImageFolder, PlannedImage, generate, plan
from overpaint.evaluation import generate as generate_function
from overpaint.evaluation.images.drawable import model_record, read_record
from overpaint.evaluation.images.files import ImageRow, append_row, known_rows, read_image_rows
from overpaint.evaluation.images.plan import Prompt, check_plan, plan_named
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.digest import weights_digest

Planned = tuple[PlannedImage, ...]
ALONE: dict[str, Any] = {"model": "m", "rank": 0, "world_size": 1, "progress": False}
GENERATE = sys.modules[generate_function.__module__]
TWO = plan({"benign": ["a red circle", "a blue dog"]})


def bytes_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "m").glob("*.png")}


# Rows


def test_each_image_has_one_row_that_tells_all_of_it(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    generate(noise_policy(), planned, tmp_path, DrawConfig(steps=7, size=16), batch_size=4, **ALONE)
    rows = read_image_rows(tmp_path / "m")
    assert [row.file for row in rows] == [image.file_name for image in planned]
    assert rows[3][:6] == ("explicit-0001_1.png", *planned[3][:5])
    assert {(row.width, row.height) for row in rows} == {(16, 16)}
    assert [row.batch for row in rows] == [4] * 8 + [2] * 2
    assert len({row.seconds for row in rows[:4]}) == 1  # a batch's time, shared out
    assert all(row.seconds > 0 for row in rows)
    for row in rows:
        assert row.sha256 == hashlib.sha256((tmp_path / "m" / row.file).read_bytes()).hexdigest()
    assert not list((tmp_path / "m").glob(".*"))


def test_an_unfinished_folder_has_rows_of_what_is_there(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(noise_policy(fail_after=2), planned, tmp_path, batch_size=3, **ALONE)
    assert list(known_rows(tmp_path / "m")) == [image.file_name for image in planned[:6]]
    with pytest.raises(ValueError, match=r"folder must hold manifest\.jsonl, got .*m, which does not"):
        read_image_rows(tmp_path / "m")


def test_an_image_without_a_row_or_with_other_bytes_is_drawn_again(
    planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    generate(noise_policy(), planned, tmp_path, batch_size=2, **ALONE)
    before, rows = bytes_of(tmp_path), (tmp_path / "m" / "manifest.jsonl").read_text()
    (tmp_path / "m" / "manifest.jsonl").write_text("".join(rows.splitlines(keepends=True)[1:]))
    shutil.copy(tmp_path / "m" / planned[0].file_name, tmp_path / "m" / planned[5].file_name)
    kept = [(tmp_path / "m" / planned[k].file_name) for k in (1, 4)]
    times = [path.stat().st_mtime_ns for path in kept]
    policy = noise_policy()
    assert generate(policy, planned, tmp_path, batch_size=2, **ALONE) == 2
    assert policy.drawn == [(planned[k].prompt, planned[k].seed) for k in (0, 1, 4, 5)]
    assert [path.stat().st_mtime_ns for path in kept] == times  # drawn, as their batches are, and not written
    assert bytes_of(tmp_path) == before
    assert [row.file for row in read_image_rows(tmp_path / "m")] == [image.file_name for image in planned]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_whole_batches(
    world_size: int, planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    policies = [noise_policy() for _ in range(world_size)]
    options: dict[str, Any] = {**ALONE, "world_size": world_size}
    for rank, policy in enumerate(policies):
        assert not (tmp_path / "m" / "manifest.jsonl").exists()  # which the last brings together
        options["rank"] = rank
        generate(policy, planned, tmp_path, batch_size=3, **options)
    assert (tmp_path / "m" / "manifest.jsonl").exists()
    batches = [[(image.prompt, image.seed) for image in planned[k : k + 3]] for k in (0, 3, 6, 9)]
    for rank, policy in enumerate(policies):
        assert policy.drawn == [pair for batch in batches[rank::world_size] for pair in batch]
    generate(noise_policy(), planned, tmp_path / "one", batch_size=3, **ALONE)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path)


# The record of the model


def test_the_record_tells_model_scheduler_drawing_and_libraries(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    config = DrawConfig(steps=1, guidance_scale=2.0)
    generate(make_policy(), TWO, tmp_path, config, **ALONE)
    record = read_record(tmp_path / "m")
    assert record["class"] == "overpaint.policy.DiffusionPolicy"
    assert record["drawing"] == {"steps": 1, "guidance_scale": 2.0, "eta": 0.0, "size": None}
    assert (record["scheduler"]["class"], record["scheduler"]["beta_end"]) == ("DDIM", 0.012)
    assert record["libraries"]["torch"] == version("torch")
    assert (record["guard"], record["safety_checker"]) == (None, "none")
    assert len(record["weights"]) == 64


def test_the_hash_tells_weights_adapters_and_their_absence_apart(make_policy: Callable[..., DiffusionPolicy]) -> None:
    plain, again, tuned = make_policy(), make_policy(), make_policy(lora=LoRAConfig())

    def digest(policy: DiffusionPolicy) -> str:
        return weights_digest({"unet": policy.unet, "vae": policy.vae})

    assert digest(plain) == digest(again)
    with_lora = digest(tuned)
    with tuned.reference():
        without = digest(tuned)
    assert digest(tuned) == with_lora
    with torch.no_grad():
        again.vae.get_parameter("decoder.conv_out.bias")[0] += 1e-6
    assert len({digest(plain), with_lora, without, digest(again), digest(plain.to("cpu"))}) == 4


def test_images_of_other_weights_are_refused_under_the_same_name(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    other: dict[str, Any] = {**ALONE, "model": "tuned"}
    config, policy = DrawConfig(steps=1), make_policy(train="full")
    generate(policy, TWO, tmp_path, config, **ALONE)
    before = bytes_of(tmp_path)
    (tmp_path / "m" / TWO[1].file_name).unlink()
    with torch.no_grad():
        policy.trainable_parameters()[0].mul_(1.001)
    with pytest.raises(ValueError, match=r"was drawn by another model, with weights '.*choose another model name"):
        generate(policy, TWO, tmp_path, config, **ALONE)
    with policy.reference():
        assert generate(policy, TWO, tmp_path, config, **ALONE) == 1
    assert bytes_of(tmp_path) == before
    assert generate(policy, TWO, tmp_path, config, **other) == 2


def test_a_safeguard_is_part_of_the_record(make_policy: Callable[..., DiffusionPolicy]) -> None:
    from erasure.methods.safree import SAFREEChange, SAFREEConfig
    from erasure.methods.sld import SLDChange, SLDConfig

    records = []
    for change in (
        SLDChange(SLDConfig(concept_text="stripes")),
        SLDChange(SLDConfig(concept_text="dots")),
        SAFREEChange(SAFREEConfig(concepts=("stripes",)), 1.0),
        SAFREEChange(SAFREEConfig(concepts=("dots",)), 1.0),
    ):
        policy = make_policy()
        change.apply(policy)
        records.append(model_record(policy, DrawConfig())["guard"])
    assert len(set(records)) == 4
    assert not any(" at 0x" in record for record in records)


def test_images_of_unknown_origin_are_left_alone(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "m" / planned[0].file_name)
    before = bytes_of(tmp_path)
    with pytest.raises(ValueError, match=r"must be empty or hold model\.json, got images without; choose another"):
        generate(noise_policy(), planned, tmp_path, **ALONE)
    assert bytes_of(tmp_path) == before


def test_a_record_that_cannot_be_read_is_named(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    generate(noise_policy(), planned, tmp_path, **ALONE)
    (tmp_path / "m" / "model.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"folder must hold model\.json, which `generate` writes, got .*must be JSON"):
        generate(noise_policy(), planned, tmp_path, **ALONE)


# Names and sizes


def test_two_images_of_one_name_are_refused_before_anything_is_drawn(
    planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    twice = (*planned, planned[2]._replace(prompt="another"))
    with pytest.raises(ValueError, match=r"must name every image once, got explicit-0001_0\.png for 'a <b>.*'another'"):
        generate(noise_policy(), twice, tmp_path / "root", **ALONE)
    with pytest.raises(ValueError, match=r"an id must be letters, digits, .* got '\.\./up'"):
        generate(noise_policy(), (planned[0]._replace(id="../up"),), tmp_path / "root", **ALONE)
    assert not (tmp_path / "root").exists()


def test_prompts_keep_their_own_names_and_their_seeds_whatever_is_beside_them() -> None:
    dog = Prompt("17", "a dog")
    named = plan_named([Prompt("000904-0035", "a cat"), dog], images_per_prompt=2, seed=5)
    assert [image.file_name for image in named] == ["000904-0035_0.png", "000904-0035_1.png", "17_0.png", "17_1.png"]
    assert named[2:] == plan_named([dog], images_per_prompt=2, seed=5)
    assert len({image.seed for image in (*named, *plan_named([dog], seed=6))}) == 5
    check_plan(named)
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        plan_named([dog], images_per_prompt=0)
    with pytest.raises(ValueError, match=r"prompts\['benign'\] must be a non-empty list"):
        plan_named([])


def test_images_have_the_size_that_is_asked_for(policy: DiffusionPolicy, tmp_path: Path) -> None:
    generate(policy, TWO, tmp_path, DrawConfig(steps=1, size=24), **ALONE)
    folder = ImageFolder.open(tmp_path, "m")
    assert folder.pixels([0, 1]).shape == (2, 3, 24, 24)
    assert folder.config.size == 24
    with pytest.raises(ValueError, match=r"holds another run, drawn with .*size=24.* got .*size=None"):
        generate(policy, TWO, tmp_path, DrawConfig(steps=1), **ALONE)


@pytest.mark.parametrize(("size", "rule"), [(0, "at least 8"), (-8, "at least 8"), (12, "a multiple of 8")])
def test_sizes_that_no_latents_have_are_refused(size: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"DrawConfig\.size must be {rule}, got {size}"):
        DrawConfig(size=size)


def test_a_manifest_from_before_there_were_sizes_is_read(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    generate(noise_policy(), planned, tmp_path, DrawConfig(steps=3), **ALONE)
    manifest = json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))
    del manifest["size"]
    (tmp_path / "prompts.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert ImageFolder.open(tmp_path, "m").config == DrawConfig(steps=3)
    assert generate(noise_policy(), planned, tmp_path, DrawConfig(steps=3), **ALONE) == 0


def test_another_batch_size_changes_at_most_one_grey_level_of_few_pixels(
    policy: DiffusionPolicy, tmp_path: Path
) -> None:
    planned = plan({"benign": ["a red circle", "a blue dog", "a cat", "two dogs"]})
    for batch_size in (1, 3):
        generate(policy, planned, tmp_path / str(batch_size), DrawConfig(steps=2), batch_size=batch_size, **ALONE)
    one, three = (ImageFolder.open(tmp_path / name, "m").pixels(range(4)).int() for name in ("1", "3"))
    assert (one - three).abs().max() <= 1
    assert (one != three).float().mean() < 0.01


def test_wrong_answers_of_a_model_are_refused(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    class Other:
        def __init__(self, count: int, side: int) -> None:
            self.shape = (count, 3, side, side)

        def draw(self, prompts: Any, **rest: Any) -> torch.Tensor:
            return torch.zeros(self.shape)

    with pytest.raises(ValueError, match="policy must draw one image for each of 10 prompts, got 9"):
        generate(Other(9, 8), planned, tmp_path, **ALONE)
    with pytest.raises(ValueError, match=r"policy must draw images of size 16, got \(8, 8\)"):
        generate(Other(10, 8), planned, tmp_path / "sized", DrawConfig(size=16), **ALONE)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        generate(noise_policy(), planned, tmp_path, batch_size=0, **ALONE)


# Time and space


def test_a_long_run_is_told_of_after_its_first_batch(
    planned: Planned, noise_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            self.now += 1000.0
            return self.now

    shown: dict[str, Any] = {**ALONE, "progress": True}
    monkeypatch.setattr(GENERATE, "time", Clock())
    generate(noise_policy(), planned, tmp_path, batch_size=2, **shown)
    assert capsys.readouterr().err.count("m: 10 images will take about 1 h 23 min") == 1
    monkeypatch.setattr(GENERATE, "LONG", 4000.0)
    generate(noise_policy(), planned, tmp_path / "shorter", batch_size=2, **shown)
    assert "will take" not in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 44 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=44k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the permission to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_named_with_what_stays_and_the_run_goes_on_once_there_is_room(
    small_disk: Path, planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    generate(noise_policy(), planned, tmp_path / "whole", batch_size=3, **ALONE)
    with pytest.raises(OSError, match=r"No space left on device; the [1-9] of 10 images that are in .*stay") as raised:
        generate(noise_policy(), planned, small_disk, batch_size=3, **ALONE)
    assert raised.value.errno == errno.ENOSPC
    assert Path(str(raised.value.filename)).parent == small_disk / "m"
    there = bytes_of(small_disk)
    assert 1 <= len(there) < 10
    assert all(bytes_of(tmp_path / "whole")[name] == content for name, content in there.items())
    assert not list((small_disk / "m").glob(".*.partial"))
    with pytest.raises(OSError, match="No space left"):  # nothing is lost by trying again
        generate(noise_policy(), planned, small_disk, batch_size=3, **ALONE)
    assert bytes_of(small_disk).items() >= there.items()

    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    policy = noise_policy()
    assert generate(policy, planned, small_disk, batch_size=3, **ALONE) <= 10 - len(there) + 1
    assert bytes_of(small_disk) == bytes_of(tmp_path / "whole")
    assert [row.file for row in read_image_rows(small_disk / "m")] == [image.file_name for image in planned]


def test_a_row_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    row = ImageRow("a_0.png", "benign", "a", 0, "a red circle", 1, 8, 8, 0.5, 1, "0" * 64)
    append_row(tmp_path, 0, row)
    journal = tmp_path / ".drawn-0.jsonl"
    before, limits = journal.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*\.drawn-0\.jsonl'"):
            append_row(tmp_path, 0, row._replace(file="b_0.png"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert journal.read_bytes() == before


def test_a_disk_that_is_full_from_the_start_leaves_nothing_half(
    small_disk: Path, planned: Planned, noise_policy: Any
) -> None:
    (small_disk / "filling").write_bytes(bytes(44 * 1024 - 4096))
    with pytest.raises(OSError, match=r"No space left on device; the 0 of 10 images .*model\.json"):
        generate(noise_policy(), planned, small_disk, **ALONE)
    (small_disk / "filling").unlink()
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["prompts.json"]
