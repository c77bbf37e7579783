"""The benchmarks of DDPO and DiffusionNFT compare like with like."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ddpo_speed as speed
from benchmarks import nft_overhead
from benchmarks.ddpo_by_hand import BareRound, PlainRound
from ddpo import DDPOConfig, DDPOTrainer, NFTConfig, NFTTrainer
from ddpo.gradient import KL_PAIRS, PROBED_PAIRS, Term
from ddpo.requests import Pairs
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig, TrainingRun

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
CONFIG = DDPOConfig(
    samples_per_round=8, updates_per_round=2, sampling_batch_size=4, minibatch_size=4, steps=3, guidance_scale=3.0
)


class Redness:
    """The mean of red, which notes what it is shown."""

    differentiable = True

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.seen.append(("reward", tuple(images.shape), torch.is_grad_enabled()))
        return images[:, 0].mean(dim=(1, 2))


def noting_policy(make_policy: Callable[..., DiffusionPolicy], seen: list[Any]) -> DiffusionPolicy:
    """Returns a policy that notes the shape of every call of a network, and whether it is differentiated."""
    policy = make_policy(lora=LoRAConfig())

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            shapes = [tuple(value.shape) for value in (*inputs, *options.values()) if isinstance(value, Tensor)]
            seen.append((name, shapes, torch.is_grad_enabled()))

        return hook

    policy.unet.register_forward_pre_hook(note("unet"), with_kwargs=True)
    policy.vae.decoder.register_forward_pre_hook(note("decoder"), with_kwargs=True)
    return policy


def trainers_round(policy: DiffusionPolicy, reward: Redness, config: DDPOConfig | NFTConfig, folder: Path) -> None:
    trainer: DDPOTrainer | NFTTrainer
    if isinstance(config, NFTConfig):
        trainer = NFTTrainer(policy, reward, PROMPTS, config)
    else:
        trainer = DDPOTrainer(policy, reward, PROMPTS, config)
    with TrainingRun(policy, TrainingConfig(output_dir=folder, iterations=1, progress=False)) as run:
        trainer.prepare(run)
        trainer.step(run)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, timestep_fraction=0.67), replace(CONFIG, sampling_batch_size=8)]
)
def test_bare_round_makes_the_calls_of_the_trainers_round(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DDPOConfig
) -> None:
    monkeypatch.setattr("ddpo.gradient.TOLERATED", float("inf"))  # whether shapes round alike is the machine's affair
    seen: list[Any] = []
    policy = noting_policy(make_policy, seen)
    trainers_round(policy, Redness(seen), config, tmp_path)
    of_the_trainer = seen.copy()
    seen.clear()

    BareRound(policy, Redness(seen), PROMPTS, config, nullcontext)()

    minibatch = config.minibatch_size
    # What only measures: the reference once in a round; and a few minibatches where shapes differ from the drawing's.
    probes = PROBED_PAIRS // minibatch if config.sampling_batch_size != minibatch else 0
    measuring = 1 + probes
    assert minibatch <= KL_PAIRS
    call = next(call for call in seen if call[0] == "unet" and call[2])
    extra = [("unet", call[1], False)] * measuring
    # The reward has a thread of its own, so that its place in the order is a matter of chance.
    assert sorted(map(repr, of_the_trainer)) == sorted(map(repr, seen + extra))
    assert [call for call in of_the_trainer if call[2]] == [call for call in seen if call[2]]


NFT = NFTConfig(samples_per_round=8, images_per_prompt=4, sampling_batch_size=4, minibatch_size=2, steps=3)


@pytest.mark.parametrize(
    "config",
    [NFT, replace(NFT, kl_weight=0.0, updates_per_round=2), replace(NFT, guidance_scale=3.0, trained_levels=1)],
)
def test_bare_round_makes_the_calls_of_diffusion_nfts_round(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, config: NFTConfig
) -> None:
    seen: list[Any] = []
    policy = noting_policy(make_policy, seen)
    trainers_round(policy, Redness(seen), config, tmp_path)
    of_the_trainer = seen.copy()
    seen.clear()

    BareRound(policy, Redness(seen), PROMPTS, config, nullcontext)()

    # The reward has a thread of its own, so that its place in the order is a matter of chance.
    unet = [[call for call in calls if call[0] == "unet"] for calls in (of_the_trainer, seen)]
    assert unet[0] == unet[1]
    assert sorted(map(repr, of_the_trainer)) == sorted(map(repr, seen))


def test_diffusion_nfts_overhead_has_the_repeats_that_were_asked_for(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    config = nft_overhead.Config(
        samples_per_round=4, images_per_prompt=2, sampling_batch_size=2, minibatch_size=2, steps=2, repeats=2
    )
    policy = make_policy(lora=LoRAConfig())
    before = policy.trainable_state()
    times = nft_overhead.measure(policy, Redness([]), PROMPTS, config)
    assert [len(seconds) for seconds in times.values()] == [2, 2]
    assert min(*times["trainer"], *times["bare"]) > 0
    assert all(torch.allclose(value, before[name], atol=1e-10) for name, value in policy.trainable_state().items())


def test_plain_round_puts_as_many_samples_through_the_unet_as_the_bare_one(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    policy = make_policy(lora=LoRAConfig())
    bare = BareRound(policy, Redness([]), PROMPTS, CONFIG, nullcontext)
    plain = PlainRound(policy, Redness([]), PROMPTS, CONFIG, nullcontext, batch_size=2)
    pairs = 2 * CONFIG.samples_per_round * CONFIG.steps
    assert speed.count_calls(policy, bare) == speed.count_calls(policy, plain) == speed.Calls(pairs, pairs)


def test_bare_and_plain_rounds_reach_every_trained_weight_and_change_none(
    make_policy: Callable[..., DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(lora=LoRAConfig())
    before, parameters = policy.trainable_state(), policy.trainable_parameters()
    bare = BareRound(policy, Redness([]), PROMPTS, CONFIG, nullcontext)
    plain = PlainRound(policy, Redness([]), PROMPTS, CONFIG, nullcontext, batch_size=4)
    for work in (bare, plain):
        reached: list[bool] = []
        step = work.optimizer.step
        monkeypatch.setattr(
            work.optimizer,
            "step",
            lambda reached=reached, step=step: (reached.extend(p.grad is not None for p in parameters), step()),
        )
        work()
        assert len(reached) == CONFIG.updates_per_round * len(before)
        assert all(reached)
    assert all(torch.equal(value, before[name]) for name, value in policy.trainable_state().items())


def test_plain_gradient_is_that_of_the_trainers_update_on_the_same_trajectory(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(lora=LoRAConfig())
    config = replace(CONFIG, updates_per_round=1, minibatch_size=6, clip_range=1e-2)
    parameters = policy.trainable_parameters()
    with torch.no_grad():
        for parameter in parameters:  # a fresh LoRA has gradients in one of its two halves only
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    prompts = [PROMPTS[index % 3] for index in range(8)]
    trajectory = policy.rollout(
        policy.encode(prompts), steps=3, guidance=ClassifierFree(config.guidance_scale), seeds=range(8)
    )
    with torch.no_grad():
        parameters[0].mul_(1.5)  # so that ratios are not 1
    advantages = torch.linspace(-2.0, 2.0, 8)

    plain = PlainRound(policy, Redness([]), PROMPTS, config, nullcontext, batch_size=2)
    plain.backward(prompts, trajectory.latents, trajectory.log_probs, advantages)
    of_the_loop = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in of_the_loop)
    plain.optimizer.adamw.zero_grad(set_to_none=True)

    of_the_trainer: list[Tensor] = []
    trainer = DDPOTrainer(policy, Redness([]), PROMPTS, config)
    with TrainingRun(policy, TrainingConfig(output_dir=tmp_path, iterations=1, progress=False)) as run:
        update = run.update

        def noting_update() -> float:
            of_the_trainer.extend(p.grad.clone() for p in parameters if p.grad is not None)
            return update()

        monkeypatch.setattr(run, "update", noting_update)
        pairs = Pairs(torch.arange(8).repeat_interleave(3), torch.arange(3).repeat(8))
        result = trainer.gradient.update(run, Term(pairs), trajectory, advantages[:, None].expand(-1, 3))

    assert float(result.ratio_max) > 1e-4
    largest = max(float(gradient.abs().max()) for gradient in of_the_trainer)
    assert largest > 0
    for ours, theirs in zip(of_the_trainer, of_the_loop, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5 * largest)


def test_plain_batch_that_does_not_divide_an_update_is_refused(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="batch_size must divide the 4 samples of an update, got 3"):
        PlainRound(policy, Redness([]), PROMPTS, CONFIG, nullcontext, batch_size=3)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[speed.Row], str, dict[str, Any]]:
    """Rows, printed text and written record of the whole program with the smallest shapes."""
    output = tmp_path_factory.mktemp("speed") / "speed.json"
    config = speed.Config(
        samples_per_round=4, updates_per_round=2, sampling_batch_size=2, minibatch_size=2, steps=2,
        plain_batch_sizes=(1,), minibatch_sizes=(1, 4), timestep_fractions=(0.5,), repeats=2, table_repeats=1,
        output=output,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *values, sep=" ", **options: printed.append(sep.join(map(str, values))))
        rows = speed.main(config)
    return rows, "\n".join(printed), json.loads(output.read_text(encoding="utf-8"))


def test_main_prints_the_trainers_cost_over_the_bare_calls(
    tiny_run: tuple[list[speed.Row], str, dict[str, Any]],
) -> None:
    rows, printed, _ = tiny_run
    assert [row.name for row in rows[:3]] == ["trainer", "bare calls", "plain loop, batches of 1"]
    assert f"trainer over bare calls: {1 / rows[1].relative:.3f} (target: at most 1.10)" in printed
    assert f"plain loop, batches of 1 over trainer: {rows[2].relative:.2f}" in printed


def test_table_has_a_line_for_each_measure_with_what_goes_through_the_unet(
    tiny_run: tuple[list[speed.Row], str, dict[str, Any]],
) -> None:
    calls = {row.name: row.calls for row in tiny_run[0][3:]}
    # Four samples, two steps, two branches: 16 are drawn, and 16 differentiated. Added is one look at the reference, on
    # a minibatch with two branches.
    assert calls == {
        "trainer": (16 + 4, 16),
        # Eight pairs are too few to tell whether log-probabilities of other shapes agree: all are taken again.
        "1 pairs a minibatch": (16 + 2 + 16, 16),
        "4 pairs a minibatch": (16 + 8 + 16, 16),
        "0.5 of the steps": (16 + 4, 8),
        "divergence in the loss": (16 + 16, 16),
        "4 pairs, old log-probabilities again": (16 + 8 + 16, 16),
    }


def test_output_has_every_time_that_was_taken(tiny_run: tuple[list[speed.Row], str, dict[str, Any]]) -> None:
    rows, _, record = tiny_run
    written = [row for table in record["tables"] for row in table]
    assert [row["seconds"] for row in written] == [row.seconds for row in rows]
    assert [len(row.seconds) for row in rows] == [2] * 3 + [1] * 6
    assert min(second for row in rows for second in row.seconds) > 0


def test_relative_time_is_that_of_the_medians(policy: DiffusionPolicy) -> None:
    times = iter([2.0, 4.0, 4.0, 2.0, 100.0, 1.0])  # trainer and other, other and trainer, trainer and other
    rows = speed.measure(
        policy, {speed.TRAINER: lambda: None, "other": lambda: None}, lambda work: next(times), repeats=3
    )
    assert [row.seconds for row in rows] == [[2.0, 2.0, 100.0], [4.0, 4.0, 1.0]]
    assert [row.relative for row in rows] == pytest.approx([1.0, 2.0], rel=1e-12)


def test_stable_diffusion_on_a_cpu_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu"):
        speed.main(speed.Config(architecture="stable-diffusion"))
    asked = speed.Config(architecture="stable-diffusion", device="cpu")
    assert speed.chosen_device(asked) == speed.chosen_device(speed.Config()) == torch.device("cpu")


@pytest.mark.parametrize(("on_gpu", "device"), [(False, "cuda"), (True, "cpu")])
def test_device_that_a_run_would_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, device: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    with pytest.raises(SystemExit, match=f"got '{device}'"):
        speed.chosen_device(speed.Config(device=device))


def test_without_a_compiler_the_line_is_left_out_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert speed.compiled_row(speed.Config(), torch.device("cpu"), lambda work: 1.0, 1.0) is None
    assert "torch.compile does not work here, and is left out: RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("repeats", 1, "repeats must be at least 2"),
        ("table_repeats", -1, "table_repeats must be at least 0"),
        ("guidance_scale", 1.0, "guidance_scale must be above 1"),
        ("updates_per_round", 5, "samples_per_round must divide evenly"),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        speed.Config(**{field: value})


@pytest.mark.parametrize("family", ["flux", *(pytest.param(one, marks=pytest.mark.slow) for one in ("sdxl", "sd3"))])
def test_other_families_go_through_the_network_as_often_by_hand(family: Any) -> None:
    config = speed.Config(
        architecture=family, samples_per_round=4, updates_per_round=1, sampling_batch_size=4, minibatch_size=4, steps=3
    )
    with speed.bench(config, torch.device("cpu")) as bench:
        rounds = speed.contestants(config, bench)
        assert rounds.keys() == {speed.TRAINER, speed.BARE}
        trainer, bare = (speed.count_calls(bench.policy, work) for work in rounds.values())
    branches = 1 if family == "flux" else 2
    assert trainer.differentiated == bare.differentiated == 4 * branches * (3 if family == "sdxl" else 2)
    assert trainer.forward_only - bare.forward_only == 4 * branches  # the divergence, which is only measured
