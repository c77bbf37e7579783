"""The check of the official weights, with a small network and its own scores."""

import subprocess
import sys
from pathlib import Path

import pytest
from golden_case import Record, Tensors
from PIL import Image

from rewards import ImageReward, image_reward_check
from rewards.image_reward_check import PROMPT, Comparison, Config


@pytest.fixture
def images(golden: Tensors, tmp_path: Path) -> Path:
    """A folder with four images under the names of the authors'."""
    folder = tmp_path / "images"
    folder.mkdir()
    pictures = [golden["file_image0/image"], golden["file_image1/image"], golden["images"][0], golden["images"][1]]
    for number, picture in enumerate(pictures, start=1):
        array = picture.permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(folder / f"{number}.webp", lossless=True)
    return folder


@pytest.fixture
def weights(golden_reward: ImageReward, tmp_path: Path) -> Path:
    """A folder with the golden network."""
    golden_reward.save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def test_official_scores_of_files_are_found_again(
    golden_reward: ImageReward, golden: Tensors, golden_case: Record, images: Path
) -> None:
    paths = [images / "1.webp", images / "2.webp"]
    for index, prompt in enumerate(golden_case["prompts"]):
        expected = [golden[f"file_image{image}/scores"][index].item() for image in range(2)]
        rows = image_reward_check.check(golden_reward, paths, prompt=prompt, expected=expected)
        assert [row.image for row in rows] == ["1.webp", "2.webp"]
        assert [row.published for row in rows] == expected
        assert image_reward_check.agrees(rows, 1e-4)


def test_scores_as_published_end_with_zero(
    golden_reward: ImageReward, images: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = golden_reward.inference_rank(PROMPT, image_reward_check.image_paths(images))[1]
    expected[2] += 0.009
    assert image_reward_check.main(Config(images=images, weights=weights), expected) == 0
    printed = capsys.readouterr().out
    assert "All scores are as published." in printed
    assert "off by more" not in printed


def test_one_score_that_is_off_ends_with_one_and_is_marked(
    golden_reward: ImageReward, images: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = golden_reward.inference_rank(PROMPT, image_reward_check.image_paths(images))[1]
    expected[2] += 0.011
    assert image_reward_check.main(Config(images=images, weights=weights), expected) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("off by more than 0.01") for line in lines[1:5]] == [False, False, True, False]
    assert lines[-1] == "Scores are NOT as published."


def test_a_score_that_is_not_a_number_does_not_agree() -> None:
    assert not image_reward_check.agrees([Comparison("1.webp", 0.58, float("nan"))])


def test_expected_scores_must_match_the_images(golden_reward: ImageReward, images: Path) -> None:
    with pytest.raises(ValueError, match="one score for each of 1 images, got 4"):
        image_reward_check.check(golden_reward, [images / "1.webp"])


def test_images_without_a_path_are_named_by_number(golden_reward: ImageReward, images: Path) -> None:
    with Image.open(images / "1.webp") as picture:
        rows = image_reward_check.check(golden_reward, [picture], expected=[0.0])
    assert rows[0].image == "image 1"


def test_missing_images_are_named_with_where_to_get_them(images: Path) -> None:
    (images / "3.webp").unlink()
    with pytest.raises(FileNotFoundError, match=r"without 3\.webp\. Save them from https://github\.com/THUDM"):
        image_reward_check.main(Config(images=images))


def test_program_says_what_is_missing_without_a_traceback(images: Path, weights: Path) -> None:
    program = [sys.executable, "-m", "rewards.image_reward_check"]
    without = subprocess.run(program, capture_output=True, text=True, timeout=100)
    assert without.returncode == 1
    assert without.stderr.startswith("images must be a folder with 1.webp")
    # The golden network is not ImageReward: its scores of these images are others.
    paths = ["--images", str(images), "--weights", str(weights)]
    off = subprocess.run([*program, *paths], capture_output=True, text=True, timeout=100)
    assert off.returncode == 1
    assert off.stdout.endswith("Scores are NOT as published.\n")
