import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from erasure.fusion import LowRank, around, fused, refining_factor
from erasure.phrases import placed
from erasure.uce import MATRICES, TextReader
from policy import DiffusionPolicy
from policy.weights import base_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD: dict[str, Any] = json.loads((GOLDEN / "mace.json").read_text(encoding="utf-8"))
HYPER, TOLERANCES = RECORD["hyper"], RECORD["tensors"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "mace.safetensors")


@pytest.fixture(scope="module")
def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu")


@pytest.fixture(scope="module")
def weights(golden_policy: DiffusionPolicy) -> dict[str, torch.Tensor]:
    named = base_parameters(golden_policy.unet)
    return {name: value.detach().double() for name, value in named.items() if name.endswith(MATRICES)}


def own_embeddings(policy: DiffusionPolicy) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Returns what the file stores, computed from the texts: around the concepts, around what they become, prior, f."""
    read_text = TextReader(policy)
    olds, news, prompts = [], [], []
    for concept, anchor in zip(HYPER["concepts"], HYPER["mapped_to"], strict=True):
        pairs = [
            (placed(policy, template, concept), placed(policy, template, anchor)) for template in HYPER["templates"]
        ]
        for old, new in pairs:
            first, second = around(old, new, read_text(old.text).tokens, read_text(new.text).tokens)
            olds.append(first)
            news.append(second)
        prompts.append(torch.cat([read_text(old.text).tokens for old, _ in pairs]))
    prior = torch.cat([read_text(caption).tokens for caption in HYPER["prior_captions"]])
    return torch.cat(olds), torch.cat(news), prior, prompts


def stored_embeddings(
    tensors: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    names = ("stage1/f_old", "stage1/f_new", "prior_embeddings", "stage3/f_concept0", "stage3/f_concept1")
    old, new, prior, *prompts = (tensors[name].double() for name in names)
    return old, new, prior, prompts


def check(name: str, value: torch.Tensor, tensors: dict[str, torch.Tensor], tolerance: str) -> None:
    expected = tensors[name]
    error = (value.float() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCES[name][tolerance], name


def test_tokens_around_the_concept_are_those_that_are_stored(
    golden_policy: DiffusionPolicy, tensors: dict[str, torch.Tensor]
) -> None:
    for mine, stored in zip(own_embeddings(golden_policy)[:3], stored_embeddings(tensors)[:3], strict=True):
        torch.testing.assert_close(mine, stored, rtol=0, atol=1e-5)  # of order 1
    for pair in RECORD["prompt_pairs"]:
        for concept, anchor in zip(HYPER["concepts"], HYPER["mapped_to"], strict=True):
            for template in HYPER["templates"]:
                if (template.format(concept), template.format(anchor)) != (pair["old"], pair["new"]):
                    continue
                numbers = torch.arange(77.0).unsqueeze(1)
                old, new = (placed(golden_policy, template, phrase) for phrase in (concept, anchor))
                first, second = around(old, new, numbers, numbers)
                assert first.flatten().tolist() == pair["old_positions"]
                assert second.flatten().tolist() == pair["new_positions"]


@pytest.mark.parametrize(("embeddings", "tolerance"), [("stored", "tol"), ("own", "tol_own_embeddings")])
@pytest.mark.parametrize("p", HYPER["p_stage1"])
def test_refined_weights_are_those_of_the_equations(
    golden_policy: DiffusionPolicy,
    weights: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    p: float,
    embeddings: str,
    tolerance: str,
) -> None:
    old, new, prior, _ = own_embeddings(golden_policy) if embeddings == "own" else stored_embeddings(tensors)
    factor = refining_factor(old, new, prior.T @ prior, prior_weight=p)
    prefix = f"stage1/p{p}/"
    assert {prefix + name for name in weights} == {name for name in tensors if name.startswith(prefix)}
    for name, weight in weights.items():
        check(prefix + name, weight + weight @ factor, tensors, tolerance)


@pytest.mark.parametrize(("embeddings", "tolerance"), [("stored", "tol"), ("own", "tol_own_embeddings")])
def test_fused_weights_are_those_of_the_equations(
    golden_policy: DiffusionPolicy,
    weights: dict[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    embeddings: str,
    tolerance: str,
) -> None:
    old, new, prior, prompts = own_embeddings(golden_policy) if embeddings == "own" else stored_embeddings(tensors)
    factor = refining_factor(old, new, prior.T @ prior, prior_weight=HYPER["p_stage1"][0])
    updates = [
        {
            name: LowRank(tensors[f"stage3/lora{index}/up/{name}"], tensors[f"stage3/lora{index}/down/{name}"])
            for name in weights
        }
        for index in range(2)
    ]
    changes = fused(
        weights,
        factor,
        updates,
        [tokens.T @ tokens for tokens in prompts],
        prior.T @ prior,
        prior_weight=HYPER["p_stage3"],
    )
    for name, weight in weights.items():
        check(f"stage3/fused/{name}", weight + changes[name], tensors, tolerance)
