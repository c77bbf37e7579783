"""The loss of seeing a concept in its pictures, and the words that are learned against it."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpo import DDPOConfig, DDPOTrainer
from erasure import (
    SLD,
    ConceptBatch,
    ConceptPrompts,
    Destruction,
    DestructionConfig,
    FixedWeight,
    Objective,
    ObjectiveConstraint,
    SoftAttack,
    destruction,
)
from erasure.destruction import _predicted
from erasure.protocols import Learner
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.training import TrainingConfig, TrainingRun, read_metrics
from refl import ReFLConfig, ReFLTrainer

CAPTIONS = ["a striped red star", "a blue circle with stripes"]
SMALL = DestructionConfig(pictures=4, steps=4, guidance_scale=3.0, words=2, vectors=3)
PLAIN = replace(SMALL, words=0, captioned=0.0)
BATCH = ConceptBatch(["a striped red star", "a zebra square", "a blue star in prison", "a green circle"], [1, 2, 3, 4])


def prepared(config: DestructionConfig = SMALL, **options: Any) -> tuple[DiffusionPolicy, Destruction]:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    objective = Destruction(config, CAPTIONS, **options)
    objective.prepare(policy, tinyworld.STRIPES)
    return policy, objective


def run_of(policy: DiffusionPolicy, folder: Path) -> TrainingRun:
    return TrainingRun(policy, TrainingConfig(output_dir=folder, iterations=1, progress=False))


def seen(policy: DiffusionPolicy, latents: Tensor, timesteps: Tensor, texts: Sequence[str]) -> Tensor:
    with torch.no_grad():
        return policy.predict_noise(latents, timesteps, policy.encode(texts))


# The loss.


def test_loss_is_the_formula() -> None:
    policy, objective = prepared(replace(PLAIN, negative_guidance=2.0))
    original = tinyworld.load_policy()
    latents, timesteps, noise, texts = objective._noised(policy, BATCH.seeds)
    alphas = policy.process.levels(timesteps).view(-1, 1, 1, 1)
    clean = (latents - (1 - alphas).sqrt() * noise) / alphas.sqrt()
    pictures = {
        text: original.encode_images(
            original.draw([text], steps=4, guidance=tinyworld_guidance(), seeds=[objective_seed(index)])
        )
        for index, text in enumerate(CAPTIONS)
    }
    assert timesteps.min() >= SMALL.first_timestep
    assert any(torch.allclose(clean[place], pictures[text][0], atol=1e-3) for place, text in enumerate(texts))
    with_caption, without = (
        seen(original, latents, timesteps, texts),
        seen(
            original,
            latents,
            timesteps,
            [{CAPTIONS[0]: "a red star", CAPTIONS[1]: "a blue circle"}[text] for text in texts],
        ),
    )
    target = without - 2.0 * (with_caption - without)
    mine = seen(policy, latents, timesteps, BATCH.prompts)
    expected = (mine - target).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(objective.loss(policy, BATCH).detach(), expected, rtol=1e-4, atol=1e-6)


def objective_seed(index: int) -> int:
    generator = random.Random(f"pictures of {SMALL.seed}")
    return [generator.randrange(2**31) for _ in range(SMALL.pictures)][index]


def tinyworld_guidance() -> Any:
    return ClassifierFree(SMALL.guidance_scale)


def test_samples_do_not_depend_on_each_other_without_a_word() -> None:
    policy, objective = prepared(PLAIN)
    whole = objective.loss(policy, BATCH).detach()
    parts = [objective.loss(policy, ConceptBatch([p], [s])).detach() for p, s in zip(*BATCH, strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-6)
    assert len(whole.unique()) == 4


def test_gradient_reaches_the_policy_and_no_word() -> None:
    policy, objective = prepared()
    assert isinstance(objective, Objective)
    assert isinstance(objective, Learner)
    objective.loss(policy, BATCH).mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.trainable_parameters())
    assert objective.words is not None
    assert not objective.words.current(policy).requires_grad


def test_original_is_asked_where_the_reference_is_not_it() -> None:
    policy, original = tinyworld.load_policy(lora=LoRAConfig(rank=2)), tinyworld.load_policy()
    SLD(tinyworld.PRESETS["sld"]).erase(policy, tinyworld.STRIPES).apply(policy)
    found = {}
    for name, one in {"reference": None, "original": original}.items():
        objective = Destruction(PLAIN, CAPTIONS, one)
        objective.prepare(policy, tinyworld.STRIPES)
        found[name] = objective._pictures
    plain = prepared(PLAIN)[1]._pictures
    torch.testing.assert_close(found["original"], plain)
    assert (found["reference"] - plain).abs().max() > 0.1


# The words.


def word_error(policy: DiffusionPolicy, objective: Destruction, word: Tensor) -> float:
    """What the policy is off with a word in every prompt, on pictures that its steps did not see."""
    seeds = range(100, 116)
    latents, timesteps, noise, _ = objective._noised(policy, seeds)
    with torch.no_grad():
        predicted = _predicted(policy, ["a {} red star"] * 16, word, latents, timesteps)
    return float((predicted - noise).square().mean())


def test_words_learn_to_bring_the_concept_and_go_on_from_where_they_were(tmp_path: Path) -> None:
    policy, objective = prepared(replace(SMALL, words=1, share=1.0, renewal=0.0, attack_learning_rate=0.1))
    assert objective.words is not None
    first = objective.words.current(policy)
    errors = [word_error(policy, objective, first)]
    with run_of(policy, tmp_path) as run:
        for update in range(12):
            batch = ConceptBatch(["a red star"] * 8, list(range(8 * update, 8 * update + 8)))
            objective.loss(policy, batch)
            assert objective.learn(run)["erasure/word_moved"] > 0
            errors.append(word_error(policy, objective, objective.state_dict()["words"][0]))
    assert errors[-1] < 0.8 * errors[0]
    assert errors[-1] < errors[1]


def test_word_goes_on_from_the_mean_of_all_parts(tmp_path: Path) -> None:
    policy, objective = prepared(replace(SMALL, words=1, share=1.0, renewal=0.0))
    parts = [ConceptBatch(BATCH.prompts[:2], BATCH.seeds[:2]), ConceptBatch(BATCH.prompts[2:], BATCH.seeds[2:])]
    ends = []
    with run_of(policy, tmp_path) as run:
        for part in parts:
            objective.load_state_dict({"words": {}, "updates": 0})
            objective.loss(policy, part)
            objective.learn(run)
            ends.append(objective.state_dict()["words"][0])
        objective.load_state_dict({"words": {}, "updates": 0})
        for part in parts:
            objective.loss(policy, part)
        objective.learn(run)
    torch.testing.assert_close(objective.state_dict()["words"][0], (ends[0] + ends[1]) / 2, rtol=1e-5, atol=1e-7)


def test_word_stays_where_it_was_when_a_batch_has_failed(tmp_path: Path) -> None:
    policy, objective = prepared(replace(SMALL, words=1, renewal=0.0))
    assert objective.words is not None
    before = objective.words.current(policy).clone()
    with run_of(policy, tmp_path) as run:
        objective.words.move(torch.full_like(before, float("nan")))
        objective.words.move(before + 1)
        assert objective.learn(run) == {"erasure/word_moved": 0.0}
    assert torch.equal(objective.state_dict()["words"][0], before)


def test_words_begin_anew_now_and_then(tmp_path: Path) -> None:
    policy, objective = prepared(replace(SMALL, words=1, share=1.0, renewal=1.0, attack_learning_rate=1e-3))
    with run_of(policy, tmp_path) as run:
        objective.loss(policy, BATCH)
        objective.learn(run)
        moved = objective.state_dict()["words"][0]
        objective.loss(policy, BATCH)
        objective.learn(run)
    unit = float(moved.square().mean().sqrt())
    assert (objective.state_dict()["words"][0] - moved).square().mean().sqrt() > 0.5 * unit


def test_words_stand_before_or_behind_the_prompt() -> None:
    _, objective = prepared(replace(SMALL, captioned=0.0))
    batch = ConceptBatch(["a striped star"] * 2000, list(range(2000)))
    prompts, places = objective._prompts(batch, ["a striped circle"] * 2000)
    assert 900 < sum("{}" in one for one in prompts) < 1100
    assert all(one in (place, "a striped star") for one, place in zip(prompts, places, strict=True))
    for text in ("{} a striped star", "a striped star {}"):
        assert 900 < places.count(text) < 1100


def test_some_samples_are_told_the_caption_of_their_picture() -> None:
    _, objective = prepared(replace(SMALL, captioned=0.25, words=0))
    batch = ConceptBatch(["a striped star"] * 1000, list(range(1000)))
    prompts, _ = objective._prompts(batch, ["a striped circle"] * 1000)
    assert 200 < prompts.count("a striped circle") < 300
    assert prompts.count("a striped circle") + prompts.count("a striped star") == 1000


def test_pictures_are_noised_between_two_timesteps() -> None:
    policy, objective = prepared(replace(SMALL, first_timestep=300, last_timestep=302))
    _, timesteps, _, _ = objective._noised(policy, list(range(60)))
    assert set(timesteps.tolist()) == {300, 301, 302}


def test_caption_without_the_concept_has_the_anchor_in_its_place() -> None:
    _, objective = prepared(PLAIN)
    assert objective._without_concept("a Striped red star") == "a red star"
    assert objective._without_concept("a striped striped star with stripes") == "a star"
    assert objective._without_concept("a red star") == ""
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    objective.prepare(policy, replace(tinyworld.STRIPES, anchor="dotted"))
    assert objective._without_concept("a striped red star") == "a dotted red star"


def test_state_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    policy, objective = prepared()
    with run_of(policy, tmp_path) as run:
        objective.loss(policy, BATCH)
        objective.learn(run)
    again = prepared()[1]
    again.load_state_dict(objective.state_dict())
    torch.testing.assert_close(again.loss(policy, BATCH), objective.loss(policy, BATCH), rtol=0, atol=0)
    fresh = prepared()[1]
    assert not torch.equal(fresh.loss(policy, BATCH), objective.loss(policy, BATCH))
    with pytest.raises(ValueError, match="2 words with 3 finite vectors, got number 2 with 3"):
        again.load_state_dict({"words": {2: torch.zeros(3, 4)}, "updates": 0})


# As a constraint.


class Stopped(Exception):
    """What an interruption raises."""


def train(folder: Path, *, stop_at: int | None = None, resume: bool = False) -> dict[str, Tensor]:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    objective = Destruction(replace(SMALL, share=1.0), CAPTIONS)
    weight = FixedWeight(1.0)
    constraint = ObjectiveConstraint(objective, tinyworld.STRIPES, CAPTIONS, weight, ceiling=0.05)
    update = weight.update

    def interrupted(violation: float) -> None:
        update(violation)
        if objective.state_dict()["updates"] == stop_at:
            raise Stopped

    weight.update = interrupted
    config = ReFLConfig(
        batch_size=2, micro_batch_size=2, erasure_batch_size=4, steps=4, first_reward_step=2, last_reward_step=3,
        guidance_scale=3.0, pretraining_weight=0.0,
    )  # fmt: skip
    run = TrainingConfig(
        output_dir=folder, iterations=3, learning_rate=1e-3, checkpoint_every=1, resume=resume, progress=False
    )
    ReFLTrainer(policy, tinyworld.load_reward(), CAPTIONS, config, erasure=constraint).train(run)
    return {name: value.clone() for name, value in policy.trainable_state().items()}


def test_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(Stopped):
        train(tmp_path / "parted", stop_at=2)
    parted = train(tmp_path / "parted", resume=True)
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    words = [
        line["erasure/word_moved"]
        for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")
        if "erasure/word_moved" in line
    ]
    assert len(words) == 3
    assert min(words) > 0


def test_each_update_of_a_round_of_ddpo_takes_a_word(tmp_path: Path) -> None:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    objective = Destruction(SMALL, CAPTIONS)
    constraint = ObjectiveConstraint(objective, tinyworld.STRIPES, CAPTIONS, FixedWeight(1.0), ceiling=0.05)
    config = DDPOConfig(
        samples_per_round=8, updates_per_round=2, sampling_batch_size=8, minibatch_size=4, steps=2, guidance_scale=3.0,
        erasure_samples_per_round=4,
    )  # fmt: skip
    trainer = DDPOTrainer(policy, tinyworld.load_reward(), CAPTIONS, config, erasure=constraint)
    trainer.train(TrainingConfig(output_dir=tmp_path, iterations=2, learning_rate=1e-4, progress=False))
    assert objective.state_dict()["updates"] == 4


# What does not fit.


def test_a_word_has_to_have_room_in_the_constraints_prompts_before_a_picture_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    monkeypatch.setattr(destruction, "generated_latents", lambda *_, **__: pytest.fail("a picture was drawn"))
    constraint = ObjectiveConstraint(Destruction(SMALL, CAPTIONS), tinyworld.STRIPES, ["a red star " * 8])
    with pytest.raises(ValueError, match=r"leave room for DestructionConfig\.vectors=3 .* got 26: 'a red star"):
        constraint.prepare(policy)
    fitting = [ConceptPrompts(CAPTIONS), ConceptPrompts(CAPTIONS, ["a zebra star"])]
    for prompts in fitting:
        ObjectiveConstraint(Destruction(SMALL, CAPTIONS), tinyworld.STRIPES, prompts).check(policy)
    attacked = ObjectiveConstraint(Destruction(PLAIN), tinyworld.STRIPES, ["a red star " * 8], attack=SoftAttack())
    with pytest.raises(ValueError, match=r"room for SoftAttackConfig\.vectors=4"):
        attacked.check(policy)
    ObjectiveConstraint(Destruction(PLAIN), tinyworld.STRIPES, ["a red star " * 8]).check(policy)  # without words


def test_captions_that_no_picture_has_need_no_room() -> None:
    policy = tinyworld.load_policy()
    captions = [*CAPTIONS, "a red star " * 8]
    Destruction(replace(SMALL, pictures=2), captions).check_prompts(policy, [])
    with pytest.raises(ValueError, match=r"got 26: 'a red star"):
        Destruction(replace(SMALL, pictures=3), captions).check_prompts(policy, [])


def test_what_does_not_fit_is_told_before_work() -> None:
    policy = tinyworld.load_policy(lora=LoRAConfig(rank=2))
    with pytest.raises(ValueError, match="last_timestep must be below 1000, got 1000"):
        Destruction(replace(SMALL, last_timestep=1000)).prepare(policy, tinyworld.STRIPES)
    with pytest.raises(ValueError, match="first_timestep must be at most last_timestep=300, got 301"):
        replace(SMALL, first_timestep=301, last_timestep=300)
    with pytest.raises(ValueError, match=r"room for DestructionConfig.vectors=200"):
        Destruction(replace(SMALL, vectors=200)).prepare(policy, tinyworld.STRIPES)
    with pytest.raises(ValueError, match=r"leave room for DestructionConfig\.vectors=3 .* got 2[0-9]"):
        Destruction(SMALL, captions=["a striped red star " * 5]).prepare(policy, tinyworld.STRIPES)
    with pytest.raises(ValueError, match=r"the anchor of 'stripes' must be free of 'stripes', got 'striped' in"):
        Destruction(SMALL).prepare(policy, replace(tinyworld.STRIPES, anchor="a striped thing"))
    with pytest.raises(ValueError, match="trainable"):
        Destruction(SMALL).prepare(tinyworld.load_policy(), tinyworld.STRIPES)
    with pytest.raises(ValueError, match="prompt"):
        Destruction(SMALL, captions=[])
