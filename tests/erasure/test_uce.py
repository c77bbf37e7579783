from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN

from erasure import UCE, Concept, UCEConfig
from erasure.methods.uce import EmbeddedText, TextReader, aligned_spans, editing_factor
from overpaint.policy import DiffusionPolicy
from overpaint.policy.weights import base_parameters

STRIPED = Concept(name="stripes", phrases=("striped", "with stripes"), preserve=("", "dotted"))
VALUES = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"


def answer(policy: DiffusionPolicy, delta: torch.Tensor, text: str) -> float:
    """How far the values of a text's tokens move, relative to their size."""
    tokens = TextReader(policy)(text).tokens.float()
    weight = base_parameters(policy.unet)[VALUES].detach()
    return ((tokens @ delta.T).norm() / (tokens @ weight.T).norm()).item()


def test_factor_of_one_pair_is_the_hand_computed_one() -> None:
    # One old vector (1, 0) to become (0, 1), lambda 1, scale 3: A = diag(4, 1), change = 3 [[-1, 0], [1, 0]].
    old, new = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    factor = editing_factor(old, new, torch.zeros(0, 2), erase_scale=3.0, preserve_scale=1.0, regularization=1.0)
    torch.testing.assert_close(factor, torch.tensor([[-0.75, 0.0], [0.75, 0.0]]), rtol=1e-6, atol=0)


def test_factor_solves_the_papers_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, kept = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (3, 3, 4))
    weight = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    factor = editing_factor(old, new, kept, erase_scale=2.0, preserve_scale=0.3, regularization=0.5)
    edited = (weight + weight @ factor).requires_grad_(True)
    loss = 2.0 * (old @ edited.T - new @ weight.T).square().sum() + 0.5 * (edited - weight).square().sum()
    (loss + 0.3 * (kept @ (edited - weight).T).square().sum()).backward()
    assert edited.grad is not None
    assert edited.grad.abs().max() < 1e-10  # at the minimum, where entries of the loss are of order 10


def test_whole_spans_run_from_each_last_word_to_the_end_of_the_longer_text() -> None:
    tokens = torch.arange(6.0, dtype=torch.float64).unsqueeze(1)
    old, new = aligned_spans(EmbeddedText(tokens, 1, tokens), EmbeddedText(tokens, 3, tokens), whole=True)
    assert (old.flatten().tolist(), new.flatten().tolist()) == ([1, 2, 3], [3, 4, 5])


def test_single_token_spans_are_the_two_last_words() -> None:
    tokens = torch.arange(6.0, dtype=torch.float64).unsqueeze(1)
    old, new = aligned_spans(EmbeddedText(tokens, 1, tokens), EmbeddedText(tokens, 0, tokens), whole=False)
    assert (old.flatten().tolist(), new.flatten().tolist()) == ([1], [0])


@pytest.mark.parametrize(("text", "last_word"), [("", 0), (" ", 0), ("red", 1), ("a red circle", 3)])
def test_last_word_is_the_position_before_the_end_token(policy: DiffusionPolicy, text: str, last_word: int) -> None:
    assert TextReader(policy)(text).last_word == last_word


@pytest.mark.filterwarnings("ignore::overpaint.policy.TruncatedPromptWarning")
def test_a_text_longer_than_the_encoder_ends_before_its_last_position(policy: DiffusionPolicy) -> None:
    read = TextReader(policy)("red " * 100)
    assert read.last_word == len(read.tokens) - 2


def test_stronger_erasing_changes_more(policy: DiffusionPolicy) -> None:
    norms = [UCE().erase(policy, STRIPED, strength).delta.tensors[VALUES].norm() for strength in (0.1, 1.0, 10.0)]
    assert norms[0] < norms[1] < norms[2]


def test_erased_phrase_answers_as_its_anchor(policy: DiffusionPolicy) -> None:
    # One token each, so that the system can be solved exactly.
    uce = UCE(UCEConfig(variant="released"))
    delta = uce.erase(policy, STRIPED, strength=1e6).delta.tensors[VALUES]
    weight = base_parameters(policy.unet)[VALUES].detach()
    old, new = aligned_spans(TextReader(policy)("striped"), TextReader(policy)(" "), whole=False)
    torch.testing.assert_close(
        old.float() @ (weight + delta).T, new.float() @ weight.T, rtol=0, atol=1e-4
    )  # of order 1


def test_preserved_text_moves_less_than_it_would_unpreserved(policy: DiffusionPolicy) -> None:
    kept = UCE(UCEConfig(preserve_scale=1000.0)).erase(policy, STRIPED).delta.tensors[VALUES]
    bare = UCE().erase(policy, Concept(name="stripes", phrases=STRIPED.phrases)).delta.tensors[VALUES]
    assert answer(policy, kept, "dotted") < 0.1 * answer(policy, bare, "dotted")


def test_paper_variant_preserves_the_empty_text_unasked(policy: DiffusionPolicy) -> None:
    without = Concept(name="stripes", phrases=STRIPED.phrases, preserve=("dotted",))
    listed = Concept(name="stripes", phrases=STRIPED.phrases, preserve=("", "dotted", "dotted"))
    assert torch.equal(UCE()(policy, without).tensors[VALUES], UCE()(policy, listed).tensors[VALUES])


def test_released_variant_edits_less(policy: DiffusionPolicy) -> None:
    paper, released = UCE()(policy, STRIPED), UCE(UCEConfig(variant="released"))(policy, STRIPED)
    assert released.tensors[VALUES].norm() < 0.5 * paper.tensors[VALUES].norm()


def test_half_precision_policy_is_edited_as_its_float32_copy(
    make_policy: Callable[..., DiffusionPolicy], pipeline_dir: Path
) -> None:
    half = make_policy(dtype=torch.bfloat16)
    full = make_policy(dtype=torch.bfloat16)
    full.unet.float()
    full.text_encoder.float()
    torch.testing.assert_close(
        UCE()(half, STRIPED).tensors, UCE()(full, STRIPED).tensors, rtol=0, atol=1e-6
    )  # differences are of order 0.1; a bfloat16 text encoder is off by 1e-2


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_impossible_strength_is_refused(policy: DiffusionPolicy, strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be (at least 0|a finite number), got"):
        UCE().erase(policy, STRIPED, strength)


def test_edit_without_pairs_is_refused(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="pairs must hold at least one text"):
        UCE().edit(policy, [], preserve=[""])


@pytest.mark.parametrize(
    ("field", "value"),
    [("variant", "old"), ("preserve_scale", -0.1), ("regularization", 0.0), ("regularization", float("nan"))],
)
def test_impossible_setting_is_refused(field: str, value: object) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"UCEConfig\.{field} must be .* got"):
        UCEConfig(**settings)


PROJECTIONS = {"context_embedder": "tokens", "time_text_embed.text_embedder.linear_1": "pooled"}
"""Layers of FLUX that a text alone goes into, and which part of it."""


@pytest.mark.parametrize("layer", PROJECTIONS)
def test_flux_projections_are_the_minimum_of_the_papers_loss(layer: str) -> None:
    policy = DiffusionPolicy.from_pretrained(GOLDEN / "flow" / "tiny-flux", device="cpu")
    uce = UCE(UCEConfig(variant="released", preserve_scale=0.3))
    delta = uce.erase(policy, STRIPED, strength=2.0).delta.tensors
    assert delta.keys() == {f"{name}.weight" for name in PROJECTIONS}

    def read(text: str) -> torch.Tensor:
        embedded = TextReader(policy)(text)
        return embedded.pooled[0] if PROJECTIONS[layer] == "pooled" else embedded.tokens[embedded.last_word]

    weight = policy.model.get_parameter(f"{layer}.weight").detach().double()
    edited = (weight + delta[f"{layer}.weight"].double()).requires_grad_(True)
    loss = 0.5 * (edited - weight).square().sum()
    for phrase in STRIPED.phrases:
        loss = loss + 2.0 * (edited @ read(phrase) - weight @ read(STRIPED.anchor)).square().sum()
    for text in STRIPED.preserve:
        loss = loss + 0.3 * ((edited - weight) @ read(text)).square().sum()
    loss.backward()
    assert edited.grad is not None
    assert delta[f"{layer}.weight"].abs().max() > 1e-3
    assert edited.grad.abs().max() < 1e-4  # the change is kept in float32


def test_erased_phrase_is_projected_as_its_anchor_in_flux() -> None:
    policy = DiffusionPolicy.from_pretrained(GOLDEN / "flow" / "tiny-flux", device="cpu")
    erasure = UCE(UCEConfig(variant="released", preserve_scale=0.0)).erase(policy, STRIPED, strength=1e6)
    old, new = TextReader(policy)("striped"), TextReader(policy)(STRIPED.anchor)
    layers = [policy.model.get_submodule(name) for name in PROJECTIONS]
    vectors = [(old.tokens[old.last_word], new.tokens[new.last_word]), (old.pooled[0], new.pooled[0])]
    wanted = [layer(after.float()) for layer, (_, after) in zip(layers, vectors, strict=True)]
    with erasure.applied(policy):
        for layer, (before, _), answer in zip(layers, vectors, wanted, strict=True):
            torch.testing.assert_close(layer(before.float()), answer, rtol=0, atol=1e-4)  # of order 1, bias included
