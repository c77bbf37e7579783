import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from erasure.ac import AC, ACConfig, Examples
from policy import DiffusionPolicy
from policy.weights import base_parameters, select_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "ac.json").read_text(encoding="utf-8"))
HYPER = RECORD["hyper"]
SETS = {"cross-attn": ("xattn-kv", "cross_attn"), "attn": ("attn", "attn")}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ac.safetensors")


@pytest.fixture
def student() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu", train="attn")


def check(name: str, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    expected = tensors[name]
    assert value.shape == expected.shape
    assert (value.detach() - expected).abs().max() / expected.abs().max() <= RECORD["tensors"][name]["tol"], name


def stored(policy: DiffusionPolicy, tensors: dict[str, torch.Tensor]) -> Examples:
    timesteps = tensors["timesteps"].long()
    return Examples(
        latents=policy.add_noise(tensors["latents"], tensors["noise"], timesteps),
        noise=tensors["noise"],
        timesteps=timesteps,
        captions=HYPER["target_captions"] + HYPER["prior_captions"],
        anchors=HYPER["anchor_captions"],
        mask=tensors["mask"][:2],
    )


def test_noised_latents_and_predictions_are_those_of_the_authors_code(
    student: DiffusionPolicy, tensors: dict[str, torch.Tensor]
) -> None:
    examples = stored(student, tensors)
    check("noisy_latents", examples.latents, tensors)
    captions = {"pred_target": HYPER["target_captions"], "pred_anchor": HYPER["anchor_captions"]}
    captions["pred_prior"] = HYPER["prior_captions"]
    for name, texts in captions.items():
        rows = slice(2, 4) if name == "pred_prior" else slice(2)
        prediction = student.predict_noise(examples.latents[rows], examples.timesteps[rows], student.encode(texts))
        check(name, prediction, tensors)


@pytest.mark.parametrize("case", sorted(HYPER["prior_weight"]))
def test_loss_and_gradients_are_those_of_the_authors_code(
    case: str, student: DiffusionPolicy, tensors: dict[str, torch.Tensor]
) -> None:
    weight = HYPER["prior_weight"][case]
    method = AC(ACConfig(prior_weight=weight, detach_start=case != "no_sos_detach"))
    erased, prior = method.losses(student, stored(student, tensors))
    loss = (erased + weight * prior).mean()
    loss.backward()
    check(f"{case}/loss", loss, tensors)
    check(f"{case}/prior_loss", prior.mean(), tensors)

    gradients: dict[str, Any] = {name: value.grad for name, value in base_parameters(student.unet).items()}
    for name, (ours, theirs) in SETS.items():
        names = select_parameters(student.unet, ours)
        assert set(names) == set(RECORD["parameter_sets"][theirs])
        norm = torch.stack([gradients[key].square().sum() for key in names]).sum().sqrt()
        check(f"{case}/grad_norm/{name}", norm, tensors)
    for name in tensors:
        if name.startswith(f"{case}/grad/"):
            check(name, gradients[name.removeprefix(f"{case}/grad/")], tensors)


def test_every_expected_tensor_is_compared() -> None:
    expected = {name for name, about in RECORD["tensors"].items() if about["kind"] == "expected"}
    compared = {"noisy_latents", "pred_target", "pred_anchor", "pred_prior"}
    for case in HYPER["prior_weight"]:
        compared |= {f"{case}/{part}" for part in ("loss", "prior_loss", "grad_norm/cross-attn", "grad_norm/attn")}
    assert {name for name in expected if "/grad/" not in name} == compared
