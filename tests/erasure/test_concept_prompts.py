"""The mix of a constraint's prompts, and the mining of hard ones."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import ConceptPrompts, ConceptPromptsConfig
from overpaint.policy import DiffusionPolicy
from overpaint.training import TrainingConfig, TrainingRun, draw_batch

EXPLICIT = ["striped star", "striped cross", "striped circle"]
IMPLICIT = ["zebra star", "cross in prison"]


@pytest.fixture
def run(policy: DiffusionPolicy, tmp_path: Path) -> Iterator[TrainingRun]:
    with TrainingRun(policy, TrainingConfig(output_dir=tmp_path, iterations=1, progress=False)) as run:
        yield run


def mixed(**settings: Any) -> ConceptPrompts:
    return ConceptPrompts(EXPLICIT, IMPLICIT, ConceptPromptsConfig(**settings))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kinds(picked: list[str]) -> tuple[int, int]:
    """How many are explicit, and how many implicit."""
    return sum(prompt in EXPLICIT for prompt in picked), sum(prompt in IMPLICIT for prompt in picked)


# The mix.


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ((3.0, 1.0, 0.0), 8, (6, 2)),
        ((1.0, 1.0, 0.0), 8, (4, 4)),
        ((0.7, 0.3, 0.0), 10, (7, 3)),  # 0.7 * 10 is a bit less than 7
        ((0.0, 1.0, 0.0), 5, (0, 5)),
        ((1.0, 0.0, 0.0), 5, (5, 0)),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_whole_shares_are_met_exactly(
    shares: tuple[float, float, float], count: int, expected: tuple[int, int], seed: int
) -> None:
    explicit, implicit, hard = shares
    prompts = mixed(explicit_share=explicit, implicit_share=implicit, hard_share=hard)
    assert kinds(prompts.pick(count, generator(seed))) == expected


def test_other_shares_are_rounded_at_random_and_met_on_average() -> None:
    prompts = mixed(explicit_share=2.0, implicit_share=1.0, hard_share=0.0)
    source = generator()
    numbers = [kinds(prompts.pick(4, source)) for _ in range(600)]
    assert set(numbers) == {(3, 1), (2, 2)}  # 2.67 and 1.33
    assert sum(number[1] for number in numbers) / 600 == pytest.approx(4 / 3, abs=0.06)


def test_hard_part_is_exact_too_and_drawn_from_the_one_that_violates(run: TrainingRun) -> None:
    prompts = mixed(explicit_share=1.0, implicit_share=1.0, hard_share=2.0)
    prompts.note(run, ["cross in prison", "striped star"], torch.tensor([0.5, -0.2]))
    for seed in range(5):
        picked = prompts.pick(8, generator(seed))
        assert kinds(picked) == (2, 6)
        assert picked.count("cross in prison") >= 4


def test_shares_of_kinds_that_are_not_there_go_to_the_others() -> None:
    prompts = ConceptPrompts(EXPLICIT)  # 2 explicit to 1 hard, which is drawn from the same
    numbers = prompts._numbers(9, generator())
    assert numbers == [6, 0, 3]


def test_order_is_random_so_that_every_process_has_its_share_of_each_kind() -> None:
    prompts = mixed(hard_share=0.0, implicit_share=2.0)
    places = [[prompt in IMPLICIT for prompt in prompts.pick(8, generator(seed))] for seed in range(400)]
    rates = torch.tensor(places).double().mean(dim=0)
    assert ((rates - 0.5).abs() < 0.1).all()


def test_plain_prompts_are_drawn_as_they_ever_were(run: TrainingRun) -> None:
    run.generator.manual_seed(7)
    expected = draw_batch(run, EXPLICIT, 6)
    run.generator.manual_seed(7)
    assert ConceptPrompts.of(EXPLICIT).draw(run, 6) == expected


def test_draw_follows_from_the_generator(run: TrainingRun) -> None:
    prompts = mixed()
    batches = []
    for seed in (1, 1, 2):
        run.generator.manual_seed(seed)
        batches.append(prompts.draw(run, 8))
    assert batches[0] == batches[1] != batches[2]
    assert len({seed for _, seed in batches[0]}) == 8


def test_it_is_a_sequence_of_all_prompts() -> None:
    prompts = mixed()
    assert list(prompts) == EXPLICIT + IMPLICIT
    assert (len(prompts), prompts[3], prompts[:2]) == (5, "zebra star", EXPLICIT[:2])
    assert ConceptPrompts.of(prompts) is prompts


# Mining.


def test_prompt_that_violates_is_drawn_more_often_in_proportion(run: TrainingRun) -> None:
    prompts = mixed(explicit_share=0.0, implicit_share=0.0, hard_share=1.0)
    prompts.note(run, ["striped star", "zebra star", "striped cross"], torch.tensor([3.0, 1.0, -0.5]))
    counts = Counter(prompts.pick(4000, generator()))
    assert set(counts) == {"striped star", "zebra star"}
    assert counts["striped star"] / 4000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(0.5, 0.9), (2.0, 3**0.5 / (1 + 3**0.5)), (1e9, 0.5), (1e-3, 1.0)]
)
def test_temperature_says_how_much_the_violation_decides(run: TrainingRun, temperature: float, expected: float) -> None:
    prompts = mixed(explicit_share=0.0, implicit_share=0.0, temperature=temperature)
    prompts.note(run, ["striped star", "zebra star"], torch.tensor([3e4, 1e4]))
    counts = Counter(prompts.pick(4000, generator()))
    assert counts["striped star"] / 4000 == pytest.approx(expected, abs=0.03)


def test_where_nothing_violates_the_hard_part_is_drawn_from_all(run: TrainingRun) -> None:
    prompts = mixed(explicit_share=0.0, implicit_share=0.0)
    assert set(prompts.pick(200, generator())) == {*EXPLICIT, *IMPLICIT}
    prompts.note(run, ["striped star"], torch.tensor([-1.0]))
    assert set(prompts.pick(200, generator())) == {*EXPLICIT, *IMPLICIT}
    assert prompts.hard == {}


def test_average_forgets_exponentially_and_begins_with_the_first_sight(run: TrainingRun) -> None:
    prompts = mixed(memory=0.75)
    assert prompts.hard_violation == 0.0
    prompts.note(run, ["striped star", "striped star"], torch.tensor([1.0, 3.0]))
    assert prompts.hard == {"striped star": 2.0}
    prompts.note(run, ["striped star", "zebra star"], torch.tensor([0.0, 6.0]))
    assert prompts.hard == {"zebra star": 6.0, "striped star": 1.5}
    assert list(prompts.hard) == ["zebra star", "striped star"]
    assert prompts.hard_violation == pytest.approx((6 * 6 + 1.5 * 1.5) / 7.5)
    prompts.note(run, ["zebra star"], torch.tensor([float("nan")]))
    assert prompts.hard["zebra star"] == 6.0


def test_nothing_is_remembered_where_nothing_is_mined(run: TrainingRun) -> None:
    prompts = mixed(hard_share=0.0)
    prompts.note(run, ["striped star"], torch.tensor([5.0]))
    assert prompts.state_dict() == {"average": {}}


def test_state_goes_on_with_the_same_batches(run: TrainingRun) -> None:
    first, second = mixed(), mixed()
    for _ in range(3):
        first.note(run, ["striped star", "zebra star"], torch.rand(2, generator=run.generator) * 3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert second.pick(32, generator(3)) == first.pick(32, generator(3))
    first.note(run, ["striped star"], torch.tensor([9.0]))
    assert second.state_dict() != first.state_dict()


@pytest.mark.parametrize(
    ("average", "message"),
    [({"a cat": 1.0}, "of these prompts, got one of 'a cat'"), ({"zebra star": float("inf")}, "finite")],
)
def test_state_of_other_prompts_is_refused(average: dict[str, float], message: str) -> None:
    prompts = mixed()
    with pytest.raises(ValueError, match=message):
        prompts.load_state_dict({"average": average})
    assert prompts.state_dict() == {"average": {}}


@pytest.mark.parametrize(
    ("explicit", "implicit", "settings", "message"),
    [
        ([], ["a"], {}, "prompts must not be empty"),
        ("striped", [], {}, "explicit must be a sequence, got 'striped'"),
        (["a"], "b", {}, "implicit must be a sequence, got 'b'"),
        (["a"], [], {"explicit_share": 0.0, "hard_share": 0.0}, "must share a batch out"),
        (["a"], [], {"hard_share": -1.0}, "hard_share must be at least 0"),
        (["a"], [], {"memory": 1.0}, "memory must be below 1"),
        (["a"], [], {"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    explicit: Any, implicit: Any, settings: dict[str, float], message: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ConceptPrompts(explicit, implicit, ConceptPromptsConfig(**settings))


def test_repeated_prompts_are_drawn_more_often_but_not_in_the_hard_part() -> None:
    for settings, expected in (({"hard_share": 0.0}, 2000), ({"explicit_share": 0.0}, 1500)):
        prompts = ConceptPrompts(["a", "a", "b"], config=ConceptPromptsConfig(**settings))
        assert Counter(prompts.pick(3000, generator()))["a"] == pytest.approx(expected, abs=120)


PROGRAM = '''
"""Draws and notes; each process writes what it had, the first what is remembered."""

import json
import sys
from pathlib import Path

import torch

from erasure import ConceptPrompts
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig, TrainingRun, process_state

policy = DiffusionPolicy.from_pretrained(sys.argv[1], lora=LoRAConfig(), device="cpu")
folder = Path(sys.argv[2])
prompts = ConceptPrompts(["a striped circle", "a striped square"], ["a cat", "a dog"])
batches = []
with TrainingRun(policy, TrainingConfig(output_dir=folder / "run", iterations=1, progress=False)) as run:
    assert run.num_processes == int(sys.argv[3])
    for _ in range(6):
        batch = prompts.draw(run, 8)
        batches.append(batch)
        texts, seeds = zip(*batch)
        prompts.note(run, texts, torch.tensor([seed / 2**29 - 1.7 + len(text) / 10 for text, seed in batch]))
    (folder / f"{run.num_processes}-{run.process_index}.json").write_text(
        json.dumps({"batches": batches, "state": prompts.state_dict()})
    )
process_state().destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_share_the_batch_of_one_and_remember_the_same(
    pipeline_dir: Path, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    for processes in (1, 2):
        (tmp_path / f"{processes}").mkdir()
        torchrun(program, pipeline_dir, tmp_path / f"{processes}", processes, processes=processes)
    whole = json.loads((tmp_path / "1" / "1-0.json").read_text())
    halves = [json.loads((tmp_path / "2" / f"2-{index}.json").read_text()) for index in range(2)]
    assert halves[0]["state"] == halves[1]["state"] == whole["state"]
    assert max(whole["state"]["average"].values()) > 0
    for k, batch in enumerate(whole["batches"]):
        assert [*halves[0]["batches"][k], *halves[1]["batches"][k]] == batch
