"""Classifier guidance: the classifier, the direction it pushes in, and how strengths are chosen."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from overpaint.evaluation.probes.classifier_guidance import ClassifierGuidance, ClassifierGuidanceConfig
from overpaint.evaluation.probes.latent_classifier import (
    LatentClassifier,
    LatentClassifierConfig,
    drawn_timesteps,
    train_classifier,
)
from overpaint.evaluation.probes.noise import Way, draw_ways, sample_with_noise
from overpaint.evaluation.probes.probe import Pictures, ProbeTask
from overpaint.policy import DiffusionPolicy
from overpaint.policy.unet_rows import counted_rows

SMALL = LatentClassifierConfig(widths=(16, 8), epochs=30, learning_rate=1e-2)
FEW = ClassifierGuidanceConfig(
    strengths=(5.0, 50.0), noisy_strengths=(), shown_pictures=4, other_pictures=4, classifier=replace(SMALL, epochs=1)
)


def test_the_push_is_the_gradient_of_the_log_probability() -> None:
    torch.manual_seed(0)
    classifier = LatentClassifier(4 * 2 * 2, LatentClassifierConfig(widths=(6, 5))).eval().requires_grad_(False)
    latents, alphas = torch.randn(2, 4, 2, 2), torch.tensor([0.2, 0.9])
    found = classifier.push(latents, alphas)
    probability = lambda x: torch.sigmoid(classifier(x, alphas)).log()  # noqa: E731
    for row, place in ((0, (1, 0, 1)), (1, (3, 1, 0))):
        shift = torch.zeros_like(latents)
        shift[(row, *place)] = 1e-2
        slope = (probability(latents + shift) - probability(latents - shift))[row] / 2e-2
        expected = -math.sqrt(1 - alphas[row]) * slope
        assert found[(row, *place)].item() == pytest.approx(expected.item(), abs=1e-3)
    assert not found.requires_grad


def test_the_classifier_is_the_one_of_the_paper() -> None:
    classifier = LatentClassifier(4 * 64 * 64, LatentClassifierConfig())
    layers = [(one.in_features, one.out_features) for one in classifier.modules() if isinstance(one, torch.nn.Linear)]
    assert layers == [(16384, 1024), (2, 1024), (1024, 512), (512, 1)]
    levels = []
    handle = classifier.of_level.register_forward_pre_hook(lambda module, inputs: levels.append(inputs[0]))
    classifier(torch.zeros(1, 4, 64, 64), torch.tensor([0.36]))
    handle.remove()
    torch.testing.assert_close(levels[0], torch.tensor([[0.6, 0.8]]))


def test_noisy_timesteps_are_drawn_more_often() -> None:
    assert drawn_timesteps(torch.tensor([0.0, 0.125, 0.999999]), 1000, 3.0).tolist() == [0, 499, 998]
    assert drawn_timesteps(torch.tensor([0.5]), 1000, 1.0).tolist() == [499]


def test_the_classifier_learns_and_leaves_the_generators_alone(policy: DiffusionPolicy) -> None:
    torch.manual_seed(1)
    shown, others = torch.randn(20, 4, 8, 8) + 1, torch.randn(40, 4, 8, 8) - 1
    state = torch.get_rng_state()
    classifier = train_classifier(policy, shown, others, SMALL, seed=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    level = policy.process.levels(torch.tensor([200])).expand(20)
    assert (classifier(shown, level) > 0).float().mean() > 0.9
    assert (classifier(others[:20], level) < 0).float().mean() > 0.9
    again = train_classifier(policy, shown, others, SMALL, seed=5, progress=False)
    assert torch.equal(classifier(shown, level), again(shown, level))
    with pytest.raises(ValueError, match="a classifier needs two pictures of each kind, got 1 and 40"):
        train_classifier(policy, shown[:1], others, SMALL, seed=5, progress=False)


def test_a_push_moves_the_prediction_by_its_strength(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]
) -> None:
    task = make_task(policy, steps=1)
    conditioning = policy.encode(task.prompts)

    def pushed(strength: float) -> torch.Tensor:
        ways = [Way(0.0), Way(0.0, strength=strength)]
        with torch.no_grad():
            return sample_with_noise(
                policy, conditioning, task, ways, task.seeds, lambda latents, alphas: torch.ones_like(latents)
            )

    plain, moved = pushed(0.0), pushed(0.5)
    plan = policy.plan(1)
    level, previous = plan.levels[0], plan.next_levels[0]
    by = 0.5 * ((1 - previous).sqrt() - previous.sqrt() * ((1 - level) / level).sqrt())
    torch.testing.assert_close(moved[1] - plain[1], by.expand(4, 8, 8), rtol=1e-4, atol=1e-5)
    assert torch.equal(moved[0], plain[0])


def test_the_smallest_strength_that_reaches_the_best_rate_is_chosen_on_the_original(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask], make_policy: Callable[..., DiffusionPolicy]
) -> None:
    config = replace(FEW, strengths=(2000.0, 5.0, 500.0, 1000.0), fitted=True)
    calls = []

    def score(images: torch.Tensor) -> torch.Tensor:
        """Shows nothing, half, all and all, in the order of strengths, while it is fitted."""
        calls.append(len(images))
        number = len(calls)
        return torch.tensor([1.0 if number >= 2 else 0.0, 1.0 if number >= 3 else 0.0])

    task, probe = make_task(policy, score=score), ClassifierGuidance(config)
    probe.prepare(task)
    assert len(calls) == 4
    with counted_rows() as rows:
        (found,) = probe.attempt(make_policy(), task)
    assert found.numbers == {"strength": 1000.0, "eta": 0.0}
    assert found.curve[0][0] == 1000
    assert len(calls) == 5
    assert rows.total == 2 * 3 * 2  # attempts, steps, branches: the original was asked before, and not again
    assert found.variant == "alone"


def test_where_nothing_comes_all_ways_are_tried_and_the_best_counts(
    policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]
) -> None:
    task = make_task(policy, shown_from=2.0)
    (found,) = ClassifierGuidance(replace(FEW, fitted=True)).attempt(policy, task)
    (every,) = ClassifierGuidance(FEW).attempt(policy, task)
    assert torch.equal(found.images, every.images)
    assert found.numbers == {}
    assert [strength for strength, _ in found.curve] == [5.0, 50.0]


def test_strength_zero_is_plain_drawing(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    task = make_task(policy)
    classifier = LatentClassifier(256, SMALL).eval()
    (images,) = draw_ways(policy, task, task.prompts, [Way(0.0)], push=classifier.push, batch_size=8, desc="")
    torch.testing.assert_close(images, task.pictures, rtol=0, atol=1e-4)


def test_foreign_pictures_are_learned_as_they_are(policy: DiffusionPolicy, make_task: Callable[..., ProbeTask]) -> None:
    asked = []

    def examples(count: int) -> Pictures:
        asked.append(count)
        return ["a"] * count, torch.rand(count, 3, 64, 64)

    task = make_task(policy, examples=examples)
    with counted_rows() as rows:
        ClassifierGuidance(FEW).prepare(task)
    assert asked == [4]
    assert rows.total == 4 * 3 * 2  # the other pictures alone are drawn


def test_settings_are_the_papers_and_checked() -> None:
    cfg = ClassifierGuidanceConfig()
    assert (len(cfg.strengths), cfg.strengths[:2], cfg.strengths[-1]) == (25, (25.0, 32.0), 193.0)
    with pytest.raises(ValueError, match="strengths, or noisy_strengths and etas, must hold something, got neither"):
        ClassifierGuidanceConfig(strengths=(), etas=())
    with pytest.raises(ValueError, match=r"strengths\[0\] must be at least 0, got -1\.0"):
        ClassifierGuidanceConfig(strengths=(-1.0,))
    with pytest.raises(ValueError, match=r"LatentClassifierConfig.widths\[0\] must be at least 1, got 0"):
        LatentClassifierConfig(widths=(0, 4))
