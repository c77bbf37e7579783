"""SLD: the equations, sampling by a policy, its memory along a trajectory, and what a saved one holds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import UCE, Concept, Erasure, strongest_erasure
from erasure.changes import Change
from erasure.methods.sld import SLD, SLDChange, SLDConfig, SLDGuard, safety_term
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy, Guidance, LoRAConfig, SamplingGuard, StepContext
from overpaint.tinyworld.presets import PRESETS, STRIPES
from refl import ReFLConfig
from refl.one_step import one_step_images

STRIPED = Concept(name="stripes", phrases=("striped", "with stripes"))
DOTTED = Concept(name="dots", phrases=("dotted",))
PROMPTS = ["a striped red circle", "a dotted blue square"]
SEEDS = [1, 2]
STEPS = 6
CFG = ClassifierFree(5.0)
EARLY = SLDConfig(warmup_steps=2, guidance_scale=20.0, threshold=0.1, momentum_scale=0.5, momentum_beta=0.6)
"""Acts within few steps, and little enough that rounding does not grow; shows everything that SLD does."""
MEMORYLESS = replace(EARLY, momentum_scale=0.0)


@pytest.fixture(params=["epsilon", "v_prediction"])
def either(request: pytest.FixtureRequest) -> DiffusionPolicy:
    return request.getfixturevalue("policy" if request.param == "epsilon" else "v_policy")


def safe(policy: DiffusionPolicy, config: SLDConfig = EARLY, concept: Concept = STRIPED) -> DiffusionPolicy:
    SLD(config).erase(policy, concept).apply(policy)
    return policy


def draw(policy: DiffusionPolicy, guidance: Guidance = CFG, *, steps: int = STEPS) -> Tensor:
    latents = policy.sample(policy.encode(PROMPTS), steps=steps, seeds=SEEDS, guidance=guidance)
    assert latents.isfinite().all()
    return latents


# The equations.


def one(*values: float) -> Tensor:
    return torch.tensor(values).view(1, 1, 1, -1).expand(1, 4, 1, -1)


def test_term_is_the_hand_computed_one() -> None:
    # Differences prompt - safety: 0.2 at the threshold, -0.05 half unsafe, -0.3 wholly, 0.05 half unsafe.
    prompt, safety, away = one(0.2, 0.95, 0.7, 1.05), one(0.0, 1.0, 1.0, 1.0), one(2.0, 0.5, 0.5, 0.5)
    config = SLDConfig(guidance_scale=10.0, threshold=0.2, momentum_scale=0.5, momentum_beta=0.75)
    term, momentum = safety_term(away, prompt, safety, one(0.0, 0.0, 0.4, 0.0), config)
    torch.testing.assert_close(term, one(0.0, 0.25, 0.7, 0.25), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(momentum, one(0.0, 0.0625, 0.475, 0.0625), rtol=1e-5, atol=1e-7)


def test_threshold_is_signed() -> None:
    config = SLDConfig(guidance_scale=1000.0, threshold=0.01, momentum_scale=0.0)
    term, _ = safety_term(one(0.0, 0.0), one(1.5, 0.5), one(1.0, 1.0), one(0.0, 0.0), config)
    assert torch.equal(term, one(0.0, 1.0))


def test_gradient_reaches_the_two_predictions_of_the_difference_and_nothing_else() -> None:
    away, prompt, safety, momentum = (one(value).clone().requires_grad_() for value in (0.5, 0.95, 1.0, 0.4))
    term, after = safety_term(away, prompt, safety, momentum.detach(), SLDConfig(guidance_scale=10.0))
    gradients = torch.autograd.grad(term.sum(), [away, prompt, safety], allow_unused=True)
    torch.testing.assert_close(gradients[0], one(-0.5), rtol=1e-5, atol=0)
    assert gradients[1] is None
    torch.testing.assert_close(gradients[2], one(0.5), rtol=1e-5, atol=0)
    assert not after.requires_grad


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (SLDConfig.weak(), (15, 200.0, 0.0, 0.0, 0.0)),
        (SLDConfig.weak("released"), (15, 20.0, 0.0, 0.0, 0.0)),
        (SLDConfig.medium(), (10, 1000.0, 0.01, 0.3, 0.4)),
        (SLDConfig(), (10, 1000.0, 0.01, 0.3, 0.4)),
        (SLDConfig.strong(), (7, 2000.0, 0.025, 0.5, 0.7)),
        (SLDConfig.max(), (0, 5000.0, 1.0, 0.5, 0.7)),
    ],
)
def test_presets_are_the_papers(config: SLDConfig, numbers: tuple[float, ...]) -> None:
    assert (
        config.warmup_steps,
        config.guidance_scale,
        config.threshold,
        config.momentum_scale,
        config.momentum_beta,
    ) == numbers
    assert config.concept_text is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_steps": -1}, "SLDConfig.warmup_steps must be at least 0, got -1"),
        ({"guidance_scale": -1.0}, "SLDConfig.guidance_scale must be at least 0, got -1.0"),
        ({"guidance_scale": float("inf")}, "SLDConfig.guidance_scale must be a finite number, got inf"),
        ({"threshold": float("nan")}, "SLDConfig.threshold must be a finite number, got nan"),
        ({"momentum_scale": -0.1}, "SLDConfig.momentum_scale must be at least 0, got -0.1"),
        ({"momentum_beta": 1.0}, "SLDConfig.momentum_beta must be below 1, got 1.0"),
        ({"concept_text": " "}, "SLDConfig.concept_text must not be blank, got ' '"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLDConfig(**change)


def test_an_unknown_variant_is_refused() -> None:
    weak: Any = SLDConfig.weak
    with pytest.raises(Exception, match="variant"):
        weak("old")


# Sampling by a policy.


@torch.no_grad()
def by_hand(policy: DiffusionPolicy, text: str, config: SLDConfig, negative: str = "", scale: float = 5.0) -> Tensor:
    """Draws with the equations as the paper has them: noise in, noise out, one network call for each prediction."""
    from diffusers import DDIMScheduler

    # The policy's converted predictions are noise, whatever the network's kind.
    scheduler: Any = DDIMScheduler.from_config(policy.scheduler_config | {"prediction_type": "epsilon"})
    scheduler.set_timesteps(STEPS)
    latents = policy.sample(policy.encode(PROMPTS), steps=STEPS, seeds=SEEDS, until=0)
    texts = [policy.encode(PROMPTS), policy.encode([negative] * 2), policy.encode([text] * 2)]
    momentum = torch.zeros_like(latents)
    for i, timestep in enumerate(scheduler.timesteps):
        prompt, away, safety = (policy.predict_noise(latents, timestep.expand(2), each) for each in texts)
        phi = torch.minimum((prompt - safety).abs() * config.guidance_scale, torch.ones(()))
        mu = torch.where(prompt - safety >= config.threshold, torch.zeros(()), phi)
        term = mu * (safety - away) + config.momentum_scale * momentum
        momentum = config.momentum_beta * momentum + (1 - config.momentum_beta) * term
        gamma = prompt - away
        if i >= config.warmup_steps:
            gamma = gamma - term
        latents = scheduler.step(away + scale * gamma, timestep, latents).prev_sample
    return latents


@pytest.mark.parametrize("negative", ["", "a photo of a cat"])
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_a_policy_draws_what_the_papers_equations_draw(either: DiffusionPolicy, negative: str, scale: float) -> None:
    plain = draw(either, ClassifierFree(scale))
    expected = by_hand(either, "striped, with stripes", EARLY, negative, scale)
    safe(either)
    drawn = draw(either, ClassifierFree(scale, either.encode([negative]) if negative else None))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-4)  # of order 10
    assert (drawn - plain).abs().max() > 0.02 * scale


def test_all_branches_go_through_the_network_in_one_call(policy: DiffusionPolicy) -> None:
    sizes: list[int] = []

    def network(latents: Tensor, timesteps: Tensor, **rest: Any) -> Any:
        sizes.append(len(latents))
        return policy.unet(latents, timesteps, **rest)

    policy.network = network
    with SLD(EARLY).erase(policy, STRIPED, 0.0).applied(policy):
        draw(policy, steps=2)
    safe(policy)
    draw(policy, steps=2)
    draw(policy, ClassifierFree(1.0), steps=2)
    assert sizes == [4, 4, 6, 6, 6, 6]


def test_nothing_happens_during_warm_up_but_momentum_builds_up(policy: DiffusionPolicy) -> None:
    plain = draw(policy)
    with SLD(replace(EARLY, warmup_steps=STEPS)).erase(policy, STRIPED).applied(policy):
        assert torch.equal(draw(policy), plain)
    last = replace(EARLY, warmup_steps=STEPS - 1)
    drawn = []
    for config in (last, replace(last, momentum_scale=0.0)):
        with SLD(config).erase(policy, STRIPED).applied(policy):
            drawn.append(draw(policy))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], plain)


def test_drawing_does_not_depend_on_the_batch(policy: DiffusionPolicy) -> None:
    safe(policy)
    texts, seeds = [*PROMPTS, "a dog"], [1, 2, 3]
    whole = policy.draw(texts, steps=STEPS, seeds=seeds)
    parts = policy.draw(texts, steps=STEPS, seeds=seeds, batch_size=2)
    swapped = policy.draw(texts[::-1], steps=STEPS, seeds=seeds[::-1])
    # The network rounds differently in another batch, and the safety term is steep.
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-3)
    torch.testing.assert_close(whole, swapped.flip(0), rtol=0, atol=1e-3)


def test_half_precision_draws_nearly_the_same(make_policy: Callable[..., DiffusionPolicy]) -> None:
    exact, rounded = (draw(safe(make_policy(dtype=dtype)), steps=3) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.float32
    # 1.7 to 2.0 units with AVX-512, AVX2 and SSE; the mean, as the steep safety term moves single pixels far.
    assert (exact - rounded).abs().mean() < 6 * torch.finfo(torch.bfloat16).eps * exact.abs().mean()


def test_strength_scales_the_guidance_and_zero_changes_nothing(policy: DiffusionPolicy) -> None:
    plain = draw(policy)
    with SLD(EARLY).erase(policy, STRIPED, 0.0).applied(policy):
        assert torch.equal(draw(policy), plain)
    with SLD(EARLY).erase(policy, STRIPED, 0.5).applied(policy):
        half = draw(policy)
    with SLD(replace(EARLY, guidance_scale=10.0)).erase(policy, STRIPED).applied(policy):
        assert torch.equal(draw(policy), half)
    with pytest.raises(ValueError, match=r"strength must be (at least 0|a finite number), got -1\.0"):
        SLD().erase(policy, STRIPED, -1.0)


def test_strength_can_be_searched_under_a_floor(policy: DiffusionPolicy) -> None:
    def rewards_of(policy: DiffusionPolicy) -> Tensor:
        assert isinstance(policy.guard, SLDGuard)
        return torch.tensor([-policy.guard.config.guidance_scale] * 2)

    erasure, search = strongest_erasure(SLD(EARLY), policy, STRIPED, rewards_of, floor=-11.0, tolerance=0.3)
    assert search.best.strength == 0.5
    assert erasure.config["strength"] == 0.5
    assert policy.guard is None


# Memory along a trajectory.


def test_a_trajectory_can_be_taken_up_where_it_was_left(policy: DiffusionPolicy) -> None:
    safe(policy)
    whole = draw(policy)
    embeddings = policy.encode(PROMPTS)
    latents = policy.sample(embeddings, steps=STEPS, guidance=CFG, seeds=SEEDS, until=3)
    with torch.no_grad():
        for step in range(3, STEPS):
            latents = policy.denoise(latents, embeddings, step=step, steps=STEPS, guidance=CFG)
    assert torch.equal(latents, whole)
    assert torch.equal(policy.sample(embeddings, steps=STEPS, guidance=CFG, seeds=SEEDS), whole)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_steps_that_are_recomputed_for_the_gradient_have_their_own_momentum(
    make_policy: Callable[..., DiffusionPolicy], eta: float
) -> None:
    gradients = []
    for recompute in (False, True):
        policy = safe(make_policy(lora=LoRAConfig()))
        trained = policy.trainable_parameters()
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        config = ReFLConfig(
            steps=STEPS, first_reward_step=5, last_reward_step=5, truncation_steps=3,
            guidance_scale=5.0, eta=eta, checkpoint_steps=recompute,
        )  # fmt: skip
        one_step_images(policy, PROMPTS, SEEDS, config, reward_step=5).mean().backward()
        gradients.append(torch.cat([torch.zeros(0) if p.grad is None else p.grad.flatten() for p in trained]))
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_a_step_of_an_unknown_trajectory_is_refused(policy: DiffusionPolicy) -> None:
    safe(policy)
    embeddings = policy.encode(PROMPTS)
    latents = policy.sample(embeddings, steps=STEPS, guidance=CFG, seeds=SEEDS, until=2)
    message = "SLD's momentum needs the steps of one batch in their order from step 0 on, got step 2 .* set SLDConfig"
    for others in (policy.encode(PROMPTS), embeddings[:]):
        with pytest.raises(ValueError, match=message):
            policy.denoise(latents, others, step=2, steps=STEPS, guidance=CFG)
    with pytest.raises(ValueError, match=message):
        policy.denoise(latents[:1], embeddings[:1], step=2, steps=STEPS, guidance=CFG)
    with pytest.raises(ValueError, match="got steps 1 to 2 together of a batch"):
        policy.predict_noise(latents, torch.tensor([700, 500]), embeddings, CFG, steps=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="got step 4 of a batch"):
        policy.denoise(latents, embeddings, step=4, steps=STEPS, guidance=CFG)


def test_momentum_begins_where_sampling_does(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy, memoryless = safe(make_policy()), safe(make_policy(), MEMORYLESS)
    conditioning, latents = policy.encode(PROMPTS), torch.randn(2, 4, 8, 8)

    def on(one: DiffusionPolicy, until: int) -> Tensor:
        return one.sample(conditioning, steps=STEPS, guidance=CFG, seeds=SEEDS, latents=latents, start=3, until=until)

    # The first step has none before it; the second has that of the first.
    assert torch.equal(on(policy, 4), on(memoryless, 4))
    assert not torch.equal(on(policy, 5), on(memoryless, 5))
    with pytest.raises(ValueError, match="got step 3 of a batch"):
        policy.denoise(latents, policy.encode(PROMPTS), step=3, steps=STEPS, guidance=CFG)


def test_policy_gradients_need_a_memoryless_one(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = safe(make_policy(), MEMORYLESS)
    trajectory = policy.rollout(policy.encode(PROMPTS), steps=STEPS, guidance=CFG, seeds=SEEDS)
    samples, steps = torch.tensor([0, 1, 0]), torch.tensor([0, 3, 5])
    log_probs = policy.log_prob(trajectory, samples, steps, guidance=CFG)
    torch.testing.assert_close(log_probs, trajectory.log_probs[samples, steps], rtol=0, atol=1e-3)
    for step in range(STEPS):
        there = torch.full((2,), step)
        again = policy.log_prob(trajectory, torch.arange(2), there, guidance=CFG)
        assert torch.equal(again, trajectory.log_probs[:, step])

    policy = safe(make_policy())
    trajectory = policy.rollout(policy.encode(PROMPTS), steps=STEPS, guidance=CFG, seeds=SEEDS)
    with pytest.raises(ValueError, match=r"got steps 0 to 5 together of a batch .*\.momentum_scale to 0"):
        policy.log_prob(trajectory, samples, steps, guidance=CFG)
    # Neither are stored steps of one index the latest trajectory: prompts may repeat, and minibatches are shuffled.
    with pytest.raises(ValueError, match="got step 5 of a batch"):
        policy.log_prob(trajectory, torch.arange(2), torch.full((2,), 5), guidance=CFG)


# What is erased, kept and carried.


def test_the_tiny_worlds_stripes_go_and_its_dots_stay() -> None:
    policy = tinyworld.load_policy(device="cpu")
    texts = [*tinyworld.captions("explicit", 6, 3), *tinyworld.captions("neighbour", 4, 3)]
    erasure = SLD(PRESETS["sld"]).erase(policy, STRIPES)
    erasure.apply(policy)
    images = policy.draw(texts, seeds=range(10), steps=20, guidance=ClassifierFree(3.0))
    assert not tinyworld.concept_shown(images).any()
    assert tinyworld.neighbour_shown(images[6:]).all()


def test_safety_concept_is_the_phrases_or_the_given_text(policy: DiffusionPolicy) -> None:
    def text(config: SLDConfig) -> str | None:
        change = SLD(config).erase(policy, STRIPED).change
        assert isinstance(change, SLDChange)
        return change.config.concept_text

    assert text(EARLY) == "striped, with stripes"
    assert text(replace(EARLY, concept_text="a zebra")) == "a zebra"
    with pytest.raises(ValueError, match="must give its concept_text, got None"):
        SLDChange(EARLY)


def test_a_safety_concept_that_is_cut_off_is_refused(policy: DiffusionPolicy) -> None:
    long = replace(EARLY, concept_text="a photo of a cat " * 5 + "and a dog with no style")
    with pytest.raises(ValueError, match=r"at most 22 tokens, got \d+; '.*no style' is cut off"):
        SLD(long).erase(policy, STRIPED)
    for apply in (SLDChange(long).apply, lambda p: SLDChange(long).apply_to_pipeline(p.to_pipeline())):
        with pytest.raises(ValueError, match="must have at most 22 tokens"):
            apply(policy)
    assert policy.guard is None


def test_another_concept_gives_other_pictures(policy: DiffusionPolicy) -> None:
    drawn = []
    for concept in (STRIPED, DOTTED):
        with SLD(EARLY).erase(policy, concept).applied(policy):
            drawn.append(draw(policy))
    assert not torch.equal(*drawn)


def test_saved_and_loaded_erasure_draws_the_same_bits(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    first, second = make_policy(), make_policy()
    erasure = SLD(EARLY).erase(first, STRIPED, 0.5)
    erasure.save(tmp_path / "new" / "folder")
    loaded = Erasure.load(tmp_path / "new" / "folder")
    assert loaded == erasure
    assert loaded.base is None
    assert isinstance(loaded.change, Change)
    assert {path.suffix for path in (tmp_path / "new" / "folder").iterdir()} == {".json"}
    erasure.apply(first)
    loaded.apply(second)
    assert torch.equal(draw(first), draw(second))


def test_a_damaged_folder_is_refused(policy: DiffusionPolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold sld\.json, and"):
        SLDChange.load(tmp_path)
    (tmp_path / "sld.json").write_text('{"steps": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"sld\.json must hold .*'concept_text'.*, got \['steps'\]"):
        SLDChange.load(tmp_path)


def test_an_erasure_for_a_while_is_taken_back_after_an_error(policy: DiffusionPolicy) -> None:
    erasure = SLD(EARLY).erase(policy, STRIPED)
    with pytest.raises(RuntimeError, match="drawing failed"), erasure.applied(policy):
        raise RuntimeError("drawing failed")
    assert policy.guard is None


def test_a_policy_takes_one_safeguard(policy: DiffusionPolicy) -> None:
    safe(policy)
    with pytest.raises(ValueError, match="a policy takes one guard, and this one has SLDGuard"):
        safe(policy)


def test_it_goes_on_top_of_an_erasure_of_the_weights(policy: DiffusionPolicy) -> None:
    with SLD(EARLY).erase(policy, STRIPED).applied(policy):
        alone = draw(policy)
    UCE().erase(policy, STRIPED).apply(policy)
    edited = draw(policy)
    expected = by_hand(policy, "striped, with stripes", EARLY)
    SLD(EARLY).erase(policy, STRIPED).apply(policy)
    both = draw(policy)
    torch.testing.assert_close(both, expected, rtol=0, atol=2e-4)
    assert not torch.equal(both, alone)
    assert not torch.equal(both, edited)


def test_erasing_leaves_the_policy_as_it_was(policy: DiffusionPolicy) -> None:
    before = draw(policy)
    SLD(EARLY).erase(policy, STRIPED)
    assert policy.guard is None
    assert torch.equal(draw(policy), before)


def test_a_trainee_is_safe_too(policy: DiffusionPolicy) -> None:
    drawn = draw(safe(policy))
    torch.testing.assert_close(draw(policy.student_copy("xattn")), drawn, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["off", "on"])
def test_branches_are_the_same_with_guidance_and_without(scale: float, policy: DiffusionPolicy) -> None:
    guard = safe(policy).guard
    assert isinstance(guard, SamplingGuard)
    guided = guard.guided(ClassifierFree(scale))
    assert isinstance(guided, Guidance)
    moment = StepContext(torch.zeros(2, dtype=torch.int64), 1, torch.ones(2))
    prompt, empty = policy.encode(PROMPTS), policy.encode(["", ""])
    branches = guided.branches(prompt, empty, moment)
    expected = empty, prompt, policy.encode(["striped, with stripes"] * 2)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(branches, expected, strict=True))
