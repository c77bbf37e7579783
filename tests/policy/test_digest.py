import hashlib

import torch

from overpaint.policy.digest import tensors_hash


def test_the_hash_is_of_names_types_shapes_and_bytes() -> None:
    content = b"a torch.float32 (2,)\n\x00\x00\x80\x3f\x00\x00\x00\x40" + b"b torch.bool ()\n\x01"
    tensors = {"b": torch.tensor(True), "a": torch.tensor([1.0, 2.0])}
    assert tensors_hash(tensors) == hashlib.sha256(content).hexdigest()


def test_whatever_differs_gives_another_hash_and_the_order_and_strides_do_not() -> None:
    value = torch.arange(6.0).view(2, 3)
    same = [{"a": value, "b": value}, {"b": value, "a": value.T.contiguous().T}]
    others = [
        {"a": value, "c": value},
        {"a": value, "b": value.view(3, 2)},
        {"a": value, "b": value.bfloat16()},
        {"a": value, "b": value.nextafter(torch.tensor(9.0))},
        {"a": value},
    ]
    assert len({tensors_hash(tensors) for tensors in same}) == 1
    assert len({tensors_hash(tensors) for tensors in [*same, *others]}) == 1 + len(others)
    assert len({tensors_hash(same[0], notes) for notes in ([], ["x"], ["y"], ["x", "y"])}) == 4
