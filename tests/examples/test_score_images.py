"""The program that scores images: what it writes, what it keeps when killed, what it refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from examples import score_images
from examples.score_images import Config, main

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BRIGHTNESS, LENGTH, INVERSE = (f"made_up_rewards:{n}" for n in ("Brightness", "PromptLength", "InverseBrightness"))
GREYS = [10, 250, 90, 130, 50, 170, 210]


@pytest.fixture(autouse=True)
def made_up_rewards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Makes the rewards of this folder known by name; returns the file where they note what they do."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    return tmp_path / "noted"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven grey images of two sizes in turn, named as ImageReward names them."""
    for k, grey in enumerate(GREYS):
        size = (6, 4) if k % 2 == 0 else (3, 5)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", size, (grey, grey, grey)).save(tmp_path / "images" / f"cat-{k // 2}_{k % 2}.png")
    return tmp_path / "images"


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Config:
    return Config(source=folder, rewards=(BRIGHTNESS,), output=tmp_path / "scores.csv", batch_size=2, device="cpu")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str = BRIGHTNESS) -> list[float | None]:
    return [float(row[name]) if row[name] else None for row in read(path)]


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# What is written


def test_images_of_several_sizes_are_scored_in_the_order_of_their_names(
    config: Config, made_up_rewards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = main(config)
    assert [row["image"] for row in read(config.output)] == sorted(f"cat-{k // 2}_{k % 2}.png" for k in range(7))
    assert column(config.output) == pytest.approx([grey / 255 for grey in GREYS])
    assert result.scores[BRIGHTNESS] == pytest.approx(column(config.output), rel=1e-7)
    # Four images of one size and three of the other, at most two at a time; one loading.
    assert sorted(made_up_rewards.read_text().split("\n")) == ["", "loaded", "scored 1", *["scored 2"] * 3]
    assert [path.name for path in config.output.parent.glob("scores.csv*")] == ["scores.csv"]
    assert "The scores: " in capsys.readouterr().out


def test_a_table_keeps_its_order_and_its_other_columns(config: Config, folder: Path) -> None:
    names = [f"images/cat-{k}.png" for k in ("1_0", "0_0", "1_0")]
    rows = [{"seed": f"{k:03}", "image": n, "note": 'a "b",\nc', "prompt": "x" * k} for k, n in enumerate(names)]
    table = write_table(folder.parent / "pairs.csv", rows)
    main(replace(config, source=table, rewards=(LENGTH, BRIGHTNESS)))
    written = read(config.output)
    assert list(written[0]) == ["seed", "image", "note", "prompt", LENGTH, BRIGHTNESS]
    assert [{key: row[key] for key in rows[0]} for row in written] == rows
    assert column(config.output, LENGTH) == [0, 1, 2]
    assert column(config.output) == pytest.approx([90 / 255, 10 / 255, 90 / 255])


def test_summary_names_the_highest_and_the_lowest(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    summary = main(config).summaries[BRIGHTNESS]
    values = [grey / 255 for grey in GREYS]
    mean = sum(values) / 7
    assert (summary.count, summary.mean) == (7, pytest.approx(mean))
    assert summary.std == pytest.approx((sum((value - mean) ** 2 for value in values) / 7) ** 0.5)
    assert summary.ranked == sorted(range(7), key=lambda k: -GREYS[k])
    line = next(line for line in capsys.readouterr().out.split("\n") if line.startswith(BRIGHTNESS))
    assert line.split() == [
        BRIGHTNESS, "7", f"{mean:.4g}", f"{summary.std:.4g}", "0.03922", "cat-0_0.png", "0.9804", "cat-0_1.png",
    ]  # fmt: skip


def test_contact_sheet_shows_the_best_first_and_the_worst_last(config: Config, tmp_path: Path) -> None:
    main(replace(config, picture=tmp_path / "sheet.png"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        # Cells of 6 pixels enlarged 32 times; images 5 high stand in the middle of them.
        assert sheet.getpixel((8 + 96, 8 + 96)) == (250, 250, 250)
        lowest = [sheet.getpixel((sheet.width - 8 - 96, y)) for y in range(sheet.height)]
        assert lowest.count((10, 10, 10)) == 4 * 32
        assert {(255, 255, 255), (250, 250, 250)} <= {sheet.getpixel((104, y)) for y in range(8, 200)}


def test_by_default_pictures_of_the_tiny_world_are_drawn_and_scored(tmp_path: Path) -> None:
    result = main(Config(output=tmp_path / "scores.csv", picture=tmp_path / "sheet.png"))
    rows = read(tmp_path / "scores.csv")
    assert len(rows) == 2 * score_images.TINY_PICTURES
    assert list(rows[0]) == ["image", "prompt", *score_images.TINY_REWARDS]
    stripes = column(tmp_path / "scores.csv", "tinyworld:StripeScore")
    striped = [k for k, pair in enumerate(result.pairs) if "strip" in (pair.prompt or "")]
    assert min(stripes[k] or 0 for k in striped) > 0.17 > max(s or 0 for k, s in enumerate(stripes) if k not in striped)
    assert (tmp_path / "sheet.png").is_file()


# Prompts


def test_rewards_that_read_prompts_ask_for_them(config: Config) -> None:
    with pytest.raises(
        ValueError, match=r"made_up_rewards:PromptLength must have a prompt for every image, got none fo"
    ):
        main(replace(config, rewards=(BRIGHTNESS, LENGTH)))
    assert not list(config.output.parent.glob("scores*"))


def test_one_prompt_serves_all(config: Config) -> None:
    main(replace(config, rewards=(LENGTH,), prompt="a cat"))
    assert column(config.output, LENGTH) == [5] * 7
    assert {row["prompt"] for row in read(config.output)} == {"a cat"}


def test_prompts_are_found_by_the_identifiers_in_the_names(config: Config, tmp_path: Path) -> None:
    entries = [{"id": f"cat-{k}", "prompt": "x" * k} for k in (3, 2, 1, 0, 9)]
    (tmp_path / "prompts.json").write_text(json.dumps(entries), encoding="utf-8")
    main(replace(config, rewards=(LENGTH,), prompts=tmp_path / "prompts.json"))
    assert column(config.output, LENGTH) == [0, 0, 1, 1, 2, 2, 3]


def test_prompts_are_found_in_a_table(config: Config, tmp_path: Path) -> None:
    rows = [{"file": f"cat-{k // 2}_{k % 2}.png", "text": "x" * k} for k in reversed(range(7))]
    prompts = write_table(tmp_path / "prompts.csv", rows)
    main(replace(config, rewards=(LENGTH,), prompts=prompts, image_column="file", prompt_column="text"))
    assert column(config.output, LENGTH) == list(range(7))
    assert list(read(config.output)[0]) == ["file", "text", LENGTH]


# What is kept


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_run_goes_on_and_gives_what_an_undisturbed_one_gives(
    config: Config, made_up_rewards: Path, tmp_path: Path
) -> None:
    whole = replace(config, output=tmp_path / "whole.csv", batch_size=1)
    main(whole)
    made_up_rewards.unlink()

    interrupted = replace(config, batch_size=1)
    options = ["--source", str(config.source), "--rewards", BRIGHTNESS, "--output", str(config.output)]
    command = [sys.executable, "examples/score_images.py", *options, "--batch-size", "1", "--device", "cpu"]
    environment = {**os.environ, "SECONDS_PER_BATCH": "0.5", "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}
    partial = tmp_path / "scores.csv.partial"
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as program:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.read_bytes().count(b"\n") >= 3):  # the job and two batches
            assert program.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        program.send_signal(signal.SIGKILL)
    assert not config.output.exists()
    finished = partial.read_bytes().count(b"\n") - 1
    assert 2 <= finished < 7

    made_up_rewards.unlink()
    main(interrupted)
    assert config.output.read_bytes() == whole.output.read_bytes()
    assert made_up_rewards.read_text().count("scored") == 7 - finished


@pytest.fixture
def interrupted(config: Config, monkeypatch: pytest.MonkeyPatch, made_up_rewards: Path) -> Path:
    """The partial file of a run whose table could not be written: all is scored."""

    def fail(*given: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(score_images, "write_table", fail)
        with pytest.raises(OSError, match="no space left"):
            main(config)
    made_up_rewards.unlink()
    return config.output.with_name("scores.csv.partial")


def test_what_is_finished_is_not_scored_again(config: Config, interrupted: Path, made_up_rewards: Path) -> None:
    main(config)
    assert column(config.output) == pytest.approx([grey / 255 for grey in GREYS])
    assert made_up_rewards.read_text() == "loaded\n"
    assert not interrupted.exists()


@pytest.mark.parametrize("torn", [b"", b"{", b'{"batch": 3, "pai', b"\x00\x00\x00\n"])
def test_a_torn_last_line_is_scored_again(
    torn: bytes, config: Config, interrupted: Path, made_up_rewards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = interrupted.read_bytes().splitlines(keepends=True)
    interrupted.write_bytes(b"".join(lines[:-1]) + torn)
    with monkeypatch.context() as patch:
        patch.setattr(score_images, "write_table", None)
        with pytest.raises(TypeError):
            main(config)
    assert interrupted.read_bytes() == b"".join(lines)
    main(config)
    assert column(config.output) == pytest.approx([grey / 255 for grey in GREYS])
    assert made_up_rewards.read_text().count("scored") == 1


def test_a_line_damaged_in_the_middle_is_refused(config: Config, interrupted: Path) -> None:
    lines = interrupted.read_bytes().splitlines(keepends=True)
    interrupted.write_bytes(b"".join([lines[0], b"{}}\n", *lines[2:]]))
    with pytest.raises(
        ValueError, match=r"line 2 of .*scores\.csv\.partial is damaged: it must be JSON.*; delete the file"
    ):
        main(config)


def rewritten(config: Config, folder: Path) -> Config:
    before = (folder / "cat-0_0.png").stat().st_size
    Image.new("RGB", (6, 4), (11, 11, 11)).save(folder / "cat-0_0.png")
    assert (folder / "cat-0_0.png").stat().st_size == before
    return config


def one_more(config: Config, folder: Path) -> Config:
    Image.new("RGB", (6, 4), "red").save(folder / "cat-9_0.png")
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, folder: replace(config, rewards=(INVERSE,)), r"was begun with rewards \['made_up_rewards:Brig"),
        (lambda config, folder: replace(config, batch_size=3), "was begun with batch_size 2, got 3"),
        (lambda config, folder: replace(config, prompt="a cat"), r"is of other images or prompts, .*at cat-0_0\.png"),
        (one_more, "was begun with images 7, got 8"),
        (rewritten, r"images were written anew since, at cat-0_0\.png; put them back to go on, or delete it"),
    ],
)
def test_another_job_is_not_mixed_with_what_is_finished(
    change: Callable[[Config, Path], Config], message: str, config: Config, folder: Path, interrupted: Path
) -> None:
    before = interrupted.read_bytes()
    with pytest.raises(ValueError, match=message):
        main(change(config, folder))
    assert interrupted.read_bytes() == before


# What is broken


def test_a_broken_image_is_named_before_any_work(config: Config, folder: Path, made_up_rewards: Path) -> None:
    (folder / "cat-1_0.png").write_text("no image", encoding="utf-8")
    with pytest.raises(ValueError, match=r"got 1 of 7 that are not: .*cat-1_0\.png: it cannot be read"):
        main(config)
    assert not made_up_rewards.exists()


def test_an_image_of_16_bits_is_scaled_and_one_of_floats_refused(config: Config, folder: Path) -> None:
    Image.new("I;16", (6, 4), 40_000).save(folder / "cat-1_0.png")
    result = main(config)
    (place,) = (k for k, pair in enumerate(result.pairs) if pair.path.name == "cat-1_0.png")
    assert next(iter(result.scores.values()))[place] == pytest.approx((40_000 >> 8) / 255, abs=1e-6)
    Image.new("F", (6, 4)).save(folder / "cat-2_0.tif")
    wrong = replace(config, output=config.output.with_name("other.csv"))
    with pytest.raises(ValueError, match=r"cat-2_0\.tif: it must have 8 or 16 bits for each colour, got .* mode F"):
        main(wrong)


def cut_short(path: Path) -> bytes:
    """Leaves the header of an image, and some of the rest; returns what it was."""
    with Image.open(path) as image:
        image.resize((6, 4)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-26])
    return content


def test_work_survives_a_broken_image_that_only_shows_when_it_is_read(
    config: Config, folder: Path, made_up_rewards: Path
) -> None:
    content = cut_short(folder / "cat-3_0.png")
    with pytest.raises(ValueError, match=r"cat-3_0\.png: it cannot be read.* [2-6] of 7 images are finished and kept"):
        main(config)
    before = made_up_rewards.read_text().count("scored")
    (folder / "cat-3_0.png").write_bytes(content)
    main(config)
    assert column(config.output) == pytest.approx([grey / 255 for grey in GREYS])
    assert made_up_rewards.read_text().count("scored") == 4 > before > 0


def test_broken_images_can_be_skipped_and_are_counted(
    config: Config, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_short(folder / "cat-3_0.png")
    (folder / "cat-0_1.png").write_bytes(b"")
    result = main(replace(config, skip_broken=True))
    expected = [grey / 255 for grey in GREYS]
    written = column(config.output)
    assert [k for k, value in enumerate(written) if value is None] == [1, 6]
    assert [v for v in written if v is not None] == pytest.approx([expected[k] for k in (0, 2, 3, 4, 5)])
    assert sorted(result.broken) == [1, 6]
    assert result.summaries[BRIGHTNESS].count == 5
    assert f"2 skipped, the first {folder / 'cat-0_1.png'}: it cannot be read" in capsys.readouterr().out


def test_a_score_that_is_not_finite_is_treated_as_broken(config: Config, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(folder / "cat-0_0.png")
    both = replace(config, rewards=(BRIGHTNESS, INVERSE))
    with pytest.raises(ValueError, match=r"cat-0_0\.png: made_up_rewards:InverseBrightness gives it inf; 0 of 7"):
        main(both)
    main(replace(both, skip_broken=True))
    assert column(config.output)[0] == 0
    assert column(config.output, INVERSE)[0] is None
    assert column(config.output, INVERSE)[1:] == pytest.approx([255 / grey for grey in GREYS[1:]])


def test_what_was_skipped_is_tried_again_when_nothing_may_be(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(folder / "cat-3_0.png")
    with monkeypatch.context() as patch:
        patch.setattr(score_images, "write_table", None)
        with pytest.raises(TypeError):
            main(replace(config, skip_broken=True))
    with pytest.raises(ValueError, match=r"cat-3_0\.png: it cannot be read"):
        main(config)


def test_nothing_is_left_to_show_when_all_are_broken(config: Config, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        path.write_bytes(b"")
    result = main(replace(config, skip_broken=True, picture=tmp_path / "sheet.png"))
    assert result.summaries[BRIGHTNESS].count == 0
    assert column(config.output) == [None] * 7
    assert not (tmp_path / "sheet.png").exists()


# What is refused


def test_an_output_that_is_there_is_not_written_over(config: Config, made_up_rewards: Path) -> None:
    config.output.write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match=r"output must not exist yet, got .*scores\.csv; delete it"):
        main(config)
    assert config.output.read_text() == "precious"
    assert not made_up_rewards.exists()


def test_contradictions_are_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rewards must name at least one, got none"):
        Config(source=tmp_path)
    with pytest.raises(ValueError, match=r"rewards must hold each once, got \('a', 'b', 'a'\)"):
        Config(source=tmp_path, rewards=("a", "b", "a"))
    with pytest.raises(ValueError, match="prompt and prompts must come with a source"):
        Config(prompt="a cat")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        main(replace(config, batch_size=0))
    with pytest.raises(ValueError, match=r"reward must be one of .* or path/to/file\.py:name, got 'beauty'"):
        main(replace(config, rewards=("beauty",)))
