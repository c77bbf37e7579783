"""ReFL that erases under a floor of the reward, or near the reference policy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import (
    AC,
    ANT,
    ESD,
    MACE,
    SA,
    ACConfig,
    ANTConfig,
    DescentConfig,
    ESDConfig,
    FixedWeight,
    ImageConstraint,
    Lagrangian,
    LagrangianConfig,
    MACEConfig,
    ObjectiveConstraint,
    Receler,
    RecelerConfig,
    ReferenceDivergence,
    RewardFloor,
    SAConfig,
    Switch,
)
from erasure.methods.ant import SaliencyConfig
from erasure.methods.sa import FisherConfig
from overpaint import LoRAConfig, tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.ddim import gaussian_kl
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingConfig, read_metrics
from refl import ReFLConfig, ReFLTrainer

CONCEPT = ["a plain circle", "a striped circle"]


class Greenness:
    """The mean of green."""

    differentiable = True

    def __call__(self, images: Images, prompts: Any) -> PerSample:
        return images[:, 1].mean(dim=(1, 2))


def green(weight: float, ceiling: float = 0.2) -> ImageConstraint:
    return ImageConstraint(Greenness(), CONCEPT, FixedWeight(weight), ceiling=ceiling)


def drawn_by_a_run(seed: int, config: ReFLConfig, *populations: list[str]) -> tuple[int, list[Any]]:
    """Returns the reward step of a run's first iteration, and prompts and seeds of each batch, as its generator has."""
    generator = torch.Generator().manual_seed(seed)
    step = int(torch.randint(config.first_reward_step, config.last_reward_step + 1, (), generator=generator))
    batches = []
    for population in populations:
        picks = torch.randint(len(population), (config.batch_size,), generator=generator).tolist()
        seeds = torch.randint(2**31 - 1, (config.batch_size,), generator=generator).tolist()
        batches.append(([population[pick] for pick in picks], seeds))
    return step, batches


def one_step(policy: DiffusionPolicy, prompts: list[str], seeds: list[int], step: int) -> Images:
    conditioning, guidance = policy.encode(prompts), ClassifierFree(1.0)
    latents = policy.sample(conditioning, steps=4, guidance=guidance, eta=1.0, seeds=seeds, until=step)
    return policy.decode(policy.predict_clean(latents, conditioning, step=step, steps=4, guidance=guidance))


def gradient_of(policy: DiffusionPolicy, loss: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, policy.trainable_parameters())
    return dict(zip(policy.trainable_state(), gradients, strict=True))


@pytest.mark.parametrize("floor", [None, 0.7], ids=["paired", "number"])
def test_update_is_that_of_the_weighted_terms_by_hand(
    floor: float | None,
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    gradients: Callable[[ReFLTrainer], dict[str, Tensor]],
    assert_equal_gradients: Callable,
) -> None:
    stir(policy)
    config = small(reward_scale=0.5, micro_batch_size=2)
    step, ((texts, seeds), (concept, concept_seeds)) = drawn_by_a_run(0, config, prompts, CONCEPT)
    rewards = redness(one_step(policy, texts, seeds, step), texts)
    costs = Greenness()(one_step(policy, concept, concept_seeds, step), concept)
    with policy.reference():
        original = redness(one_step(policy, texts, seeds, step), texts)
    missing = ((original - 0.05 if floor is None else floor) - rewards) / 2.0
    loss = 0.5 * (3.0 * missing.mean() + 2.0 * (costs / 0.2 - 1).mean())
    expected = gradient_of(policy, loss)

    bound = RewardFloor(0.05 if floor is None else 0.0, 2.0, FixedWeight(3.0), floor)
    trainer = ReFLTrainer(policy, redness, prompts, config, erasure=green(2.0), floor=bound)
    assert_equal_gradients(gradients(trainer), expected)


def test_divergence_is_that_of_single_steps_by_hand(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    detached: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    stir(policy)
    config = small()
    _, ((texts, seeds), _) = drawn_by_a_run(0, config, prompts, CONCEPT)
    guidance, samples = ClassifierFree(1.0), torch.arange(len(seeds))
    trajectory = policy.rollout(policy.encode(texts), steps=4, guidance=guidance, eta=1.0, seeds=seeds)
    by_step = []
    for step in range(4):
        steps = torch.full((len(seeds),), step)
        _, mean, std = policy.stored_steps(trajectory, samples, steps, guidance=guidance)
        with policy.reference():
            _, other, _ = policy.stored_steps(trajectory, samples, steps, guidance=guidance)
        by_step.append(gaussian_kl(mean, other, std).detach())
    bound = ReferenceDivergence(1e-3, FixedWeight(1.0))
    metrics = ReFLTrainer(policy, detached, prompts, config, erasure=green(1.0), floor=bound).train(
        run_config(iterations=1)
    )
    assert metrics is not None
    found = (metrics.floor_violation + 1) * 1e-3
    lowest, highest = torch.stack(by_step).amin(dim=0).mean(), torch.stack(by_step).amax(dim=0).mean()
    assert float(lowest) * 0.999 <= found <= float(highest) * 1.001
    assert found > 0
    assert metrics.reward == 0.0  # which nothing computes: the reward has no gradient, and is not asked for one


@pytest.mark.parametrize("project", [False, True])
def test_conflicting_terms_are_projected_where_that_is_asked_for(
    project: bool,
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    gradients: Callable[[ReFLTrainer], dict[str, Tensor]],
    assert_equal_gradients: Callable,
) -> None:
    stir(policy)
    start, config = policy.trainable_state(), small(project_conflicts=project)
    step, ((texts, seeds), (concept, concept_seeds)) = drawn_by_a_run(0, config, prompts, prompts)
    reward = redness(one_step(policy, texts, seeds, step), texts)
    one = gradient_of(policy, (2.0 - reward).mean())
    two = gradient_of(policy, (redness(one_step(policy, concept, concept_seeds, step), concept) / 0.2 - 1).mean())
    product, first, second = (
        float(sum((a[name] * b[name]).sum() for name in one)) for a, b in ((one, two), (one, one), (two, two))
    )
    assert product < 0  # red is wanted and not wanted
    expected = {name: one[name] + two[name] for name in one}
    if project:
        expected = {name: (1 - product / first) * one[name] + (1 - product / second) * two[name] for name in one}
    erasure = ImageConstraint(redness, prompts, FixedWeight(1.0), ceiling=0.2)
    trainer = ReFLTrainer(policy, redness, prompts, config, erasure=erasure)
    policy.load_trainable_state(start)
    assert_equal_gradients(gradients(trainer), expected)


def test_switch_trains_one_term_at_a_time(
    policy: DiffusionPolicy,
    stir: Callable[[DiffusionPolicy], None],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    gradients: Callable[[ReFLTrainer], dict[str, Tensor]],
    assert_equal_gradients: Callable,
) -> None:
    stir(policy)
    start, config = policy.trainable_state(), small()
    step, ((texts, seeds), (concept, concept_seeds)) = drawn_by_a_run(0, config, prompts, CONCEPT)
    rewards = redness(one_step(policy, texts, seeds, step), texts)
    costs = Greenness()(one_step(policy, concept, concept_seeds, step), concept)
    alone = {
        True: gradient_of(policy, (costs / 0.2 - 1).mean()),
        False: gradient_of(policy, (2.0 - rewards).mean()),
    }
    for erasing, expected in alone.items():
        policy.load_trainable_state(start)
        switch = Switch()
        switch.erasing = erasing
        erasure = ImageConstraint(Greenness(), CONCEPT, switch, ceiling=0.2)
        assert_equal_gradients(gradients(ReFLTrainer(policy, redness, prompts, config, erasure=erasure)), expected)


def curve(config: TrainingConfig, tag: str) -> list[float]:
    return [line[tag] for line in read_metrics(config.output_dir / "metrics.jsonl") if tag in line]


@pytest.mark.parametrize("kind", ["lagrangian", "switch"])
def test_resumed_controllers_go_on_as_if_never_stopped(
    kind: str,
    make_policy: Callable[..., DiffusionPolicy],
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    def trained(name: str, iterations: int, *, resume: bool = False) -> tuple[Any, ...]:
        policy = make_policy(train="xattn-kv")
        erasing = Switch(1, low=-0.9) if kind == "switch" else Lagrangian()
        erasure = ImageConstraint(Greenness(), CONCEPT, erasing, ceiling=0.2)
        floor = RewardFloor(lagrangian=Lagrangian(LagrangianConfig(derivative_gain=1.0)))
        settings = run_config(name, iterations=iterations, checkpoint_every=2, resume=resume)
        ReFLTrainer(policy, redness, prompts, small(), erasure=erasure, floor=floor).train(settings)
        curves = [curve(settings, f"{side}/{tag}") for side in ("erasure", "floor") for tag in ("violation", "weight")]
        return erasing.state_dict(), floor.lagrangian.state_dict(), curves, policy.trainable_state()

    *whole, weights = trained("whole", 4)
    trained("stopped", 2)
    *resumed, others = trained("stopped", 4, resume=True)
    assert resumed == whole
    assert all(len(values) == 4 for values in whole[-1])
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_weight_of_the_floor_grows_as_the_reward_falls_below_it(
    policy: DiffusionPolicy,
    redness: Any,
    prompts: list[str],
    small: Callable[..., ReFLConfig],
    run_config: Callable[..., TrainingConfig],
) -> None:
    config = run_config(iterations=3)
    floor = RewardFloor(floor=2.0)  # redder than red
    ReFLTrainer(policy, redness, prompts, small(), erasure=green(1.0), floor=floor).train(config)
    violations, weights = curve(config, "floor/violation"), curve(config, "floor/weight")
    assert violations == pytest.approx([2.0 - reward for reward in curve(config, "reward/mean")], abs=1e-5)
    assert weights[0] == 1.0
    assert weights[0] < weights[1] < weights[2] < floor.lagrangian.weight
    assert not curve(config, "train/reward_loss")


def test_floor_without_what_it_needs_is_refused(
    policy: DiffusionPolicy, redness: Any, detached: Any, prompts: list[str], small: Callable[..., ReFLConfig]
) -> None:
    with pytest.raises(ValueError, match="floor must come with an erasure"):
        ReFLTrainer(policy, redness, prompts, floor=RewardFloor())
    with pytest.raises(ValueError, match=r"ReFLConfig\.eta must be above 0 with a ReferenceDivergence, got 0"):
        ReFLTrainer(policy, redness, prompts, small(eta=0.0), erasure=green(1.0), floor=ReferenceDivergence())


DESCENT = DescentConfig(iterations=1, learning_rate=1e-3, batch_size=1)
PICTURES = ("a red circle", "a blue square")
OBJECTIVES: dict[str, Any] = {
    "ac": AC(ACConfig(anchors=PICTURES, templates=("{concept} {anchor}",), images=2, steps=2, descent=DESCENT)),
    "ant": ANT(
        ANTConfig(
            steps=2,
            saliency=SaliencyConfig(prompts=PICTURES, seeds=(1,), iterations=1, learning_rate=1e-3),
            descent=DESCENT,
        )
    ),
    "esd": ESD(ESDConfig(steps=2, descent=DESCENT)),
    "mace": MACE(
        MACEConfig(
            templates=("a {} circle",), prior=(), prior_size=None, prompts=("a {}",), images=2, steps=2,
            guidance_scale=3.0, mask_timesteps=(400,), descent=DESCENT,
        )
    ),
    "receler": Receler(RecelerConfig(rank=4, tokens=2, inner_steps=2, steps=2, descent=DESCENT)),
    "sa": SA(
        SAConfig(
            surrogates=PICTURES, replay=("a dotted star",), images=2, steps=2,
            fisher=FisherConfig(images=1, timesteps=2), descent=DESCENT,
        )
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def small_world() -> tuple[DiffusionPolicy, dict[str, Tensor]]:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2), device="cpu")
    return policy, policy.trainable_state()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_every_objective_erases_under_a_floor_of_the_tiny_worlds_reward(
    name: str,
    small_world: tuple[DiffusionPolicy, dict[str, Tensor]],
    small: Callable[..., ReFLConfig],
    tmp_path: Path,
) -> None:
    policy, start = small_world
    policy.load_trainable_state(start)
    objective = OBJECTIVES[name]
    concept = replace(tinyworld.STRIPES, phrases=("striped", "zebra"), preserve=())
    erasure = ObjectiveConstraint(objective, concept, lagrangian=FixedWeight(1.0), ceiling=0.01)
    floor = RewardFloor(slack=0.05)
    config = small(batch_size=2, erasure_batch_size=2, reward_scale=0.05)
    trainer = ReFLTrainer(
        policy, tinyworld.load_reward(), tinyworld.captions("train", 4), config, erasure=erasure, floor=floor
    )
    settings = TrainingConfig(output_dir=tmp_path, iterations=2, learning_rate=1e-2, progress=False)
    metrics = trainer.train(settings)
    assert metrics is not None
    assert torch.isfinite(torch.tensor(metrics)).all()
    # At the first iteration nothing has moved, and the floor is the very same pictures' reward.
    assert curve(settings, "floor/violation")[0] == pytest.approx(-0.05, abs=1e-5)
    assert any(not torch.equal(value, start[key]) for key, value in policy.trainable_state().items())
    assert curve(settings, "floor/weight")[0] == 1.0 != floor.lagrangian.weight
