"""The Fréchet distance of images' features, and the network that published distances take them from."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn

from overpaint.evaluation.images.files import write_png
from overpaint.evaluation.metrics.distances import WEIGHTS_SHA256, Inception, frechet_distance


def filled(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights that are the same everywhere, and that keep the size of what passes through the network."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in sorted(state):
        shape = state[name].shape
        if name.endswith("num_batches_tracked"):
            continue
        values = torch.randn(shape, generator=generator)
        if name.endswith(("running_var", "bn.weight")):
            weights[name] = values.abs() * 0.5 + 0.75
        else:
            weights[name] = values * ((1.5 / state[name][0].numel()) ** 0.5 if len(shape) > 1 else 0.1)
    return weights


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(filled(Inception().state_dict()), path)
    return path


def test_features_are_those_of_torch_fidelity(weights_file: Path) -> None:
    # FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with these weights, on the same images.
    network = Inception.from_file(weights_file, sha256=None)
    generator = torch.Generator().manual_seed(1)
    small = torch.randint(0, 256, (2, 3, 64, 48), generator=generator, dtype=torch.uint8)
    large = torch.randint(0, 256, (1, 3, 400, 310), generator=generator, dtype=torch.uint8)
    places = [0, 500, 1000, 1500, 2000]
    theirs = [
        [0.9910393357276917, 0.20105037093162537, 0.0, 0.18380126357078552, 1.4588849544525146],
        [1.000671148300171, 0.19816254079341888, 0.0, 0.18786576390266418, 1.5009572505950888],
        [1.02732515335083, 0.22497709095478058, 0.0, 0.17471805214881897, 1.4493720531463623],
    ]
    features = torch.cat([network(small), network(large)])
    assert features.shape == (3, 2048)
    # The two of one file differ by up to 7e-7; a mistake in padding, pooling or scaling moves them by 1e-3 and more.
    torch.testing.assert_close(features[:, places], torch.tensor(theirs), atol=2e-5, rtol=0)


def test_the_features_file_is_named_and_checked(weights_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"save https://.*/weights-inception-2015-12-05-6726825d\.pth"):
        Inception.from_file(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth must have SHA-256 {WEIGHTS_SHA256}, got [0-9a-f]{{64}}\."):
        Inception.from_file(weights_file)


class Means(nn.Module):
    """The mean and the largest value of each channel, as features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        maps = images.double() / 255
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


def folder(root: Path, count: int, seed: int, highest: int) -> list[Path]:
    generator = torch.Generator().manual_seed(seed)
    paths = [root / f"{seed}" / f"{k:03}.png" for k in range(count)]
    for k, path in enumerate(paths):
        side = 4 if k % 2 else 6
        pixels = torch.randint(0, int(highest * (0.5 + k / count)), (3, side, side), generator=generator)
        write_png(pixels.to(torch.uint8), path)
    return paths


def by_hand(paths: list[Path], others: list[Path]) -> float:
    from overpaint.evaluation.images.files import read_image

    first, second = (torch.cat([Means()(read_image(path)[None]) for path in some]).numpy() for some in (paths, others))
    covariances = numpy.cov(first, rowvar=False), numpy.cov(second, rowvar=False)
    values, vectors = numpy.linalg.eigh(covariances[0])
    root = vectors * numpy.sqrt(values.clip(0)) @ vectors.T
    shared = numpy.sqrt(numpy.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    shift = ((first.mean(axis=0) - second.mean(axis=0)) ** 2).sum()
    return float(shift + numpy.trace(covariances[0]) + numpy.trace(covariances[1]) - 2 * shared)


def test_the_distance_is_the_closed_form_of_two_normals(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    real, drawn = folder(tmp_path, 30, 0, 160), folder(tmp_path, 25, 1, 100)
    expected = by_hand(real, drawn)
    for batch_size in (4, 100):
        assert frechet_distance(Means(), real, drawn, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Means(), real, real) == pytest.approx(0, abs=1e-6)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    paths = folder(tmp_path, 2, 0, 160)
    with pytest.raises(ValueError, match="drawn must hold at least 2 images, got 1"):
        frechet_distance(Means(), paths, paths[:1])


def test_without_its_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"needs the package torchmetrics.*pip install overpaint\[fid\]"):
        frechet_distance(Means(), [tmp_path] * 2, [tmp_path] * 2)
