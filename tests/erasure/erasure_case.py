"""Golden cases of the erasure methods, whose tolerances are all stated in the same way."""

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from golden_case import GOLDEN, GoldenCase
from torch import Tensor

from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.policy.weights import base_parameters

TINY_SD = GOLDEN / "tiny-sd"
"""The pipeline that all of them were computed with."""


class ErasureCase(GoldenCase):
    """A case of which every tensor that is expected has to be compared, by `check`; reading it is not enough."""

    def __init__(self, name: str, left_out: Mapping[str, str] | None = None) -> None:
        super().__init__(name, left_out)
        self._compared: set[str] = set()

    def check(self, name: str, found: Tensor, tolerance: str = "tol") -> None:
        """Compares by the rule of the files: the largest difference, as a share of the largest value."""
        expected = self.tensors[name].double()
        self._compared.add(name)
        assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
        difference, allowed = (found.detach().double() - expected).abs().max().item(), self.allowed(name, tolerance)
        assert difference <= allowed, f"{name}: off by {difference:.1e}, allowed are {allowed:.1e}"

    def allowed(self, name: str, tolerance: str = "tol") -> float:
        """By how much a number of a tensor may differ."""
        return self.record["tensors"][name][tolerance] * self.tensors[name].abs().max().item()

    def check_embedding(self, policy: DiffusionPolicy, name: str, text: str) -> None:
        """Compares a text's embedding with one that is fed in, and so has no tolerance of its own."""
        torch.testing.assert_close(policy.encode([text]).tokens, self.tensors[name], rtol=0, atol=1e-5)  # of order 1

    def encoded(self, name: str) -> Conditioning:
        """A stored embedding, in a policy's hands."""
        tokens = self.tensors[name]
        return Conditioning((name,) * len(tokens), tokens)

    def complaints(self) -> list[str]:
        found = super().complaints()
        expected = {name for name, about in self._content["tensors"].items() if about["kind"] == "expected"}
        missed = expected - self._compared
        missed -= {name for name in missed if any(fnmatchcase(name, pattern) for pattern in self.left_out)}
        return found + [f"{self.name}: {name} is expected, and was compared with nothing" for name in sorted(missed)]


def perturb(policy: DiffusionPolicy, words: str) -> None:
    """Changes every weight of the UNet as a record puts it, "1.01 * original + 0.001"."""
    ((factor, offset),) = re.findall(r"= ([\d.]+) [*x] original \+ ([\d.]+)", words)
    with torch.no_grad():
        for parameter in base_parameters(policy.unet).values():
            parameter.mul_(float(factor)).add_(float(offset))
