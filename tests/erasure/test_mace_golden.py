"""MACE's two closed forms are those of its equations, computed by someone else."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from erasure.methods.keys_and_values import TextReader, keys_and_values
from erasure.methods.mace.fusion import LowRank, around, fused, refining_factor
from erasure.phrases import placed
from overpaint.policy import DiffusionPolicy
from tests.erasure.erasure_case import TINY_SD, ErasureCase

CASE = ErasureCase("mace")
HYPER, CHECKS = CASE.record["hyper"], CASE.record["checks"]
WORDS = list(zip(HYPER["concepts"], HYPER["mapped_to"], strict=True))
TOLERANCES = {"stored": "tol", "own": "tol_own_embeddings"}
"""Of what is computed from the file's embeddings, and from those of its texts."""

OTHER_SOLVER = 100
"""Times the file's own difference between two solvers, which is rounding: another on each processor."""


class Vectors(NamedTuple):
    """Embeddings of tokens, in float64."""

    old: Tensor
    new: Tensor
    prior: Tensor
    prompts: list[Tensor]


@pytest.fixture(scope="module")
def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, device="cpu")


@pytest.fixture(scope="module")
def weights(golden_policy: DiffusionPolicy) -> dict[str, Tensor]:
    return keys_and_values(golden_policy)


def own(policy: DiffusionPolicy) -> Vectors:
    """What the file stores, computed from the texts."""
    read_text = TextReader(policy)
    olds, news, prompts = [], [], []
    for concept, anchor in WORDS:
        pairs = [(placed(policy, words, concept), placed(policy, words, anchor)) for words in HYPER["templates"]]
        for old, new in pairs:
            first, second = around(old, new, read_text(old.text).tokens, read_text(new.text).tokens)
            olds.append(first)
            news.append(second)
        prompts.append(torch.cat([read_text(old.text).tokens for old, _ in pairs]))
    prior = torch.cat([read_text(caption).tokens for caption in HYPER["prior_captions"]])
    return Vectors(torch.cat(olds), torch.cat(news), prior, prompts)


def stored() -> Vectors:
    old, new, prior = (CASE.tensors[name].double() for name in ("stage1/f_old", "stage1/f_new", "prior_embeddings"))
    return Vectors(old, new, prior, [CASE.tensors[f"stage3/f_concept{index}"].double() for index in range(len(WORDS))])


def vectors(policy: DiffusionPolicy, embeddings: str) -> Vectors:
    return own(policy) if embeddings == "own" else stored()


def update_of(index: int, name: str) -> LowRank:
    factors = CASE.tensors.under(f"stage3/lora{index}/")
    return LowRank(factors[f"up/{name}"], factors[f"down/{name}"])


def fused_changes(weights: dict[str, Tensor], texts: Vectors) -> dict[str, Tensor]:
    moment = texts.prior.T @ texts.prior
    return fused(
        weights,
        refining_factor(texts.old, texts.new, moment, prior_weight=HYPER["p_stage1"][0]),
        [{name: update_of(index, name) for name in weights} for index in range(len(WORDS))],
        [tokens.T @ tokens for tokens in texts.prompts],
        moment,
        prior_weight=HYPER["p_stage3"],
    )


def check_system(system: Tensor, stage: str) -> None:
    """Compares its condition, which rounding changes by its own multiple of the precision."""
    expected = CHECKS[f"{stage}/condition"]
    rounding = len(system) * expected * torch.finfo(system.dtype).eps
    assert torch.linalg.cond(system).item() == pytest.approx(expected, rel=rounding)


def solved(seen: Tensor, wanted: Tensor) -> Tensor:
    """The weight for which `weight @ seen` is nearest to what is wanted, without the normal equations."""
    return torch.linalg.lstsq(seen, wanted, driver="gelsd").solution.T


def test_tokens_around_the_concept_are_those_that_are_stored(golden_policy: DiffusionPolicy) -> None:
    mine, theirs = own(golden_policy), stored()
    for name in ("old", "new", "prior"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=1e-5)  # of order 1
    for first, second in zip(mine.prompts, theirs.prompts, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_tokens_are_paired_by_their_places_in_both_texts(golden_policy: DiffusionPolicy) -> None:
    numbers = torch.arange(float(golden_policy.prompts.room)).unsqueeze(1)
    places = [(template, *words) for words in WORDS for template in HYPER["templates"]]
    for pair, (template, *phrases) in zip(CASE.record["prompt_pairs"], places, strict=True):
        old, new = (placed(golden_policy, template, phrase) for phrase in phrases)
        assert (old.text, new.text) == (pair["old"], pair["new"])
        first, second = around(old, new, numbers, numbers)
        assert first.flatten().tolist() == pair["old_positions"]
        assert second.flatten().tolist() == pair["new_positions"]


@pytest.mark.parametrize("embeddings", TOLERANCES)
@pytest.mark.parametrize("p", HYPER["p_stage1"])
def test_refined_weights_are_those_of_the_equations(
    golden_policy: DiffusionPolicy, weights: dict[str, Tensor], p: float, embeddings: str
) -> None:
    assert HYPER["lamb"] == 0  # a pull towards the original weights, which the paper does not have
    texts = vectors(golden_policy, embeddings)
    factor = refining_factor(texts.old, texts.new, texts.prior.T @ texts.prior, prior_weight=p)
    assert weights.keys() == set(CASE.tensors.under(f"stage1/p{p}/"))
    for name, weight in weights.items():
        CASE.check(f"stage1/p{p}/{name}", weight + weight @ factor, TOLERANCES[embeddings])
    edit = max((weight @ factor).abs().max().item() for weight in weights.values())
    allowed = max(CASE.allowed(f"stage1/p{p}/{name}", TOLERANCES[embeddings]) for name in weights)
    assert edit == pytest.approx(CHECKS[f"stage1/p{p}/max_abs_edit"], rel=0, abs=allowed)


@pytest.mark.parametrize("p", HYPER["p_stage1"])
def test_refined_weights_are_those_of_a_solver_of_least_squares(weights: dict[str, Tensor], p: float) -> None:
    texts = stored()
    moment = texts.prior.T @ texts.prior
    factor = refining_factor(texts.old, texts.new, moment, prior_weight=p)
    check_system(texts.old.T @ texts.old + p * moment, f"stage1/p{p}")
    seen = torch.cat([texts.old, p**0.5 * texts.prior])
    for weight in weights.values():
        wanted = torch.cat([texts.new @ weight.T, p**0.5 * texts.prior @ weight.T])
        difference = (solved(seen, wanted) - weight - weight @ factor).abs().max()
        assert difference <= OTHER_SOLVER * CHECKS[f"stage1/p{p}/lstsq_max_abs_diff"]


@pytest.mark.parametrize("embeddings", TOLERANCES)
def test_fused_weights_are_those_of_the_equations(
    golden_policy: DiffusionPolicy, weights: dict[str, Tensor], embeddings: str
) -> None:
    changes = fused_changes(weights, vectors(golden_policy, embeddings))
    assert weights.keys() == set(CASE.tensors.under("stage3/fused/"))
    for name, weight in weights.items():
        CASE.check(f"stage3/fused/{name}", weight + changes[name], TOLERANCES[embeddings])


def test_fused_weights_are_those_of_a_solver_of_least_squares(weights: dict[str, Tensor]) -> None:
    texts, p = stored(), HYPER["p_stage3"]
    changes = fused_changes(weights, texts)
    check_system(sum((f.T @ f for f in texts.prompts), p * texts.prior.T @ texts.prior), "stage3")
    factor = refining_factor(texts.old, texts.new, texts.prior.T @ texts.prior, prior_weight=HYPER["p_stage1"][0])
    seen = torch.cat([*texts.prompts, p**0.5 * texts.prior])
    for name, weight in weights.items():
        updates = [update_of(index, name) for index in range(len(WORDS))]
        own_weights = [weight + weight @ factor + update.up.double() @ update.down.double() for update in updates]
        answers = [f @ each.T for f, each in zip(texts.prompts, own_weights, strict=True)]
        wanted = torch.cat([*answers, p**0.5 * texts.prior @ weight.T])
        difference = (solved(seen, wanted) - weight - changes[name]).abs().max()
        assert difference <= OTHER_SOLVER * CHECKS["stage3/lstsq_max_abs_diff"]
