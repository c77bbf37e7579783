"""bfloat16 autocast beside float32: every eraser and every trainer, two updates each, the same losses to 2 %."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer, RewardError, RWRConfig, RWRTrainer, ScoringConfig
from erasure import (
    Concept,
    ImageConstraint,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
)
from erasure.changes import WeightChange
from erasure.descend import DescentConfig
from erasure.methods.ac import AC, ACConfig
from erasure.methods.ant import ANT, ANTConfig
from erasure.methods.ant.saliency import SaliencyConfig
from erasure.methods.eraseflow import EraseFlow, EraseFlowConfig
from erasure.methods.esd import ESD, ESDConfig
from erasure.methods.mace import MACE, MACEConfig
from erasure.methods.receler import Receler, RecelerConfig
from erasure.methods.sa import SA, SAConfig
from erasure.methods.sa.fisher import FisherConfig
from erasure.methods.safree import SAFREE
from erasure.methods.sld import SLD
from erasure.methods.uce import UCE
from erasure.registry import erase
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.tinyworld.presets import PRESETS
from overpaint.training import AveragedWeights, HeldOut, TrainingConfig, load_checkpoint, read_metrics
from refl import ReFLConfig, ReFLTrainer

Precision = Literal["no", "bf16"]

TOLERANCE = 0.02
STRIPED = Concept(name="stripes", phrases=("striped", "with stripes"))
PICTURES = ("a red circle", "a green square", "a blue star")
PROMPTS = ["a striped red circle", "a dotted blue square", "a green star", "a striped yellow star"]
PROMPT = "a red circle at night"


@pytest.fixture
def world() -> Callable[..., DiffusionPolicy]:
    return lambda **options: tinyworld.load_policy(device="cpu", **options)


# Erasers that train.


def descent(precision: Precision) -> DescentConfig:
    return DescentConfig(iterations=2, learning_rate=3e-3, batch_size=4, mixed_precision=precision)


ERASERS: dict[str, Callable[[DescentConfig], Any]] = {
    "esd": lambda descent: ESD(ESDConfig(train="xattn", steps=4, descent=replace(descent, learning_rate=2e-2))),
    "esd-released": lambda descent: ESD(
        ESDConfig(train="xattn", variant="released", steps=4, descent=replace(descent, learning_rate=2e-2))
    ),
    "ac": lambda descent: AC(
        ACConfig(anchors=PICTURES, templates=("{concept} {anchor}",), images=3, steps=2, descent=descent)
    ),
    "sa": lambda descent: SA(
        SAConfig(
            train="xattn", surrogates=PICTURES, replay=("a yellow star",), images=3, steps=2,
            fisher=FisherConfig(images=1, timesteps=2), descent=descent,
        )
    ),
    "receler": lambda descent: Receler(RecelerConfig(rank=4, tokens=2, inner_steps=2, steps=4, descent=descent)),
    "ant": lambda descent: ANT(
        ANTConfig(
            steps=4, descent=descent,
            saliency=SaliencyConfig(prompts=STRIPED.phrases, seeds=(3,), iterations=1, learning_rate=1e-3),
        )
    ),
    "eraseflow": lambda descent: EraseFlow(EraseFlowConfig(steps=4, retain_share=0.0, descent=descent)),
}  # fmt: skip


def erasure_losses(method: Any, policy: DiffusionPolicy, folder: Path) -> list[float]:
    erase(method, policy, STRIPED, output_dir=folder, progress=False)
    files = sorted(folder.rglob("metrics.jsonl"))
    return [line["erasure/loss"] for file in files for line in read_metrics(file) if "erasure/loss" in line]


@pytest.mark.parametrize("name", list(ERASERS))
def test_losses_of_an_eraser_are_those_of_float32(
    name: str, world: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    exact, rounded = (
        erasure_losses(ERASERS[name](descent(precision)), world(), tmp_path / precision) for precision in ("no", "bf16")
    )
    assert len(exact) == 2
    assert rounded == pytest.approx(exact, rel=TOLERANCE)
    assert rounded != exact


def test_losses_of_mace_are_those_of_float32(policy: DiffusionPolicy, tmp_path: Path) -> None:
    # On random weights: the tiny world's attention is so sharp that rounded queries and keys alone move it by 3 %.
    found = []
    for precision in ("no", "bf16"):
        config = MACEConfig(
            templates=("a {} circle",), prior=PICTURES, prior_weight=0.1, fusion_prior_weight=0.1, prior_size=None,
            prompts=("a {}",), images=2, steps=2, guidance_scale=3.0, mask_timesteps=(400,),
            descent=descent(precision),
        )  # fmt: skip
        found.append(erasure_losses(MACE(config), policy, tmp_path / precision))
    exact, rounded = found
    assert len(exact) == 2 * len(STRIPED.phrases)
    # What is computed of the rounded queries and keys is not rounded again: half a unit in the last place is 0.2 %.
    assert rounded == pytest.approx(exact, rel=5e-4)
    assert rounded != exact


# Erasers that do not train: they give the same inside autocast as outside.


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_uce_inside_autocast_is_uce_outside(world: Callable[..., DiffusionPolicy]) -> None:
    with autocast():
        inside = UCE().erase(world(), STRIPED)
    outside = UCE().erase(world(), STRIPED)
    assert isinstance(inside.change, WeightChange)
    assert isinstance(outside.change, WeightChange)
    for name, tensor in outside.change.delta.tensors.items():
        assert torch.equal(inside.change.delta.tensors[name], tensor)


@pytest.mark.parametrize(
    "method",
    [SLD(PRESETS["sld"]), SAFREE(PRESETS["safree"])],
    ids=["sld", "safree"],
)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rounded", ["autocast", "weights"])
def test_safeguard_in_half_precision_draws_nearly_the_same(
    method: Any, rounded: str, scale: float, world: Callable[..., DiffusionPolicy]
) -> None:
    def drawn(policy: DiffusionPolicy) -> Tensor:
        return policy.draw(PROMPTS, seeds=range(4), steps=4, guidance=ClassifierFree(scale)).float()

    exact, other = world(), world(dtype=torch.bfloat16) if rounded == "weights" else world()
    plain = drawn(exact)
    method.erase(exact, STRIPED).apply(exact)
    with autocast() if rounded == "autocast" else nullcontext():
        method.erase(other, STRIPED).apply(other)
        half = drawn(other)
    # What the guard does is there: without it the difference would be what it changes, and more.
    changed = float((drawn(exact) - plain).abs().mean())
    assert float((half - drawn(exact)).abs().mean()) < 0.2 * changed


# Trainers.


def stirred(world: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    """Returns a policy that has gone some way already, so that its distance from its reference is no rounding error."""
    policy = world(lora=LoRAConfig(rank=2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return policy


def run(precision: Precision, folder: Path) -> TrainingConfig:
    return TrainingConfig(
        output_dir=folder / precision, iterations=2, learning_rate=1e-3, mixed_precision=precision, progress=False
    )


def refl(constraint: Any) -> Callable[[DiffusionPolicy, TrainingConfig], None]:
    def train(policy: DiffusionPolicy, config: TrainingConfig) -> None:
        settings = ReFLConfig(
            batch_size=8, pretraining_batch_size=8, erasure_batch_size=8, micro_batch_size=8, steps=4,
            first_reward_step=2, last_reward_step=3, reward_scale=0.02,
        )  # fmt: skip
        ReFLTrainer(policy, tinyworld.load_reward(), PROMPTS, settings, erasure=constraint()).train(config)

    return train


def ddpo(policy: DiffusionPolicy, config: TrainingConfig) -> None:
    settings = DDPOConfig(
        samples_per_round=32, sampling_batch_size=16, minibatch_size=16, steps=4, guidance_scale=3.0, baseline="round"
    )
    # With a large epsilon a step is proportional to the gradient, so that rounding stays as small as it is.
    DDPOTrainer(policy, tinyworld.load_reward(), PROMPTS, settings).train(replace(config, adam_epsilon=1e-2))


def rwr(policy: DiffusionPolicy, config: TrainingConfig) -> None:
    settings = RWRConfig(samples_per_round=8, sampling_batch_size=8, epochs_per_round=1, batch_size=8, steps=4)
    RWRTrainer(policy, tinyworld.load_reward(), PROMPTS, settings).train(config)


TRAINERS: dict[str, tuple[Callable[[DiffusionPolicy, TrainingConfig], None], dict[str, float]]] = {
    "refl": (refl(lambda: None), {"train/reward_loss": 0.0, "train/pretraining_loss": 0.0}),
    "refl-image": (
        refl(lambda: ImageConstraint(tinyworld.StripeScore(), PROMPTS[:1] * 4, ceiling=0.02)),
        {"train/reward_loss": 0.0, "erasure/violation": 0.0},
    ),
    "refl-objective": (
        refl(lambda: ObjectiveConstraint(ReferenceDistance(ReferenceDistanceConfig(steps=4)), STRIPED, PROMPTS)),
        {"train/reward_loss": 0.0, "erasure/violation": 0.0},
    ),
    # The loss of a policy gradient is a mean of advantages, which are centred: what counts is their unit, 1.
    # Processors round bf16 differently: of 8 pictures in place of 32 the mean reward may be 0.02 off.
    "ddpo": (ddpo, {"train/loss": TOLERANCE, "reward/mean": TOLERANCE}),
    "rwr": (rwr, {"train/loss": 0.0}),
}
"""What trains, and the losses to compare with their absolute tolerances."""


@pytest.mark.parametrize("name", list(TRAINERS))
def test_losses_of_a_trainer_are_those_of_float32(
    name: str, world: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    train, compared = TRAINERS[name]
    lines = {}
    for precision in ("no", "bf16"):
        config = run(precision, tmp_path)
        train(stirred(world), config)
        lines[precision] = read_metrics(config.output_dir / "metrics.jsonl")
    for tag, absolute in compared.items():
        exact, rounded = ([line[tag] for line in lines[precision] if tag in line] for precision in ("no", "bf16"))
        assert len(exact) == 2
        assert rounded == pytest.approx(exact, rel=TOLERANCE, abs=absolute), tag


# What changes weights makes autocast forget its copies of them.


def predicted(policy: DiffusionPolicy) -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return policy.predict_noise(latents, torch.tensor([500]), policy.encode([PROMPT])).detach()


def moved(policy: DiffusionPolicy) -> dict[str, Tensor]:
    return {name: value + 0.05 for name, value in policy.trainable_state().items()}


def load(policy: DiffusionPolicy, folder: Path, stack: ExitStack) -> None:
    policy.load_trainable_state(moved(policy))


def average(policy: DiffusionPolicy, folder: Path, stack: ExitStack) -> None:
    averages = AveragedWeights(policy.trainable_parameters(), 0.5)
    averages.load_state_dict({"averages": list(moved(policy).values()), "updates": 1})
    stack.enter_context(averages.swapped())


def erased(policy: DiffusionPolicy, folder: Path, stack: ExitStack) -> None:
    UCE().erase(policy, STRIPED).apply(policy, check_base=False)


def erased_for_a_while(policy: DiffusionPolicy, folder: Path, stack: ExitStack) -> None:
    before = predicted(policy)
    with UCE().erase(policy, STRIPED).applied(policy):
        assert not torch.equal(predicted(policy), before)


def read(policy: DiffusionPolicy, folder: Path, stack: ExitStack) -> None:
    other = tinyworld.load_policy(device="cpu", lora=policy.lora)
    other.load_trainable_state(moved(policy))
    other.save_lora(folder)
    policy.load_lora(folder)


@pytest.mark.parametrize(
    ("trained", "change"),
    [
        ({"train": "xattn"}, load),
        ({"train": "xattn"}, average),
        ({"train": "xattn"}, erased),
        ({"train": "xattn"}, erased_for_a_while),
        ({"lora": LoRAConfig(rank=2)}, load),
        ({"lora": LoRAConfig(rank=2)}, read),
    ],
    ids=["load", "average", "erase", "applied", "load-lora", "read-lora"],
)
def test_change_of_weights_inside_autocast_is_seen_there(
    trained: dict[str, Any], change: Callable[[DiffusionPolicy, Path, ExitStack], None], world: Callable, tmp_path: Path
) -> None:
    policy = world(**trained)
    with ExitStack() as stack:
        with autocast():
            predicted(policy)
            change(policy, tmp_path, stack)
            inside = predicted(policy)
        with autocast():
            assert torch.equal(predicted(policy), inside)


@pytest.mark.parametrize("trained", [{"train": "xattn"}, {"lora": LoRAConfig(rank=2)}], ids=["set", "lora"])
def test_reference_inside_autocast_is_the_reference_and_the_way_back_too(
    trained: dict[str, Any], world: Callable[..., DiffusionPolicy]
) -> None:
    policy = world(**trained)
    with autocast():
        start = predicted(policy)
    policy.load_trainable_state(moved(policy))
    with autocast():
        tuned = predicted(policy)
        with policy.reference():
            assert torch.equal(predicted(policy), start)
        assert torch.equal(predicted(policy), tuned)
    assert not torch.equal(tuned, start)


def test_embedding_does_not_depend_on_who_asked_first(world: Callable[..., DiffusionPolicy]) -> None:
    exact = world().encode([PROMPT])
    policy = world()
    with autocast():
        inside = policy.encode([PROMPT])
    assert torch.equal(inside.tokens, exact.tokens)
    assert torch.equal(policy.encode([PROMPT]).tokens, exact.tokens)


def test_run_that_is_resumed_is_the_run_that_was_not_interrupted(
    world: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    def trained(folder: Path, iterations: int, *, resume: bool = False) -> dict[str, Tensor]:
        settings = ReFLConfig(
            batch_size=4, pretraining_weight=0.0, steps=4, first_reward_step=3, last_reward_step=3, reward_scale=0.02
        )
        config = TrainingConfig(
            output_dir=folder, iterations=iterations, learning_rate=5e-4, mixed_precision="bf16", checkpoint_every=1,
            resume=resume, progress=False,
        )  # fmt: skip
        # The held-out prompts, which are encoded outside autocast, are training prompts too.
        held_out = HeldOut(PROMPTS, tinyworld.Utility())
        policy = world(lora=LoRAConfig(rank=2))
        ReFLTrainer(policy, tinyworld.load_reward(), PROMPTS, settings, held_out=held_out).train(config)
        return load_checkpoint(folder / "checkpoints" / f"iteration-{iterations:08d}").weights

    whole = trained(tmp_path / "whole", 3)
    trained(tmp_path / "parts", 1)
    parts = trained(tmp_path / "parts", 3, resume=True)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


class FailingOnce:
    """A reward that fails at its first call."""

    differentiable = False

    def __init__(self) -> None:
        self.failed = False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not self.failed:
            self.failed = True
            raise ConnectionError("not yet")
        return images[:, 0].mean(dim=(1, 2))


def test_ratio_is_one_before_any_update_of_samples_that_waited_for_a_reward(
    world: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    reward = FailingOnce()
    settings = DDPOConfig(
        samples_per_round=4, sampling_batch_size=4, minibatch_size=4, steps=4, guidance_scale=3.0, baseline="round"
    )

    def train(*, resume: bool) -> None:
        config = TrainingConfig(
            output_dir=tmp_path, iterations=1, mixed_precision="bf16", resume=resume, progress=False
        )  # fmt: skip
        policy = world(lora=LoRAConfig(rank=2))
        DDPOTrainer(policy, reward, PROMPTS, settings, scoring=ScoringConfig(attempts=1)).train(config)

    with pytest.raises(RewardError):
        train(resume=False)
    train(resume=True)
    assert [line["policy/ratio_start"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0.0]
