import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erasure import UCE, UCEConfig
from erasure.uce import MATRICES
from policy import DiffusionPolicy
from policy.weights import base_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "uce.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "uce.safetensors")


@pytest.fixture
def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu")


@pytest.mark.parametrize("name", sorted(RECORD["cases"]))
def test_edited_weights_are_those_of_the_authors_code(
    name: str, golden_policy: DiffusionPolicy, tensors: dict[str, torch.Tensor]
) -> None:
    case = RECORD["cases"][name]
    uce = UCE(UCEConfig(variant="paper" if name.startswith("a") else "released", regularization=case["lambda_"]))
    pairs = list(zip(case["erase"], case["guide"], strict=True))
    delta = uce.edit(golden_policy, pairs, preserve=case["preserve"], strength=case["erase_scale"])
    delta.apply(golden_policy.unet)

    edited = {k: v.detach() for k, v in base_parameters(golden_policy.unet).items() if k.endswith(MATRICES)}
    assert {f"{name}/{key}" for key in edited} == {key for key in tensors if key.startswith(f"{name}/")}
    for key, weight in edited.items():
        expected = tensors[f"{name}/{key}"]
        error = (weight - expected).abs().max() / expected.abs().max()
        assert error <= RECORD["tensors"][f"{name}/{key}"]["tol"], key


def test_text_embeddings_are_those_of_the_authors_code(
    golden_policy: DiffusionPolicy, tensors: dict[str, torch.Tensor]
) -> None:
    for key, text in RECORD["texts"].items():
        torch.testing.assert_close(golden_policy.encode([text]), tensors[key], rtol=0, atol=1e-5)  # of order 1
