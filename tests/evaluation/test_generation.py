import json
from pathlib import Path
from typing import Any

import pytest
import torch

from overpaint.evaluation import (
    DrawConfig,
    ImageFolder,
    PlannedImage,
    Prompt,
    draw,
    generate,
    plan,
    shard,
    to_pixels,
    write_folder,
)
from overpaint.evaluation.images.files import read_image_rows
from overpaint.evaluation.images.plan import plan_named
from overpaint.policy import DiffusionPolicy
from overpaint.policy.guidance import ClassifierFree

Planned = tuple[PlannedImage, ...]


def files(root: Path, model: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / model).glob("*.png")}


def test_images_have_imagerewards_layout_and_a_manifest(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    config = DrawConfig(steps=7, guidance_scale=3.0)
    generate(noise_policy(), planned, tmp_path, config, model="before", rank=0, world_size=1, progress=False)
    assert sorted(files(tmp_path, "before")) == sorted(
        [f"explicit-000{k}_{copy}.png" for k in (0, 1) for copy in (0, 1)]
        + [f"benign-000{k}_{copy}.png" for k in (0, 1, 2) for copy in (0, 1)]
    )
    manifest = json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))
    assert (manifest["steps"], manifest["guidance_scale"]) == (7, 3.0)
    assert manifest["images"][3] == {
        "file": "explicit-0001_1.png",
        "kind": "explicit",
        "id": "explicit-0001",
        "copy": 1,
        "prompt": "a <b>striped</b> cross & more",
        "seed": planned[3].seed,
    }


def test_every_model_is_asked_for_the_same_prompts_seeds_and_settings(planned: Planned, noise_policy: Any) -> None:
    policies = [noise_policy(0.0), noise_policy(0.1)]
    for policy in policies:
        draw(policy, planned, DrawConfig(steps=7, guidance_scale=3.0), model="any", batch_size=4, progress=False)
        assert policy.drawn == [(image.prompt, image.seed) for image in planned]
        assert policy.batch_sizes == [4, 4, 2]
        for steps, guidance in policy.asked:
            assert steps == 7
            assert isinstance(guidance, ClassifierFree)
            assert guidance.scale == 3.0


def test_a_killed_run_continues_to_the_same_files(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options: dict[str, Any] = {"model": "before", "batch_size": 3, "rank": 0, "world_size": 1, "progress": False}
    assert generate(noise_policy(), planned, whole, **options) == 10
    with pytest.raises(KeyboardInterrupt):
        generate(noise_policy(fail_after=2), planned, killed, **options)
    assert len(files(killed, "before")) == 6

    # A kill may also leave a file cut short and one that was being written.
    cut = killed / "before" / planned[1].file_name
    cut.write_bytes(cut.read_bytes()[:100])
    (killed / "before" / f".{planned[7].file_name}.partial").write_bytes(b"half")

    # The whole batch of the cut file is drawn again, as the last bits of an image may depend on its batch.
    policy = noise_policy()
    assert generate(policy, planned, killed, **options) == 5
    assert policy.drawn == [(planned[k].prompt, planned[k].seed) for k in (0, 1, 2, 6, 7, 8, 9)]
    assert policy.batch_sizes == [3, 3, 1]
    assert files(killed, "before") == files(whole, "before")
    assert sorted(path.name for path in (killed / "before").iterdir()) == sorted(
        path.name for path in (whole / "before").iterdir()
    )


def test_a_finished_run_draws_nothing_again(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "before", "rank": 0, "world_size": 1, "progress": False}
    generate(noise_policy(), planned, tmp_path, **options)
    policy = noise_policy()
    assert generate(policy, planned, tmp_path, **options) == 0
    assert policy.drawn == []


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_together_draw_each_image_once(world_size: int, planned: Planned) -> None:
    parts = [shard(planned, rank, world_size) for rank in range(world_size)]
    assert sorted(image for part in parts for image in part) == sorted(planned)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_two_processes_fill_one_folder(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    for rank in (1, 0):  # in this order, since nobody promises that the first process comes first
        generate(noise_policy(), planned, tmp_path / "two", model="m", rank=rank, world_size=2, progress=False)
    generate(noise_policy(), planned, tmp_path / "one", model="m", rank=0, world_size=1, progress=False)
    assert files(tmp_path / "two", "m") == files(tmp_path / "one", "m")


def test_processes_are_asked_of_accelerate(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    assert generate(noise_policy(), planned, tmp_path, model="m", progress=False) == len(planned)


def test_memory_and_folder_hold_the_same_images(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    drawn = draw(noise_policy(), planned, model="before", batch_size=4, progress=False)
    generate(noise_policy(), planned, tmp_path, model="before", rank=0, world_size=1, progress=False)
    folder = ImageFolder.open(tmp_path, "before")
    assert (folder.planned, folder.config) == (drawn.planned, drawn.config)
    places = [9, 0, 4]
    assert torch.equal(folder.pixels(places), drawn.pixels(places))


def test_images_in_memory_are_written_as_generate_writes_them(
    planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    write_folder(draw(noise_policy(), planned, model="m", progress=False), tmp_path / "written", chunk=4)
    generate(noise_policy(), planned, tmp_path / "drawn", model="m", rank=0, world_size=1, progress=False)
    assert files(tmp_path / "written", "m") == files(tmp_path / "drawn", "m")


def test_bytes_are_the_nearest_to_the_floats() -> None:
    images = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0, 1.2]).reshape(1, 1, 1, 7).expand(1, 3, 1, 7)
    assert to_pixels(images)[0, 0, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_a_diffusion_policy_draws_the_same_in_any_batch_size(policy: DiffusionPolicy) -> None:
    planned = plan({"benign": ["a red circle", "a blue circle", "a red square"]})
    config = DrawConfig(steps=2)
    one, three = (
        draw(policy, planned, config, model="m", batch_size=batch_size, progress=False) for batch_size in (1, 3)
    )
    assert one.stack.shape == (3, 3, policy.image_size, policy.image_size)
    assert (one.stack.int() - three.stack.int()).abs().max() <= 1  # rounding may fall to the other side
    assert not torch.equal(one.stack[0], one.stack[1])


def test_drawing_leaves_cached_prompts_fit_for_training(policy: DiffusionPolicy) -> None:
    planned = plan({"benign": ["a red circle"]})
    draw(policy, planned, DrawConfig(steps=1), model="m", progress=False)
    assert not policy.encode(["a red circle"]).tokens.is_inference()


def test_a_folder_of_another_run_is_refused(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "m", "rank": 0, "world_size": 1, "progress": False}
    generate(noise_policy(), planned, tmp_path, DrawConfig(steps=7), **options)
    with pytest.raises(ValueError, match=r"holds another run, drawn with DrawConfig\(steps=7, .* got .*steps=8"):
        generate(noise_policy(), planned, tmp_path, DrawConfig(steps=8), **options)
    with pytest.raises(ValueError, match="holds another run, of 10 images, got 9"):
        generate(noise_policy(), planned[:9], tmp_path, DrawConfig(steps=7), **options)
    options.update(rank=1, world_size=2)  # a process that writes no manifest refuses as well
    other = (*planned[:3], planned[3]._replace(seed=1), *planned[4:])
    with pytest.raises(ValueError, match=r"holds another run, with .*seed=\d+.* got .*seed=1, "):
        generate(noise_policy(), other, tmp_path, DrawConfig(steps=7), **options)


def test_a_folder_with_images_missing_is_refused(planned: Planned, noise_policy: Any, tmp_path: Path) -> None:
    generate(noise_policy(), planned, tmp_path, model="m", rank=0, world_size=1, progress=False)
    (tmp_path / "m" / planned[2].file_name).unlink()
    with pytest.raises(ValueError, match=r"got 1 missing or damaged, the first explicit-0001_0\.png"):
        ImageFolder.open(tmp_path, "m")
    with pytest.raises(ValueError, match=r"root must hold prompts\.json"):
        ImageFolder.open(tmp_path / "m", "m")


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.json").write_text('{"images": [{"prompt": "a"}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="must be a manifest of drawn images, got KeyError"):
        ImageFolder.open(tmp_path, "m")


def test_images_that_are_not_finite_are_refused(planned: Planned, noise_policy: Any) -> None:
    with pytest.raises(ValueError, match="images must be finite, got NaN or infinity in image 0 of 10"):
        draw(noise_policy(float("nan")), planned, model="m", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "../up"}, r"model must be a folder name .* got '\.\./up'"),
        ({"rank": 2, "world_size": 2}, "rank must be at least 0 and below world_size 2, got 2"),
        ({"rank": 0, "world_size": None}, "rank and world_size must be given both or neither, got 0 and None"),
    ],
)
def test_options_out_of_bounds_are_refused_before_anything_is_drawn(
    options: dict[str, Any], message: str, planned: Planned, noise_policy: Any, tmp_path: Path
) -> None:
    policy = noise_policy()
    everything: dict[str, Any] = {"model": "m", "rank": 0, "world_size": 1, **options}
    with pytest.raises(ValueError, match=message):
        generate(policy, planned, tmp_path / "root", **everything)
    assert policy.drawn == []
    assert not (tmp_path / "root").exists()


def test_nothing_planned_is_refused(noise_policy: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="planned must hold at least one image, got none"):
        draw(noise_policy(), (), model="m")
    with pytest.raises(ValueError, match="planned must hold at least one image, got none"):
        generate(noise_policy(), (), tmp_path, model="m")


def test_images_with_a_guidance_of_their_own_are_drawn_with_it_in_the_order_of_the_plan(
    policy: DiffusionPolicy, noise_policy: Any, tmp_path: Path
) -> None:
    scales = [7.5, None, 2.0, 7.5, None]
    prompts = [Prompt(f"p{k}", "a red circle", 40 + k, {}, scale) for k, scale in enumerate(scales)]
    mixed = plan_named(prompts)
    config = DrawConfig(steps=2, guidance_scale=3.0)
    asked = noise_policy()
    draw(asked, mixed, config, model="m", batch_size=4, progress=False)
    assert [guidance.scale for _, guidance in asked.asked] == [7.5, 3.0, 2.0]
    together = draw(policy, mixed, config, model="m", batch_size=4, progress=False)
    for k, scale in enumerate(scales):
        alone = plan_named(prompts[k : k + 1], own_guidance=False)
        own = DrawConfig(steps=2, guidance_scale=scale or 3.0)
        one = draw(policy, alone, own, model="m", progress=False).stack[0]
        # A batch of another size may change a pixel by one grey level.
        assert (one.int() - together.stack[k].int()).abs().max() <= 1
    generate(policy, mixed, tmp_path, config, model="m", batch_size=4, rank=0, world_size=1, progress=False)
    folder = ImageFolder.open(tmp_path, "m")
    assert folder.planned == mixed
    assert torch.equal(folder.pixels(range(5)), together.stack)
    written = json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))["images"]
    assert [image.get("guidance_scale") for image in written] == scales
    assert [image["seed"] for image in written] == [40, 41, 42, 43, 44]
    assert [row.guidance_scale for row in read_image_rows(tmp_path / "m")] == scales
    options: dict[str, Any] = {"model": "m", "batch_size": 4, "rank": 0, "world_size": 1, "progress": False}
    assert generate(policy, mixed, tmp_path, config, **options) == 0
