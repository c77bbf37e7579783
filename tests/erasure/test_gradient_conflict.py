"""Gradient surgery, computed by hand."""

import pytest
import torch

from erasure import gradient_cosine, project_conflicts


def test_conflicting_gradients_lose_what_points_against_the_other() -> None:
    # One vector spread over two weights: g1 = (1, 0, 0), g2 = (-1, 1, 0); g1·g2 = -1, |g1|² = 1, |g2|² = 2.
    first = [torch.tensor([1.0, 0.0]), torch.tensor([[0.0]])]
    second = [torch.tensor([-1.0, 1.0]), torch.tensor([[0.0]])]
    one, two = project_conflicts(first, second)
    assert torch.equal(one[0], torch.tensor([0.5, 0.5]))  # g1 + g2 / 2
    assert torch.equal(two[0], torch.tensor([0.0, 1.0]))  # g2 + g1
    assert one[1].shape == two[1].shape == (1, 1)
    # Each is now at right angles to the other as it was.
    assert float(one[0] @ second[0]) == float(two[0] @ first[0]) == 0.0
    assert torch.equal(first[0], torch.tensor([1.0, 0.0]))  # what was given is unchanged


@pytest.mark.parametrize("second", [[2.0, 1.0], [0.0, 3.0], [0.0, 0.0]], ids=["same", "right-angled", "zero"])
def test_gradients_without_a_conflict_stay_as_they_are(second: list[float]) -> None:
    first, other = [torch.tensor([1.0, 0.0])], [torch.tensor(second)]
    one, two = project_conflicts(first, other)
    assert torch.equal(one[0], first[0])
    assert torch.equal(two[0], other[0])


def test_opposite_gradients_cancel() -> None:
    one, two = project_conflicts([torch.tensor([2.0])], [torch.tensor([-3.0])])
    assert float(one[0]) == float(two[0]) == 0.0


def test_half_precision_keeps_its_type() -> None:
    one, two = project_conflicts([torch.ones(2, dtype=torch.bfloat16)], [-torch.ones(2, dtype=torch.bfloat16)])
    assert one[0].dtype == two[0].dtype == torch.bfloat16


def test_cosine_is_that_of_the_gradients_as_one_vector() -> None:
    first = [torch.tensor([3.0]), torch.tensor([0.0, 4.0])]
    second = [torch.tensor([0.0]), torch.tensor([0.0, -2.0])]
    assert gradient_cosine(first, second) == pytest.approx(-0.8, rel=1e-6)
    assert gradient_cosine(first, [torch.zeros(1), torch.zeros(2)]) == 0.0
