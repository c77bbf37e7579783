"""Gradients, updates, averages, and numbers that are not finite."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.training import NonFiniteError, TrainingConfig, TrainingRun, make_optimizer

BATCH = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., TrainingConfig]:
    def make(**changes: Any) -> TrainingConfig:
        fields: dict[str, Any] = {"iterations": 4, "learning_rate": 1e-2, "progress": False} | changes
        return TrainingConfig(output_dir=tmp_path / "run", **fields)

    return make


def squares(policy: Any, batch: Tensor = BATCH) -> Tensor:
    return policy.network(batch).square().mean()


def test_update_is_adamw_of_the_clipped_gradient(stand_in: Callable, settings: Callable) -> None:
    policy, expected = stand_in(), stand_in()
    config = settings(iterations=3, max_grad_norm=0.05, weight_decay=0.1)
    optimizer = torch.optim.AdamW(expected.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    with TrainingRun(policy, config) as run:
        for _ in run.iterations():
            run.backward(squares(policy))
            norm = run.update()
            optimizer.zero_grad()
            squares(expected).backward()
            clipped = torch.nn.utils.clip_grad_norm_(expected.trainable_parameters(), 0.05)
            optimizer.step()
            assert norm == pytest.approx(float(clipped), rel=1e-6)
            assert norm > 0.05
    for ours, theirs in zip(policy.trainable_parameters(), expected.trainable_parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_trainable_weights_change_and_all_of_them_do(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    before = {name: tensor.clone() for name, tensor in policy.unet.state_dict().items()}
    with TrainingRun(policy, settings()) as run:
        run.backward(squares(policy))
        run.update()
    changed = {name for name, tensor in policy.unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(policy.trainable_state())


def test_accumulated_gradient_is_that_of_the_whole_batch(stand_in: Callable, settings: Callable) -> None:
    whole, parts = stand_in(), stand_in()
    with TrainingRun(whole, settings()) as run:
        run.backward(squares(whole))
        norm = run.update()
    with TrainingRun(parts, settings()) as run:
        losses = [squares(parts, part) / 4 for part in BATCH.split(2)]
        for loss in losses[:-1]:
            run.backward(loss, sync=False)
        run.backward(losses[-1])
        assert run.update() == pytest.approx(norm, rel=1e-6)
    for ours, theirs in zip(parts.trainable_parameters(), whole.trainable_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_update_without_a_synchronised_backward_is_refused(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    with TrainingRun(policy, settings()) as run:
        with pytest.raises(RuntimeError, match=r"update\(\) must follow a backward"):
            run.update()
        run.backward(squares(policy), sync=False)
        with pytest.raises(RuntimeError, match=r"update\(\) must follow a backward"):
            run.update()


@pytest.mark.parametrize("what", ["loss", "gradient", "early loss"])
def test_what_is_not_finite_skips_the_update_and_is_counted(what: str, stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    before = policy.trainable_state()
    with TrainingRun(policy, settings(ema_decay=0.5)) as run:
        if what == "gradient":  # the square root's slope at zero is infinite although its value is finite
            run.backward((policy.network(BATCH) * 0).sqrt().mean())
        else:
            loss = squares(policy) + math.nan  # its gradient is finite
            run.backward(loss, sync=what == "loss")
            if what == "early loss":
                run.backward(squares(policy))
        norm = run.update()
        assert math.isfinite(norm) == (what != "gradient")
        assert run.skipped == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.trainable_state().items())
        with run.ema_weights():
            assert all(torch.equal(tensor, before[name]) for name, tensor in policy.trainable_state().items())
        run.backward(squares(policy))
        run.update()
        assert run.skipped == 1
        assert not torch.equal(policy.trainable_state()["0.weight"], before["0.weight"])


def test_too_many_skipped_in_a_row_stop_the_run(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    with TrainingRun(policy, settings(max_skipped=2)) as run:
        for bad in (True, True, False, True, True):
            run.backward(squares(policy) * (math.inf if bad else 1))
            run.update()
        assert run.skipped == 4
        run.backward(squares(policy) * math.inf)
        with pytest.raises(NonFiniteError, match=r"3 updates in a row .* max_skipped is 2"):
            run.update()


def test_skips_in_a_row_are_counted_across_an_interruption(stand_in: Callable, settings: Callable) -> None:
    def spoil(config: TrainingConfig) -> None:
        policy = stand_in()
        with TrainingRun(policy, config) as run:
            for _ in run.iterations():
                run.backward(squares(policy) * math.nan)
                run.update()

    spoil(settings(iterations=2, max_skipped=2))
    with pytest.raises(NonFiniteError, match="3 updates in a row"):
        spoil(settings(iterations=3, max_skipped=2, resume=True))


def test_average_is_that_computed_by_hand(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    expected = policy.trainable_state()
    with TrainingRun(policy, settings(ema_decay=0.75)) as run:
        for _ in run.iterations():
            run.backward(squares(policy))
            run.update()
            weights = policy.trainable_state()
            expected = {name: 0.75 * expected[name] + 0.25 * weights[name] for name in weights}
        with run.ema_weights():
            for name, tensor in policy.trainable_state().items():
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
                assert not torch.equal(tensor, weights[name])
        for name, tensor in policy.trainable_state().items():
            assert torch.equal(tensor, weights[name])


def test_averaged_weights_need_an_average(stand_in: Callable, settings: Callable) -> None:
    with TrainingRun(stand_in(), settings()) as run, pytest.raises(ValueError, match="ema_decay must be set"):
        run.ema_weights()


def test_bf16_computes_in_bf16_and_trains_in_float32(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    forward = policy.unet.forward
    seen = []
    policy.unet[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with TrainingRun(policy, settings(mixed_precision="bf16")) as run:
        with run.autocast():
            assert (BATCH @ BATCH.T).dtype == torch.bfloat16
        run.backward(squares(policy))
        run.update()
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in policy.trainable_parameters()} == {torch.float32}
    # What accelerate put on the network is gone, and another precision may follow in the same program.
    assert policy.network is policy.unet
    assert policy.unet.forward == forward
    with TrainingRun(policy, settings()) as run:
        squares(policy)
    assert seen[-1] == torch.float32


def test_resumed_bf16_run_equals_uninterrupted(
    train: Callable, killed: type[Exception], same: Callable, tmp_path: Path
) -> None:
    settings = {"mixed_precision": "bf16", "iterations": 4}
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(killed):
        train(tmp_path / "run", die_at=3, **settings)
    same(train(tmp_path / "run", resume=True, **settings), whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_on_a_cpu_is_refused(stand_in: Callable, settings: Callable) -> None:
    with pytest.raises(ValueError, match="mixed_precision must be 'no' or 'bf16' on a CPU, got 'fp16'"):
        TrainingRun(stand_in(), settings(mixed_precision="fp16")).__enter__()


def test_policy_without_trainable_weights_is_refused(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    policy.unet.requires_grad_(False)
    with pytest.raises(ValueError, match="policy must have trainable weights"):
        TrainingRun(policy, settings())


def test_network_is_given_back_after_an_error(stand_in: Callable, settings: Callable) -> None:
    policy = stand_in()
    with pytest.raises(RuntimeError, match="must follow"), TrainingRun(policy, settings(mixed_precision="bf16")) as run:
        run.update()
    assert policy.network is policy.unet
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(policy.unet))


def test_adamw8bit_takes_a_step_near_that_of_adamw(settings: Callable) -> None:
    pytest.importorskip("bitsandbytes")
    weights = []
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(64, 64))  # from 4096 elements on the moments have 8 bits
        optimizer = make_optimizer([parameter], settings(optimizer=name))
        for _ in range(3):
            parameter.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(parameter.detach())
    dtypes = {value.dtype for value in optimizer.state[parameter].values() if isinstance(value, Tensor)}
    assert torch.uint8 in dtypes
    start = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    moved = (weights[0] - start).abs().mean()
    assert float((weights[1] - weights[0]).abs().mean()) < 0.1 * float(moved)


def test_resumed_adamw8bit_run_equals_uninterrupted(
    train: Callable, killed: type[Exception], same: Callable, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"optimizer": "adamw8bit", "iterations": 4}
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(killed):
        train(tmp_path / "run", die_at=3, **settings)
    same(train(tmp_path / "run", resume=True, **settings), whole)


def test_adamw8bit_that_does_not_work_is_told_before_any_work(
    stand_in: Callable, settings: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(optim.AdamW8bit, "step", fail)
    with pytest.raises(ValueError, match=r"optimizer must be one that works here, got 'adamw8bit'.*no kernel"):
        make_optimizer(stand_in().trainable_parameters(), settings(optimizer="adamw8bit"))


def test_missing_bitsandbytes_is_told(stand_in: Callable, settings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ValueError, match="optimizer must be one that works here, got 'adamw8bit': bitsandbytes does not"
    ):
        make_optimizer(stand_in().trainable_parameters(), settings(optimizer="adamw8bit"))


# The learning rate, and the other optimizer.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"warmup_iterations": 2}, [0, 0.5, 1, 1]),
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup_iterations": 2}, [0, 0.5, 1, 0.5]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ({"schedule": "cosine", "warmup_iterations": 4}, [0, 0.25, 0.5, 0.75]),
    ],
)
def test_learning_rate_of_each_iteration(
    changes: dict[str, Any], expected: list[float], stand_in: Callable, settings: Callable
) -> None:
    policy = stand_in()
    rates, moved = [], []
    with TrainingRun(policy, settings(**changes)) as run:
        for _ in run.iterations():
            before = policy.trainable_state()
            for _ in range(2):  # as many updates as a round has
                run.backward(squares(policy))
                run.update()
                rates.append(run.learning_rate)
            moved.append(any(not torch.equal(value, before[name]) for name, value in policy.trainable_state().items()))
    assert rates == pytest.approx([1e-2 * factor for factor in expected for _ in range(2)], rel=1e-12)
    assert moved == [factor > 0 for factor in expected]


def test_adafactor_is_torchs(stand_in: Callable, settings: Callable) -> None:
    policy, expected = stand_in(), stand_in()
    optimizer = torch.optim.Adafactor(expected.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    with TrainingRun(policy, settings(optimizer="adafactor", weight_decay=0.1)) as run:
        for _ in run.iterations():
            run.backward(squares(policy))
            run.update()
            optimizer.zero_grad()
            squares(expected).backward()
            torch.nn.utils.clip_grad_norm_(expected.trainable_parameters(), 1.0)
            optimizer.step()
    for ours, theirs in zip(policy.trainable_parameters(), expected.trainable_parameters(), strict=True):
        assert torch.equal(ours, theirs)
