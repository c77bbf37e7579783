"""Concept ablation: its loss, what it draws to train on, and the erasure that comes of it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import Concept, Erasure, ObjectiveConstraint
from erasure.descend import DescentConfig
from erasure.methods import ac
from erasure.methods.ac import AC, PEOPLE, ACConfig, masked_error, start_detached
from erasure.protocols import ConceptBatch, Objective
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.policy.noise import SampleNoise
from overpaint.policy.weights import base_parameters, select_parameters

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"))
ANCHORS = ("a red circle", "a cat", "a blue square")
CONFIG = ACConfig(
    anchors=ANCHORS,
    templates=("{concept} {anchor}", "{anchor} {concept}"),
    images=4,
    steps=2,
    draw_batch_size=4,
    descent=DescentConfig(iterations=4, learning_rate=1e-3, batch_size=2, checkpoint_every=1, max_grad_norm=1.0),
)
PLAIN = replace(CONFIG, mirror=False)
BATCH = ConceptBatch(["striped", "with stripes", "striped"], [11, 12, 13])


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


@pytest.fixture
def student(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy(train="attn")


def prepared(policy: DiffusionPolicy, config: ACConfig = PLAIN, **options: Any) -> AC:
    method = AC(config, progress=False, **options)
    method.prepare(policy, CONCEPT)
    return method


def equal(one: Erasure, other: Erasure) -> bool:
    ours, theirs = one.delta.tensors, other.delta.tensors
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The loss.


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_equation_in_noise(
    make_policy: Callable[..., DiffusionPolicy], pipeline_dir: Path, v_pipeline_dir: Path, prediction: str
) -> None:
    policy = make_policy(path=pipeline_dir if prediction == "epsilon" else v_pipeline_dir, train="attn")
    method = prepared(policy, replace(PLAIN, prior_weight=0.5))
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.mul_(1.5)  # the teacher is the present network, not the one that training started from
    seen = method.examples(policy, BATCH)
    noise, alphas = seen.noise, policy.process.levels(seen.timesteps).view(-1, 1, 1, 1)

    def noise_for(rows: slice, texts: list[str]) -> torch.Tensor:
        inputs = (seen.latents[rows], seen.timesteps[rows], policy.encode(texts).tokens)
        output = policy.unet(*inputs, return_dict=False)[0]
        if prediction == "epsilon":
            return output
        return alphas[rows].sqrt() * output + (1 - alphas[rows]).sqrt() * seen.latents[rows]

    with torch.no_grad():
        towards = noise_for(slice(3), seen.anchors)
        erased = (noise_for(slice(3), seen.captions[:3]) - towards).square().sum(dim=1).mean(dim=(1, 2))
        prior = (noise_for(slice(3, 6), seen.anchors) - noise[3:]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(method.loss(policy, BATCH).detach(), erased + 0.5 * prior, rtol=1e-4, atol=1e-6)


def test_the_teacher_may_be_what_training_started_from(student: DiffusionPolicy) -> None:
    method = prepared(student, replace(PLAIN, target="original", prior_weight=0.0))
    seen = method.examples(student, BATCH)
    with torch.no_grad():
        target = student.predict_noise(seen.latents[:3], seen.timesteps[:3], student.encode(seen.anchors))
        for parameter in student.trainable_parameters():
            parameter.mul_(1.5)
        prediction = student.predict_noise(seen.latents[:3], seen.timesteps[:3], student.encode(seen.captions[:3]))
    expected = (prediction - target).square().sum(dim=1).mean(dim=(1, 2))
    loss = method.loss(student, BATCH)
    assert loss.requires_grad
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_noise_may_be_the_target_in_place_of_the_anchor(student: DiffusionPolicy) -> None:
    method = prepared(student, replace(PLAIN, target="noise"))
    seen = method.examples(student, BATCH)
    prediction = student.predict_noise(seen.latents, seen.timesteps, student.encode(seen.captions))
    errors = (prediction - seen.noise).square().flatten(1).mean(dim=1).detach()
    torch.testing.assert_close(method.loss(student, BATCH).detach(), 4 * errors[:3] + errors[3:], rtol=1e-4, atol=0)


def test_the_error_is_over_the_masks_pixels_and_all_channels() -> None:
    prediction, mask = torch.full((2, 4, 2, 2), 3.0), torch.ones(2, 1, 2, 2)
    mask[1, 0, 0] = 0
    prediction[1, :, 0] = 100.0  # under the mask
    assert masked_error(prediction, torch.ones(2, 4, 2, 2), mask).tolist() == [16.0, 16.0]


def test_a_sample_has_its_loss_in_any_batch(student: DiffusionPolicy) -> None:
    method = prepared(student)
    together = method.loss(student, BATCH).detach()
    for index in range(3):
        alone = method.loss(student, ConceptBatch(BATCH.prompts[index : index + 1], BATCH.seeds[index : index + 1]))
        torch.testing.assert_close(alone.detach(), together[index : index + 1], rtol=1e-4, atol=1e-6)
    turned = method.loss(student, ConceptBatch(BATCH.prompts[::-1], BATCH.seeds[::-1])).detach()
    torch.testing.assert_close(turned, together.flip(0), rtol=1e-4, atol=1e-6)


def test_the_seed_chooses_picture_timesteps_noise_and_where_the_concept_stands(student: DiffusionPolicy) -> None:
    method = prepared(student)
    seeds = list(range(60))
    seen = method.examples(student, ConceptBatch(["striped"] * 60, seeds))
    assert set(seen.anchors) == set(ANCHORS)
    assert set(seen.captions[:60]) == {
        text for anchor in ANCHORS for text in (f"striped {anchor}", f"{anchor} striped")
    }
    assert seen.captions[60:] == seen.anchors
    assert len(set(seen.timesteps.tolist())) > 100
    first, second = seen.timesteps.chunk(2)
    assert not torch.equal(first, second)
    stream = SampleNoise(seeds, (4, 8, 8), torch.device("cpu"))
    assert torch.equal(seen.noise, torch.cat([stream.draw(), stream.draw()]))


@pytest.mark.parametrize("lora", [None, LoRAConfig()])
def test_no_gradient_flows_through_the_start_token(
    make_policy: Callable[..., DiffusionPolicy], lora: LoRAConfig | None
) -> None:
    policy = make_policy(lora=lora, train=None if lora else "xattn-kv")
    prompt = policy.encode(["striped"])
    prompt.tokens[:, 1:] = 0  # keys and values come from the first token alone
    latents, timesteps = policy.sample(policy.encode(["a cat"]), seeds=[1], until=0), torch.tensor([500])

    def gradient() -> list[torch.Tensor]:
        policy.unet.zero_grad()
        policy.predict_noise(latents, timesteps, prompt).square().sum().backward()
        names = (".attn2.to_k.", ".attn2.to_v.")
        named = policy.unet.named_parameters()
        return [value.grad.clone() for key, value in named if value.grad is not None and any(n in key for n in names)]

    assert any(value.any() for value in gradient())
    with start_detached(policy.unet):
        assert not any(value.any() for value in gradient())
    assert any(value.any() for value in gradient())


def test_the_teacher_and_the_start_token_cost_no_more_than_is_said(
    student: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, seen = student.network, {True: 0, False: 0}

    def counted(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen[torch.is_grad_enabled()] += len(latents)
        return network(latents, *arguments, **options)

    for config in (PLAIN, replace(PLAIN, prior_weight=0.0, target="original"), replace(PLAIN, target="noise")):
        method = prepared(student, config)
        seen.update({True: 0, False: 0})
        monkeypatch.setattr(student, "network", counted)
        method.loss(student, BATCH).sum().backward()
        monkeypatch.setattr(student, "network", network)
        assert seen == {False: 3 * method.unet_calls().forward, True: 3 * method.unet_calls().backward}


# The pictures.


def test_pictures_are_drawn_without_the_concept_and_kept(bare: DiffusionPolicy, tmp_path: Path) -> None:
    first = prepared(bare, folder=tmp_path)
    seeds = _seeds(tmp_path)
    away = bare.encode(["striped, with stripes"])
    prompts = bare.encode([*ANCHORS, ANCHORS[0]])
    drawn = bare.sample(prompts, steps=2, guidance=ClassifierFree(6.0, away), seeds=seeds)
    clean = _clean(first, bare)
    assert len(set(seeds)) == 4
    torch.testing.assert_close(clean, drawn, rtol=0, atol=1e-5)
    with torch.no_grad():
        bare.unet.conv_in.bias[0] += 1
    with pytest.raises(ValueError, match="folder must be new or hold the same latents"):
        prepared(bare, folder=tmp_path)


def test_an_empty_negative_prompt_is_none(bare: DiffusionPolicy, tmp_path: Path) -> None:
    method = prepared(bare, replace(PLAIN, negative=""), folder=tmp_path)
    prompts = bare.encode([*ANCHORS, ANCHORS[0]])
    drawn = bare.sample(prompts, steps=2, guidance=ClassifierFree(6.0), seeds=_seeds(tmp_path))
    torch.testing.assert_close(_clean(method, bare), drawn, rtol=0, atol=1e-5)


def test_half_of_the_pictures_are_mirrored_as_images(bare: DiffusionPolicy) -> None:
    plain, both = _clean(prepared(bare), bare), _clean(prepared(bare, CONFIG), bare)
    assert torch.equal(both[:4], plain)
    expected = bare.encode_images(bare.decode(plain).flip(-1))
    torch.testing.assert_close(both[4:], expected, rtol=0, atol=1e-5)


def test_pictures_are_the_references_whatever_was_trained_since(
    make_policy: Callable[..., DiffusionPolicy], policy: DiffusionPolicy
) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_()
    torch.testing.assert_close(
        _clean(prepared(policy), policy), _clean(prepared(make_policy()), policy), rtol=0, atol=1e-5
    )


def _seeds(folder: Path) -> list[int]:
    return json.loads((folder / "generated.json").read_text(encoding="utf-8"))["seeds"]


def _clean(method: AC, policy: DiffusionPolicy) -> torch.Tensor:
    assert method._pictures is not None
    return method._pictures


# The erasure.


def test_the_policy_is_left_as_it_was_and_the_named_parameters_change(bare: DiffusionPolicy) -> None:
    before = {name: value.detach().clone() for name, value in base_parameters(bare.unet).items()}
    erasure = AC(CONFIG).erase(bare, CONCEPT, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in base_parameters(bare.unet).items())
    assert set(erasure.delta.tensors) == set(select_parameters(bare.unet, "attn"))


def test_erasing_leaves_the_method_as_it_was_and_keeps_pictures_with_the_run(
    bare: DiffusionPolicy, tmp_path: Path
) -> None:
    method = AC(PLAIN)
    before = dict(vars(method))
    method.erase(bare, CONCEPT, output_dir=tmp_path / "run", progress=False)
    assert vars(method) == before
    assert (tmp_path / "run" / "anchors" / "generated.json").is_file()
    AC(PLAIN, folder=tmp_path / "own").erase(bare, CONCEPT, output_dir=tmp_path / "other", progress=False)
    assert (tmp_path / "own" / "generated.json").is_file()
    assert not (tmp_path / "other" / "anchors").exists()


def test_training_takes_the_concept_for_the_anchor(bare: DiffusionPolicy) -> None:
    descent = replace(CONFIG.descent, iterations=30, learning_rate=3e-3, batch_size=8)
    config = replace(PLAIN, train="xattn-kv", prior_weight=0.0, descent=descent)
    erasure = AC(config).erase(bare, CONCEPT, progress=False)
    method, batch = prepared(bare, config), ConceptBatch(["striped"] * 16, list(range(16)))
    with torch.no_grad():
        before = method.loss(bare, batch).mean()
        erasure.apply(bare)
        assert method.loss(bare, batch).mean() < 0.5 * before


def test_a_saved_erasure_draws_the_same_in_a_policy_and_in_a_pipeline(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policies = [make_policy() for _ in range(3)]
    erasure = AC(PLAIN).erase(policies[0], CONCEPT, progress=False)
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path)
    assert (loaded.config, loaded.concept, loaded.method) == (erasure.config, CONCEPT, "AC")
    erasure.apply(policies[0])
    loaded.apply(policies[1])
    pipeline = policies[2].to_pipeline()
    loaded.apply_to_pipeline(pipeline)
    drawn = [policy.draw(["a striped cat"], seeds=[1], steps=2) for policy in policies]
    assert all(torch.equal(image, drawn[0]) for image in drawn)
    assert not torch.equal(make_policy().draw(["a striped cat"], seeds=[1], steps=2), drawn[0])


def test_an_interrupted_training_goes_on_to_the_same_numbers(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = AC(PLAIN).erase(bare, CONCEPT, progress=False)
    loss, calls, sample, drawn = AC.loss, 0, DiffusionPolicy.sample, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return sample(*arguments, **options)

    monkeypatch.setattr(AC, "loss", failing)
    monkeypatch.setattr(DiffusionPolicy, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        AC(PLAIN).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    resumed = AC(PLAIN).erase(bare, CONCEPT, output_dir=tmp_path, resume=True, progress=False)
    assert (calls, drawn) == (5, 1)  # two updates, the one that failed, and the last two; pictures only once
    assert equal(resumed, whole)


def test_a_second_concept_is_erased_after_the_first(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy, method = make_policy(), AC(PLAIN)
    first = method.erase(policy, CONCEPT, progress=False)
    first.apply(policy)
    second = method.erase(policy, Concept(name="dogs", phrases=("dog",)), progress=False)
    second.apply(policy)
    again = make_policy()
    first.apply(again)
    second.apply(again)
    assert torch.equal(again.draw(["a dog"], seeds=[1], steps=2), policy.draw(["a dog"], seeds=[1], steps=2))
    with pytest.raises(ValueError, match="must have the weights that AC erased 'dogs' from"):
        second.apply(make_policy())


def test_it_is_a_constraint_that_reaches_a_lora(policy: DiffusionPolicy) -> None:
    method = AC(replace(PLAIN, prior_weight=0.0), progress=False)
    assert isinstance(method, Objective)
    constraint = ObjectiveConstraint(method, CONCEPT)
    constraint.prepare(policy)
    constraint.violation(policy, BATCH).mean().backward()
    reached = [value.grad is not None and bool(value.grad.any()) for value in policy.trainable_parameters()]
    assert sum(reached) == len(reached) / 2  # the half of a fresh LoRA that starts at zero


# Settings.


def test_defaults_are_the_authors_for_nudity() -> None:
    config = ACConfig()
    assert config.descent == DescentConfig(
        iterations=800, learning_rate=3.2e-5, batch_size=4, weight_decay=1e-2, max_grad_norm=1.0
    )
    assert AC().config == config
    assert (config.train, config.prior_weight, config.images, config.guidance_scale) == ("attn", 1.0, 1000, 6.0)
    assert len(set(PEOPLE)) == 200
    assert not any("nud" in prompt or "nake" in prompt for prompt in PEOPLE)


def test_anchors_are_the_concepts_own_unless_the_settings_name_others(
    bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ac, "PEOPLE", ("a man",))  # the scenes are too long for the tiny text encoder
    shown = {}
    for concept in (CONCEPT, Concept(name="stripes", phrases=("striped",), anchor="a dog")):
        method = AC(replace(PLAIN, anchors=None, images=1), progress=False)
        method.prepare(bare, concept)
        shown[concept.anchor] = set(method.examples(bare, BATCH).anchors)
    assert shown == {" ": {"a man"}, "a dog": {"a dog"}}


def test_settings_for_the_tiny_world_fit_it() -> None:
    from overpaint import tinyworld
    from overpaint.tinyworld.presets import PRESETS, STRIPES

    policy = tinyworld.load_policy()
    method = AC(replace(PRESETS["ac"], images=1, steps=1), progress=False)
    method.prepare(policy, STRIPES)
    erased, prior = method.losses(policy, method.examples(policy, BATCH))
    assert erased.isfinite().all()
    assert (erased > 0).all()
    assert (prior >= 0).all()


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("target", "anchor", "must be 'model', 'original' or 'noise', got 'anchor'"),
        ("prior_weight", -1.0, r"must be at least 0, got -1\.0"),
        ("guidance_scale", float("inf"), "must be a finite number, got inf"),
        ("images", 0, "must be at least 1, got 0"),
        ("steps", 0, "must be at least 1, got 0"),
        ("draw_batch_size", 0, "must be at least 1, got 0"),
        ("anchors", (), r"must have at least 1 item, got \(\)"),
        ("templates", (), r"must have at least 1 item, got \(\)"),
        ("templates", ("{anchor}",), "must each hold {concept} and {anchor}, got '{anchor}'"),
    ],
)
def test_settings_are_checked(field: str, value: object, rule: str) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"ACConfig(\.|: ){field} {rule}"):
        ACConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": ("a cat", "a Striped dog")}, "must be free of 'stripes', got 'striped' in 'a Striped dog'"),
        ({"anchors": ("a dog " * 11,)}, "AC's prompts must have at most 24 tokens, got 29 in "),
        ({"negative": "striped " * 30}, "AC's prompts must have at most 24 tokens, got 122 in 'striped "),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(bare: DiffusionPolicy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AC(replace(PLAIN, **changes)).erase(bare, CONCEPT, progress=False)


def test_a_loss_before_preparation_is_refused(student: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="prepare must be called before the first loss"):
        AC(PLAIN).loss(student, BATCH)


def test_gradient_checkpointing_needs_the_start_token_attached(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(train="attn", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="detach_start must be False for a policy with gradient checkpointing"):
        prepared(policy)
    prepared(policy, replace(PLAIN, detach_start=False)).loss(policy, BATCH).mean().backward()
