"""Two processes with half the batch each take the same step as one with the whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = '''
"""Takes two iterations with every term of the loss; the first process writes what they led to."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from erasure import (
    Concept,
    Destruction,
    DestructionConfig,
    ImageConstraint,
    ObjectiveConstraint,
    ReferenceDivergence,
    RewardFloor,
)
from overpaint.policy import DiffusionPolicy
from refl import ReFLConfig, ReFLTrainer
from overpaint.training import HeldOut
from overpaint.training import TrainingConfig, process_state

PROMPTS = ["a red circle", "a blue square", "a cat", "two dogs"]


class Mean:
    """The mean of a colour."""

    differentiable = True

    def __init__(self, channel):
        self.channel = channel

    def __call__(self, images, prompts):
        return images[:, self.channel].mean(dim=(1, 2))


pipeline, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
policy = DiffusionPolicy.from_pretrained(pipeline, train="xattn", device="cpu")
if kind == "divergence":  # at the reference itself its gradient is rounding and nothing else
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
config = ReFLConfig(
    batch_size=4,
    micro_batch_size=2,
    steps=4,
    first_reward_step=2,
    last_reward_step=3,
    reward_scale=1.0,
    pretraining_weight=0.0 if kind == "reward-alone" else 1.0,
    pretraining_batch_size=4,
    erasure_batch_size=4,
    truncation_steps=2,
    checkpoint_steps=True,
    evaluate_every=1,
    project_conflicts=kind == "floor",
)
erasure = None if kind == "reward-alone" else ImageConstraint(Mean(1), PROMPTS, ceiling=0.3)
if kind == "destruction":  # a word is moved by each micro batch, of which one process takes two
    words = Destruction(DestructionConfig(pictures=4, steps=2, words=1, vectors=2, attack_steps=1, share=1.0))
    concept = Concept(name="circle", phrases=("circle",), anchor="square")
    erasure = ObjectiveConstraint(words, concept, PROMPTS, ceiling=0.1)
floor = {"floor": RewardFloor(0.1), "divergence": ReferenceDivergence(1.0)}.get(kind)
held_out = HeldOut(PROMPTS, Mean(0))
trainer = ReFLTrainer(policy, Mean(0), PROMPTS, config, erasure=erasure, floor=floor, held_out=held_out)
# Plain gradient steps, as far as AdamW can take them: with a large epsilon its step is proportional to the gradient,
# so that rounding is not blown up where a gradient is nearly zero.
settings = TrainingConfig(
    output_dir=folder,
    iterations=2,
    learning_rate=10.0,
    adam_epsilon=1.0,
    weight_decay=0.0,
    max_grad_norm=1e6,
    progress=False,
)
metrics = trainer.train(settings)
state = process_state()
if state.is_main_process:
    assert state.num_processes == int(sys.argv[4])
    numbers = {"metrics": torch.tensor(metrics), "best": torch.tensor([trainer.early_stopping.best])}
    weight = {} if erasure is None else {"weight": torch.tensor(erasure.lagrangian.weight)}
    weight |= {} if floor is None else {"floor": torch.tensor(floor.lagrangian.weight)}
    weight |= {"word": words.state_dict()["words"][0]} if kind == "destruction" else {}
    save_file(policy.trainable_state() | numbers | weight, folder / "end.safetensors")
state.destroy_process_group()
'''


@pytest.mark.proof("several processes take the updates of one")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "several"),
    [
        ("all", 2),
        ("all", 4),
        ("floor", 2),
        ("floor", 4),
        ("divergence", 2),
        ("reward-alone", 2),
        ("destruction", 2),
    ],
)
def test_several_processes_take_the_same_steps_as_one(
    kind: str, several: int, pipeline_dir: Path, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    ends: list[dict[str, Any]] = []
    for processes in (1, several):
        folder = tmp_path / f"run-{processes}"
        torchrun(program, pipeline_dir, folder, kind, processes, processes=processes)
        ends.append(load_file(folder / "end.safetensors"))
    one, many = ends
    assert one.keys() == many.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            many[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
