"""A network that is spread over two processes trains as one in one process does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_case import GOLDEN
from safetensors.torch import load_file

from overpaint.policy import DiffusionPolicy
from overpaint.policy.lora_files import LORA_FILE
from overpaint.training import launcher, read_metrics

MODELS = GOLDEN / "flow"
slow = (pytest.mark.slow, pytest.mark.timeout(1800))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, torchrun: Callable[..., str]) -> tuple[Path, Path]:
    """Folders of the same program in one process and in two."""
    folders = []
    program = Path(__file__).with_name("sharded_program.py")
    for count in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes-{count}")
        torchrun(program, folder, MODELS, processes=count)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.mark.proof("several processes take the updates of one")
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("trainer", "model"), [("ddpo", "flux"), ("refl", "sdxl")])
def test_two_processes_with_half_the_network_give_the_lora_of_one(
    outputs: tuple[Path, Path], trainer: str, model: str
) -> None:
    one, two = (load_file(folder / trainer / "lora" / LORA_FILE) for folder in outputs)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in one.items() if "lora_B" in name or "lora.up" in name)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
    policy = DiffusionPolicy.from_pretrained(MODELS / f"tiny-{model}", device="cpu")
    policy.load_lora(outputs[1] / trainer / "lora")  # its base is the whole network's
    rewards = [
        [entry["reward/mean"] for entry in read_metrics(folder / trainer / "metrics.jsonl") if "reward/mean" in entry]
        for folder in outputs
    ]
    assert rewards[1] == pytest.approx(rewards[0], abs=1e-5)
    assert list((outputs[1] / trainer / "images").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sharded_run_goes_on_where_it_stopped(outputs: tuple[Path, Path]) -> None:
    for folder in outputs:
        whole, resumed = (load_file(folder / name / "lora" / LORA_FILE) for name in ("ddpo", "resumed"))
        assert whole.keys() == resumed.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=0)
        iterations = [entry["iteration"] for entry in read_metrics(folder / "resumed" / "metrics.jsonl")]
        assert {0, 1} <= set(iterations)


def test_launchers_sharding_is_taken_and_its_first_version_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not launcher.launched_sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version must be 2, got 1"):
        launcher.launched_sharding()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launcher.launched_sharding()
    launcher.check_launcher()


def test_a_policy_without_a_lora_is_not_sharded() -> None:
    policy = DiffusionPolicy.from_pretrained(MODELS / "tiny-sd3", device="cpu", train="attn")
    with pytest.raises(ValueError, match="the policy must have a LoRA"):
        policy.shard(2)
