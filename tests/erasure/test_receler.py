"""Receler: erasers beside cross-attentions, and the loss that they descend."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import Concept, ConceptBatch, Erasure, Objective
from erasure.changes import Change
from erasure.descend import DescentConfig
from erasure.methods.esd import ESD, ESDConfig
from erasure.methods.receler.erasers import AddedNetworks, Eraser, fresh_erasers
from erasure.methods.receler.receler import Receler, RecelerConfig, first_tokens, with_tokens
from erasure.protocols import TrainedMethod
from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.policy.added import added_networks
from overpaint.tinyworld.presets import PRESETS, STRIPES

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"))
DESCENT = DescentConfig(iterations=3, learning_rate=1e-2, batch_size=2, checkpoint_every=1)
CONFIG = RecelerConfig(rank=4, tokens=3, inner_steps=3, steps=3, descent=DESCENT)
PROMPTS = ["a striped red circle", "a blue square"]
BATCH = ConceptBatch(["striped", "with stripes", "striped"], [4, 5, 6])


def draw(policy: DiffusionPolicy) -> torch.Tensor:
    return policy.draw(PROMPTS, steps=2, seeds=[1, 2])


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


@torch.no_grad()
def disturb(policy: DiffusionPolicy, scale: float = 0.3) -> DiffusionPolicy:
    """Gives trained weights that do something."""
    for index, parameter in enumerate(policy.trainable_parameters()):
        parameter.copy_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return policy


@pytest.fixture
def change(bare: DiffusionPolicy) -> AddedNetworks:
    """Erasers that do something."""
    return AddedNetworks.of(disturb(Receler(CONFIG).student(bare)).unet)


# Erasers.


def test_an_eraser_adds_nothing_before_it_is_trained_and_its_equation_afterwards() -> None:
    eraser = Eraser(6, 2)
    x = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(eraser(x), torch.zeros_like(x))
    torch.nn.init.ones_(eraser.up.weight)
    hidden = x @ eraser.down.weight.T + eraser.down.bias
    expected = (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))).sum(dim=2, keepdim=True).expand_as(x)
    torch.testing.assert_close(eraser(x), expected, rtol=0, atol=1e-6)


def test_fresh_erasers_follow_from_the_seed(bare: DiffusionPolicy) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([eraser.down.weight.flatten() for eraser in fresh_erasers(bare.unet, 4, seed).values()])

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_student_draws_the_same_and_its_reference_is_the_original_to_the_bit(bare: DiffusionPolicy) -> None:
    before = draw(bare)
    student = Receler(CONFIG).student(bare)
    assert not added_networks(bare.unet)
    assert torch.equal(draw(student), before)
    assert len(student.trainable_parameters()) == 4 * len(added_networks(student.unet)) == 16
    disturb(student)
    assert not torch.allclose(draw(student), before, atol=1e-3)
    with student.reference():
        assert torch.equal(draw(student), before)


def test_saved_and_loaded_erasers_draw_the_same_bits(
    make_policy: Callable[..., DiffusionPolicy], change: AddedNetworks, tmp_path: Path
) -> None:
    assert isinstance(change, Change)
    first, second = make_policy(), make_policy()
    Erasure.of(first, "Receler", {}, CONCEPT, change).save(tmp_path)
    change.apply(first)
    Erasure.load(tmp_path).apply(second)
    assert torch.equal(draw(first), draw(second))
    assert not torch.allclose(draw(first), draw(make_policy()), atol=1e-3)
    assert {file.name for file in tmp_path.iterdir()} == {"erasure.json", "erasers.json", "erasers.safetensors"}


def test_a_plain_pipeline_draws_what_the_policy_draws(
    make_policy: Callable[..., DiffusionPolicy], change: AddedNetworks
) -> None:
    policy, pipeline = make_policy(), make_policy().to_pipeline()
    change.apply(policy)
    change.apply_to_pipeline(pipeline)
    assert torch.equal(draw(DiffusionPolicy(pipeline, device="cpu")), draw(policy))


def test_applied_erasers_are_gone_after_the_block(bare: DiffusionPolicy, change: AddedNetworks) -> None:
    before = draw(bare)
    with change.applied(bare):
        assert not torch.allclose(draw(bare), before, atol=1e-3)
    assert torch.equal(draw(bare), before)
    with pytest.raises(KeyboardInterrupt), change.applied(bare):
        raise KeyboardInterrupt
    assert not added_networks(bare.unet)


def test_applied_erasers_are_part_of_the_reference_and_a_lora_stays_on_top(
    policy: DiffusionPolicy, bare: DiffusionPolicy, change: AddedNetworks
) -> None:
    change.apply(bare)
    change.apply(policy)
    assert torch.equal(draw(policy), draw(bare))
    disturb(policy)
    assert not torch.allclose(draw(policy), draw(bare), atol=1e-3)
    with policy.reference():
        assert torch.equal(draw(policy), draw(bare))
    assert not any(parameter.requires_grad for parameter in bare.unet.parameters())


def test_training_an_applied_eraser_does_not_change_the_erasure(bare: DiffusionPolicy, change: AddedNetworks) -> None:
    before = {name: value.clone() for name, value in change.tensors.items()}
    change.apply(bare)
    with torch.no_grad():
        for network in added_networks(bare.unet).values():
            for parameter in network.parameters():
                parameter.zero_()
    assert all(torch.equal(change.tensors[name], value) for name, value in before.items())


def test_half_precision_models_get_erasers_in_half_precision(
    make_policy: Callable[..., DiffusionPolicy], change: AddedNetworks
) -> None:
    single, half = make_policy(), make_policy(dtype=torch.bfloat16)
    change.apply(single)
    change.apply(half)
    assert {p.dtype for network in added_networks(half.unet).values() for p in network.parameters()} == {torch.bfloat16}
    # Images from 0 to 1: 5 units of bfloat16 with AVX-512 and SSE, and room for another rounding.
    torch.testing.assert_close(draw(half).float(), draw(single), rtol=0, atol=12 * torch.finfo(torch.bfloat16).eps)


def test_erasers_that_do_not_fit_are_refused_and_change_nothing(
    bare: DiffusionPolicy, v_policy: DiffusionPolicy, change: AddedNetworks, tmp_path: Path
) -> None:
    before = draw(bare)
    renamed = AddedNetworks({f"elsewhere.{name}": value for name, value in change.tensors.items()})
    with pytest.raises(ValueError, match=r"lacks 'elsewhere\.down_blocks"):
        renamed.apply(bare)
    wide = {
        name: value.repeat(1, 2) if name.endswith("down.weight") else value for name, value in change.tensors.items()
    }
    with pytest.raises(ValueError, match="must have the eraser's 16 channels, got 8"):
        AddedNetworks(wide).apply(bare)
    assert torch.equal(draw(bare), before)

    erasure = Erasure.of(bare, "Receler", {}, CONCEPT, change)
    with pytest.raises(ValueError, match="must have the weights that Receler erased 'stripes' from"):
        erasure.apply(v_policy)

    change.apply(bare)
    for again in (change.apply, Receler(CONFIG).student, lambda policy: Receler(CONFIG).erase(policy, CONCEPT)):
        with pytest.raises(ValueError, match="must be the first networks that are added to a UNet, and this one has 4"):
            again(bare)
    with pytest.raises(ValueError, match=r"must hold erasers\.safetensors"):
        AddedNetworks.load(tmp_path)
    change.save(tmp_path)
    record = json.loads((tmp_path / "erasers.json").read_text(encoding="utf-8"))
    (tmp_path / "erasers.json").write_text(json.dumps(record | {"parameters": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold the parameters that erasers\.json lists"):
        AddedNetworks.load(tmp_path)
    (tmp_path / "erasers.json").write_text(json.dumps(record | {"format": "x"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be of format 'overpaint\.Erasers/1', got 'x'"):
        AddedNetworks.load(tmp_path)


# The loss.


def test_a_sample_has_the_same_loss_in_any_batch(bare: DiffusionPolicy) -> None:
    student, method = disturb(Receler(CONFIG).student(bare)), Receler(CONFIG)
    together = method.loss(student, BATCH)
    alone = [
        method.loss(student, ConceptBatch([prompt], [seed]))
        for prompt, seed in zip(BATCH.prompts, BATCH.seeds, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=0)
    turned = method.loss(student, ConceptBatch(BATCH.prompts[::-1], BATCH.seeds[::-1]))
    torch.testing.assert_close(together, turned.flip(0), rtol=1e-4, atol=0)
    assert torch.equal(together, method.loss(student, BATCH))


def test_without_soft_tokens_and_regularisation_it_is_esds_loss(
    bare: DiffusionPolicy, v_pipeline_dir: Path, make_policy: Callable[..., DiffusionPolicy]
) -> None:
    config = replace(CONFIG, variant="released", regularization=0.0)
    for policy in (bare, make_policy(path=v_pipeline_dir)):
        student = disturb(Receler(config).student(policy))
        loss = Receler(config).loss(student, BATCH)
        torch.testing.assert_close(loss, ESD(ESDConfig(steps=3)).loss(student, BATCH), rtol=1e-5, atol=0)


def test_the_gradient_is_that_of_finite_differences(bare: DiffusionPolicy) -> None:
    # The soft tokens are the attacker's: the erasers' gradient takes them as given, so they stand still here.
    student, method = disturb(Receler(CONFIG).student(bare)), Receler(replace(CONFIG, inner_steps=1))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    fixed = (CONCEPT.phrases, latents, torch.tensor([600, 40]), first_tokens([1, 2], 3, 16))

    def mean() -> torch.Tensor:
        return method.total(method.terms(student, *fixed)).mean()

    mean().backward()
    for parameter in student.trainable_parameters()[:4]:
        direction = parameter.grad
        assert direction is not None
        slope = direction.norm()
        step = 1e-2 * direction / slope
        with torch.no_grad():
            ends = []
            for sign in (1.0, -1.0):
                parameter += sign * step
                ends.append(mean())
                parameter -= sign * step
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, slope, rtol=2e-2, atol=1e-5)


def test_soft_tokens_bring_the_prediction_for_the_concept_back(bare: DiffusionPolicy) -> None:
    student, method = disturb(Receler(CONFIG).student(bare)), Receler(replace(CONFIG, tokens=16, inner_steps=40))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps, embeddings, words = torch.tensor([500]), bare.encode(["striped"]), torch.arange(24).eq(1).unsqueeze(0)
    wanted = bare.predict_noise(latents, timesteps, embeddings)

    def distance(tokens: torch.Tensor) -> float:
        with torch.no_grad():
            prediction = student.predict_noise(latents, timesteps, with_tokens(embeddings, words, tokens))
        return (prediction - wanted).square().mean().item()

    first = first_tokens([1], 16, 16)
    attacked = method.attack(student, embeddings, words, latents, timesteps, wanted, first)
    assert distance(attacked) < 0.9 * distance(first)
    assert not attacked.requires_grad
    assert all(parameter.grad is None for parameter in student.trainable_parameters())


def test_soft_tokens_take_the_places_behind_the_words_as_far_as_there_are_places() -> None:
    prompts, tokens = Conditioning(("", ""), torch.zeros(2, 6, 1)), torch.arange(1.0, 4.0).view(1, 3, 1).repeat(2, 1, 1)
    words = torch.tensor([[False, True] + 4 * [False], [False, True, True, True, False, False]])
    found = with_tokens(prompts, words, tokens).tokens[..., 0]
    assert found.tolist() == [[0, 0, 1, 2, 3, 0], [0, 0, 0, 0, 1, 2]]


def test_the_released_variant_does_not_see_soft_tokens(bare: DiffusionPolicy) -> None:
    student = disturb(Receler(CONFIG).student(bare))

    def loss(**changes: Any) -> torch.Tensor:
        return Receler(replace(CONFIG, **changes)).loss(student, BATCH)

    released = loss(variant="released")
    assert torch.equal(released, loss(variant="released", tokens=9, inner_steps=7))
    assert not torch.allclose(released, loss(), rtol=1e-3)
    assert not torch.allclose(loss(inner_steps=1), loss(), rtol=1e-5)


def test_a_lora_descends_the_loss_with_and_without_erasers(policy: DiffusionPolicy, change: AddedNetworks) -> None:
    method = Receler(CONFIG)
    assert isinstance(method, Objective)
    assert isinstance(method, TrainedMethod)
    disturb(policy, 0.1)
    method.prepare(policy, CONCEPT)
    heavy = Receler(replace(CONFIG, regularization=1e3))
    torch.testing.assert_close(method.loss(policy, BATCH), heavy.loss(policy, BATCH))
    change.apply(policy)
    assert bool((heavy.loss(policy, BATCH) > 2 * method.loss(policy, BATCH)).all())
    method.loss(policy, BATCH).mean().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())
    assert all(parameter.grad is None for parameter in policy.unet.parameters() if not parameter.requires_grad)


# Training.


def test_erasing_trains_erasers_and_leaves_the_policy_as_it_was(policy: DiffusionPolicy) -> None:
    before = draw(policy)
    erasure = Receler(CONFIG).erase(policy, CONCEPT, progress=False)
    assert torch.equal(draw(policy), before)
    assert isinstance(erasure.change, AddedNetworks)
    assert all(value.any() for value in erasure.change.tensors.values())
    assert erasure.config["variant"] == "paper"
    with pytest.raises(ValueError, match="that of its weights, and Receler changes none"):
        _ = erasure.delta
    erasure.apply(policy)
    assert not torch.equal(draw(policy), before)


def test_an_interrupted_training_goes_on_to_the_same_numbers(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Receler(CONFIG).erase(bare, CONCEPT, progress=False)
    method = Receler(CONFIG)
    loss, calls = method.loss, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(method, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        method.erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    resumed = method.erase(bare, CONCEPT, output_dir=tmp_path, resume=True, progress=False)
    assert calls == 4  # two updates, the one that failed, and the last
    changes = [erasure.change for erasure in (whole, resumed)]
    ours, theirs = (change.tensors for change in changes if isinstance(change, AddedNetworks))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("variant", "inner"), [("paper", 3), ("released", 1)])
def test_the_calls_of_the_network_are_those_that_are_stated(bare: DiffusionPolicy, variant: str, inner: int) -> None:
    seen = {True: 0, False: 0}

    def count(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    method = Receler(replace(CONFIG, variant=variant))
    student = method.student(bare)
    student.unet.register_forward_pre_hook(count, with_kwargs=True)
    seeds = list(range(90))
    method.loss(student, ConceptBatch(["striped"] * len(seeds), seeds))
    said = method.unet_calls()
    assert said.backward == inner
    assert seen[True] == said.backward * len(seeds)
    assert seen[False] == pytest.approx(said.forward * len(seeds), rel=0.15)  # the steps are drawn


def test_a_policy_with_nothing_to_train_and_words_that_are_cut_off_are_refused(bare: DiffusionPolicy) -> None:
    with pytest.raises(
        ValueError, match=r"needs a policy with trainable weights, got one without; see Receler\.student"
    ):
        Receler(CONFIG).prepare(bare, CONCEPT)
    student = Receler(CONFIG).student(bare)
    Receler(CONFIG).prepare(student, Concept(name="x", phrases=("red " * 22,)))
    with pytest.raises(ValueError, match="texts of 'x' must have at most 24 tokens, got 25"):
        Receler(CONFIG).prepare(student, Concept(name="x", phrases=("red " * 23,)))


def test_phrases_that_say_more_than_the_concept_are_not_trained_on(
    bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    method = Receler(CONFIG)
    loss = method.loss

    def noting(policy: DiffusionPolicy, batch: ConceptBatch) -> torch.Tensor:
        seen.update(batch.prompts)
        return loss(policy, batch)

    monkeypatch.setattr(method, "loss", noting)
    concept = replace(CONCEPT, phrases=("a striped circle", "striped", "dotted"))
    erasure = method.erase(bare, concept, progress=False)
    assert seen == {"striped", "dotted"}
    assert erasure.concept == concept


def test_settings_of_the_tiny_world_leave_room_for_all_soft_tokens() -> None:
    config = PRESETS["receler"]
    assert config.variant == "paper"
    assert config.descent.iterations * config.descent.batch_size < 500 * 50
    assert max(len(phrase.split()) for phrase in STRIPES.phrases) + 2 + config.tokens <= 24


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "must be at least 1, got 0"),
        ("tokens", 0, "must be at least 1, got 0"),
        ("inner_steps", 0, "must be at least 1, got 0"),
        ("steps", 0, "must be at least 1, got 0"),
        ("mask_side", 0, "must be at least 1, got 0"),
        ("negative_guidance", 0.0, r"must be above 0, got 0\.0"),
        ("token_learning_rate", float("nan"), "must be a finite number, got nan"),
        ("regularization", -1.0, r"must be at least 0, got -1\.0"),
        ("token_weight_decay", float("inf"), "must be a finite number, got inf"),
        ("guidance_scale", -1.0, r"must be at least 0, got -1\.0"),
        ("mask_threshold", 2.0, r"must be at most 1, got 2\.0"),
    ],
)
def test_settings_are_checked(field: str, value: Any, message: str) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"RecelerConfig\.{field} {message}"):
        RecelerConfig(**settings)
