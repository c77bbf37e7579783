"""Closed forms of MACE: least squares that refine keys and values, and that fuse the updates of several phrases.

Both are least squares over token vectors, and both are solved in float64: their condition is 10⁵ and more. Where texts
leave a direction open, it stays as it was.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
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
    down: Float[Tensor, "rank dim"]


class Texts(NamedTuple):
    """What the closed forms read, in float64."""

    old: Float[Tensor, "pairs dim"]  # tokens around the phrases
    new: Float[Tensor, "pairs dim"]  # tokens around the anchor in their place
    prompts: list[Float[Tensor, "dim dim"]]  # second moment of all tokens of each phrase's prompts
    prior: Float[Tensor, "dim dim"]  # second moment of the prior's tokens


def read_texts(
    policy: DiffusionPolicy, phrases: Mapping[str, Sequence[str]], anchor: str, prior: Sequence[str]
) -> Texts:
    """Returns what the closed forms read: `phrases` with the templates that each is put into, and the `anchor` in them.

    A `ValueError` refuses a template that cannot be used.
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
    moments = (tokens.T @ tokens for tokens in (read(text).tokens for text in texts))
    return reduce(torch.add, moments)  # one by one: there may be hundreds of thousands


def around(
    old: Placed, new: Placed, old_tokens: Float[Tensor, "positions dim"], new_tokens: Float[Tensor, "positions dim"]
) -> tuple[Float[Tensor, "around dim"], Float[Tensor, "around dim"]]:
    """Pairs the tokens around a phrase with those around its replacement in the same template.

    What stands before is paired as it is, what follows from the first token behind each; where one text has more of
    that, its end is left out.
    """
    behind = len(old_tokens) - max(old.end, new.end)
    return (
        torch.cat([old_tokens[: old.first], old_tokens[old.end : old.end + behind]]),
        torch.cat([new_tokens[: new.first], new_tokens[new.end : new.end + behind]]),
    )


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
    `W' = W (Σ f_new f_oldᵀ + p Σ e eᵀ) (Σ f_old f_oldᵀ + p Σ e eᵀ)⁻¹`; `prior_weight` is p, the rest as in `Texts`.
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
        refinement: E, of `refining_factor`.
        updates: ΔW_i for each word and weight.
        moments: Second moment of the tokens f of each word's prompts.
        prior: That of the tokens e.
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
