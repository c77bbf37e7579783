"""Two terms of a loss that pull against each other: the cosine of their gradients, and the projection of conflicts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Returns the cosine between two gradients, each a tensor for every weight; 0 where either is zero."""
    product, first_squared, second_squared = _products(first, second).tolist()
    lengths = math.sqrt(first_squared) * math.sqrt(second_squared)
    return product / lengths if lengths else 0.0


def project_conflicts(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Takes from each of two gradients what points against the other, where they conflict.

    With a product below zero, `g1 - (g1·g2 / |g2|²) g2` and `g2 - (g1·g2 / |g1|²) g1`, each of the other as it was;
    otherwise both stay as they are. Source: gradient surgery (PCGrad), Yu et al. (2020),
    https://arxiv.org/abs/2001.06782, Algorithm 1, whose random order of tasks does not matter with two.

    Args:
        first: A tensor for every weight.
        second: The other, in the same order.
    """
    product, first_squared, second_squared = _products(first, second)
    # Without a transfer from the device; where the product is below zero neither is of length zero.
    conflict = product.clamp(max=0.0)
    from_first = torch.where(product < 0, conflict / second_squared, 0.0)
    from_second = torch.where(product < 0, conflict / first_squared, 0.0)
    pairs = list(zip(first, second, strict=True))
    return (
        [(a - from_first * b).to(a.dtype) for a, b in pairs],
        [(b - from_second * a).to(b.dtype) for a, b in pairs],
    )


def _products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Returns the product of two gradients and the squares of both, summed in float32."""
    sums = torch.zeros(3, device=first[0].device)
    for one, other in zip(first, second, strict=True):
        a, b = one.flatten().float(), other.flatten().float()
        sums += torch.stack([a @ b, a @ a, b @ b])
    return sums
