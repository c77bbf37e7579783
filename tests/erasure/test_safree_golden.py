"""SAFREE against what the authors' own functions give on a tiny Stable Diffusion with random weights."""

import re

import pytest
import torch
from torch import Tensor

from erasure.methods.safree import NUDITY_CONCEPTS, SAFREEConfig
from erasure.methods.safree.prompt_filter import PromptFilter, projector, trigger_tokens
from erasure.methods.safree.reattention import damp_low_frequencies
from overpaint.policy import DiffusionPolicy
from tests.erasure.erasure_case import TINY_SD, ErasureCase

CASE = ErasureCase("safree")
HYPER = CASE.record["hyper"]
PROMPTS = HYPER["prompts"]


def config_for(kind: str) -> SAFREEConfig:
    """The settings with which the file counted steps, as it says beside them."""
    words = CASE.record["tensors"][f"n_grid_{kind}"]["what"]
    ((steepness, midpoint),) = re.findall(r"k=([\d.]+), t0=([\d.]+)", words)
    return SAFREEConfig(
        alpha=HYPER["alpha"],
        filtered_steps=HYPER["up_t"],
        steepness=float(steepness),
        midpoint=float(midpoint),
        concepts=tuple(HYPER["concepts"]),
    )


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, device="cpu")


@pytest.fixture(scope="module")
def prompt_filter(policy: DiffusionPolicy) -> PromptFilter:
    config = config_for("nudity")
    return PromptFilter(policy.prompts, config.concepts or (), alpha=config.alpha, last_step=config.last_step)


@pytest.fixture(scope="module")
def away(prompt_filter: PromptFilter) -> Tensor:
    """The projector away from the concepts."""
    return torch.eye(len(prompt_filter.concepts), dtype=torch.float64) - prompt_filter.concepts


def test_settings_for_nudity_are_those_of_the_authors() -> None:
    ours, theirs = SAFREEConfig(concepts=NUDITY_CONCEPTS), config_for("nudity")
    assert ours == theirs


@pytest.mark.filterwarnings("ignore::overpaint.policy.TruncatedPromptWarning")
def test_concepts_span_what_they_do_in_the_authors_code(prompt_filter: PromptFilter) -> None:
    pooled = prompt_filter.pooled(HYPER["concepts"])
    CASE.check("concept_pooled", pooled)
    CASE.check("concept_projector", projector(pooled))
    assert torch.equal(prompt_filter.concepts, projector(pooled))
    CASE.check("negative_prompt_embedding", prompt_filter.prompts([", ".join(HYPER["concepts"])]).tokens)


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_prompts_have_the_authors_tokens(index: int, policy: DiffusionPolicy, prompt_filter: PromptFilter) -> None:
    prompt = PROMPTS[index]["prompt"]
    assert policy.tokenizer.tokenize(prompt) == PROMPTS[index]["tokens"]
    ids, stored = prompt_filter.ids(prompt), CASE.tensors[f"p{index}/input_ids"][0].int().tolist()
    assert ids + [policy.tokenizer.pad_token_id] * (len(stored) - len(ids)) == stored


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_triggers_are_found_as_in_the_authors_code(index: int, prompt_filter: PromptFilter, away: Tensor) -> None:
    each, prefix = PROMPTS[index], f"p{index}"
    left_out = prompt_filter.without_each_token(each["prompt"])
    CASE.check(f"{prefix}/masked_pooled", left_out)
    CASE.check(f"{prefix}/masked_projector", projector(left_out))
    condition = torch.linalg.cond(left_out @ left_out.T).item()
    # Of a square in float32: off by twice what its vectors may be off by, as often as the weakest is weaker.
    allowed = 2 * CASE.record["tensors"][f"{prefix}/masked_pooled"]["tol"] * condition
    assert condition == pytest.approx(each["condition_number_of_gram_of_p_i"], rel=allowed)

    distances = (left_out @ away).norm(dim=1)
    CASE.check(f"{prefix}/distance", distances)
    CASE.check(f"{prefix}/trigger", trigger_tokens(distances, HYPER["alpha"]))
    for alpha in CASE.tensors.under(f"{prefix}/trigger_alpha"):
        CASE.check(f"{prefix}/trigger_alpha{alpha}", trigger_tokens(distances, float(alpha)))
    margin = each["smallest_relative_margin_of_the_trigger_test"]
    if len(distances) > 1:
        others = (distances.sum() - distances) / (len(distances) - 1)
        found = ((distances - (1 + HYPER["alpha"]) * others) / distances).abs().min().item()
        # A difference of two distances: each may be off by its tolerance, which is far below the margin.
        allowed = 2 * CASE.record["tensors"][f"{prefix}/distance"]["tol"] * (distances.max() / distances.min()).item()
        assert found == pytest.approx(margin, rel=0, abs=2 * allowed)
        assert margin > 10 * allowed
    else:
        assert margin is None  # it has no others to be compared with


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_prompts_are_filtered_as_in_the_authors_code(index: int, prompt_filter: PromptFilter, away: Tensor) -> None:
    each, prefix = PROMPTS[index], f"p{index}"
    embedding, filtered = prompt_filter.prompts([each["prompt"]]).tokens, prompt_filter(each["prompt"])
    CASE.check(f"{prefix}/embedding", embedding)
    span = projector(prompt_filter.without_each_token(each["prompt"]))
    CASE.check(f"{prefix}/all_projected", embedding.double() @ (away @ span).T)
    CASE.check(f"{prefix}/trigger", filtered.triggers)
    CASE.check(f"{prefix}/filtered_embedding", filtered.embedding.unsqueeze(0))
    CASE.check(f"{prefix}/beta", torch.tensor(filtered.change))
    assert filtered.change == pytest.approx(each["beta"], rel=CASE.record["tensors"][f"{prefix}/beta"]["tol"])
    CASE.check(f"{prefix}/n", torch.tensor(filtered.last_step))
    assert filtered.last_step == each["n"]
    CASE.check(f"{prefix}/n_artist", torch.tensor(config_for("artist").last_step(filtered.change)))


@pytest.mark.parametrize("kind", sorted(CASE.tensors.under("n_grid_")))
def test_steps_are_counted_as_in_the_authors_code(kind: str) -> None:
    config = config_for(kind)
    steps = [config.last_step(change) for change in CASE.tensors["beta_grid"].tolist()]
    CASE.check(f"n_grid_{kind}", torch.tensor(steps))


@pytest.mark.parametrize("name", sorted(CASE.tensors.under("lra/out_")))
def test_low_frequencies_are_damped_as_in_the_authors_code(name: str) -> None:
    kind, factor = name.split("_s")
    away_branch, branch, original = CASE.tensors["lra/x"]
    damped = damp_low_frequencies(branch[None], original[None], float(factor), replace=kind == "released")
    CASE.check(f"lra/out_{name}", torch.stack([away_branch, damped[0], original]))
