"""The benchmark of rewards' costs builds each at its published size, and measures each by itself."""

import json
import math
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

from benchmarks import random_rewards, reward_cost
from benchmarks.reward_cost import Config, Cost
from rewards import Reward

CPU = torch.device("cpu")
DIFFERENTIABLE = ("image-reward", "blip", "clip-vit-l-14", "clip-vit-b-32", "aesthetic", "pick", "hps")


# Published: 446.7 M for ImageReward with what is not used here; the CLIP models as their model cards count them; 750 M
# for deberta-xlarge, of which 8 layers of 14.7 M are cut.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("image-reward", 446.2),
        ("blip", 445.7),
        ("clip-vit-l-14", 427.6),
        ("clip-vit-b-32", 151.3),
        ("aesthetic", 428.5),
        ("pick", 986.1),
        ("hps", 986.1),
        ("alignment-text", 640.3),
    ],
)
def test_networks_have_their_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        reward = random_rewards.BUILDERS[name](False)
    assert isinstance(reward, nn.Module)
    assert sum(p.numel() for p in reward.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


def test_every_name_but_those_without_a_network_is_measured_tiny() -> None:
    for name in (*DIFFERENTIABLE, "alignment-text", "compressibility"):
        cost = reward_cost.measure(name, Config(batch=2, side=24, repeats=1, tiny=True))
        assert cost.reward == name
        assert cost.forward_seconds >= 0
        assert cost.forward_gib > 0
        assert math.isnan(cost.backward_seconds) != (name in DIFFERENTIABLE)
        assert (cost.parameters > 0) == (name != "compressibility")


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "alignment-text"])
def test_random_networks_are_frozen_and_give_finite_scores(name: str) -> None:
    torch.manual_seed(0)
    reward = random_rewards.random_reward(name, CPU, tiny=True)
    assert isinstance(reward, nn.Module)
    assert not any(p.requires_grad for p in reward.parameters())
    scores = reward(torch.rand(2, 3, 24, 24), ["a red circle", "a blue square"])
    assert scores.shape == (2,)
    assert torch.isfinite(scores).all()


def test_time_is_the_median_for_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0, 10.0, 11.0, 20.0, 25.0])
    monkeypatch.setattr(reward_cost.timing, "clock", lambda device: next(times))
    runs: list[int] = []
    seconds, _ = reward_cost.measured(lambda: runs.append(1), Config(batch=2, repeats=3))
    assert seconds == 1.5
    assert len(runs) == 4


def test_peak_memory_is_that_of_the_work_alone() -> None:
    before = torch.ones(50 * 2**18)  # 50 MiB that are gone again
    del before
    idle = reward_cost.measured(lambda: None, Config(repeats=1))[1]
    busy = reward_cost.measured(lambda: torch.ones(200 * 2**18).sum().item(), Config(repeats=1))[1]
    again = reward_cost.measured(lambda: None, Config(repeats=1))[1]
    assert busy - idle == pytest.approx(200 / 1024, abs=0.03)
    assert again == pytest.approx(idle, abs=0.03)


def test_table_and_json_say_the_same_of_each_reward_in_its_own_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(rewards=("compressibility",), side=64, repeats=1, output=tmp_path / "cost.json")
    costs = reward_cost.main(config)
    written = json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))
    assert [row["reward"] for row in written["costs"]] == ["compressibility"]
    assert written["costs"][0]["forward_seconds"] == costs[0].forward_seconds
    assert written["costs"][0]["backward_seconds"] is None
    assert written["config"]["side"] == 64
    lines = capsys.readouterr().out.splitlines()
    assert "batch 1, 64 x 64 pixels, cpu" in lines[0]
    assert lines[2].split()[:3] == ["compressibility", "0.0", "M"]
    assert lines[2].split()[4] == "-"


class Failing:
    """A reward that needs what is not there."""

    differentiable = False

    def __init__(self) -> None:
        raise ImportError("this detector needs the package nudenet\npip install it")


class Pool:
    """Runs the work where it is."""

    def __init__(self, **options: object) -> None:
        pass

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def submit(self, work: object, name: str, config: Config) -> "Pool":
        self.arguments = name, config
        return self

    def result(self) -> Cost:
        return reward_cost.measure(*self.arguments)


def test_a_reward_that_cannot_be_made_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(tiny: bool) -> Reward:
        return Failing()  # ty: ignore[invalid-explicit-return]

    monkeypatch.setattr(random_rewards, "BUILDERS", {"nudenet": make})
    monkeypatch.setattr(reward_cost, "ProcessPoolExecutor", Pool)
    cost = reward_cost.measure_apart("nudenet", Config())
    assert cost.error == "ImportError: this detector needs the package nudenet"
    assert reward_cost.table([cost]).splitlines()[1].endswith("  ImportError: this detector needs the package nudenet")


def test_a_process_that_dies_is_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: Pool) -> NoReturn:
        raise reward_cost.BrokenProcessPool

    monkeypatch.setattr(Pool, "result", die)
    monkeypatch.setattr(reward_cost, "ProcessPoolExecutor", Pool)
    assert "died" in reward_cost.measure_apart("hps", Config()).error


def test_wrong_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"rewards must be some of image-reward, .*got 'clip'"):
        Config(rewards=("clip",))
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        Config(repeats=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        reward_cost.main(Config(device="cuda"))
