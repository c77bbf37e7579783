"""Closed forms of MACE: least squares that refine keys and values, and that fuse the updates of several phrases.

Both are least squares over token vectors, and both are solved in float64: their condition is 10⁵ and more. Where texts
leave a direction open, it stays as it was.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from erasure.methods.keys_and_values import TextReader
from erasure.phrases import Placed, placed
from overpaint.policy import DiffusionPolicy


class LowRank(NamedTuple):
    """A low-rank update of a weight, `up @ down`."""

    up: Float[Tensor, "out rank"]
    """Its columns."""

    down: Float[Tensor, "rank dim"]
    """Its rows."""


class Texts(NamedTuple):
    """What the closed forms read, in float64."""

    old: Float[Tensor, "pairs dim"]
    """Tokens around the phrases."""

    new: Float[Tensor, "pairs dim"]
    """Tokens around the anchor in their place."""

    prompts: list[Float[Tensor, "dim dim"]]
    """Second moment of all tokens of each phrase's prompts."""

    prior: Float[Tensor, "dim dim"]
    """Second moment of the prior's tokens."""


def read_texts(
    policy: DiffusionPolicy, phrases: Mapping[str, Sequence[str]], anchor: str, prior: Sequence[str]
) -> Texts:
    """Returns what the closed forms read.

    Args:
        policy: Whose text encoder reads.
        phrases: What is erased, each with the templates that it is put into.
        anchor: What takes their place.
        prior: Texts whose keys and values are to stay.

    Raises:
        ValueError: A template cannot be used.
    """
    read = TextReader(policy)
    old, new, prompts = [], [], []
    for phrase, templates in phrases.items():
        texts = []
        for template in templates:
            before, after = placed(policy, template, phrase), placed(policy, template, anchor)
            context, replaced = around(before, after, read(before.text).tokens, read(after.text).tokens)
            old.append(context)
            new.append(replaced)
            texts.append(before.text)
        prompts.append(second_moment(read, texts))
    return Texts(torch.cat(old), torch.cat(new), prompts, second_moment(read, prior))


def second_moment(read: TextReader, texts: Sequence[str]) -> Float[Tensor, "dim dim"]:
    """Returns Σ e eᵀ over all tokens of some texts, at least one."""
    first, *others = texts
    tokens = read(first).tokens
    moment = tokens.T @ tokens
    for text in others:  # added up one by one: there may be hundreds of thousands
        tokens = read(text).tokens
        moment += tokens.T @ tokens
    return moment


def around(
    old: Placed, new: Placed, old_tokens: Float[Tensor, "positions dim"], new_tokens: Float[Tensor, "positions dim"]
) -> tuple[Float[Tensor, "around dim"], Float[Tensor, "around dim"]]:
    """Pairs the tokens around a phrase with those around its replacement in the same template.

    What stands before is paired as it is, what follows from the first token behind each; where one text has more of
    that, its end is left out.
    """
    behind = len(old_tokens) - max(old.end, new.end)
    pairs = [
        torch.cat([tokens[: each.first], tokens[each.end : each.end + behind]])
        for each, tokens in ((old, old_tokens), (new, new_tokens))
    ]
    return pairs[0], pairs[1]


def least_squares(target: Float[Tensor, "rows dim"], system: Float[Tensor, "dim dim"]) -> Float[Tensor, "rows dim"]:
    """Returns `target · system⁻¹` for a system that is symmetric and not negative, zero where it has no size."""
    values, vectors = torch.linalg.eigh(system)
    solvable = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[solvable], vectors[:, solvable]
    return (target @ vectors / values) @ vectors.T


def refining_factor(
    old: Float[Tensor, "pairs dim"],
    new: Float[Tensor, "pairs dim"],
    prior: Float[Tensor, "dim dim"],
    *,
    prior_weight: float,
) -> Float[Tensor, "dim dim"]:
    """Returns the matrix E for which the refined weights are W + W E, whatever the original W.

    The solution of min Σ ‖W' f_old - W f_new‖² + p Σ ‖W' e - W e‖², that is
    `W' = W (Σ f_new f_oldᵀ + p Σ e eᵀ) (Σ f_old f_oldᵀ + p Σ e eᵀ)⁻¹`.

    Args:
        old: Tokens around the concept.
        new: Tokens around what takes its place.
        prior: Second moment of the tokens whose keys and values are to stay.
        prior_weight: p.
    """
    return least_squares((new - old).T @ old, old.T @ old + prior_weight * prior)


def fused(
    weights: Mapping[str, Float[Tensor, "out dim"]],
    refinement: Float[Tensor, "dim dim"],
    updates: Sequence[Mapping[str, LowRank]],
    moments: Sequence[Float[Tensor, "dim dim"]],
    prior: Float[Tensor, "dim dim"],
    *,
    prior_weight: float,
) -> dict[str, Tensor]:
    """Returns what to add to the original weights, so that each word meets its own update and nothing else changes.

    The solution of min Σ_i Σ_f ‖W* f - (W + W E + ΔW_i) f‖² + p Σ ‖W* e - W e‖², less W.

    Args:
        weights: The original weights W, float64.
        refinement: E.
        updates: ΔW_i for each word and weight.
        moments: Second moment of the tokens f of each word's prompts.
        prior: As for `refining_factor`.
        prior_weight: p.
    """
    system = sum(moments[1:], moments[0]) + prior_weight * prior
    shared = least_squares(refinement @ (system - prior_weight * prior), system)
    own = [least_squares(moment, system) for moment in moments]
    changes = {}
    for name, weight in weights.items():
        change = weight @ shared
        for update, moment in zip(updates, own, strict=True):
            change = change + update[name].up.double() @ (update[name].down.double() @ moment)
        changes[name] = change
    return changes
