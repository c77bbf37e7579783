"""Advantages: by hand, over rounds, and what must not change them."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpo import PromptStatistics, centred_advantages, group_advantages, round_advantages
from overpaint.training import Checkpoint, CheckpointFolder

ODD_PROMPTS = ["", "/", "a/b", "../x", "tensor", "чёрный кот", "猫 🐈", "e\u0301", "é", 'say "no"\n\\', "0", " a", "a"]
"""Prompts that a path, a file of text or a careless comparison might take for something else."""

SAMPLES = st.lists(st.tuples(st.integers(-100, 100), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=20)
"""Rewards, whole numbers so that deviations are zero or far above the epsilon, and prompts."""

BASELINES: dict[str, Callable[[torch.Tensor, list[str]], torch.Tensor]] = {
    "round": round_advantages,
    "group": group_advantages,
    "centred": centred_advantages,
    "prompt": lambda rewards, prompts: PromptStatistics(32, 4).advantages(rewards, prompts),
}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns the shape checker off, which users do not have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def taken_apart(samples: list[tuple[int, str]]) -> tuple[torch.Tensor, list[str]]:
    return torch.tensor([float(reward) for reward, _ in samples]), [prompt for _, prompt in samples]


# By hand.


def test_round_advantages_by_hand() -> None:
    # Mean 5, population deviation 2.
    rewards = torch.tensor([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    expected = torch.tensor([-1.5, -0.5, -0.5, -0.5, 0.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(round_advantages(rewards), expected, atol=2e-6, rtol=0)


def test_group_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 10.0, 3.0, 10.0, 7.0])
    advantages = group_advantages(rewards, ["a", "b", "a", "b", "c"])
    # Group a has mean 2 and deviation 1; the rewards of b are equal; c is alone.
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, atol=2e-6, rtol=0)


def test_centred_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 10.0, 3.0, 14.0, 7.0])
    advantages = centred_advantages(rewards, ["a", "b", "a", "b", "c"])
    # Minus the means 2, 12 and 7 that is -1, -2, 1, 2, 0, whose mean square is 2.
    expected = torch.tensor([-1.0, -2.0, 1.0, 2.0, 0.0], dtype=torch.float64) / 2**0.5
    torch.testing.assert_close(advantages, expected, atol=2e-6, rtol=0)


def test_prompt_statistics_by_hand() -> None:
    statistics = PromptStatistics(buffer_size=3, min_count=2)
    # Prompt a has two rewards, mean 1 and deviation 1; b has one, so the round's mean 2 and variance 8/3 count.
    advantages = statistics.advantages(torch.tensor([0.0, 4.0, 2.0]), ["a", "b", "a"])
    expected = torch.tensor([-1.0, 2 / (8 / 3) ** 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, atol=2e-6, rtol=0)
    # Now b remembers 4 and 8, mean 6 and deviation 2; what is new counts, and what is old is kept.
    advantages = statistics.advantages(torch.tensor([8.0]), ["b"])
    torch.testing.assert_close(advantages, torch.tensor([1.0], dtype=torch.float64), atol=2e-6, rtol=0)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("rewards", [[3.0], [3.0, 3.0, 3.0], [0.1] * 7])
def test_equal_rewards_have_no_advantage(baseline: str, rewards: list[float]) -> None:
    # The mean of equal numbers may be off by a rounding error of float64, which the epsilon keeps small.
    advantages = BASELINES[baseline](torch.tensor(rewards), ["a"] * len(rewards))
    assert advantages.abs().max() < 1e-9


@pytest.mark.parametrize("baseline", BASELINES)
def test_whole_numbers_are_not_cut_off(baseline: str, unchecked: None) -> None:
    rewards, prompts = torch.tensor([1, 4, 9, 9]), ["a", "a", "b", "b"]
    advantages = BASELINES[baseline](rewards, prompts)
    assert advantages.dtype == torch.float64
    torch.testing.assert_close(advantages, BASELINES[baseline](rewards.float(), prompts), atol=0, rtol=0)


@pytest.mark.parametrize("baseline", BASELINES)
def test_rewards_are_left_as_they_were(baseline: str) -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    BASELINES[baseline](rewards, ["a", "a", "b"])
    assert rewards.tolist() == [1.0, 2.0, 4.0]


# What is remembered.


def test_only_the_newest_rewards_of_a_prompt_are_kept() -> None:
    statistics = PromptStatistics(buffer_size=3, min_count=1)
    statistics.advantages(torch.tensor([100.0, 1.0, 2.0]), ["a", "a", "b"])
    statistics.advantages(torch.tensor([3.0, 5.0]), ["a", "a"])
    assert statistics.state_dict() == {"buffers": {"a": [1.0, 3.0, 5.0], "b": [2.0]}}


def test_round_with_more_samples_of_a_prompt_than_are_kept_gives_each_an_advantage() -> None:
    statistics = PromptStatistics(buffer_size=2, min_count=1)
    advantages = statistics.advantages(torch.tensor([10.0, 1.0, 3.0]), ["a", "a", "a"])
    # 1 and 3 are kept: mean 2, deviation 1.
    torch.testing.assert_close(advantages, torch.tensor([8.0, -1.0, 1.0], dtype=torch.float64), atol=1e-5, rtol=0)


def test_prompt_is_its_own_measure_from_min_count_on() -> None:
    statistics = PromptStatistics(buffer_size=8, min_count=3)
    rewards, prompts = torch.tensor([0.0, 2.0, 10.0, 12.0]), ["a", "a", "b", "b"]
    # Two rewards of each prompt: the round's mean 6 is what they are compared with.
    assert statistics.advantages(rewards, prompts).sign().tolist() == [-1.0, -1.0, 1.0, 1.0]
    # Four of each: their own means 1 and 11.
    assert statistics.advantages(rewards, prompts).sign().tolist() == [-1.0, 1.0, -1.0, 1.0]
    # A prompt that is new is still compared with the round.
    assert statistics.advantages(torch.tensor([5.0, 1.0, 0.0]), ["c", "c", "a"]).sign().tolist()[:2] == [1.0, -1.0]


def test_state_of_odd_prompts_goes_through_a_checkpoint(tmp_path: Path) -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=2)
    rewards = torch.randn(len(ODD_PROMPTS), generator=torch.Generator().manual_seed(0))
    statistics.advantages(rewards, ODD_PROMPTS)
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    folder.save(Checkpoint(1, {"weight": torch.zeros(1)}, {"statistics": statistics.state_dict()}))

    resumed = PromptStatistics(buffer_size=4, min_count=2)
    resumed.advantages(torch.tensor([1.0]), ["forgotten"])
    resumed.load_state_dict(folder.load(1).state["statistics"])
    assert resumed.state_dict() == statistics.state_dict()
    assert list(resumed.state_dict()["buffers"]) == ODD_PROMPTS
    # Both go on alike, with buffers that still have their limit.
    for _ in range(5):
        ours, theirs = (each.advantages(rewards.flip(0), ODD_PROMPTS) for each in (resumed, statistics))
        assert torch.equal(ours, theirs)
    assert {len(kept) for kept in resumed.state_dict()["buffers"].values()} == {4}


def test_state_is_a_copy() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=2)
    statistics.advantages(torch.tensor([1.0]), ["a"])
    state = statistics.state_dict()
    other = PromptStatistics(buffer_size=4, min_count=2)
    other.load_state_dict(state)
    statistics.advantages(torch.tensor([2.0]), ["a"])
    other.advantages(torch.tensor([3.0]), ["a"])
    assert state == {"buffers": {"a": [1.0]}}


@pytest.mark.parametrize("field", ["buffer_size", "min_count"])
def test_number_below_one_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"^PromptStatistics\.{field} must be at least 1, got 0$"):
        PromptStatistics(**{field: 0})
    PromptStatistics(**{field: 1})


# What must not change them.


@pytest.mark.parametrize("baseline", BASELINES)
@settings(deadline=None, max_examples=50)
@given(samples=SAMPLES, data=st.data())
def test_order_of_the_samples_does_not_matter(
    baseline: str, samples: list[tuple[int, str]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(samples))))
    advantages = BASELINES[baseline](*taken_apart(samples))
    shuffled = BASELINES[baseline](*taken_apart([samples[index] for index in order]))
    torch.testing.assert_close(shuffled, advantages[order], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("baseline", BASELINES)
@settings(deadline=None, max_examples=50)
@given(samples=SAMPLES, factor=st.integers(1, 50), shift=st.integers(-1000, 1000))
def test_scale_and_shift_of_rewards_do_not_matter(
    baseline: str, samples: list[tuple[int, str]], factor: int, shift: int
) -> None:
    moved = [(factor * reward + shift, prompt) for reward, prompt in samples]
    # The smallest deviation of 20 whole numbers is above 0.1, of which the epsilon is below 1e-5.
    torch.testing.assert_close(
        BASELINES[baseline](*taken_apart(moved)), BASELINES[baseline](*taken_apart(samples)), atol=1e-9, rtol=1e-5
    )


@pytest.mark.parametrize("baseline", ["group", "centred"])
@settings(deadline=None, max_examples=50)
@given(samples=SAMPLES, shift=st.integers(-1000, 1000))
def test_prompt_whose_rewards_are_all_higher_is_no_better_within_groups(
    baseline: str, samples: list[tuple[int, str]], shift: int
) -> None:
    easier = [(reward + shift * (prompt == "a"), prompt) for reward, prompt in samples]
    torch.testing.assert_close(
        BASELINES[baseline](*taken_apart(easier)), BASELINES[baseline](*taken_apart(samples)), atol=1e-9, rtol=1e-9
    )


@settings(deadline=None, max_examples=50)
@given(samples=SAMPLES)
def test_first_round_of_prompt_statistics_is_the_group_or_the_round(samples: list[tuple[int, str]]) -> None:
    rewards, prompts = taken_apart(samples)
    own = PromptStatistics(buffer_size=20, min_count=1).advantages(rewards, prompts)
    torch.testing.assert_close(own, group_advantages(rewards, prompts), atol=1e-9, rtol=1e-9)
    others = PromptStatistics(buffer_size=20, min_count=21).advantages(rewards, prompts)
    torch.testing.assert_close(others, round_advantages(rewards), atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=50)
@given(samples=SAMPLES)
def test_advantages_within_a_group_have_mean_zero_and_deviation_one_or_zero(samples: list[tuple[int, str]]) -> None:
    rewards, prompts = taken_apart(samples)
    advantages = group_advantages(rewards, prompts)
    for prompt in set(prompts):
        mine = advantages[[index for index, other in enumerate(prompts) if other == prompt]]
        assert abs(float(mine.mean())) < 1e-9
        deviation = float(mine.std(correction=0))
        assert deviation < 1e-9 or deviation == pytest.approx(1.0, rel=1e-5)
