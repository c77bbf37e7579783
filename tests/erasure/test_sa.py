"""Selective amnesia: surrogates for the concept, replay for the rest, and weights that are held where they matter."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import NUDITY, Concept, ConceptBatch, Erasure, Objective, ObjectiveConstraint
from erasure.descend import DescentConfig, concept_batch
from erasure.estimate import estimate
from erasure.methods.sa.fisher import FisherConfig, changes, fisher_information, start_of
from erasure.methods.sa.sa import EVERYDAY, SA, SAConfig, weighted_change
from erasure.protocols import TrainedMethod
from overpaint.policy import DiffusionPolicy, LoRAConfig, select_parameters
from overpaint.tinyworld import load_policy
from overpaint.tinyworld.presets import PRESETS, STRIPES

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"))
DESCENT = DescentConfig(iterations=3, learning_rate=1e-3, batch_size=2, checkpoint_every=1)
CONFIG = SAConfig(
    train="xattn-kv",
    surrogates=("a red circle", "a blue square"),
    replay=("a cat", "dots", "a dog"),
    images=3,
    steps=2,
    fisher=FisherConfig(images=2, timesteps=4),
    descent=DESCENT,
)
HELD = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), ["a cat", "a dog"])
BATCH = ConceptBatch(["striped", "with stripes", "striped"], [3, 4, 5])


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


def prepared(policy: DiffusionPolicy, config: SAConfig = CONFIG, concept: Concept = CONCEPT, **options: Any) -> SA:
    method = SA(config, **options)
    method.progress = False
    method.prepare(policy, concept)
    return method


def disturb(policy: DiffusionPolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def equal(one: Erasure, other: Erasure) -> bool:
    ours, theirs = one.delta.tensors, other.delta.tensors
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_an_objective_and_a_trained_method() -> None:
    assert isinstance(SA(), Objective)
    assert isinstance(SA(), TrainedMethod)


def test_the_loss_is_the_sum_of_its_three_terms(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(train="xattn-kv")
    method = prepared(policy, replace(CONFIG, penalty=7.0, replay_weight=0.5))
    disturb(policy)
    examples = method.examples(policy, BATCH)
    prompts = policy.encode(examples.captions)
    noised = policy.add_noise(examples.clean, examples.noise, examples.timesteps)
    errors = (policy.predict_noise(noised, examples.timesteps, prompts) - examples.noise).square().mean(dim=(1, 2, 3))
    with policy.reference():
        start = policy.trainable_state()
    terms = [method._fisher[name] * (now - start[name]) ** 2 for name, now in policy.trainable_state().items()]
    penalty = sum(term.sum() for term in terms)
    assert penalty > 0
    torch.testing.assert_close(
        method.loss(policy, BATCH), errors[:3] + 0.5 * errors[3:] + 7.0 * penalty, rtol=1e-5, atol=1e-6
    )


def test_pictures_are_those_of_their_prompts(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(train="xattn-kv")
    method = prepared(policy, replace(CONFIG, images=4, templates=("{concept} {surrogate}", "{surrogate} {concept}")))
    seeds = list(range(40))
    examples = method.examples(policy, ConceptBatch(["striped"] * 40, seeds))
    assert len(examples.captions) == len(examples.clean) == 80
    said = {caption.replace("striped", "").strip() for caption in examples.captions[:40]}
    assert said == {"a red circle", "a blue square"}
    assert {caption.startswith("striped") for caption in examples.captions[:40]} == {True, False}
    assert set(examples.captions[40:]) == {"a cat", "dots", "a dog"}
    # A picture keeps its prompt: as many pairs of both as there are pictures, of either kind.
    pairs = {
        (picture.sum().item(), caption.replace("striped", "").strip())
        for picture, caption in zip(examples.clean, examples.captions, strict=True)
    }
    assert len(pairs) == len({total for total, _ in pairs}) == 8


def test_an_anchor_takes_the_place_of_the_surrogate_prompts(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(train="xattn-kv")
    config = replace(CONFIG, templates=("{concept} {surrogate}",))
    method = prepared(policy, config, replace(CONCEPT, anchor="a plain shape"))
    assert method.examples(policy, BATCH).captions[0] == "striped a plain shape"


def test_without_replay_and_penalty_the_concept_alone_is_trained(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy = make_policy(train="xattn-kv")
    method = prepared(policy, replace(CONFIG, replay_weight=0.0, penalty=0.0))
    full = prepared(policy, replace(CONFIG, penalty=0.0))
    expected, _ = full.errors(policy, full.examples(policy, BATCH))
    torch.testing.assert_close(method.loss(policy, BATCH), expected, rtol=1e-5, atol=1e-6)
    assert len(method.examples(policy, BATCH).captions) == 3
    assert method.unet_calls() == (0.0, 1.0)


@pytest.mark.parametrize("options", [{"train": "noxattn"}, {"lora": LoRAConfig()}])
def test_gradient_reaches_all_trained_parameters_and_no_others(
    make_policy: Callable[..., DiffusionPolicy], options: dict[str, Any]
) -> None:
    policy = make_policy(**options)
    method = prepared(policy)
    disturb(policy)
    method.loss(policy, BATCH).mean().backward()
    moved = {name for name, parameter in policy.unet.named_parameters() if parameter.grad is not None}
    assert moved == set(policy.trainable_state())
    assert all(p.grad is not None and p.grad.any() for p in policy.trainable_parameters())


@pytest.mark.parametrize("options", [{"train": "xattn-kv"}, {"lora": LoRAConfig()}])
def test_penalty_holds_the_weights_where_they_were(
    make_policy: Callable[..., DiffusionPolicy], options: dict[str, Any]
) -> None:
    def moved(penalty: float) -> float:
        policy = make_policy(**options)
        method = prepared(policy, replace(CONFIG, penalty=penalty))
        optimizer = torch.optim.Adam(policy.trainable_parameters(), lr=3e-3)
        for seed in range(12):
            optimizer.zero_grad()
            method.loss(policy, concept_batch(CONCEPT, 4, torch.Generator().manual_seed(seed))).mean().backward()
            optimizer.step()
        held = fisher_information(policy, *HELD, CONFIG.fisher, progress=False)
        return weighted_change(held, changes(policy, start_of(policy))).item()

    assert 0 < moved(1e7) < 0.3 * moved(0.0)


@pytest.mark.parametrize("options", [{"train": "xattn-kv"}, {"lora": LoRAConfig()}])
def test_the_batch_does_not_matter(make_policy: Callable[..., DiffusionPolicy], options: dict[str, Any]) -> None:
    policy = make_policy(**options)
    method = prepared(policy)
    disturb(policy)
    together = method.loss(policy, BATCH)
    for index in range(3):
        alone = method.loss(policy, ConceptBatch(BATCH.prompts[index : index + 1], BATCH.seeds[index : index + 1]))
        torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-5)
    backwards = method.loss(policy, ConceptBatch(BATCH.prompts[::-1], BATCH.seeds[::-1]))
    torch.testing.assert_close(backwards.flip(0), together, rtol=1e-5, atol=1e-5)


def test_preparing_a_policy_that_has_trained_gives_the_same_loss(make_policy: Callable[..., DiffusionPolicy]) -> None:
    for options in ({"train": "xattn-kv"}, {"lora": LoRAConfig()}):
        policy = make_policy(**options)
        before = prepared(policy)
        disturb(policy)
        assert torch.equal(prepared(policy).loss(policy, BATCH), before.loss(policy, BATCH))


def test_velocities_are_compared_as_noise(
    make_policy: Callable[..., DiffusionPolicy], v_pipeline_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(path=v_pipeline_dir, train="xattn-kv")
    method = prepared(policy)
    examples = method.examples(policy, BATCH)
    alphas = policy.process.levels(examples.timesteps).view(-1, 1, 1, 1)
    velocity = alphas.sqrt() * examples.noise - (1 - alphas).sqrt() * examples.clean
    monkeypatch.setattr(policy, "network", lambda *args, **kwargs: (velocity,))
    assert method.loss(policy, BATCH).max() < 1e-6  # whoever gives the true velocity knows the noise


def test_erasing_trains_the_named_parameters_and_leaves_the_policy_as_it_was(bare: DiffusionPolicy) -> None:
    before = {name: value.clone() for name, value in bare.unet.state_dict().items()}
    erasure = SA(CONFIG).erase(bare, CONCEPT, progress=False)
    assert set(erasure.delta.tensors) == set(select_parameters(bare.unet, "xattn-kv"))
    assert all(torch.equal(value, before[name]) for name, value in bare.unet.state_dict().items())
    assert erasure.config == json.loads(json.dumps(asdict(CONFIG)))


def test_saved_and_loaded_erasure_is_applied_to_the_same_bits(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policy, other = make_policy(), make_policy()
    erasure = SA(CONFIG).erase(policy, CONCEPT, progress=False)
    erasure.save(tmp_path)
    erasure.apply(policy)
    pipeline = other.to_pipeline()
    Erasure.load(tmp_path).apply_to_pipeline(pipeline)
    loaded = DiffusionPolicy(pipeline, device="cpu")
    for name, value in policy.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
    images = [each.draw(["a striped circle"], seeds=[1], steps=2) for each in (policy, loaded)]
    assert torch.equal(*images)


@pytest.mark.parametrize("stage", ["drawing", "Fisher information", "training"])
def test_an_interrupted_erasure_goes_on_to_the_same_numbers(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    from erasure import generated
    from erasure.methods.sa import fisher

    monkeypatch.setattr(fisher, "SAVE_EVERY", 1)
    whole = SA(CONFIG).erase(bare, CONCEPT, progress=False)
    where, name = {
        "drawing": (generated, "generated_latents"),
        "Fisher information": (fisher, "_losses"),
        "training": (SA, "loss"),
    }[stage]
    real, calls = getattr(where, name), 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing)
        with pytest.raises(KeyboardInterrupt):
            SA(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
        resumed = SA(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, resume=True, progress=False)
    assert calls == {"drawing": 4, "Fisher information": 3, "training": 4}[stage]
    assert equal(resumed, whole)


def test_another_concept_is_erased_otherwise(bare: DiffusionPolicy) -> None:
    dots = Concept(name="dots", phrases=("dotted",))
    first, second = (SA(CONFIG).erase(bare, concept, progress=False) for concept in (CONCEPT, dots))
    assert not equal(first, second)


def test_the_calls_are_those_that_are_made(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy, seen = make_policy(), {True: 0, False: 0}
    config = replace(CONFIG, descent=replace(DESCENT, iterations=2, batch_size=4))
    said = estimate(SA(config), policy, config.train)
    student = policy.student_copy(config.train)
    method = prepared(student, config)

    def count(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    student.unet.register_forward_pre_hook(count, with_kwargs=True)
    for seed in range(2):
        method.loss(student, concept_batch(CONCEPT, 4, torch.Generator().manual_seed(seed)))
    assert (seen[False], seen[True]) == (said.forward, said.backward) == (0, 16)


def test_it_keeps_a_tuned_policy_erased_as_a_constraint(policy: DiffusionPolicy) -> None:
    method = SA(CONFIG)
    method.progress = False
    constraint = ObjectiveConstraint(method, CONCEPT)
    constraint.prepare(policy)
    cost = constraint.violation(policy, BATCH)
    assert cost.requires_grad
    assert cost.shape == (3,)


@pytest.mark.parametrize(
    ("changes", "concept", "message"),
    [
        ({}, Concept(name="x", phrases=("striped " * 30,)), "must have at most 24 tokens, got"),
        ({"replay": ("striped " * 30,)}, Concept(name="x", phrases=("dotted",)), "SA's prompts must have at most 24"),
        ({"surrogates": ("a Striped cat",)}, CONCEPT, r"surrogates must be free of 'stripes', got 'striped' in 'a St"),
        ({"replay": ("a cat with stripes",)}, CONCEPT, "replay must be free of 'stripes', got 'with stripes' in 'a c"),
        ({}, replace(CONCEPT, anchor="Striped"), "must not be one of its phrases"),
        ({}, replace(CONCEPT, anchor="a striped cat"), "surrogates must be free of 'stripes'"),
    ],
)
def test_texts_that_cannot_work_are_refused(
    bare: DiffusionPolicy, changes: dict[str, Any], concept: Concept, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SA(replace(CONFIG, **changes)).erase(bare, concept, progress=False)


def test_a_policy_that_trains_nothing_is_refused(bare: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="needs a policy with trainable weights, got one without"):
        SA(CONFIG).prepare(bare, CONCEPT)


def test_a_loss_before_prepare_is_refused(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="prepare must be called before the first loss"):
        SA(CONFIG).loss(policy, BATCH)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("penalty", -1.0), ("replay_weight", float("inf")), ("guidance_scale", -1.0), ("images", 0), ("steps", 0),
        ("draw_batch_size", 0), ("surrogates", ()), ("templates", ()), ("templates", ("a thing",)), ("replay", ()),
    ],
)  # fmt: skip
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"SAConfig(\.|: ){field} must "):
        replace(CONFIG, **{field: value})


def test_prompts_of_everyday_things_are_many_and_short(bare: DiffusionPolicy) -> None:
    assert len(set(EVERYDAY)) == len(EVERYDAY) == 1000
    assert all(len(prompt.split()) <= 10 for prompt in EVERYDAY)
    assert not any(phrase in prompt for prompt in EVERYDAY for phrase in NUDITY.phrases)


def test_the_tiny_world_has_settings(tmp_path: Path) -> None:
    config = PRESETS["sa"]
    student = load_policy(train=config.train)
    small = replace(config, images=2, steps=2, fisher=FisherConfig(images=1, timesteps=2))
    method = prepared(student, small, STRIPES)
    assert method.loss(student, concept_batch(STRIPES, 2, torch.Generator().manual_seed(0))).isfinite().all()
