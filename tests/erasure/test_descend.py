"""Training of an erasure: the loop, its rollouts, and what it says it will cost."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure import Concept, Erasure
from erasure.descend import DescentConfig, concept_batch, erase_by_descent
from erasure.estimate import estimate
from erasure.methods.esd import ESD, ESDConfig
from erasure.phrases import check_words
from erasure.protocols import ConceptBatch, UNetCalls
from erasure.registry import erase
from erasure.rollout import latents_before, noised_latents, random_stops
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.weights import base_parameters, select_parameters
from overpaint.training import read_metrics

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes"))
DESCENT = DescentConfig(iterations=4, learning_rate=1e-3, batch_size=2, checkpoint_every=1)
CONFIG = ESDConfig(train="xattn", steps=3, descent=DESCENT)


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


def equal(one: Erasure, other: Erasure) -> bool:
    ours, theirs = one.delta.tensors, other.delta.tensors
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_policy_is_left_as_it_was(bare: DiffusionPolicy) -> None:
    before = {name: value.detach().clone() for name, value in base_parameters(bare.unet).items()}
    erasure = ESD(CONFIG).erase(bare, CONCEPT, progress=False)
    assert any(value.any() for value in erasure.delta.tensors.values())
    assert all(torch.equal(value, before[name]) for name, value in base_parameters(bare.unet).items())


def test_an_interrupted_training_goes_on_to_the_same_numbers(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ESD(CONFIG).erase(bare, CONCEPT, progress=False)

    method = ESD(CONFIG)
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
    assert calls == 5  # two updates, the one that failed, and the last two
    assert equal(resumed, whole)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_resuming_needs_the_same_settings_and_a_folder(bare: DiffusionPolicy, tmp_path: Path) -> None:
    ESD(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="negative_guidance"):
        ESD(replace(CONFIG, negative_guidance=2.0)).erase(bare, CONCEPT, output_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume must come with the output_dir"):
        ESD(CONFIG).erase(bare, CONCEPT, resume=True)


def test_processes_that_cannot_share_a_batch_are_refused_before_anything_is_prepared(
    bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erasure.descend.process_state", lambda: SimpleNamespace(num_processes=2))
    DESCENT.check_processes()
    monkeypatch.setattr(ESD, "prepare", lambda self, policy, concept: pytest.fail("work was begun"))
    method = ESD(replace(CONFIG, descent=replace(DESCENT, batch_size=3)))
    with pytest.raises(ValueError, match="batch_size must be a multiple of 2, the number of processes, got 3"):
        method.erase(bare, CONCEPT, progress=False)
    monkeypatch.setattr(ESD, "erase", lambda self, policy, concept: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match="batch_size must be a multiple of 2"):
        erase(method, bare, CONCEPT)


@dataclass(frozen=True)
class DarkConfig:
    train: str = "xattn-kv"
    descent: DescentConfig = DESCENT


class Dark:
    """An objective of a user's own: predictions become small."""

    name = "Dark"
    erase = erase_by_descent
    config = DarkConfig()

    def unet_calls(self) -> UNetCalls:
        return UNetCalls(forward=0, backward=1)

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        check_words(policy, concept)

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> torch.Tensor:
        prompts = policy.encode(batch.prompts)
        latents, timesteps = noised_latents(policy, prompts, batch.seeds, steps=2, guidance_scale=1.0)
        return policy.predict_noise(latents, timesteps, prompts).square().flatten(1).mean(dim=1)


def test_any_objective_is_trained(bare: DiffusionPolicy, tmp_path: Path) -> None:
    erasure = Dark().erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    assert (erasure.method, erasure.concept, erasure.config["train"]) == ("Dark", CONCEPT, "xattn-kv")
    assert set(erasure.delta.tensors) == set(select_parameters(bare.unet, "xattn-kv"))
    losses = [row["erasure/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == DESCENT.iterations
    assert "dark" in json.loads((tmp_path / "run_config.json").read_text(encoding="utf-8"))


def test_a_batch_holds_phrases_of_the_concept_and_follows_from_the_generator() -> None:
    first, second = (concept_batch(CONCEPT, 64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first == second
    assert set(first.prompts) == set(CONCEPT.phrases)
    assert len(set(first.seeds)) == 64


def test_each_sample_stops_before_its_own_step(bare: DiffusionPolicy) -> None:
    embeddings, guidance = bare.encode(["striped", "a cat", "a dog"]), ClassifierFree(3.0)
    stops = torch.tensor([0, 3, 1])
    (latents,) = latents_before(bare, embeddings, stops[None], steps=4, guidance=guidance, seeds=[5, 6, 7])
    for index, (stop, seed) in enumerate(zip(stops.tolist(), [5, 6, 7], strict=True)):
        part = embeddings[index : index + 1]
        alone = bare.sample(part, steps=4, guidance=guidance, seeds=[seed], until=stop)
        torch.testing.assert_close(latents[index : index + 1], alone, rtol=0, atol=1e-5)


def test_stops_follow_from_the_seed_and_reach_every_step() -> None:
    stops = random_stops(range(100), 2, 5)
    assert set(stops.tolist()) == {2, 3, 4, 5}
    assert torch.equal(random_stops([7, 3], 2, 5), stops[[7, 3]])


def test_the_estimate_counts_what_training_does(bare: DiffusionPolicy) -> None:
    seen = {True: 0, False: 0}

    def count(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    config = replace(CONFIG, descent=replace(DESCENT, batch_size=60, iterations=2))
    said = estimate(ESD(config), bare, train="xattn")
    student = bare.student_copy("xattn")
    student.unet.register_forward_pre_hook(count, with_kwargs=True)
    for seed in range(2):
        ESD(config).loss(student, concept_batch(CONCEPT, 60, torch.Generator().manual_seed(seed)))
    assert seen[True] == said.backward == 120
    assert seen[False] == pytest.approx(said.forward, rel=0.15)  # the steps are drawn
    assert said.minutes > 0
    assert str(said).startswith("480 UNet forwards and 120 with gradient, about ")


def test_words_that_are_cut_off_and_an_anchor_that_is_the_concept_are_refused(bare: DiffusionPolicy) -> None:
    check_words(bare, CONCEPT)
    with pytest.raises(ValueError, match=r"texts of 'x' must have at most 24 tokens, got 122 in 'striped striped"):
        check_words(bare, Concept(name="x", phrases=("striped " * 30,)))
    with pytest.raises(ValueError, match="must not be one of its phrases, got 'Striped' as both"):
        ESD(CONFIG).erase(bare, Concept(name="x", phrases=("Striped",), anchor="striped "), progress=False)


@pytest.mark.parametrize(
    ("field", "value"), [("iterations", 0), ("learning_rate", 0.0), ("batch_size", 0), ("weight_decay", -1.0)]
)
def test_settings_of_the_descent_are_checked(field: str, value: float) -> None:
    settings: dict[str, Any] = {"iterations": 1, "learning_rate": 0.1} | {field: value}
    with pytest.raises(ValueError, match=rf"DescentConfig\.{field} must .*, got {value}"):
        DescentConfig(**settings)
