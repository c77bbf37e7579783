import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import NUDITY, UCE, Concept, Erasure
from erasure.guards import detach
from erasure.methods.safree import NUDITY_CONCEPTS, SAFREE, SAFREEChange, SAFREEConfig, SAFREEGuard
from erasure.methods.safree.prompt_filter import PromptFilter, projector, trigger_tokens
from erasure.methods.safree.reattention import Reattention, damp_low_frequencies
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig, StepContext
from overpaint.policy.noise import SampleNoise
from overpaint.tinyworld.presets import PRESETS, STRIPES

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"))
PROMPTS = ["a striped red circle on a blue background", "striped", "", "a photo of a cat"]
SEEDS = [1, 2, 3, 4]
CFG = ClassifierFree(3.0)
EVERYWHERE = SAFREEConfig(filtered_steps=50, midpoint=0.0)
"""Filters every step of every prompt that has a trigger."""


def draw(policy: DiffusionPolicy, prompts: list[str] = PROMPTS, steps: int = 4, scale: float = 3.0) -> Tensor:
    return policy.draw(prompts, seeds=SEEDS[: len(prompts)], steps=steps, guidance=ClassifierFree(scale))


def apply(policy: DiffusionPolicy, config: SAFREEConfig | None = None, strength: float = 1.0) -> SAFREEGuard:
    SAFREE(config).erase(policy, CONCEPT, strength).apply(policy)
    assert isinstance(policy.guard, SAFREEGuard)
    return policy.guard


def moment(steps: list[int], total: int) -> StepContext:
    return StepContext(torch.tensor(steps), total, torch.ones(len(steps)))


def count_samples(policy: DiffusionPolicy) -> list[int]:
    """Notes how many samples go through the UNet at each call."""
    sizes: list[int] = []

    def network(latents: Tensor, timesteps: Tensor, **rest: Any) -> Any:
        sizes.append(len(latents))
        return policy.unet(latents, timesteps, **rest)

    policy.network = network
    return sizes


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


# The filter of prompts.


def test_projector_keeps_the_span_and_nothing_else_even_of_dependent_vectors() -> None:
    one, two = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = projector(torch.stack([one, two, one + two, one + 1e-9 * two]))
    torch.testing.assert_close(found @ one, one)
    torch.testing.assert_close(found @ two, two)
    torch.testing.assert_close(found @ found, found)
    assert round(found.trace().item()) == 2


def test_token_without_which_a_prompt_is_far_from_the_concepts_is_a_trigger() -> None:
    assert trigger_tokens(torch.tensor([1.0, 1.0, 1.3]), 0.01).tolist() == [False, False, True]
    assert trigger_tokens(torch.tensor([1.0, 1.0, 1.3]), 0.31).tolist() == [False, False, False]
    assert trigger_tokens(torch.tensor([1.0]), 0.01).tolist() == [True]


def test_filter_replaces_trigger_tokens_and_no_others(bare: DiffusionPolicy) -> None:
    guard = apply(bare)
    prompt = PROMPTS[0]
    filtered, embedding = guard.filter(prompt), bare.encode([prompt]).tokens[0]
    changed = (filtered.embedding != embedding).any(dim=1)
    assert filtered.triggers.any()
    assert not filtered.triggers.all()
    expected = torch.zeros(len(embedding), dtype=torch.bool)
    expected[1 : 1 + len(filtered.triggers)] = filtered.triggers
    assert torch.equal(changed, expected)


def test_only_token_of_a_prompt_is_a_trigger(bare: DiffusionPolicy) -> None:
    assert apply(bare).filter("cat").triggers.tolist() == [True]


def test_empty_prompt_is_left_alone(bare: DiffusionPolicy) -> None:
    filtered = apply(bare, EVERYWHERE).filter("")
    assert torch.equal(filtered.embedding, bare.encode([""]).tokens[0])
    assert (len(filtered.triggers), filtered.last_step) == (0, -1)
    assert math.isnan(filtered.change)


@pytest.mark.filterwarnings("ignore::overpaint.policy.TruncatedPromptWarning")
def test_prompt_longer_than_the_context_is_filtered_as_far_as_it_is_read(bare: DiffusionPolicy) -> None:
    filtered = apply(bare).filter("a striped red circle and " * 10)
    assert len(filtered.triggers) == 22  # of a context of 24, less start and end
    assert filtered.embedding.isfinite().all()
    assert 0 < filtered.change < 2


def test_prompt_is_read_once_and_its_masked_copies_in_one_batch(bare: DiffusionPolicy) -> None:
    apply(bare)
    embeddings = bare.encode(PROMPTS[:2])
    sizes: list[int] = []
    hook = bare.text_encoder.register_forward_hook(lambda encoder, inputs, output: sizes.append(len(output[0])))
    for _ in range(2):
        bare.sample(embeddings, steps=3, guidance=CFG, seeds=[1, 2])
        bare.sample(embeddings[[1, 0]], steps=3, guidance=CFG, seeds=[1, 2])
    hook.remove()
    words = [len(bare.tokenizer(prompt)["input_ids"]) - 2 for prompt in PROMPTS[:2]]
    assert sorted(sizes) == sorted([1, 1, *words])  # the empty prompt, the joined concepts, and one batch for each


@pytest.mark.filterwarnings("ignore::overpaint.policy.TruncatedPromptWarning")
def test_concepts_that_exceed_the_context_together_are_cut_off(bare: DiffusionPolicy) -> None:
    many = tuple(f"striped {word}" for word in ("red", "green", "blue", "circle", "square", "small", "large"))
    guard = apply(bare, SAFREEConfig(concepts=many))
    empty = bare.encode([""])
    assert torch.equal(guard.negative(empty).tokens, bare.encode([", ".join(many)]).tokens)
    assert torch.equal(guard.negative(empty).tokens, bare.encode([", ".join(many[:6])]).tokens)


def test_concept_that_the_tokenizer_cuts_off_is_refused(bare: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match=r"texts of 'nudity' must have at most 24 tokens"):
        SAFREE().erase(bare, NUDITY)  # letter by letter, in this tokenizer
    with pytest.raises(ValueError, match=r"at most 24 tokens, got 32 in 'red red"):
        SAFREE(SAFREEConfig(concepts=("red " * 30,))).erase(bare, CONCEPT)


def test_concepts_are_the_authors_for_nudity_and_else_the_phrases(
    bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erasure.methods.safree.safree.check_words", lambda policy, concept: None)
    assert SAFREE().erase(bare, NUDITY).config["concepts"] == list(NUDITY_CONCEPTS)
    assert SAFREE().erase(bare, CONCEPT).config["concepts"] == ["striped", "with stripes"]
    own = SAFREE(SAFREEConfig(concepts=("dotted",))).erase(bare, NUDITY)
    assert own.config["concepts"] == ["dotted"]


# Steps.


@pytest.mark.parametrize("total", [10, 20, 50, 1000])
def test_same_share_of_the_way_is_filtered_in_any_number_of_steps(bare: DiffusionPolicy, total: int) -> None:
    guard = apply(bare, SAFREEConfig(latent_reattention=False))
    prompt = bare.encode(["striped"] * total)
    towards = guard.guided(CFG).branches(prompt, prompt, moment(list(range(total)), total))[1]
    seen = (towards.tokens != prompt.tokens).flatten(1).any(dim=1)
    last = guard.filter("striped").last_step
    assert 0 <= last <= 10
    assert int(seen.sum()) == math.ceil((last + 1) * total / 50)
    assert seen.tolist() == sorted(seen.tolist(), reverse=True)


def test_samples_of_a_batch_have_their_own_steps_and_words(bare: DiffusionPolicy) -> None:
    guard = apply(bare, SAFREEConfig(latent_reattention=False))
    prompt = bare.encode(["striped", "striped", "", "a photo of a cat"])
    away, towards = (part.tokens for part in guard.guided(CFG).branches(prompt, prompt, moment([0, 40, 0, 0], 50)))
    assert torch.equal(towards[0], guard.filter("striped").embedding)
    assert torch.equal(towards[1:3], prompt.tokens[1:3])
    assert torch.equal(towards[3], guard.filter("a photo of a cat").embedding)
    assert torch.equal(away, bare.encode(["striped, with stripes"]).tokens.expand_as(away))


@pytest.mark.parametrize("config", [None, EVERYWHERE, SAFREEConfig(latent_reattention=False)])
def test_picture_does_not_depend_on_its_batch(bare: DiffusionPolicy, config: SAFREEConfig | None) -> None:
    apply(bare, config)
    together = draw(bare)
    alone = [
        bare.draw([prompt], seeds=[seed], steps=4, guidance=CFG) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_stored_steps_are_replayed_in_any_mixture(bare: DiffusionPolicy) -> None:
    apply(bare)
    trajectory = bare.rollout(bare.encode(PROMPTS), steps=5, guidance=CFG, seeds=SEEDS)
    samples, steps = torch.tensor([0, 0, 1, 1, 3, 2]), torch.tensor([4, 0, 3, 1, 0, 2])
    again = bare.log_prob(trajectory, samples, steps, guidance=CFG)
    torch.testing.assert_close(again.detach(), trajectory.log_probs[samples, steps], rtol=0, atol=1e-5)


def test_words_of_the_conditioning_say_what_is_filtered_from_whatever_tokens_it_has(bare: DiffusionPolicy) -> None:
    guard = apply(bare)
    guard.filtered(bare.encode(["striped"]))
    words = bare.encode(["a photo of a cat"])
    filtered = guard.filter("a photo of a cat")
    assert torch.equal(guard.filtered(words)[0][0], filtered.embedding)
    replaced = torch.zeros(len(filtered.embedding), dtype=torch.bool)
    replaced[1 : 1 + len(filtered.triggers)] = filtered.triggers
    moved = words.with_tokens(words.tokens + 1)
    (found,), last = guard.filtered(moved)
    assert last.tolist() == [filtered.last_step]
    assert torch.equal(found[~replaced], moved.tokens[0, ~replaced])
    # A projection is linear: what was added to a trigger is projected too.
    added = guard.filtered(words.with_tokens(torch.ones_like(words.tokens)))[0][0]
    torch.testing.assert_close(found[replaced], (filtered.embedding + added)[replaced])
    assert not torch.allclose(found[replaced], moved.tokens[0, replaced], atol=0.1)


def test_attacked_prompt_reaches_the_filter_with_gradient_and_leaves_nothing_behind(bare: DiffusionPolicy) -> None:
    guard = apply(bare, EVERYWHERE)
    plain = guard.filtered(bare.encode(["striped cat"]))[0]
    tokens = (bare.encode(["striped cat"]).tokens[0] + 1).requires_grad_()
    with bare.prompts.replaced({"striped cat": tokens, "a red circle": tokens}):
        with torch.no_grad():
            guard.filtered(bare.encode(["striped cat"]))
        attacked = bare.encode(["striped cat", "a red circle"])
        found = guard.filtered(attacked)[0]
        (gradient,) = torch.autograd.grad(found[0].sum(), tokens)
    assert not torch.equal(found[0], plain[0])
    assert gradient.abs().sum(dim=1).min() > 0
    for text in ("striped cat", "a red circle"):  # the second was first seen under attack
        assert torch.equal(guard.filtered(bare.encode([text]))[0][0], guard.filter(text).embedding)
        assert torch.equal(guard.filter(text).embedding[0], bare.encode([text]).tokens[0, 0])  # the start is no word


# At work in a policy.


def test_third_branch_is_computed_only_while_a_prompt_is_filtered(bare: DiffusionPolicy) -> None:
    apply(bare, SAFREEConfig(midpoint=0.0))  # the first eleven of 50 steps
    sizes = count_samples(bare)
    draw(bare, ["striped", ""], steps=10)
    assert sizes == [6, 6, 6, *[4] * 7]
    sizes.clear()
    draw(bare, [""], steps=2)
    assert sizes == [2, 2]


def test_strength_zero_changes_nothing_and_more_changes_more(bare: DiffusionPolicy) -> None:
    before = draw(bare)
    differences = []
    for strength in (0.0, 0.3, 1.0):
        with SAFREE().erase(bare, CONCEPT, strength).applied(bare):
            differences.append((draw(bare) - before).abs().mean().item())
    assert differences[0] == 0
    assert 0 < differences[1] < differences[2]
    assert bare.guard is None
    assert torch.equal(draw(bare), before)


def test_strength_prolongs_the_filter(bare: DiffusionPolicy) -> None:
    last = [apply_last(bare, strength) for strength in (0.5, 1.0, 3.0)]
    assert last == [5, 10, 30]


def apply_last(policy: DiffusionPolicy, strength: float) -> int:
    config = SAFREEConfig(midpoint=0.0, concepts=CONCEPT.phrases)
    return SAFREEGuard(config, strength, policy.prompts, policy.unet).filter("striped").last_step


@pytest.mark.parametrize("strength", [-0.1, math.inf, math.nan])
def test_impossible_strength_is_refused(bare: DiffusionPolicy, strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be (at least 0|a finite number)"):
        SAFREE().erase(bare, CONCEPT, strength)


def test_erasing_alone_changes_nothing(bare: DiffusionPolicy) -> None:
    before = draw(bare)
    SAFREE().erase(bare, CONCEPT)
    assert bare.guard is None
    assert torch.equal(draw(bare), before)


def test_saved_and_loaded_erasure_draws_the_same_bits(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy, other = make_policy(), make_policy()
    erasure = SAFREE(SAFREEConfig(alpha=0.02, concepts=("striped", "dotted"))).erase(policy, CONCEPT, 0.5)
    erasure.save(tmp_path / "new" / "folder")
    loaded = Erasure.load(tmp_path / "new" / "folder")
    assert loaded == erasure
    erasure.apply(policy)
    loaded.apply(other)
    assert torch.equal(draw(policy), draw(other))


def test_folder_without_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a saved safree must hold safree\.json"):
        SAFREEChange.load(tmp_path)


def test_second_safeguard_is_refused(bare: DiffusionPolicy) -> None:
    erasure = SAFREE().erase(bare, CONCEPT)
    erasure.apply(bare)
    with pytest.raises(ValueError, match=r"this one has SAFREEGuard\(SAFREEConfig\(.* strength=1.0\)"):
        erasure.apply(bare)
    pipeline = bare.to_pipeline()
    with pytest.raises(ValueError, match=r"one guard, and this one has PipelineSAFREE\(SAFREEGuard\(SAFREE"):
        erasure.apply_to_pipeline(pipeline)


def test_second_concept_goes_into_the_same_safeguard(bare: DiffusionPolicy) -> None:
    one, two = apply(bare).filter("a dotted red circle"), None
    bare.guard = None
    two = apply(bare, SAFREEConfig(concepts=("striped", "with stripes", "dotted"))).filter("a dotted red circle")
    assert not torch.equal(one.embedding, two.embedding)


def test_weights_may_be_edited_below(bare: DiffusionPolicy) -> None:
    plain = draw(bare)
    UCE().erase(bare, CONCEPT).apply(bare)
    edited = draw(bare)
    apply(bare)
    both = draw(bare)
    assert not torch.equal(edited, plain)
    assert not torch.equal(both, edited)


def test_negative_prompt_of_ones_own_is_refused_or_kept(bare: DiffusionPolicy) -> None:
    own = ClassifierFree(3.0, bare.encode(["a cat"]))
    apply(bare)
    with pytest.raises(ValueError, match=r"guidance has a negative prompt of its own.*negative_prompt=False"):
        bare.sample(bare.encode(["striped"]), steps=2, guidance=own, seeds=[1])
    bare.guard = None
    guard = apply(bare, SAFREEConfig(negative_prompt=False, latent_reattention=False))
    prompt = bare.encode(["striped"])
    away, _ = guard.guided(own).branches(prompt, bare.encode([""]), moment([0], 50))
    assert torch.equal(away.tokens, bare.encode(["a cat"]).tokens)
    away, _ = guard.guided(CFG).branches(prompt, bare.encode([""]), moment([0], 50))
    assert torch.equal(away.tokens, bare.encode([""]).tokens)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "newer"),
        ("fourier_filter", "none"),
        ("concepts", ()),
        ("concepts", ("a", " ")),
        ("concepts", "nudity"),
        ("alpha", -0.1),
        ("filtered_steps", -1),
        ("steepness", math.nan),
        ("coarse_factor", -1.0),
        ("fine_factor", math.inf),
        ("midpoint", math.nan),
    ],
)
def test_impossible_setting_is_refused(field: str, value: object) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"SAFREEConfig\.{field}(\[1\])? must .* got"):
        SAFREEConfig(**settings)


# Latent re-attention.


def test_equal_coefficients_are_damped_within_rounding() -> None:
    features = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    damped = damp_low_frequencies(features, features, 0.5, replace=False)
    nearly = damp_low_frequencies(features, features * (1 + 1e-7), 0.5, replace=False)
    torch.testing.assert_close(nearly, damped, rtol=0, atol=1e-6)
    low = torch.fft.fft2(features)[..., 0, 0]
    torch.testing.assert_close(torch.fft.fft2(damped)[..., 0, 0], 0.5 * low)
    torch.testing.assert_close(torch.fft.fft2(damped)[..., 2:-1, :], torch.fft.fft2(features)[..., 2:-1, :])


def test_damping_has_the_gradient_of_its_pieces() -> None:
    filtered, original = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    filtered.requires_grad_()
    damped = damp_low_frequencies(filtered, original, 0.2, replace=False)
    torch.testing.assert_close((damped * damped.detach()).sum(), damped.detach().square().sum())
    (gradient,) = torch.autograd.grad((damped * original).sum(), filtered)
    step = torch.randn(filtered.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-3
    with torch.no_grad():
        ahead, behind = (
            (damp_low_frequencies(filtered + sign * step, original, 0.2, replace=False) * original).sum()
            for sign in (1, -1)
        )
    torch.testing.assert_close((ahead - behind) / 2, (gradient * step).sum(), rtol=1e-3, atol=1e-6)


def test_widest_features_have_the_first_factor_and_the_next_width_the_second(bare: DiffusionPolicy) -> None:
    assert Reattention(bare.unet, coarse=0.9, fine=0.2, replace=False).factors == {16: 0.9, 8: 0.2}


def test_sample_that_is_not_filtered_is_compared_with_itself(bare: DiffusionPolicy) -> None:
    reattention = Reattention(bare.unet, coarse=0.9, fine=0.2, replace=False)
    latents, timestep = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    prompts = bare.encode(["a cat", "striped", "a photo"]).tokens
    predictions = []
    for active, rows in ((torch.tensor([False]), 3), (None, 2), (torch.tensor([True]), 3)):
        reattention.start(active, branches=2)
        predictions.append(bare.unet(latents.expand(rows, -1, -1, -1), timestep, prompts[:rows]).sample[:2].detach())
        reattention.stop()
    torch.testing.assert_close(predictions[0], predictions[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(predictions[2], predictions[1], rtol=1e-3, atol=1e-3)


def test_reattention_changes_pictures_and_the_released_variant_lacks_it(bare: DiffusionPolicy) -> None:
    configs = {
        "paper": SAFREEConfig(),
        "replaced": SAFREEConfig(fourier_filter="released"),
        "off": SAFREEConfig(latent_reattention=False),
        "released": SAFREEConfig(variant="released"),
    }
    images = {}
    for name, config in configs.items():
        with SAFREE(config).erase(bare, CONCEPT).applied(bare):
            images[name] = draw(bare)
    assert torch.equal(images["released"], images["off"])
    assert not torch.equal(images["paper"], images["off"])
    assert not torch.equal(images["paper"], images["replaced"])


def test_unet_is_untouched_outside_guided_predictions(bare: DiffusionPolicy) -> None:
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([900, 20])
    embeddings = bare.encode(["striped", "a cat"])
    unguided = bare.predict_noise(latents, timesteps, embeddings)
    apply(bare)
    bare.predict_noise(latents, timesteps, embeddings, CFG)
    assert torch.equal(bare.predict_noise(latents, timesteps, embeddings), unguided)
    with bare.reference():
        assert torch.equal(bare.predict_noise(latents, timesteps, embeddings), unguided)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in bare.unet.modules())


def test_unet_is_untouched_after_a_call_that_failed(bare: DiffusionPolicy) -> None:
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([900, 20])
    embeddings = bare.encode(["striped", "a cat"])
    unguided = bare.predict_noise(latents, timesteps, embeddings)
    apply(bare)
    fail = bare.unet.conv_out.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    with pytest.raises(RuntimeError):
        bare.predict_noise(latents, timesteps, embeddings, CFG)
    fail.remove()
    assert torch.equal(bare.predict_noise(latents, timesteps, embeddings), unguided)


def test_gradients_pass_and_recomputing_activations_does_not_matter(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(train="xattn", gradient_checkpointing=checkpointing)
        apply(policy, EVERYWHERE)
        policy.unet.train(checkpointing)  # diffusers recomputes in training mode only
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        prediction = policy.predict_clean(latents, policy.encode(PROMPTS[:2]), step=1, steps=4, guidance=CFG)
        prediction.square().mean().backward()
        found = [parameter.grad for parameter in policy.trainable_parameters()]
        gradients.append(torch.cat([gradient.flatten() for gradient in found if gradient is not None]))
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_another_unet_than_that_of_the_policy_is_noticed(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy, other = make_policy(), make_policy()
    apply(policy)
    other.guard = policy.guard
    with pytest.raises(ValueError, match="works in the UNet that SAFREE was applied with, and another one"):
        draw(other)
    assert torch.equal(draw(policy.student_copy("xattn")), draw(policy))  # whose guard is its own
    policy.guard = None
    apply(policy, SAFREEConfig(latent_reattention=False))
    assert torch.equal(draw(policy.student_copy("xattn")), draw(policy))


def test_compiled_unet_is_refused_for_reattention_alone(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(compile=True)
    with pytest.raises(ValueError, match=r"a UNet that is not compiled; pass latent_reattention=False"):
        apply(policy)
    assert policy.guard is None
    apply(policy, SAFREEConfig(latent_reattention=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_draws_nearly_the_same(make_policy: Callable[..., DiffusionPolicy], dtype: torch.dtype) -> None:
    exact, rounded = make_policy(), make_policy(dtype=dtype)
    apply(exact, SAFREEConfig(latent_reattention=False))
    apply(rounded, SAFREEConfig(latent_reattention=False))
    # 2.3 to 2.9 units of either precision with AVX-512, AVX2 and SSE, and room for another rounding.
    torch.testing.assert_close(draw(rounded), draw(exact), rtol=0, atol=6 * torch.finfo(dtype).eps)
    rounded.guard = None
    apply(rounded)
    assert draw(rounded).isfinite().all()


# In a plain pipeline.


def plain_images(pipeline: Any, prompts: list[str], *, steps: int = 5, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    rows = len(prompts) * options.get("num_images_per_prompt", 1)
    latents = SampleNoise(SEEDS[:rows], (4, 8, 8), torch.device("cpu")).draw()
    options = {"guidance_scale": 3.0, **options}
    return pipeline(prompts, num_inference_steps=steps, latents=latents, output_type="pt", **options).images


def ddim_pipeline(policy: DiffusionPolicy) -> Any:
    from diffusers import DDIMScheduler

    pipeline = policy.to_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    return pipeline


@pytest.mark.parametrize("kind", ["pipeline_dir", "v_pipeline_dir"])
@pytest.mark.parametrize("config", [None, EVERYWHERE, SAFREEConfig(variant="released")])
def test_pipeline_and_policy_draw_the_same(
    make_policy: Callable[..., DiffusionPolicy],
    request: pytest.FixtureRequest,
    kind: str,
    config: SAFREEConfig | None,
) -> None:
    policy = make_policy(path=request.getfixturevalue(kind))
    erasure = SAFREE(config).erase(policy, CONCEPT)
    before = draw(policy, steps=5)
    pipeline = ddim_pipeline(policy)
    plain = plain_images(pipeline, PROMPTS)
    erasure.apply_to_pipeline(pipeline)
    erasure.apply(policy)
    erased = draw(policy, steps=5)
    assert not torch.allclose(erased, before, atol=1e-3)
    torch.testing.assert_close(plain_images(pipeline, PROMPTS), erased, rtol=0, atol=1e-5)
    torch.testing.assert_close(plain_images(ddim_pipeline(policy), PROMPTS), erased, rtol=0, atol=1e-5)
    detach(pipeline)
    assert "encode_prompt" not in vars(pipeline)
    assert torch.equal(plain_images(pipeline, PROMPTS), plain)


def test_pipeline_draws_several_images_for_each_prompt(bare: DiffusionPolicy) -> None:
    apply(bare)
    pipeline = ddim_pipeline(bare)
    twice = plain_images(pipeline, PROMPTS[:2], num_images_per_prompt=2)
    expected = draw(bare, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], steps=5)
    torch.testing.assert_close(twice, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reattention", [False, True], ids=["prompts", "reattention"])
def test_it_acts_without_guidance_too(reattention: bool, bare: DiffusionPolicy) -> None:
    unguided = ClassifierFree(1.0)
    plain = plain_images(ddim_pipeline(bare), PROMPTS, guidance_scale=1.0)
    guard = apply(bare, SAFREEConfig(midpoint=0.0, latent_reattention=reattention))
    erased = bare.draw(PROMPTS, seeds=SEEDS, steps=5, guidance=unguided)
    changed = (erased - plain).abs().amax(dim=(1, 2, 3))
    striped = torch.tensor([bool(guard.filter(prompt).triggers.any()) for prompt in PROMPTS])
    assert striped.any()
    assert bool((changed[striped] > 1e-3).all())
    pipeline = ddim_pipeline(bare)
    plain_images(pipeline, PROMPTS[2:])  # what a run leaves behind must not reach the next: the same last half
    torch.testing.assert_close(plain_images(pipeline, PROMPTS, guidance_scale=1.0), erased, rtol=0, atol=1e-5)


def test_without_guidance_the_prompts_of_a_step_are_the_filtered_ones(bare: DiffusionPolicy) -> None:
    seen: list[Tensor] = []
    guard = apply(bare, SAFREEConfig(midpoint=0.0, latent_reattention=False))
    bare.network = lambda latents, timesteps, **rest: (
        seen.append(rest["encoder_hidden_states"]) or bare.unet(latents, timesteps, **rest)
    )
    bare.sample(bare.encode(["striped"]), steps=50, guidance=ClassifierFree(1.0), seeds=[1])
    filtered = guard.filter("striped")
    first, last = filtered.embedding[None], bare.encode(["striped"]).tokens
    assert 0 < filtered.last_step < 49
    for step, prompts in enumerate(seen):
        assert torch.equal(prompts, first if step <= filtered.last_step else last)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers and numpy 2
@pytest.mark.parametrize("name", ["PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_other_schedulers_filter_the_same_share_of_the_way(bare: DiffusionPolicy, name: str) -> None:
    import diffusers

    apply(bare, SAFREEConfig(midpoint=0.0))  # eleven of 50 steps, three of ten
    pipeline = bare.to_pipeline()
    scheduler: Any = getattr(diffusers, name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    sizes: list[int] = []
    pipeline.unet.conv_in.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    images = plain_images(pipeline, ["striped", "a cat"], steps=10)
    assert images.isfinite().all()
    twice = name == "PNDMScheduler"  # visits its second timestep twice
    assert sizes == [*[6] * (4 if twice else 3), *[4] * 7]


def test_pipeline_is_asked_with_words(bare: DiffusionPolicy) -> None:
    apply(bare)
    pipeline = ddim_pipeline(bare)
    with pytest.raises(ValueError, match="SAFREE reads the words of prompts"):
        pipeline(prompt_embeds=bare.encode(["a cat"]).tokens, negative_prompt_embeds=bare.encode([""]).tokens)
    with pytest.raises(ValueError, match="and no clip_skip"):
        plain_images(pipeline, PROMPTS, clip_skip=1)
    with pytest.raises(ValueError, match="guidance has a negative prompt of its own"):
        plain_images(pipeline, ["a cat"], negative_prompt=["a dog"])
    assert torch.equal(plain_images(pipeline, ["a cat"], negative_prompt=[""]), plain_images(pipeline, ["a cat"]))


def test_pipeline_keeps_a_negative_prompt_of_its_own_where_that_is_wanted(bare: DiffusionPolicy) -> None:
    apply(bare, SAFREEConfig(negative_prompt=False))
    erased = bare.draw(
        PROMPTS[:2], seeds=SEEDS[:2], steps=5, guidance=ClassifierFree(3.0, bare.encode(["a dog", "a dog"]))
    )
    images = plain_images(ddim_pipeline(bare), PROMPTS[:2], negative_prompt=["a dog", "a dog"])
    torch.testing.assert_close(images, erased, rtol=0, atol=1e-5)


def test_pipeline_without_safree_has_nothing_to_detach(bare: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="the pipeline must have a guard attached, got none"):
        detach(bare.to_pipeline())


def test_lora_below_the_safeguard_reaches_the_pipeline(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(lora=LoRAConfig())
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.fill_(0.05)
    apply(policy)
    images = plain_images(ddim_pipeline(policy), PROMPTS)
    torch.testing.assert_close(images, draw(policy, steps=5), rtol=0, atol=1e-4)


def test_filter_is_the_same_whichever_prompt_comes_first(make_policy: Callable[..., DiffusionPolicy]) -> None:
    forward, backward = (
        PromptFilter(make_policy().prompts, CONCEPT.phrases, alpha=0.01, last_step=lambda change: 10) for _ in range(2)
    )
    there = [forward(prompt).embedding for prompt in PROMPTS]
    back = [backward(prompt).embedding for prompt in reversed(PROMPTS)]
    assert all(torch.equal(one, other) for one, other in zip(there, reversed(back), strict=True))


# On the tiny world.


def test_tiny_world_loses_its_stripes_and_keeps_its_dots() -> None:
    policy = tinyworld.load_policy()
    prompts = [*tinyworld.captions("explicit", 8, 5), *tinyworld.captions("neighbour", 8, 5)]
    with SAFREE(PRESETS["safree"]).erase(policy, STRIPES).applied(policy):
        images = policy.draw(prompts, seeds=range(16), steps=20, guidance=CFG)
    assert not tinyworld.concept_shown(images[:8]).any()
    assert tinyworld.neighbour_shown(images[8:]).all()


def test_two_safeguards_say_the_same_only_if_their_settings_are_the_same(policy: DiffusionPolicy) -> None:
    # Pictures that are kept belong to the model that drew them, which its guard's words are part of.
    def words(config: SAFREEConfig, strength: float = 1.0) -> str:
        return repr(SAFREEGuard(config, strength, policy.prompts, policy.unet))

    config = SAFREEConfig(concepts=("striped", "with stripes"))
    assert words(config) == words(replace(config))
    others = [
        replace(config, alpha=0.5),
        replace(config, concepts=("dotted", "with dots")),
        replace(config, midpoint=1.0),
    ]
    assert len({words(config), words(config, 0.5), *map(words, others)}) == 5
