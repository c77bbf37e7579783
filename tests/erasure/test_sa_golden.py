"""Selective amnesia against the authors' code, run on the golden model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erasure.fisher import Sums, changes, noise_errors, start_of, watched_weights
from erasure.sa import SA, Examples, SAConfig, weighted_change
from policy import DiffusionPolicy, select_parameters
from policy.types import PerSample

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "sa.json").read_text(encoding="utf-8"))
HYPER = RECORD["hyper"]
CHUNKS = 4
KINDS = ("forget", "remember")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "sa.safetensors")


def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", train="full", device="cpu")


def check(name: str, value: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    expected = tensors[name]
    error = (value.detach() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= RECORD["tensors"][name]["tol"], name


def test_fisher_information_is_that_of_the_authors_code(tensors: dict[str, torch.Tensor]) -> None:
    policy = golden_policy()
    weights = watched_weights(policy)
    sums = Sums.zeros(weights)
    timesteps, embeddings = tensors["fim/timesteps"].long(), policy.encode(HYPER["fim_captions"])
    assert timesteps.tolist() == HYPER["timesteps_fim"]
    torch.testing.assert_close(embeddings, tensors["fim/embeddings"], rtol=0, atol=1e-5)  # of order 1
    for image, latents in enumerate(tensors["fim/latents"]):

        def loss(part: torch.Tensor, image: int = image, latents: torch.Tensor = latents) -> PerSample:
            noise = tensors["fim/noise"][image, part]
            prompt = embeddings[image].expand(len(part), -1, -1)
            return noise_errors(policy, latents.expand_as(noise), noise, timesteps[part], prompt)

        parts = torch.arange(len(timesteps)).chunk(CHUNKS)
        sums.add(list(weights.values()), (loss(part) for part in parts), len(timesteps))
    fisher = sums.information(len(tensors["fim/latents"]), 1.0)

    assert {f"fim/value/{name}" for name in fisher} == {name for name in tensors if name.startswith("fim/value/")}
    for name, value in fisher.items():
        check(f"fim/value/{name}", value, tensors)
    check("fim/sum", torch.stack([value.sum(dtype=torch.float64) for value in fisher.values()]).sum(), tensors)


@pytest.fixture(scope="module")
def student(tensors: dict[str, torch.Tensor]) -> tuple[DiffusionPolicy, dict[str, torch.Tensor]]:
    """The golden model, changed as the record says and differentiated, and the values that it must have."""
    policy = golden_policy()
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.copy_(1.01 * parameter + 0.001)
    method = SA(SAConfig(penalty=HYPER["lambda_"], replay_weight=HYPER["gamma"]))
    both = [tensors[f"loss/{kind}_{part}"] for part in ("latents", "noise", "timesteps") for kind in KINDS]
    examples = Examples(
        torch.cat(both[:2]), torch.cat(both[2:4]), torch.cat(both[4:]).long(),
        HYPER["forget_captions"] + HYPER["remember_captions"],
    )  # fmt: skip
    fisher = {name: tensors[f"fim/value/{name}"] for name in watched_weights(policy)}
    forget, remember = (errors.mean() for errors in method.errors(policy, examples))
    penalty = method.config.penalty * weighted_change(fisher, changes(policy, start_of(policy)))
    total = forget + method.config.replay_weight * remember + penalty
    total.backward()
    return policy, {"forget_term": forget, "remember_term": remember, "penalty": penalty, "total": total}


@pytest.mark.parametrize("term", ["forget_term", "remember_term", "penalty", "total"])
def test_terms_of_the_loss_are_those_of_the_authors_code(
    term: str, student: tuple[DiffusionPolicy, dict[str, torch.Tensor]], tensors: dict[str, torch.Tensor]
) -> None:
    check(f"loss/{term}", student[1][term], tensors)


@pytest.mark.parametrize("train", ["noxattn", "xattn", "full"])
def test_gradient_norms_are_those_of_the_authors_code(
    train: str, student: tuple[DiffusionPolicy, dict[str, torch.Tensor]], tensors: dict[str, torch.Tensor]
) -> None:
    gradients = [parameter.grad for parameter in select_parameters(student[0].unet, train).values()]
    squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
    assert len(squares) == len(gradients)
    check(f"loss/grad_norm/{train}", torch.stack(squares).sum().sqrt(), tensors)


def test_a_gradient_is_that_of_the_authors_code(
    student: tuple[DiffusionPolicy, dict[str, torch.Tensor]], tensors: dict[str, torch.Tensor]
) -> None:
    (name,) = (name for name in tensors if name.startswith("loss/grad/"))
    gradient = student[0].unet.get_parameter(name.removeprefix("loss/grad/")).grad
    assert gradient is not None
    check(name, gradient, tensors)
