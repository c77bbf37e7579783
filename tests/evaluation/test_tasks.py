"""DDPO's tasks: what they train on, what they look at, and what they refuse."""

from pathlib import Path

import pytest

from overpaint.evaluation.experiments.tasks import TaskName, animal_task, tiny_task
from rewards import Aesthetic, Alignment, Compressibility


@pytest.fixture
def data(shared: Path) -> Path:
    return shared / "data"


@pytest.mark.parametrize(("name", "count"), [("compressibility", 398), ("aesthetic", 45), ("alignment", 135)])
def test_a_task_of_the_paper_trains_on_its_prompts_and_looks_at_others(name: str, count: int, data: Path) -> None:
    task = animal_task(name, Compressibility(), count=10, folder=data)  # ty: ignore[invalid-argument-type]
    assert len(task.prompts) == count
    unseen = ["objects", "unseen-activity", *(["unseen-animals"] if name != "compressibility" else [])]
    assert {split: len(prompts) for split, prompts in task.splits.items()} == dict.fromkeys(["trained", *unseen], 10)
    assert set(task.splits["trained"]) <= set(task.prompts)
    assert all(set(task.splits[split]).isdisjoint(task.prompts) for split in unseen)
    assert set(task.held_out_prompts).isdisjoint(task.prompts)
    assert ("washing the dishes" in " ".join(task.prompts)) is (name == "alignment")


@pytest.mark.parametrize(("name", "kind"), [("aesthetic", Aesthetic), ("alignment", Alignment)])
def test_the_task_of_a_network_loads_its_own(
    name: TaskName, kind: type[Aesthetic | Alignment], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Compressibility()
    monkeypatch.setattr(kind, "load", lambda: loaded)
    assert animal_task(name, folder=data).reward is loaded


def test_tiny_tasks_look_at_pairs_that_are_not_trained_on() -> None:
    task = tiny_task("compressibility", count=20, held_out_count=10)
    assert isinstance(task.reward, Compressibility)
    assert set(task.splits["unseen-pairs"]).isdisjoint(task.prompts)
    assert set(task.held_out_prompts).isdisjoint(task.prompts)
    with pytest.raises(ValueError, match=r"task must be one of .* in the tiny world, got 'alignment'"):
        tiny_task("alignment")
