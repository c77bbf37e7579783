"""What the marker `proof` says a test proves counts once, where benchmarks/faults.py runs the proofs."""

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Records the promises, as `record_property` does."""
    item.user_properties += [(promise, 1) for mark in item.iter_markers("proof") for promise in mark.args]
