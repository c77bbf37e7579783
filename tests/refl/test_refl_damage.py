"""ReFL goes on from a damaged folder to the same weights, or refuses; and from another run's folder never."""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig
from refl import ReFLConfig, ReFLTrainer
from tests.refl.mortal import KilledError, Mortal

ITERATIONS, KILLED_AT = 5, 4
POSITIONS = 16
"""Places of a file at which a byte is flipped."""


Train = Callable[..., dict[str, Tensor]]


@pytest.fixture
def train(
    make_policy: Callable[..., DiffusionPolicy],
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    pipeline_dir: Path,
) -> Train:
    """Trains a new policy and returns its weights."""

    def run(
        folder: Path,
        *,
        reward: Any = None,
        path: Path = pipeline_dir,
        texts: Sequence[str] = tuple(prompts),
        trained: str | LoRAConfig = "xattn-kv",
        changes: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Tensor]:
        what = {"lora": trained} if isinstance(trained, LoRAConfig) else {"train": trained}
        policy = make_policy(path=path, **what)
        usual: dict[str, Any] = {"iterations": ITERATIONS, "learning_rate": 1e-2, "checkpoint_every": 1}
        config = TrainingConfig(output_dir=folder, progress=False, keep_checkpoints=2, **usual | settings)
        quick = {"batch_size": 2, "micro_batch_size": 2, "steps": 3, "first_reward_step": 1, "last_reward_step": 2}
        own = small(**quick, evaluate_every=100, **changes or {})
        ReFLTrainer(policy, reward or Mortal(), list(texts), own).train(config)
        return policy.trainable_state()

    return run


@pytest.fixture
def killed(train: Train, tmp_path: Path) -> Path:
    """The folder of a run that was killed."""
    with pytest.raises(KilledError):
        train(tmp_path / "killed", reward=Mortal(dies_at=KILLED_AT))
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2
    return tmp_path / "killed"


def damages(file: Path) -> Iterator[tuple[str, bytes | None]]:
    """Yields what may have become of a file, with a name for it; None is that it is missing."""
    content = file.read_bytes()
    yield "missing", None
    for part in (0, 0.01, 0.5, 0.99):
        yield f"cut to {part}", content[: int(part * len(content))]
    yield "one byte short", content[:-1]
    yield "one byte more", content + b"\0"
    for k in range(POSITIONS):
        place = k * (len(content) - 1) // (POSITIONS - 1)
        flipped = bytearray(content)
        flipped[place] ^= 1 << (k % 8)
        yield f"byte {place} flipped", bytes(flipped)


@pytest.mark.slow
@pytest.mark.proof
def test_no_damage_lets_a_run_go_on_from_wrong_state(
    train: Train, killed: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    whole = train(tmp_path / "whole")
    newest = max((killed / "checkpoints").iterdir()).relative_to(killed)
    files = [*(newest / name for name in ("weights.safetensors", "state.pt", "manifest.json"))]
    files += [Path(name) for name in ("run_config.json", "run.json", "metrics.jsonl")]
    refusals: list[tuple[Path, str]] = []
    resumed = 0
    for file in files:
        for number, (damage, content) in enumerate(damages(killed / file)):
            folder = tmp_path / f"{file.name}-{number}"
            shutil.copytree(killed, folder)
            (folder / file).unlink()
            if content is not None:
                (folder / file).write_bytes(content)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # which tells of the damaged checkpoint
                    weights = train(folder, resume=True)
            except ValueError as error:
                refusals.append((file, str(error)))
            else:
                assert all(torch.equal(value, whole[name]) for name, value in weights.items()), (file, damage)
                resumed += 1
            shutil.rmtree(folder)
    assert all(file.name in told or "resume must keep" in told for file, told in refusals), refusals
    assert resumed > len(refusals) > 0
    record_property("damaged runs that went on to the same weights", resumed)
    record_property("damaged runs that were refused", len(refusals))


@pytest.mark.proof
@pytest.mark.parametrize("trained", [pytest.param("xattn-kv", marks=pytest.mark.slow), LoRAConfig()], ids=str)
def test_a_checkpoint_of_another_run_is_refused(
    trained: str | LoRAConfig,
    train: Train,
    pipeline_copy: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    from safetensors.torch import load_file, save_file

    def rewritten(part: str, name: str) -> Path:
        """Changes one weight of the pipeline's copy."""
        folder = Path(shutil.copytree(pipeline_copy, tmp_path / f"{part} {name}"))
        (file,) = (folder / part).glob("*.safetensors")
        weights = load_file(file)
        weights[name][0] += 0.5
        save_file(weights, file, metadata={"format": "pt"})
        return folder

    key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    model = r"model\.weights '[0-9a-f]{64}' instead of '[0-9a-f]{64}'"
    others: list[tuple[str, dict[str, Any]]] = [
        (model, {"path": rewritten("unet", "conv_in.bias")}),
        (model, {"path": rewritten("unet", key)}),
        (model, {"path": rewritten("vae", "post_quant_conv.bias")}),
        (r"reward\.repr 'Mortal\(1\)' instead of 'Mortal\(0\)'", {"reward": Mortal(1)}),
        (r"prompts\.count 1 instead of 5", {"texts": ["a cat"]}),
        (r"refl\.reward_scale 2\.0 instead of 1\.0", {"changes": {"reward_scale": 2.0}}),
        (r"training\.learning_rate 0\.5 instead of 0\.01", {"learning_rate": 0.5}),
        (r"training\.seed 1 instead of 0", {"seed": 1}),
    ]
    with pytest.raises(KilledError):
        train(tmp_path / "run", trained=trained, reward=Mortal(dies_at=KILLED_AT))
    # What a checkpoint says of itself counts, wherever it was copied to.
    (tmp_path / "run" / "run_config.json").unlink()
    for message, other in others:
        with pytest.raises(ValueError, match=rf"resume must keep .*{message}"):
            train(tmp_path / "run", resume=True, trained=trained, **other)
        (tmp_path / "run" / "run_config.json").unlink()
    train(tmp_path / "run", resume=True, trained=trained)
    record_property("checkpoints of another run refused", len(others))


def test_a_served_reward_may_have_moved(train: Train, tmp_path: Path) -> None:
    class Served(Mortal):
        def __repr__(self) -> str:
            return f"Served('http://node{self.channel}:8000/score')"

    with pytest.raises(KilledError):
        train(tmp_path / "run", reward=Served(0, dies_at=KILLED_AT))
    train(tmp_path / "run", reward=Served(1), resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["reward"]["repr"].endswith("node1:8000/score')")
