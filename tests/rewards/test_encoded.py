"""Images as files in memory: nothing is lost in a PNG, and nothing bad is let in."""

import io
import struct
import zlib
from typing import get_args

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewards.encoded import ImageFormat, check_format, decode_image, encode_images
from rewards.jpeg import jpeg_sizes

IMAGES = torch.rand(3, 3, 12, 20, generator=torch.Generator().manual_seed(0))


def file_of(mode: str, format: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, format=format)
    return file.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """Returns a PNG whose header tells of an image that its few bytes of data do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_png_returns_the_same_8_bit_values() -> None:
    decoded = torch.stack([decode_image(file, 240) for file in encode_images(IMAGES)])
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, (IMAGES * 255).round() / 255)
    again = torch.stack([decode_image(file, 240) for file in encode_images(decoded)])
    assert torch.equal(again, decoded)


def test_values_beyond_the_range_are_clamped() -> None:
    images = torch.tensor([-0.5, 0.0, 1.0, 1.5]).view(1, 1, 1, 4).expand(1, 3, 2, 4)
    assert decode_image(encode_images(images)[0], 8)[0, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_jpeg_is_the_file_that_compressibility_measures() -> None:
    smooth = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
    files = encode_images(smooth, "jpeg", 95)
    assert [len(file) / 1000 for file in files] == pytest.approx(jpeg_sizes(smooth, 95).tolist())
    torch.testing.assert_close(decode_image(files[0], 64 * 64), smooth[0], atol=0.02, rtol=0.0)
    assert len(encode_images(smooth, "jpeg", 10)[0]) < len(files[0])


def test_grey_images_become_rgb() -> None:
    for format in ("PNG", "JPEG"):
        assert decode_image(file_of("L", format), 64).shape == (3, 8, 8)


def test_no_images_make_no_files() -> None:
    assert encode_images(torch.zeros(0, 3, 8, 8)) == []


def test_images_that_are_not_finite_are_refused() -> None:
    images = IMAGES.clone()
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity in image 1 of 3"):
        encode_images(images)


def test_unknown_format_or_quality_is_refused() -> None:
    with pytest.raises(ValueError, match="format must be png or jpeg, got 'webp'"):
        check_format("webp", 95)
    with pytest.raises(ValueError, match="quality must be a whole number from 1 to 100, got 101"):
        encode_images(IMAGES, "jpeg", 101)


@pytest.mark.parametrize("content", [b"", b"GIF89a", file_of("RGB", "BMP"), file_of("RGB", "GIF"), b"%!PS-Adobe"])
def test_other_formats_are_not_even_tried(content: bytes) -> None:
    with pytest.raises(ValueError, match="must be a PNG or a JPEG"):
        decode_image(content, 10**6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "I;16", "LA"])
def test_other_channels_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="must be 8-bit RGB or grey"):
        decode_image(file_of(mode, "PNG"), 10**6)


def test_size_is_read_before_anything_is_decoded() -> None:
    content = encode_images(IMAGES)[0]
    assert decode_image(content, 240).shape == (3, 12, 20)
    with pytest.raises(ValueError, match="at most 239 pixels, got 20 x 12"):
        decode_image(content, 239)
    # Pillow has limits of its own, a warning and an error, and both of them are higher than ours.
    for side in (5_000, 10_000, 30_000, 2**31 - 1):
        with pytest.raises(ValueError, match=r"pixels|DecompressionBomb"):
            decode_image(png_that_claims(side, side), 10**6)


def test_damaged_files_are_refused() -> None:
    for format in ("png", "jpeg"):
        content = encode_images(IMAGES, format)[0]
        with pytest.raises(ValueError, match="whole"):
            decode_image(content[: len(content) // 2], 10**6)
        with pytest.raises(ValueError, match="whole"):
            decode_image(content[:8], 10**6)
    with pytest.raises(ValueError, match="whole"):
        decode_image(png_that_claims(10, 10), 10**6)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(get_args(ImageFormat)), st.data())
def test_no_damage_makes_anything_but_an_image_or_a_value_error(format: ImageFormat, data: st.DataObject) -> None:
    content = bytearray(encode_images(IMAGES[:1], format)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), 10_000)
    except ValueError:
        return
    assert image.shape[0] == 3
    assert image.shape[1] * image.shape[2] <= 10_000
    assert numpy.isfinite(image.numpy()).all()
