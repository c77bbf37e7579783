"""The comparison with TRL gives both the same task, and counts right."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import peers, peers_environment
from benchmarks.peers_race import Evaluation, Evaluator, Record, Side, race, reward_after, seconds_until
from benchmarks.peers_settings import Settings, our_job, trl_config, trl_job
from overpaint.policy import DiffusionPolicy, LoRAConfig

CHILD = """
import json, pathlib, sys
from benchmarks.peers_child import serve
import torch
rounds = json.loads(pathlib.Path(sys.argv[1]).read_text())["rounds"]
played = []
def one_round():
    print("a library prints")
    played.append(sum(k * k for k in range(200_000)))
    if len(played) > rounds:
        raise RuntimeError("no more")
    return float(len(played))
serve(one_round, lambda: {"weight": torch.full((2,), float(len(played)))})
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """What TRL and "same" train with."""
    return peers.Config(output_dir=tmp_path).sides(7)[peers.TRL]


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Side]:
    """Starts a child that trains nothing, and fails after as many rounds as it is told."""
    (tmp_path / "peers_test_child.py").write_text(CHILD, encoding="utf-8")
    popen = peers_race_popen(tmp_path)
    monkeypatch.setattr("benchmarks.peers_race.subprocess.Popen", popen)

    def start(name: str = "side", rounds: int = 100, samples: int = 4) -> Side:
        job = {"rounds": rounds}
        return Side(Path(sys.executable), "peers_test_child", job, tmp_path / name, samples_per_round=samples)

    return start


def peers_race_popen(folder: Path) -> Callable[..., Any]:
    """Returns Popen with a folder more on the child's path."""
    import subprocess

    original = subprocess.Popen

    def popen(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        return original(command, env=env | {"PYTHONPATH": f"{env['PYTHONPATH']}:{folder}"}, **options)

    return popen


# Settings


def test_trl_draws_and_trains_on_as_many_images_as_we_do(settings: Settings) -> None:
    config, ddpo = trl_config(settings), settings.ddpo
    drawn = config["sample_batch_size"] * config["sample_num_batches_per_epoch"]
    of_an_update = config["train_batch_size"] * config["train_gradient_accumulation_steps"]
    assert drawn == ddpo.samples_per_round == 64
    assert of_an_update * ddpo.updates_per_round == drawn
    assert config["sample_batch_size"] == config["train_batch_size"] == 8


def test_every_setting_of_the_algorithm_and_of_the_optimizer_reaches_trl(settings: Settings) -> None:
    ddpo = replace(
        settings.ddpo, steps=3, eta=0.5, guidance_scale=2.0, clip_range=0.1, max_advantage=4.0, buffer_size=9,
        min_count=8, timestep_fraction=0.7,
    )  # fmt: skip
    run = replace(
        settings.run, learning_rate=0.01, adam_betas=(0.8, 0.9), adam_epsilon=0.03, weight_decay=0.02,
        max_grad_norm=0.5,
    )  # fmt: skip
    expected = {
        "seed": 7, "sample_num_steps": 3, "sample_eta": 0.5, "sample_guidance_scale": 2.0, "train_clip_range": 0.1,
        "train_adv_clip_max": 4.0, "per_prompt_stat_tracking_buffer_size": 9, "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_min_count": 8, "train_timestep_fraction": 0.7, "train_learning_rate": 0.01,
        "train_adam_beta1": 0.8, "train_adam_beta2": 0.9, "train_adam_epsilon": 0.03,
        "train_adam_weight_decay": 0.02, "train_max_grad_norm": 0.5, "mixed_precision": "no",
    }  # fmt: skip
    assert trl_config(replace(settings, ddpo=ddpo, run=run)).items() >= expected.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "score", "updates_per_round": 1}, "ddpo.estimator must be 'importance'"),
        ({"baseline": "round"}, "ddpo.baseline must be 'prompt'"),
        ({"step_weights": "signal"}, "ddpo.step_weights must be 'equal'"),
        ({"kl_weight": 0.1}, "ddpo.kl_weight must be 0.0"),
        ({"images_per_prompt": 2}, "ddpo.images_per_prompt must be 1"),
        ({"guidance_scale": 1.0}, "ddpo.guidance_scale must be above 1"),
        ({"minibatch_size": 16}, "sampling_batch_size % minibatch_size must be 0"),
        ({"sampling_batch_size": 24}, "samples_per_round % sampling_batch_size must be 0"),
        ({"updates_per_round": 16}, "samples of an update % minibatch_size must be 0"),
    ],
)
def test_what_trl_cannot_do_is_refused(settings: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trl_config(replace(settings, ddpo=replace(settings.ddpo, **changes)))


def test_both_children_are_given_the_same_task(settings: Settings) -> None:
    ours, theirs = our_job(settings), trl_job(settings)
    for name in ("prompts", "reward", "lora"):
        assert ours[name] == theirs[name]
    assert len(ours["prompts"]) == 32


def test_own_settings_have_the_task_of_the_others(settings: Settings, tmp_path: Path) -> None:
    own = peers.Config(output_dir=tmp_path).sides(7)[peers.OWN]
    assert own.prompts == settings.prompts
    assert own.lora == settings.lora
    assert own.reward == settings.reward
    assert own.run.seed == settings.run.seed
    assert own.run.learning_rate == settings.run.learning_rate
    assert (own.ddpo.steps, own.ddpo.guidance_scale) == (settings.ddpo.steps, settings.ddpo.guidance_scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rounds": 0}, "rounds must be at least 1"), ({"seeds": (1, 1)}, "seeds must be different numbers")],
)
def test_a_comparison_of_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peers.Config(**changes)


# The environment


def test_the_environment_has_trl_and_our_versions_whatever_device_torch_was_built_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(peers_environment.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(peers_environment, "version", lambda name: "2.0+cu999")
    python = peers_environment.make_environment(tmp_path)
    assert python == tmp_path / "bin" / "python"
    made, installed = commands
    assert made[1:] == ["-m", "venv", str(tmp_path)]
    assert {"trl==0.23.1", "torch==2.0", "diffusers==2.0"} <= set(installed)


# The race


def test_a_round_is_timed_and_its_weights_are_saved(child: Callable[..., Side]) -> None:
    with child() as side:
        side.step()
        side.step()
    assert side.record.rewards == [1.0, 2.0]
    assert min(side.record.seconds) > 0
    assert side.record.total == sum(side.record.seconds)


def test_a_side_that_fails_says_why(child: Callable[..., Side]) -> None:
    with child(rounds=1) as side:
        side.step()
        with pytest.raises(RuntimeError, match=r"a side has ended.*RuntimeError: no more"):
            side.step()


class Readings:
    """An evaluator that returns the saved number, and 0 before there is one."""

    def __call__(self, weights: Path | None = None) -> float:
        from safetensors.torch import load_file

        return 0.0 if weights is None else float(load_file(weights)["weight"][0])


class Scripted:
    """A side whose rounds take a fixed time."""

    def __init__(self, seconds: float, folder: Path, samples: int) -> None:
        self.seconds = seconds
        self.record = Record()
        self.weights = folder / f"{seconds}.safetensors"
        self.samples_per_round = samples

    def step(self) -> None:
        self.record.seconds.append(self.seconds)
        save_file({"weight": torch.full((1,), self.record.total)}, self.weights)


def run_race(folder: Path, follower: float) -> dict[str, Record]:
    """Races five rounds of 10 seconds against five of 4, and a follower."""
    sides: Any = {"a": Scripted(10.0, folder, 8), "b": Scripted(4.0, folder, 8), "c": Scripted(follower, folder, 3)}
    evaluator: Any = Readings()
    race(sides, evaluator, rounds=5, pacemaker="a", follower="c", evaluate_every=2, report=lambda line: None)
    return {name: side.record for name, side in sides.items()}


@pytest.fixture
def raced(tmp_path: Path) -> dict[str, Record]:
    """A race with a follower whose rounds take 7 seconds."""
    return run_race(tmp_path, 7.0)


def test_each_side_does_its_rounds_and_the_follower_as_long_as_the_pacemaker(raced: dict[str, Record]) -> None:
    assert raced["a"].seconds == [10.0] * 5
    assert raced["b"].seconds == [4.0] * 5
    assert raced["c"].seconds == [7.0] * 8  # the first multiple of 7 that is at least 50


def test_evaluations_are_at_the_start_and_the_end_and_between(raced: dict[str, Record]) -> None:
    assert raced["a"].evaluations == [
        Evaluation(0, 0, 0.0, 0.0), Evaluation(2, 16, 20.0, 20.0), Evaluation(4, 32, 40.0, 40.0),
        Evaluation(5, 40, 50.0, 50.0),
    ]  # fmt: skip
    assert [evaluation.rounds for evaluation in raced["c"].evaluations] == [0, 2, 4, 6, 8]
    assert raced["c"].evaluations[-1] == Evaluation(8, 24, 56.0, 56.0)


def test_a_follower_that_was_ahead_when_the_pacemaker_ended_is_evaluated_too(tmp_path: Path) -> None:
    record = run_race(tmp_path, 17.0)["c"]
    assert record.seconds == [17.0] * 3
    assert [evaluation.rounds for evaluation in record.evaluations] == [0, 2, 3]


def test_records_survive_being_written_and_read(raced: dict[str, Record]) -> None:
    assert Record(**json.loads(json.dumps(asdict(raced["a"])))) == raced["a"]


def test_evaluator_uses_the_saved_weights_and_the_same_noise(
    make_policy: Callable[..., DiffusionPolicy], settings: Settings, tmp_path: Path
) -> None:
    class Redness:
        differentiable = True

        def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
            return images[:, 0].mean(dim=(1, 2))

    policy = make_policy(lora=LoRAConfig())
    short = replace(settings, ddpo=replace(settings.ddpo, steps=2))
    evaluator = Evaluator(policy, Redness(), ["a red circle", "a blue square"], short)
    start = evaluator()
    state = policy.trainable_state()
    file = tmp_path / "weights.safetensors"
    save_file({name: torch.full_like(value, 0.1) for name, value in state.items()}, file)

    assert evaluator(file) != start
    save_file(state, file)
    assert evaluator(file) == start


# Results


def test_seconds_until_a_level_lie_on_straight_lines_between_evaluations() -> None:
    evaluations = [
        Evaluation(0, 0, 0.0, 1.0),
        Evaluation(2, 8, 20.0, 2.0),
        Evaluation(4, 16, 30.0, 1.5),
        Evaluation(6, 24, 70.0, 3.5),
    ]
    assert seconds_until(1.5, evaluations) == pytest.approx(10.0)  # the first time, not the third
    assert seconds_until(2.0, evaluations) == 20.0
    assert seconds_until(2.5, evaluations) == pytest.approx(50.0)
    assert seconds_until(3.5, evaluations) == 70.0


def test_seconds_until_a_level_are_none_at_the_start_and_infinite_if_it_is_never_reached() -> None:
    evaluations = [Evaluation(0, 0, 0.0, 1.0), Evaluation(2, 8, 20.0, 2.0)]
    assert seconds_until(0.5, evaluations) == 0.0
    assert seconds_until(2.1, evaluations) == math.inf


def test_reward_after_some_seconds_lies_on_straight_lines_between_evaluations() -> None:
    evaluations = [Evaluation(0, 0, 0.0, 1.0), Evaluation(2, 8, 20.0, 2.0), Evaluation(4, 16, 30.0, 1.0)]
    assert [reward_after(seconds, evaluations) for seconds in (0.0, 5.0, 20.0, 27.5, 99.0)] == [
        1.0,
        1.25,
        2.0,
        1.25,
        1.0,
    ]


@pytest.fixture
def records() -> dict[int, dict[str, Record]]:
    """Two seeds: rounds of 10, 8 and 5 seconds; TRL goes from 0 to 1, and "own" gets twice as far in half the time."""

    def record(seconds: float, rewards: tuple[float, float]) -> Record:
        evaluations = [
            Evaluation(0, 0, 0.0, 0.0),
            Evaluation(1, 4, seconds, rewards[0]),
            Evaluation(2, 8, 2 * seconds, rewards[1]),
        ]
        return Record(seconds=[seconds] * 2, evaluations=evaluations)

    fast = {"TRL": record(10.0, (0.5, 1.0)), "same": record(8.0, (0.4, 1.2)), "own": record(5.0, (1.0, 2.0))}
    slow = fast | {"own": record(5.0, (0.1, 0.2))}
    return {0: fast, 3: slow}


def test_summary_compares_rounds_and_the_way_to_trls_last_reward(records: dict[int, dict[str, Record]]) -> None:
    found = peers.summary(records)
    assert found["cpu_seconds_per_round"] == {"TRL": 10.0, "same": 8.0, "own": 5.0}
    assert found["ratio"] == pytest.approx(0.8)
    assert found["reached"][0] == {"start": 0.0, "level": 1.0, "TRL": 20.0, "own": 5.0, "ratio": 0.25}
    assert found["reached"][3]["ratio"] == math.inf


def test_summary_makes_no_yardstick_of_a_side_that_learned_nothing(records: dict[int, dict[str, Record]]) -> None:
    records[0]["TRL"].evaluations[-1] = Evaluation(2, 8, 20.0, -0.1)
    assert math.isnan(peers.summary(records)["reached"][0]["ratio"])


def test_table_has_the_numbers_and_the_targets(records: dict[int, dict[str, Record]]) -> None:
    lines = [line.split() for line in peers.table({0: records[0]}).splitlines()]
    assert ["TRL", "10.00"] in lines
    assert ["8", "1.0000", "1.2000"] in lines
    assert ["0", "0.0000", "1.0000", "20.0", "5.0", "0.250"] in lines
    text = " ".join(peers.table({0: records[0]}).split())
    assert "same / TRL 0.800 (target: at most 1.00)" in text
    assert "own / TRL, mean over seeds 0.250 (target: at most 0.67)" in text


def test_figures_have_a_curve_of_each_side(records: dict[int, dict[str, Record]]) -> None:
    charts = peers.figures(records)
    assert list(charts) == ["peers-queries.svg", "peers-seconds.svg"]
    for chart in charts.values():
        assert all(f">{side}<" in chart for side in ("TRL", "same", "own"))


def test_a_finished_seed_is_not_run_again_and_other_settings_are_refused(
    records: dict[int, dict[str, Record]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def played(sides: dict[str, Any], evaluator: Evaluator, **options: Any) -> None:
        for name, side in sides.items():
            side.record = records[0][name]

    class Started:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            started.append(arguments[1])

        def __enter__(self) -> "Started":
            return self

        def __exit__(self, *error: object) -> None:
            pass

    started: list[str] = []
    monkeypatch.setattr(peers, "race", played)
    monkeypatch.setattr(peers, "Side", Started)
    config = peers.Config(output_dir=tmp_path)
    (tmp_path / "seed-0").mkdir()
    python = Path(sys.executable)

    assert peers.run_seed(config, 0, python) == records[0]
    assert started == ["benchmarks.peers_trl", "benchmarks.peers_ours", "benchmarks.peers_ours"]
    assert peers.run_seed(config, 0, python) == records[0]
    assert len(started) == 3
    with pytest.raises(ValueError, match="output_dir must be new for other settings"):
        peers.run_seed(replace(config, learning_rate=0.5), 0, python)


@pytest.mark.slow
def test_program_compares_with_trl_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess

    try:
        peers_environment.make_environment(tmp_path / "venv")
    except subprocess.CalledProcessError:
        pytest.skip("TRL's environment cannot be made here")
    config = peers.Config(
        environment=tmp_path / "venv", output_dir=tmp_path / "results", rounds=2, seeds=(0,), evaluate_every=1,
        samples_per_round=16, updates_per_round=2, steps=4, held_out=4,
    )  # fmt: skip
    results = peers.main(config)
    assert set(results["records"][0]) == {"TRL", "same", "own"}
    assert all(math.isfinite(seconds) for seconds in results["cpu_seconds_per_round"].values())
    assert "same / TRL" in capsys.readouterr().out
