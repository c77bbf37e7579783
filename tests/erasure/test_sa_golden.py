"""Selective amnesia against the authors' code, run on the golden model."""

import re
from collections.abc import Callable, Generator

import pytest
import torch
from golden_case import GoldenCase
from torch import Tensor

from erasure.methods.sa.fisher import Sums, changes, noise_errors, start_of, watched_weights
from erasure.methods.sa.sa import SA, Examples, SAConfig, weighted_change
from overpaint.policy import DiffusionPolicy, select_parameters
from overpaint.policy.types import PerSample
from tests.erasure.erasure_case import TINY_SD, ErasureCase, perturb

CASE = ErasureCase("sa")
HYPER = CASE.record["hyper"]
KINDS = ("forget", "remember")
SETS, REFERENCE = HYPER["parameter_sets"].split(" as in ")
"""Names of parameter sets, and where they are written out: "noxattn/xattn/full as in esd.json (old)"."""


def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, train="full", device="cpu")


def test_fisher_information_is_that_of_the_authors_code(
    in_double: Callable[[DiffusionPolicy], DiffusionPolicy],
) -> None:
    policy = in_double(golden_policy())
    weights = watched_weights(policy)
    sums = Sums.zeros(weights)
    given = CASE.tensors.under("fim/")
    timesteps, captions = given["timesteps"].long(), HYPER["fim_captions"]
    assert timesteps.tolist() == HYPER["timesteps_fim"]
    conditioning = policy.encode(captions)
    torch.testing.assert_close(conditioning.tokens, given["embeddings"], rtol=0, atol=1e-5)  # of order 1
    (chunks,) = re.findall(r"accumulated in (\d+) chunks", CASE.record["formula"])
    for image, latents in enumerate(given["latents"]):

        def losses(image: int = image, latents: Tensor = latents) -> Generator[PerSample]:
            for part in torch.arange(len(timesteps)).chunk(int(chunks)):
                noise = given["noise"][image, part]
                prompt = conditioning[image : image + 1].expand(len(part))
                yield noise_errors(policy, latents.expand_as(noise), noise, timesteps[part], prompt)

        sums.add(list(weights.values()), losses(), len(timesteps))
    fisher = sums.information(len(captions), 1.0)

    assert fisher.keys() == set(given.under("value/"))
    for name, value in fisher.items():
        CASE.check(f"fim/value/{name}", value)
    CASE.check("fim/sum", torch.stack([value.sum(dtype=torch.float64) for value in fisher.values()]).sum())


@pytest.fixture(scope="module")
def student() -> tuple[DiffusionPolicy, dict[str, Tensor]]:
    """The golden model, changed as the record says and differentiated, and the values that it must have."""
    policy = golden_policy()
    perturb(policy, HYPER["student"])
    method = SA(SAConfig(penalty=HYPER["lambda_"], replay_weight=HYPER["gamma"]))
    given = CASE.tensors.under("loss/")
    both = [given[f"{kind}_{part}"] for part in ("latents", "noise", "timesteps") for kind in KINDS]
    examples = Examples(
        torch.cat(both[:2]), torch.cat(both[2:4]), torch.cat(both[4:]).long(),
        HYPER["forget_captions"] + HYPER["remember_captions"],
    )  # fmt: skip
    fisher = {name: CASE.tensors[f"fim/value/{name}"] for name in watched_weights(policy)}
    forget, remember = (errors.mean() for errors in method.errors(policy, examples))
    penalty = method.config.penalty * weighted_change(fisher, changes(policy, start_of(policy)))
    total = forget + method.config.replay_weight * remember + penalty
    total.backward()
    return policy, {"forget_term": forget, "remember_term": remember, "penalty": penalty, "total": total}


@pytest.mark.parametrize("term", ["forget_term", "remember_term", "penalty", "total"])
def test_terms_of_the_loss_are_those_of_the_authors_code(
    term: str, student: tuple[DiffusionPolicy, dict[str, Tensor]]
) -> None:
    CASE.check(f"loss/{term}", student[1][term])


@pytest.mark.parametrize("train", SETS.split("/"))
def test_gradient_norms_are_those_of_the_authors_code(
    train: str, student: tuple[DiffusionPolicy, dict[str, Tensor]]
) -> None:
    file, version = re.findall(r"\w+", REFERENCE)[0], re.findall(r"\((\w+)\)", REFERENCE)[0]
    chosen = select_parameters(student[0].unet, train)
    assert set(chosen) == set(GoldenCase(file).record["parameter_sets"][version][train])
    gradients = [parameter.grad for parameter in chosen.values()]
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    assert len(squares) == len(gradients)
    CASE.check(f"loss/grad_norm/{train}", torch.stack(squares).sum().sqrt())


def test_a_gradient_is_that_of_the_authors_code(student: tuple[DiffusionPolicy, dict[str, Tensor]]) -> None:
    for name in CASE.tensors.under("loss/grad/"):
        gradient = student[0].unet.get_parameter(name).grad
        assert gradient is not None
        CASE.check(f"loss/grad/{name}", gradient)
