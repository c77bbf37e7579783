"""Public calls check their arguments: types, rules, every item, shapes and devices, in one sentence each."""

import importlib
import inspect
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.argument_checks import timed_checks
from ddpo import DDPOConfig, PromptStatistics, clipped_surrogate
from erasure import RewardFloor
from overpaint.evaluation import Point, mean_estimate
from overpaint.policy import ClassifierFree, DiffusionPolicy, SampleNoise, check_checkpoint
from overpaint.tinyworld import captions, load_policy
from refl import hinge
from rewards import Incompressibility

PACKAGES = (
    "overpaint.policy",
    "overpaint.training",
    "overpaint.evaluation",
    "overpaint.tinyworld",
    "rewards",
    "erasure",
)
CPU = torch.device("cpu")
TWO, THREE = torch.zeros(2), torch.zeros(3)
TOLD = "a float32 tensor of shape"


@pytest.mark.parametrize(
    ("call", "args", "options", "kind", "message"),
    [
        (captions, ("benign", "3"), {}, TypeError, "captions: count must be a valid integer, got '3'"),
        (captions, ("benign", True), {}, TypeError, "captions: count must be a valid integer, got True"),
        (captions, ("benign", 0), {}, ValueError, "captions: count must be at least 1, got 0"),
        (captions, ("benign", 10**30), {}, ValueError, f"captions: count must be within 64 bits, got {10**30}"),
        (hinge, (TWO,), {"margin": math.nan}, ValueError, "hinge: margin must be a finite number, got nan"),
        (hinge, (TWO,), {"margin": TWO[0]}, TypeError, f"hinge: margin must be a valid number, got {TOLD} [] on cpu"),
        (mean_estimate, ("12",), {}, TypeError, "mean_estimate: values must be a sequence, got '12'"),
        (load_policy, (), {"lora": 3}, TypeError, "load_policy: lora must be an instance of LoRAConfig, got 3"),
        (ClassifierFree, (-1.0,), {}, ValueError, "ClassifierFree.scale must be at least 0, got -1.0"),
        (Point, (3, None, None), {}, TypeError, "Point.method must be a valid string, got 3"),
        (SampleNoise, ([0, "1"], (4, 8), CPU), {}, TypeError, "SampleNoise.seeds[1] must be a valid integer, got '1'"),
        (DDPOConfig().trained_of, (0,), {}, ValueError, "DDPOConfig.trained_of: possible must be at least 1, got 0"),
        (
            DiffusionPolicy.from_pretrained, (3,), {}, TypeError,
            "TextToImageModel.from_pretrained: path must be a valid string or an instance of Path, got 3",
        ),
        (
            clipped_surrogate, (TWO, THREE, TWO), {"clip_range": 0.1}, TypeError,
            "clipped_surrogate: old_log_probs must be an instance of Float[Tensor, 'batch'], "
            f"got {TOLD} [3] on cpu, with log_probs: {TOLD} [2] on cpu",
        ),
        (
            clipped_surrogate, (TWO, TWO, TWO.to("meta")), {"clip_range": 0.1}, ValueError,
            f"clipped_surrogate: tensors must be on one device, got log_probs: {TOLD} [2] on cpu, "
            f"old_log_probs: {TOLD} [2] on cpu, advantages: {TOLD} [2] on meta",
        ),
    ],
)  # fmt: skip
def test_an_error_names_the_argument_the_rule_and_the_value(
    call: Callable[..., object], args: tuple[Any, ...], options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call(*args, **options)


def test_what_fits_is_passed_on_as_it_is() -> None:
    assert hinge(torch.ones(2), margin=2.0).tolist() == [1.0, 1.0]
    assert len(SampleNoise(range(3), (4, 8, 8), CPU).generators) == 3  # any sequence
    with pytest.raises(TypeError, match=r"missing .*'margin'"):
        hinge(torch.ones(2))  # ty: ignore[missing-argument]


def test_a_subclass_answers_for_its_own_arguments() -> None:
    class Lenient(Incompressibility):
        def __init__(self, quality: str) -> None:
            super().__init__(int(quality))

    assert Lenient("90").quality == 90
    with pytest.raises(ValueError, match=r"Incompressibility\.quality must be at most 100, got 101"):
        Lenient("101")


def test_calls_from_outside_are_checked_and_constructors_whoever_calls() -> None:
    public: dict[str, Any] = {"hinge": hinge, "rewards": TWO, "RewardFloor": RewardFloor}
    inside, outside = ({"__name__": name, **public} for name in ("ddpo.loss", "my_loss"))
    with timed_checks() as spent:
        exec("hinge(rewards, margin=1.0)", inside)
        assert len(spent) == 0
        exec("hinge(rewards, margin=1.0)", outside)
        assert len(spent) == 1
    with pytest.raises(ValueError, match=r"RewardFloor\.scale must be above 0, got 0\.0"):
        exec("RewardFloor(scale=0.0)", inside)


def test_checked_functions_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(hinge)) is hinge


@pytest.mark.parametrize("package", PACKAGES)
def test_every_annotation_of_a_package_can_be_read(package: str) -> None:
    module: Any = importlib.import_module(package)
    public = [getattr(module, name) for name in module.__all__]
    methods = [member for one in public if inspect.isclass(one) for _, member in inspect.getmembers(one)]
    checks = [one.checks for one in [*public, *methods] if hasattr(one, "checks")]
    assert sum(len(check().rules) for check in checks) > len(checks) / 2


def test_numbers_that_are_kept_are_checked_before_they_are() -> None:
    with pytest.raises(ValueError, match=r"PromptStatistics\.min_count must be at least 1, got 0"):
        PromptStatistics(min_count=0)


def test_paths_are_taken_as_strings_too(tmp_path: Path) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="none"):
            check_checkpoint(path)
