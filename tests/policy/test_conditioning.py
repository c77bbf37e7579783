from typing import Any

import pytest
import torch

from overpaint.policy import Conditioning


def batch(*texts: str) -> Conditioning:
    rows = torch.tensor([float(len(text)) for text in texts])
    return Conditioning(texts, rows[:, None, None].expand(-1, 3, 4).clone())


def full(*texts: str) -> Conditioning:
    rows = torch.tensor([float(len(text)) for text in texts])
    of_row: dict[str, Any] = {
        "pooled": rows[:, None].expand(-1, 5).clone(),
        "sizes": 1016 + rows[:, None].expand(-1, 6),
        "guidance": rows,
    }
    return Conditioning(texts, rows[:, None, None].expand(-1, 3, 4).clone(), **of_row)


def lengths(found: Conditioning) -> list[list[float]]:
    assert found.pooled is not None
    assert found.sizes is not None
    assert found.guidance is not None
    return [found.pooled[:, 0].tolist(), (found.sizes[:, 5] - 1016).tolist(), found.guidance.tolist()]


def test_all_tensors_go_with_their_rows() -> None:
    three = full("a", "bb", "ccc")
    assert lengths(three[[2, 0]]) == [[3, 1]] * 3
    assert lengths(three[1:]) == [[2, 3]] * 3
    assert lengths(Conditioning.cat([three, full("dddd")])) == [[1, 2, 3, 4]] * 3
    assert lengths(full("bb").expand(2)) == [[2, 2]] * 3
    assert lengths(three.repeat_interleave(2)) == [[1, 1, 2, 2, 3, 3]] * 3
    assert lengths(three.with_tokens(three.tokens + 1)) == [[1, 2, 3]] * 3
    with pytest.raises(ValueError, match="parts must all have pooled or none of them, got 1 of 2"):
        Conditioning.cat([three, batch("a")])


def test_sizes_and_scales_are_not_rounded() -> None:
    half = full("a", "bb", "ccc").to(torch.bfloat16)
    assert half.pooled is not None
    assert half.pooled.dtype == torch.bfloat16
    assert lengths(half) == [[1, 2, 3]] * 3


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (slice(1, None), ("bb", "ccc")),
        ([2, 0], ("ccc", "a")),
        (torch.tensor([1, 1]), ("bb", "bb")),
        (torch.tensor([True, False, True]), ("a", "ccc")),
    ],
)
def test_rows_keep_texts_and_tokens_together(rows: slice | list[int] | torch.Tensor, expected: tuple[str, ...]) -> None:
    chosen = batch("a", "bb", "ccc")[rows]
    assert chosen.texts == expected
    assert chosen.tokens[:, 0, 0].tolist() == [len(text) for text in expected]


def test_joined_and_repeated_rows_keep_their_order() -> None:
    joined = Conditioning.cat([batch("a", "bb"), batch("ccc")])
    assert (len(joined), joined.texts) == (3, ("a", "bb", "ccc"))
    twice = joined.repeat_interleave(2)
    assert twice.texts == ("a", "a", "bb", "bb", "ccc", "ccc")
    assert twice.tokens[:, 0, 0].tolist() == [1, 1, 2, 2, 3, 3]


def test_one_row_expands_without_a_copy_and_several_only_to_themselves() -> None:
    one = batch("a")
    assert one.expand(3).texts == ("a", "a", "a")
    assert one.expand(3).tokens.untyped_storage().data_ptr() == one.tokens.untyped_storage().data_ptr()
    two = batch("a", "bb")
    assert two.expand(2) is two
    with pytest.raises(ValueError, match="one row or 4, got 2"):
        two.expand(4)


def test_a_moved_batch_is_the_same_and_other_rows_are_another() -> None:
    two = batch("a", "bb")
    half = two.to(torch.float16)
    assert (half.key, half.tokens.dtype, half.texts) == (two.key, torch.float16, two.texts)
    assert two.with_tokens(two.tokens + 1).key == two.key
    others = [two[:], two.repeat_interleave(1), Conditioning.cat([two]), batch("a", "bb")]
    assert len({two.key, *(other.key for other in others)}) == 5


def test_texts_are_one_for_each_row() -> None:
    with pytest.raises(ValueError, match="texts must be one for each of the 2 rows of tokens, got 1"):
        Conditioning(("a",), torch.zeros(2, 3, 4))
