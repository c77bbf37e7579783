"""ESD's targets, losses, gradients and parameter sets are those of the authors' code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from erasure.esd import erased_loss
from policy import DiffusionPolicy, select_parameters
from policy.weights import base_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "esd.json").read_text(encoding="utf-8"))
SETS = {
    "old": {"xattn": "xattn", "noxattn": "noxattn", "selfattn": "selfattn", "full": "full"},
    "new": {"esd-x": "xattn", "esd-x-strict": "xattn-kv", "esd-u": "noxattn-layers", "esd-all": "layers"},
}
"""Our name of each of theirs."""


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "esd.safetensors")


@pytest.fixture
def student() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", train="full", device="cpu")


def close(name: str, found: Tensor, tensors: dict[str, Tensor]) -> None:
    expected = tensors[name]
    error = (found - expected).abs().max() / expected.abs().max()
    assert error <= RECORD["tensors"][name]["tol"], (name, float(error))


@pytest.mark.parametrize("version", SETS)
def test_parameter_sets_are_theirs(version: str, student: DiffusionPolicy) -> None:
    for theirs, ours in SETS[version].items():
        assert set(select_parameters(student.unet, ours)) == set(RECORD["parameter_sets"][version][theirs]), theirs


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("weights", ["same", "perturbed"])
@pytest.mark.parametrize("form", ["old_eta1", "new_eta2", "new_eta2_from"])
def test_loss_and_gradients_are_theirs(
    case: int, weights: str, form: str, student: DiffusionPolicy, tensors: dict[str, Tensor]
) -> None:
    if weights == "perturbed":
        with torch.no_grad():
            for parameter in base_parameters(student.unet).values():
                parameter.mul_(1.01).add_(0.001)
    latents, timesteps = tensors[f"c{case}/x_t"], torch.tensor([RECORD["hyper"]["timesteps"][case]])
    source = tensors["emb_from"] if form == "new_eta2_from" else None
    loss = erased_loss(
        student, latents, timesteps, tensors["emb_concept"], tensors["emb_empty"], source=source, negative_guidance=1.0
    ).mean()
    close(f"c{case}/{weights}/{form}/loss", loss, tensors)

    loss.backward()
    for theirs, ours in SETS["old" if form == "old_eta1" else "new"].items():
        gradients = [p.grad for p in select_parameters(student.unet, ours).values() if p.grad is not None]
        norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
        close(f"c{case}/{weights}/{form}/grad_norm/{theirs}", norm, tensors)
    for name in tensors:
        prefix = f"c{case}/{weights}/{form}/grad/"
        if name.startswith(prefix):
            gradient = base_parameters(student.unet)[name.removeprefix(prefix)].grad
            assert gradient is not None
            close(name, gradient, tensors)


@pytest.mark.parametrize("case", [0, 1])
def test_predictions_of_the_original_model_are_theirs(
    case: int, student: DiffusionPolicy, tensors: dict[str, Tensor]
) -> None:
    timesteps = torch.tensor([RECORD["hyper"]["timesteps"][case]])
    with torch.no_grad():
        for name, text in (("eps_cond", "emb_concept"), ("eps_uncond", "emb_empty"), ("eps_from", "emb_from")):
            close(f"c{case}/{name}", student.predict_noise(tensors[f"c{case}/x_t"], timesteps, tensors[text]), tensors)
