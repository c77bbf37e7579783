"""ANT: its stages, its mask, what it changes and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import erasure.methods.ant.ant
from erasure import NUDITY, Concept, Erasure, ObjectiveConstraint
from erasure.descend import DescentConfig
from erasure.methods.ant import ANT, ANTConfig
from erasure.methods.ant.saliency import SaliencyConfig, masked_gradients, saliency_mask, salient, summed_gradients
from erasure.methods.sld import SLD, SLDConfig
from erasure.protocols import ConceptBatch, Objective
from erasure.rollout import latents_before
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.weights import base_parameters

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"))
DESCENT = DescentConfig(iterations=4, learning_rate=1e-3, batch_size=2, checkpoint_every=1)
WORDS = ("striped", "stripes")
SALIENCY = SaliencyConfig(prompts=WORDS, seeds=(3,), iterations=2, learning_rate=1e-3)
CONFIG = ANTConfig(steps=3, saliency=SALIENCY, descent=DESCENT)
BATCH = ConceptBatch(["striped", "with stripes", "striped"], [5, 6, 7])


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


@pytest.fixture
def student(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy(train="full")


def weights(policy: DiffusionPolicy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base_parameters(policy.unet).items()}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def draw(policy: DiffusionPolicy) -> Tensor:
    return policy.draw(["a striped red circle", "a dotted blue square"], seeds=[1, 2], steps=2)


def moved(policy: DiffusionPolicy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.mul_(1.05).add_(0.001)


# The stages.


@pytest.mark.parametrize(("steps", "kept"), [(50, 7), (20, 3), (100, 14), (10, 1), (3, 1), (2, 1), (1000, 140)])
def test_stages_scale_with_the_number_of_steps(steps: int, kept: int) -> None:
    assert ANTConfig(steps=steps).stages() == (range(kept), range(kept, steps))
    released = ANTConfig(steps=steps, variant="released")
    assert released.stages() == (range(steps - kept, steps), range(steps - kept))


def test_some_steps_are_always_reversed() -> None:
    assert ANTConfig(steps=4, kept_share=0.99).stages() == (range(3), range(3, 4))


def test_released_variant_changes_three_things_and_each_can_be_chosen_alone() -> None:
    assert ANTConfig().behaviour() == ("keep_early", "high", True)
    assert ANTConfig(variant="released").behaviour() == ("keep_late", "low", False)
    assert ANTConfig(variant="released", uncond_grad=True).behaviour() == ("keep_late", "low", True)
    assert ANTConfig(stage_orientation="keep_late").behaviour() == ("keep_late", "high", True)
    assert replace(ANTConfig(mask_keep="low"), variant="released").behaviour() == ("keep_late", "low", False)


def test_every_sample_is_seen_before_each_of_its_steps(bare: DiffusionPolicy) -> None:
    embeddings, guidance = bare.encode(["striped", "a cat", "a dog"]), ClassifierFree(3.0)
    stops = torch.tensor([[0, 1, 3], [2, 1, 1]])
    for safeguarded in (False, True):
        if safeguarded:
            SLD(SLDConfig(warmup_steps=0)).erase(bare, CONCEPT).apply(bare)  # remembers the way
        both = latents_before(bare, embeddings, stops, steps=4, guidance=guidance, seeds=[5, 6, 7])
        for row, latents in zip(stops.tolist(), both, strict=True):
            for index, stop in enumerate(row):
                every = bare.sample(embeddings, steps=4, guidance=guidance, seeds=[5, 6, 7], until=stop)
                torch.testing.assert_close(latents[index], every[index], rtol=0, atol=1e-5)


# The loss.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_before_training_only_the_reversed_term_is_above_zero_for_eta_of_one(
    prediction: str, variant: str, make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path
) -> None:
    options = {"path": v_pipeline_dir} if prediction == "v_prediction" else {}
    policy = make_policy(train="xattn", **options)
    latents, prompts, empty = torch.randn(2, 1, 4, 8, 8), policy.encode(["striped"]), policy.encode([""])
    timesteps = torch.tensor([[900], [200]])
    config = ANTConfig(negative_guidance=1.5, keep_weight=2.0, variant=variant)  # ty: ignore[invalid-argument-type]
    terms = ANT(config).terms(policy, latents, timesteps, prompts, empty)

    for index, term, factor in ((0, terms.keep, 0.5), (1, terms.reverse, 2.5)):
        given = latents[index], timesteps[index]
        asked, unasked = (policy.unet(*given, each.tokens, return_dict=False)[0] for each in (prompts, empty))
        scale = policy.process.levels(timesteps[index]).sqrt() if prediction == "v_prediction" else 1.0
        expected = (factor * scale * (asked - unasked)).square().mean()
        torch.testing.assert_close(term[0], expected, rtol=1e-3, atol=1e-12)
    at_one = ANT(ANTConfig()).terms(policy, latents, timesteps, prompts, empty)
    for name in ("keep", "keep_empty", "reverse_empty"):
        assert getattr(at_one, name)[0] < 1e-9, name


def test_a_loss_does_not_depend_on_its_batch(student: DiffusionPolicy) -> None:
    moved(student)
    method = ANT(replace(CONFIG, steps=6))
    whole = method.loss(student, BATCH)
    backwards = method.loss(student, ConceptBatch(BATCH.prompts[::-1], BATCH.seeds[::-1]))
    alone = [method.loss(student, ConceptBatch(BATCH.prompts[i : i + 1], BATCH.seeds[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(backwards.flip(0), whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-7)
    assert len(set(whole.tolist())) == 3


@pytest.mark.parametrize("changes", [{}, {"variant": "released"}, {"guidance_scale": 1.0}])
def test_the_estimate_counts_what_the_loss_does(changes: dict[str, Any], student: DiffusionPolicy) -> None:
    method = ANT(replace(CONFIG, steps=8, **changes))
    seen = {True: 0, False: 0}

    def count(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    student.unet.register_forward_pre_hook(count, with_kwargs=True)
    method.loss(student, ConceptBatch(["striped"] * 200, range(200)))
    said = method.unet_calls()
    assert seen[True] == 200 * said.backward
    assert seen[False] == pytest.approx(200 * said.forward, rel=0.1)  # the steps are drawn


def test_official_settings_count_sixty_forwards_and_four_with_gradient() -> None:
    # 28 steps on the way on average, two branches each, and the original's four predictions
    assert ANT().unet_calls() == (60.0, 4)


def test_in_a_trainer_it_is_the_loss_alone_and_reaches_the_lora(policy: DiffusionPolicy) -> None:
    method = ANT(CONFIG)
    assert isinstance(method, Objective)
    constraint = ObjectiveConstraint(method, CONCEPT)
    constraint.prepare(policy)
    constraint.violation(policy, BATCH).mean().backward()
    assert not any(parameter._backward_hooks for parameter in policy.unet.parameters())
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.trainable_parameters())


# The mask.


def test_a_map_keeps_half_of_each_tensor_rounded_down() -> None:
    sums = torch.tensor([[1.0, -5.0, 3.0], [0.5, -2.0, 4.0]])
    assert salient(sums, 0.5).tolist() == [[False, True, True], [False, False, True]]
    assert salient(sums, 0.5, keep="low").tolist() == [[True, False, False], [True, True, False]]
    assert salient(torch.ones(7), 0.5).sum() == 3
    assert not salient(torch.ones(1), 0.5).any()
    assert salient(torch.ones(7), 1.0).all()


def test_the_mask_is_what_all_maps_have_in_common_and_the_weights_are_put_back(student: DiffusionPolicy) -> None:
    before, method = weights(student), ANT(CONFIG)
    mask = saliency_mask(student, method.loss, WORDS, SALIENCY, progress=False)
    assert equal(weights(student), before)
    assert all(parameter.grad is None for parameter in student.trainable_parameters())
    expected: dict[str, Tensor] = {}
    for prompt in WORDS:
        sums = summed_gradients(student, method.loss, SALIENCY, prompt, 3)
        assert not equal(weights(student), before)
        student.load_trainable_state(before)
        expected = {name: salient(total, 0.5) & expected.get(name, torch.tensor(True)) for name, total in sums.items()}
    assert equal(mask, expected)
    kept = sum(int(each.sum()) for each in mask.values()) / sum(each.numel() for each in mask.values())
    assert 0.1 < kept < 0.5


def test_a_map_sums_the_gradients_of_weights_that_move(student: DiffusionPolicy) -> None:
    before, losses = weights(student), ANT(CONFIG).loss
    once, twice = (replace(SALIENCY, iterations=count) for count in (1, 2))
    first = summed_gradients(student, losses, once, "striped", 3)
    after_one = weights(student)
    student.load_trainable_state(before)
    both = summed_gradients(student, losses, twice, "striped", 3)
    name = "conv_in.weight"
    step = (after_one[name] - before[name]).abs().max()
    assert step == pytest.approx(SALIENCY.learning_rate, rel=0.1)  # Adam's first step
    assert not torch.allclose(both[name], 2 * first[name], rtol=1e-3)


def test_only_weights_of_the_mask_are_trained_and_the_others_keep_their_bits(bare: DiffusionPolicy) -> None:
    student = bare.student_copy("full")
    mask = saliency_mask(student, ANT(CONFIG).loss, WORDS, SALIENCY, progress=False)
    delta = ANT(CONFIG).erase(bare, CONCEPT, progress=False).delta.tensors
    assert set(delta) <= set(mask)
    for name, change in delta.items():
        assert not change[~mask[name]].any(), name
    assert sum(int(change.any()) for change in delta.values()) > 0.9 * sum(int(kept.any()) for kept in mask.values())
    low = ANT(replace(CONFIG, mask_keep="low")).erase(bare, CONCEPT, progress=False).delta.tensors
    assert not any((low[name].bool() & mask[name]).any() for name in low)


def test_without_saliency_everything_is_trained(bare: DiffusionPolicy) -> None:
    delta = ANT(replace(CONFIG, saliency=None)).erase(bare, CONCEPT, progress=False).delta.tensors
    assert set(delta) == set(base_parameters(bare.unet))
    assert delta["conv_in.weight"].bool().float().mean() > 0.9


def test_masking_ends_with_its_block_however_it_ends(student: DiffusionPolicy) -> None:
    mask = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in weights(student).items()}
    for error in (None, KeyboardInterrupt):
        try:
            with masked_gradients(student, mask):
                student.unet.conv_in.weight.sum().backward()
                gradient = student.unet.conv_in.weight.grad
                assert gradient is not None
                assert not gradient.any()
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        student.unet.conv_in.weight.grad = None
        student.unet.conv_in.weight.sum().backward()
        gradient = student.unet.conv_in.weight.grad
        assert gradient is not None
        assert gradient.all()
        student.unet.conv_in.weight.grad = None


def test_masks_of_something_else_are_refused(student: DiffusionPolicy) -> None:
    mask = {name: torch.ones_like(value, dtype=torch.bool) for name, value in weights(student).items()}
    with (
        pytest.raises(ValueError, match=r"differs in \['conv_in.bias'\]"),
        masked_gradients(student, {name: kept for name, kept in mask.items() if name != "conv_in.bias"}),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"mask of conv_in.bias must have shape \(8,\), got \(3,\)"),
        masked_gradients(student, mask | {"conv_in.bias": torch.ones(3, dtype=torch.bool)}),
    ):
        pass


def test_maps_that_say_nothing_are_refused(student: DiffusionPolicy) -> None:
    before, method = weights(student), ANT(CONFIG)

    def broken(policy: DiffusionPolicy, batch: ConceptBatch) -> Tensor:
        return method.loss(policy, batch) * torch.inf

    with pytest.raises(ValueError, match="gradients of the saliency phase must be finite"):
        saliency_mask(student, broken, WORDS, SALIENCY, progress=False)
    with pytest.raises(ValueError, match=r"the 2 saliency maps must have something in common, got nothing among \d+"):
        saliency_mask(student, method.loss, WORDS, replace(SALIENCY, kept=1e-9), progress=False)
    assert equal(weights(student), before)


# The erasure.


def test_the_policy_is_left_as_it_was_and_erasing_twice_gives_the_same_bits(policy: DiffusionPolicy) -> None:
    before, lora = weights(policy), policy.trainable_state()
    first, second = (ANT(CONFIG).erase(policy, CONCEPT, progress=False) for _ in range(2))
    assert equal(weights(policy), before)
    assert equal(policy.trainable_state(), lora)
    assert equal(first.delta.tensors, second.delta.tensors)


def test_saved_and_applied_erasure_is_the_same_to_the_bit(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy, other, third = make_policy(), make_policy(), make_policy()
    erasure = ANT(CONFIG).erase(policy, CONCEPT, progress=False)
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path)
    assert (loaded.method, loaded.config, loaded.concept) == ("ANT", erasure.config, CONCEPT)
    assert loaded.config["stage_orientation"] == "keep_early"  # what the variant stood for
    plain = draw(policy)
    erasure.apply(policy)
    loaded.apply(other)
    pipeline = third.to_pipeline()
    loaded.apply_to_pipeline(pipeline)
    assert equal(weights(policy), weights(other))
    erased = draw(policy)
    assert not torch.equal(erased, plain)
    assert torch.equal(erased, draw(DiffusionPolicy(pipeline, device="cpu")))


def test_a_second_concept_is_erased_on_top_of_the_first(bare: DiffusionPolicy) -> None:
    ANT(CONFIG).erase(bare, CONCEPT, progress=False).apply(bare)
    first = weights(bare)
    dots = Concept(name="dots", phrases=("dotted",))
    config = replace(CONFIG, saliency=replace(SALIENCY, prompts=("dotted",)))
    ANT(config).erase(bare, dots, progress=False).apply(bare)
    assert not equal(weights(bare), first)


def test_training_lowers_the_loss_of_fresh_samples(bare: DiffusionPolicy) -> None:
    config = replace(CONFIG, descent=replace(DESCENT, iterations=20, batch_size=4, learning_rate=1e-5))
    erasure = ANT(config).erase(bare, CONCEPT, progress=False)
    student, batch = bare.student_copy("full"), ConceptBatch(["striped"] * 16, range(16))
    with torch.no_grad():
        before = ANT(config).loss(student, batch).mean()
        erasure.delta.apply(student.unet)  # the reference stays the original
        after = ANT(config).loss(student, batch).mean()
    assert after < 0.95 * before


def test_an_interrupted_training_goes_on_to_the_same_numbers_without_new_maps(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ANT(CONFIG).erase(bare, CONCEPT, progress=False)

    method = ANT(CONFIG)
    loss, calls = method.loss, 0
    maps = len(WORDS) * len(SALIENCY.seeds) * SALIENCY.iterations

    def failing(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == maps + 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(method, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    resumed = method.erase(bare, CONCEPT, output_dir=tmp_path, resume=True, progress=False)
    assert calls == maps + 5  # two updates, the one that failed, and the last two
    assert equal(resumed.delta.tensors, whole.delta.tensors)


def test_a_folder_of_another_run_is_refused_before_long_work(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ANT(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    monkeypatch.setattr(erasure.methods.ant.ant, "saliency_mask", lambda *_, **__: pytest.fail("long work"))
    with pytest.raises(ValueError, match="output_dir must not hold another run unless resume is set"):
        ANT(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"resume must keep model and settings, and .*saliency.safetensors was found"):
        ANT(replace(CONFIG, guidance_scale=1.0)).erase(bare, CONCEPT, output_dir=tmp_path, resume=True)
    moved_policy = bare.student_copy("full")
    moved(moved_policy)
    with pytest.raises(ValueError, match="resume must keep model and settings"):
        ANT(CONFIG).erase(moved_policy, CONCEPT, output_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume must come with the output_dir"):
        ANT(replace(CONFIG, saliency=None)).erase(bare, CONCEPT, resume=True)


# What is refused.


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kept_share", 0.0), ("kept_share", 1.0), ("negative_guidance", 0.0), ("keep_weight", -1.0)),
        *(("keep_empty_weight", 0.0), ("reverse_empty_weight", float("inf")), ("steps", 1), ("guidance_scale", -0.5)),
    ],
)
def test_settings_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"ANTConfig\.{field} must .*, got {value!r}"):
        ANTConfig(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompts", ()), ("prompts", (" ",)), ("seeds", ()), ("iterations", 0), ("learning_rate", 0.0), ("kept", 0.0)],
)
def test_settings_of_the_saliency_phase_are_checked(field: str, value: Any) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"SaliencyConfig(\.|: ){field} must"):
        SaliencyConfig(**settings)


def test_weight_decay_does_not_go_with_a_mask() -> None:
    decayed = replace(DESCENT, weight_decay=0.01)
    with pytest.raises(ValueError, match=r"weight_decay must be 0 with a mask, .* got 0\.01"):
        replace(CONFIG, descent=decayed)
    assert replace(CONFIG, saliency=None, descent=decayed).descent == decayed


def test_maps_of_another_concept_are_refused(bare: DiffusionPolicy) -> None:
    others = replace(SALIENCY, prompts=("nudity", "naked"))
    with pytest.raises(ValueError, match=r"must be 'stripes''s, .* got nudity, naked"):
        ANT(replace(CONFIG, saliency=others)).erase(bare, CONCEPT, progress=False)


def test_maps_are_of_the_papers_words_for_nudity_and_else_of_the_phrases() -> None:
    assert SaliencyConfig().prompts_for(NUDITY) == ("nudity", "naked", "erotic", "sexual")
    assert SaliencyConfig().prompts_for(CONCEPT) == CONCEPT.phrases
    assert SaliencyConfig(prompts=("a",)).prompts_for(NUDITY) == ("a",)


def test_a_mask_is_read_again_for_the_same_words_alone(bare: DiffusionPolicy, tmp_path: Path) -> None:
    config = replace(CONFIG, saliency=replace(SALIENCY, prompts=None))
    ANT(config).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    others = replace(CONCEPT, phrases=("dotted",))
    with pytest.raises(ValueError, match="resume must keep"):
        ANT(config).erase(bare, others, output_dir=tmp_path, resume=True, progress=False)


def test_words_that_are_cut_off_and_a_policy_without_training_are_refused(
    bare: DiffusionPolicy, student: DiffusionPolicy
) -> None:
    with pytest.raises(ValueError, match="must have at most 24 tokens"):
        ANT(CONFIG).erase(bare, Concept(name="x", phrases=("striped " * 30,)), progress=False)
    with pytest.raises(ValueError, match="needs a policy with trainable weights, got one without"):
        ANT(CONFIG).prepare(bare, CONCEPT)
    ANT(CONFIG).prepare(student, CONCEPT)
