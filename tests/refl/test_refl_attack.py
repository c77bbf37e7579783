"""ReFL on prompts of a concept that are mixed, mined and attacked before each update."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from erasure import (
    AC,
    NUDITY,
    ACConfig,
    ConceptPrompts,
    ConceptPromptsConfig,
    FixedWeight,
    ImageConstraint,
    ObjectiveConstraint,
    ReferenceDistance,
    ReferenceDistanceConfig,
    SoftAttack,
    SoftAttackConfig,
)
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, read_metrics
from refl import ReFLConfig, ReFLTrainer

ALL = SoftAttackConfig(share=1.0, steps=2)


class Green:
    """The mean of green, which dies at its n-th call."""

    differentiable = True

    def __init__(self, dies_at: int = -1) -> None:
        self.calls_left = dies_at

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise InterruptedError
        return images[:, 1].mean(dim=(1, 2))


def concept_prompts(**settings: Any) -> ConceptPrompts:
    return ConceptPrompts(
        ["a striped circle", "a striped square"], ["a cat", "two dogs"], ConceptPromptsConfig(**settings)
    )


def attacked(cost: Any, config: SoftAttackConfig = ALL, **settings: Any) -> ImageConstraint:
    attack = SoftAttack(config)
    return ImageConstraint(cost, concept_prompts(**settings), ceiling=0.3, attack=attack)


def logged(config: TrainingConfig, tag: str) -> list[float]:
    return [line[tag] for line in read_metrics(config.output_dir / "metrics.jsonl") if tag in line]


def test_attack_raises_the_violation_that_the_update_then_lowers(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    constraint, config = attacked(Green()), run_config(iterations=3)
    ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
    before, after = (logged(config, f"erasure/violation_{when}_attack") for when in ("before", "after"))
    assert logged(config, "erasure/attacked_samples") == [4.0] * 3
    assert all(raised > plain for plain, raised in zip(before, after, strict=True))
    assert logged(config, "erasure/violation") == pytest.approx(after, rel=1e-5)
    # A rollout of reward_step steps and one with gradient, two steps of ascent and a look at where they led.
    stated = [4 * (3 * step + 1) for step in logged(config, "train/reward_step")]
    assert logged(config, "erasure/attack_rows_forward") == stated
    assert logged(config, "erasure/attack_rows_backward") == [8.0] * 3


def test_violation_of_the_hard_share_is_mined_and_logged(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    def cat(images: Images, prompts: Sequence[str]) -> PerSample:
        return torch.tensor([float("cat" in prompt) for prompt in prompts]) + 0 * images.mean(dim=(1, 2, 3))

    mined = concept_prompts(explicit_share=0.0, implicit_share=0.0)
    constraint, config = ImageConstraint(cat, mined, ceiling=0.25), run_config(iterations=5)
    settings = small(erasure_batch_size=16, low_variance_noises=2)
    ReFLTrainer(policy, redness, prompts, settings, erasure=constraint).train(config)
    assert mined.hard == {"a cat": 3.0}
    # Nothing is known at first, and by chance the first 16 prompts hold no cat: all are as likely for two iterations.
    assert logged(config, "erasure/hard_share_violation") == [-1.0, 3.0, 3.0, 3.0, 3.0]
    assert all(violation < 3.0 for violation in logged(config, "erasure/violation")[:2])
    assert logged(config, "erasure/violation")[2:] == [3.0] * 3


@pytest.mark.parametrize("controller", [None, FixedWeight(0.0)], ids=["dual", "no weight"])
def test_objective_is_attacked_too(
    controller: Any,
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    stir(policy)
    objective = ReferenceDistance(ReferenceDistanceConfig(steps=3))
    constraint = ObjectiveConstraint(objective, NUDITY, lagrangian=controller, attack=SoftAttack(ALL))
    config = run_config(iterations=2)
    ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
    before, after = (logged(config, f"erasure/violation_{when}_attack") for when in ("before", "after"))
    assert all(raised > plain for plain, raised in zip(before, after, strict=True))


def test_an_objective_s_prompts_are_mined_beside_rewards_of_several_images(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    mined = ConceptPrompts(["a cat", "a dog"])
    constraint = ObjectiveConstraint(ReferenceDistance(ReferenceDistanceConfig(steps=3)), NUDITY, mined)
    settings = small(erasure_batch_size=4, low_variance_noises=2)
    ReFLTrainer(policy, redness, prompts, settings, erasure=constraint).train(run_config(iterations=2))
    assert set(mined.state_dict()["average"]) <= {"a cat", "a dog"}
    assert mined.state_dict()["average"]


def test_interrupted_run_goes_on_with_the_same_prompts_attacks_and_memory(
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    def run(name: str, dies_at: int = -1, *, resume: bool = False) -> tuple[Any, ...]:
        policy = make_policy(train="xattn-kv")
        # Half of the samples are attacked; a green of about .5 is above the ceiling, so that prompts are mined.
        constraint = attacked(Green(dies_at), SoftAttackConfig(steps=1))
        config = run_config(name, iterations=4, checkpoint_every=2, resume=resume)
        ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
        return policy.trainable_state(), constraint.prompts.state_dict(), constraint.lagrangian.weight, config

    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("killed", dies_at=12)
    again = run("killed", resume=True)
    assert all(torch.equal(weight, again[0][name]) for name, weight in whole[0].items())
    assert whole[1] == again[1]
    assert max(whole[1]["average"].values()) > 0
    assert whole[2] == again[2]
    for tag in ("erasure/violation_after_attack", "erasure/hard_share_violation", "erasure/attacked_samples"):
        assert logged(whole[3], tag) == logged(again[3], tag)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (SoftAttack(SoftAttackConfig(vectors=20)), "must leave room for SoftAttackConfig.vectors=20"),
        (SoftAttack(score=lambda images, prompts: images.detach().mean(dim=(1, 2, 3))), "attack score must be diff"),
    ],
)
def test_attack_that_cannot_be_is_refused_before_the_first_iteration(
    attack: SoftAttack,
    message: str,
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    constraint, config = ImageConstraint(Green(), ["a striped circle"], attack=attack), run_config()
    with pytest.raises(ValueError, match=message):
        ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(config)
    assert read_metrics(config.output_dir / "metrics.jsonl") == []


def test_objective_with_prompts_of_its_own_is_refused_in_words(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    own = AC(ACConfig(anchors=("a cat",), templates=("{anchor} {concept}",), images=2, steps=2))
    constraint = ObjectiveConstraint(own, NUDITY, attack=SoftAttack(ALL))
    with pytest.raises(ValueError, match="must have a gradient to how its prompts are encoded"):
        ReFLTrainer(policy, redness, prompts, small(), erasure=constraint).train(run_config())


def test_score_on_images_is_refused_with_an_objective() -> None:
    with pytest.raises(ValueError, match=r"SoftAttack\.score must be None with an objective"):
        ObjectiveConstraint(ReferenceDistance(), NUDITY, attack=SoftAttack(score=Green()))


PROGRAM = '''
"""Takes two iterations under attack; the first process writes what they led to."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from erasure import ConceptPrompts, ImageConstraint, SoftAttack, SoftAttackConfig
from overpaint.policy import DiffusionPolicy
from overpaint.training import TrainingConfig, process_state
from refl import ReFLConfig, ReFLTrainer


def colour(channel):
    return lambda images, prompts: images[:, channel].mean(dim=(1, 2))


policy = DiffusionPolicy.from_pretrained(sys.argv[1], train="xattn", device="cpu")
prompts = ConceptPrompts(["a striped circle", "a striped square"], ["a cat", "two dogs"])
attack = SoftAttack(SoftAttackConfig(steps=2, share=0.5))
erasure = ImageConstraint(colour(1), prompts, ceiling=0.3, attack=attack)
config = ReFLConfig(
    batch_size=4, micro_batch_size=2, steps=4, first_reward_step=2, last_reward_step=3, reward_scale=1.0,
    pretraining_weight=0.0, erasure_batch_size=8,
)
settings = TrainingConfig(
    output_dir=Path(sys.argv[2]), iterations=2, learning_rate=10.0, adam_epsilon=1.0, weight_decay=0.0,
    max_grad_norm=1e6, progress=False,
)
metrics = ReFLTrainer(policy, colour(0), ["a red circle"], config, erasure=erasure).train(settings)
state = process_state()
assert state.num_processes == int(sys.argv[3])
if state.is_main_process:
    average = prompts.state_dict()["average"]
    numbers = {"violation": torch.tensor(metrics.erasure_violation), "hard": torch.tensor(list(average.values()))}
    save_file(policy.trainable_state() | numbers, settings.output_dir / "end.safetensors")
state.destroy_process_group()
'''


@pytest.mark.slow
def test_two_processes_attack_as_one_does(pipeline_dir: Path, tmp_path: Path, torchrun: Callable[..., str]) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    ends, lines = [], []
    for processes in (1, 2):
        folder = tmp_path / f"run-{processes}"
        torchrun(program, pipeline_dir, folder, processes, processes=processes)
        ends.append(load_file(folder / "end.safetensors"))
        lines.append([line for line in read_metrics(folder / "metrics.jsonl") if "erasure/violation" in line])
    one, two = ends
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, at=name: f"{at}: {text}")
    for tag in ("erasure/attacked_samples", "erasure/attack_rows_forward", "erasure/violation_after_attack"):
        assert [line[tag] for line in lines[1]] == pytest.approx([line[tag] for line in lines[0]], rel=1e-4)
    assert 0 < sum(line["erasure/attacked_samples"] for line in lines[0]) < 16
