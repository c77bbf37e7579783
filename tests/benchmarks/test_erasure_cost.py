"""The erasure benchmark repeats the calls that an update makes, and wastes none."""

import pytest
import torch

from benchmarks import erasure_cost
from erasure import ConceptBatch
from erasure.methods.esd import ESD
from erasure.methods.receler import Receler
from overpaint.policy import DiffusionPolicy
from overpaint.tinyworld.presets import PRESETS


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    from overpaint import tinyworld

    return tinyworld.load_policy()


def test_calls_are_noted_with_what_their_gradient_is_wanted_for(policy: DiffusionPolicy) -> None:
    method = Receler(PRESETS["receler"])
    assert isinstance(method, Receler)
    student = method.student(policy)
    recorder = erasure_cost.Recorder(student)
    with recorder:
        method.loss(student, ConceptBatch(["striped"], [3])).mean().backward()
    wanted = [call.wanted for call in recorder.calls]
    inner = method.config.inner_steps - 1
    assert wanted[-1 - inner :] == ["embeddings"] * inner + ["weights"]
    assert set(wanted[: -1 - inner]) == {"nothing"}


def test_the_calls_again_are_the_same_calls_and_leave_the_weights(policy: DiffusionPolicy) -> None:
    method = ESD(PRESETS["esd"])
    assert isinstance(method, ESD)
    student = policy.student_copy("xattn")
    first, second = erasure_cost.Recorder(student), erasure_cost.Recorder(student)
    with first:
        method.loss(student, ConceptBatch(["striped", "zebra"], [3, 4])).mean().backward()
    before = student.trainable_state()
    with second:
        first.again()
    assert [call.wanted for call in second.calls] == [call.wanted for call in first.calls]
    for ours, theirs in zip(second.calls, first.calls, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours.inputs, theirs.inputs, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in student.trainable_state().items())


def test_it_measures_and_prints_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    erasure_cost.main(erasure_cost.Config(methods=("ac",), repeats=1, tiny=True))
    printed = capsys.readouterr().out
    assert "ac " in printed
    assert "UCE: " in printed


@pytest.mark.parametrize("changes", [{"methods": ("uce",)}, {"repeats": 0}])
def test_settings_are_checked(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        erasure_cost.Config(**changes)  # ty: ignore[invalid-argument-type]
