"""From images of any size to the square that a vision tower takes."""

import pytest
import torch
from PIL import Image

from rewards.preprocess import centre_offset, normalise, open_image, pil_to_square, resize_and_crop, scaled_size


@pytest.mark.parametrize(
    ("height", "width", "scaled"),
    [(100, 150, (224, 336)), (150, 100, (336, 224)), (512, 512, (224, 224)), (300, 301, (224, 224))],
)
def test_short_side_gets_the_size_and_the_long_one_is_rounded_down(
    height: int, width: int, scaled: tuple[int, int]
) -> None:
    assert scaled_size(height, width, 224) == scaled


def test_crop_is_centred_and_halves_go_to_the_even_offset() -> None:
    assert [centre_offset(224 + extra, 224) for extra in (0, 1, 2, 3, 4, 5)] == [0, 0, 1, 2, 2, 2]


def test_images_of_the_right_size_pass_unchanged() -> None:
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(resize_and_crop(images, 16), images)


def test_crop_takes_the_centre_of_a_long_image() -> None:
    images = torch.rand(1, 3, 16, 22)
    assert torch.equal(resize_and_crop(images, 16), images[:, :, :, 3:19])


@pytest.mark.parametrize("shape", [(96, 80), (80, 133), (40, 57)])
def test_tensors_and_files_are_preprocessed_alike(shape: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 6, shape[0]), torch.linspace(0, 9, shape[1]), indexing="ij")
    smooth = torch.stack([rows.sin(), columns.cos(), (rows * columns).sin()]) * 0.4 + 0.5
    pixels = (smooth * 255).round().byte()
    tensor = resize_and_crop(pixels[None].float() / 255, 48)[0]
    file = pil_to_square(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), 48)
    # PIL rounds to 8 bits after each of its two passes.
    torch.testing.assert_close(tensor, file, rtol=0, atol=2 / 255)


def test_antialiasing_averages_what_a_shrunk_image_cannot_show() -> None:
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[:, :, :, ::2] = 1
    smooth = resize_and_crop(stripes, 16)[:, :, :, 4:12]
    torch.testing.assert_close(smooth, torch.full_like(smooth, 0.5), rtol=0, atol=0.05)
    assert (resize_and_crop(stripes, 16, antialias=False) - 0.5).abs().max() < 0.51
    assert not torch.equal(resize_and_crop(stripes, 16, antialias=False), resize_and_crop(stripes, 16))


def test_normalised_channels_have_the_given_mean_and_standard_deviation() -> None:
    images = torch.tensor([0.5, 0.25, 1.0]).view(1, 3, 1, 1)
    normalised = normalise(images, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.25))
    assert torch.equal(normalised.flatten(), torch.tensor([0.0, -1.0, 2.0]))


def test_transparent_and_grey_files_become_rgb() -> None:
    for mode in ("RGBA", "L", "P"):
        assert pil_to_square(Image.new(mode, (20, 30)), 16).shape == (3, 16, 16)


def test_an_open_image_stays_what_it_is() -> None:
    image = Image.new("RGB", (4, 4))
    assert open_image(image) is image
