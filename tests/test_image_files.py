"""Image files of every kind become upright RGB of 8 bits, or are refused by name."""

import io
import os
import pickle
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from overpaint.evaluation.images.pairs import image_sizes, read_pairs
from overpaint.image_files import (
    UnreadableImage,
    as_rgb,
    image_pixels,
    image_size,
    images_below,
    opened_image,
    read_image,
)
from rewards.preprocess import open_image, pil_to_square

RAMP = numpy.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(numpy.uint16)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The colours near the corners: top left, top right, bottom left, bottom right."""
    width, height = image.size
    places = [(2, 2), (width - 3, 2), (2, height - 3), (width - 3, height - 3)]
    pixels = image_pixels(image)
    return [tuple(int(value) for value in (pixels[:, y, x] > 127)) for x, y in places]


@pytest.fixture
def upright() -> Image.Image:
    """A picture with a colour of its own in each quarter, wider than high."""
    pixels = numpy.zeros((32, 48, 3), numpy.uint8)
    pixels[:16, :24, 0] = pixels[:16, 24:, 1] = pixels[16:, :24, 2] = 255
    return Image.fromarray(pixels)


# Orientation

TURNS = {
    1: (),
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_90,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_270,),
}


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_stand_upright_whatever_their_orientation(
    orientation: int, ending: str, upright: Image.Image, tmp_path: Path
) -> None:
    stored, tag = upright, Image.Exif()
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    tag[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    stored.save(path, exif=tag)
    read = read_image(path)
    assert image_size(path) == read.size == upright.size
    assert corners(read) == corners(upright)
    # Read by a path, or opened by the user, and however often it is brought upright.
    assert torch.equal(pil_to_square(read, 16), pil_to_square(open_image(path), 16))
    with Image.open(path) as opened:
        assert torch.equal(pil_to_square(opened, 16), pil_to_square(read, 16))


# Depth, transparency and colours


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_to_its_high_byte(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(RAMP).save(path)
    assert torch.equal(image_pixels(read_image(path))[1], torch.from_numpy((RAMP >> 8).astype(numpy.uint8)))
    assert torch.equal(pil_to_square(Image.fromarray(RAMP), 16), pil_to_square(read_image(path), 16))


def test_16_bit_grey_of_a_tiff_may_have_its_high_byte_first(tmp_path: Path) -> None:
    Image.fromarray(RAMP.astype(">u2")).save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as opened:
        assert opened.mode == "I;16B"
    assert torch.equal(
        image_pixels(read_image(tmp_path / "a.tif"))[0], torch.from_numpy((RAMP >> 8).astype(numpy.uint8))
    )


def test_a_16_bit_grey_that_stands_for_transparency_is_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "a.png", transparency=0)
    assert image_pixels(read_image(tmp_path / "a.png"))[0, 0, :2].tolist() == [255, 1]


@pytest.mark.parametrize(("mode", "name"), [("F", "a.tif"), ("I", "a.tif")])
def test_values_without_a_known_range_are_refused_by_name(mode: str, name: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / name)
    for read in (read_image, image_size):
        with pytest.raises(UnreadableImage, match=rf"a\.tif must have 8 or 16 bits .* got Pillow's mode {mode}"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match=rf"an image must have 8 or 16 bits .* mode {mode}"):
        as_rgb(Image.new(mode, (4, 4)))


def transparent_picture(mode: str) -> Image.Image:
    """A red left half, and a right half that is transparent."""
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.paste((0, 0, 255, 0), (2, 0, 4, 2))
    if mode == "P":
        return picture.quantize(4)
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(mode: str, tmp_path: Path) -> None:
    transparent_picture(mode).save(tmp_path / "a.png")
    pixels = image_pixels(read_image(tmp_path / "a.png"))
    assert pixels[:, 0, 3].tolist() == [255, 255, 255]
    assert pixels[:, 0, 0].tolist() == ([76, 76, 76] if mode == "LA" else [255, 0, 0])


def test_half_transparent_colours_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (0, 0, 0, 51)).save(tmp_path / "a.png")
    assert image_pixels(read_image(tmp_path / "a.png")).flatten().tolist() == [204, 204, 204]


def test_a_colour_that_stands_for_transparency_is_white(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1), (1, 2, 3)).save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert image_pixels(read_image(tmp_path / "a.png")).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("mode", "colour"), [("CMYK", (0, 255, 255, 0)), ("1", 1), ("L", 255), ("YCbCr", (76, 85, 255))]
)
def test_other_colours_become_rgb(mode: str, colour: tuple[int, ...] | int, tmp_path: Path) -> None:
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.new(mode, (8, 8), colour).save(path, quality=100)
    wanted = [255.0, 255.0, 255.0] if mode in ("1", "L") else [255.0, 0.0, 0.0]
    assert image_pixels(read_image(path)).float().mean(dim=(1, 2)).tolist() == pytest.approx(wanted, abs=3)


def test_of_an_animation_the_first_frame_is_read_and_it_is_told(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(UserWarning, match=r"a\.webp has 2 frames, of which the first is read"):
        picture = read_image(tmp_path / "a.webp")
    assert image_pixels(picture)[:, 0, 0].tolist() == [255, 0, 0]


# What cannot be read


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "picture-3.png"
    Image.effect_noise((64, 64), 80).save(path)
    whole = path.read_bytes()
    for content, why in ((whole[:400], "truncated"), (b"", "cannot identify"), (b"<html>", "cannot identify")):
        path.write_bytes(content)
        with pytest.raises(UnreadableImage, match=rf"picture-3\.png cannot be read: .*{why}") as caught:
            read_image(path)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"there is no image at .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImage, match="an image cannot be read"):
        read_image(b"none")


def test_a_decompression_bomb_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_image, image_size):
        with pytest.raises(UnreadableImage, match=r"huge\.png cannot be read: Image size \(4096 pixels\) exceeds"):
            read(tmp_path / "huge.png")


def test_errors_of_what_is_done_with_an_opened_file_name_it_too(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read: KeyError"), opened_image(tmp_path / "a.png"):
        raise KeyError


# Folders


def test_no_other_program_is_started_for_a_format_that_pillow_leaves_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(UnreadableImage, match=r"a\.png cannot be read: cannot identify image file"):
        read_image(path)
    assert not (tmp_path / "ran").exists()


def test_hidden_files_and_other_endings_are_no_images_of_a_folder(tmp_path: Path) -> None:
    for name in ("B.PNG", "a/c.JpEg", "._x.png", ".DS_Store", "a/.hidden/d.png", "notes.txt", "a.png.part"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        Image.new("RGB", (2, 2)).save(file, "PNG")
        path.write_bytes(file.getvalue())
    (tmp_path / "folder.png").mkdir()
    assert images_below(tmp_path) == ["B.PNG", "a/c.JpEg"]


def test_pairs_that_are_scored_have_their_size_upright(upright: Image.Image, tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=tag)
    upright.save(tmp_path / "b.jpg")
    Image.new("F", (4, 4)).save(tmp_path / "c.tif")
    sizes = image_sizes(read_pairs(tmp_path), skip_broken=True)
    assert sizes[:2] == [(48, 32), (48, 32)]
    assert "it must have 8 or 16 bits" in str(sizes[2])
