"""SAFREE against what the authors' own functions give on a tiny Stable Diffusion with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erasure.prompt_filter import PromptFilter, projector, trigger_tokens
from erasure.reattention import damp_low_frequencies
from erasure.safree import NUDITY_CONCEPTS, SAFREEConfig
from policy import DiffusionPolicy

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "safree.json").read_text(encoding="utf-8"))
EXPECTED = sorted(name for name, about in RECORD["tensors"].items() if about["kind"] == "expected")
SETTINGS = SAFREEConfig()
ARTISTS = SAFREEConfig(steepness=3.5, midpoint=5.5)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "safree.safetensors")


@pytest.fixture(scope="module")
def prompt_filter() -> PromptFilter:
    policy = DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu")
    return PromptFilter(policy.prompts, NUDITY_CONCEPTS, alpha=SETTINGS.alpha, last_step=SETTINGS.last_step)


@pytest.fixture(scope="module")
def computed(prompt_filter: PromptFilter, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns everything that is stored, computed anew."""
    concepts = prompt_filter.pooled(NUDITY_CONCEPTS)
    result = {
        "concept_pooled": concepts,
        "concept_projector": projector(concepts),
        "negative_prompt_embedding": prompt_filter.prompts([", ".join(NUDITY_CONCEPTS)]),
    }
    away = torch.eye(len(prompt_filter.concepts), dtype=torch.float64) - prompt_filter.concepts
    for index, each in enumerate(RECORD["hyper"]["prompts"]):
        prompt = each["prompt"]
        embedding, left_out = prompt_filter.prompts([prompt]), prompt_filter.without_each_token(prompt)
        distances = (left_out @ away).norm(dim=1)
        filtered = prompt_filter(prompt)
        tensors = {
            "embedding": embedding,
            "masked_pooled": left_out,
            "masked_projector": projector(left_out),
            "distance": distances,
            "all_projected": embedding.double() @ (away @ projector(left_out)).T,
            "trigger": filtered.triggers,
            "filtered_embedding": filtered.embedding.unsqueeze(0),
            "beta": torch.tensor(filtered.change),
            "n": torch.tensor(filtered.last_step),
            "n_artist": torch.tensor(ARTISTS.last_step(filtered.change)),
            **{f"trigger_alpha{alpha}": trigger_tokens(distances, alpha) for alpha in (0.0, 0.1, 0.3)},
        }
        result |= {f"p{index}/{name}": tensor for name, tensor in tensors.items()}
    for name, config in (("nudity", SETTINGS), ("artist", ARTISTS)):
        steps = [config.last_step(change) for change in stored["beta_grid"].tolist()]
        result[f"n_grid_{name}"] = torch.tensor(steps)
    away_branch, branch, original = stored["lra/x"]
    for kind in ("released", "scaled"):
        for factor in (0.9, 0.2):
            damped = damp_low_frequencies(branch[None], original[None], factor, replace=kind == "released")
            result[f"lra/out_{kind}_s{factor}"] = torch.stack([away_branch, damped[0], original])
    return result


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_those_of_the_authors_code(
    name: str, computed: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]
) -> None:
    assert computed[name].shape == stored[name].shape
    error = (computed[name].float() - stored[name]).abs().max()
    assert error <= RECORD["tensors"][name]["tol"] * stored[name].abs().max()


def test_settings_are_those_of_the_authors(prompt_filter: PromptFilter, stored: dict[str, torch.Tensor]) -> None:
    assert list(NUDITY_CONCEPTS) == RECORD["hyper"]["concepts"]
    assert (SETTINGS.alpha, SETTINGS.filtered_steps) == (RECORD["hyper"]["alpha"], RECORD["hyper"]["up_t"])
    for index, each in enumerate(RECORD["hyper"]["prompts"]):
        ids = prompt_filter.ids(each["prompt"])
        assert ids == stored[f"p{index}/input_ids"][0, : len(ids)].int().tolist()
