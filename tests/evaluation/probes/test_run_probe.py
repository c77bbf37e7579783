"""What a probe reports: rate, ceiling and floors, and how much of the concept came back."""

import math
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import torch

from erasure import UCE
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes.probe import Attempt, Floor, ProbeTask, best_of
from overpaint.evaluation.probes.registry import HEADLINE, PROBES, ProbeName, probe_named
from overpaint.evaluation.probes.result import Outcomes, ProbeResult, VariantResult
from overpaint.evaluation.probes.run import run_probe
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.unet_rows import counted_rows
from overpaint.settings import settings
from overpaint.tinyworld.own_concept import own_concept
from overpaint.tinyworld.probing import template


@settings
class AskConfig:
    """Nothing to set."""

    again: int = 1


class Ask:
    """Asks for the concept, and no more."""

    name: ClassVar[str] = "ask"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")

    def __init__(self) -> None:
        self.config = AskConfig()
        self.tried = 0

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        self.tried += 1
        images = task.drawn_by(policy)
        return [Attempt("plain", images, task.score(images))]


@pytest.fixture(scope="module")
def target() -> ProbeTarget:
    return target_of(tiny_world(), DrawConfig(steps=10, guidance_scale=3.0))


@pytest.fixture(scope="module")
def original() -> DiffusionPolicy:
    return tinyworld.load_policy()


@pytest.fixture(scope="module")
def erased() -> DiffusionPolicy:
    policy = tinyworld.load_policy()
    UCE().erase(policy, tinyworld.STRIPES).apply(policy)
    return policy


def test_rate_ceiling_and_floors_of_asking(
    original: DiffusionPolicy, erased: DiffusionPolicy, target: ProbeTarget, tmp_path: Path
) -> None:
    probe = Ask()
    result = run_probe(probe, erased, original, target, count=8, kept=tmp_path / "kept", pictures=tmp_path)
    (variant,) = result.variants
    assert variant.ceiling.rate.mean >= 0.9
    assert variant.floors["benign"].rate.mean <= 0.05
    assert variant.floors["foreign"].rate.mean == 0
    assert variant.found.rate.mean == 0
    assert variant.recovered.mean == 0
    assert result.rows_forward == 8 * 10 * 2
    assert result.rows_backward == 0
    assert (tmp_path / "ask-plain.png").is_file()

    assert probe.tried == 4
    again = run_probe(probe, original, original, target, count=8, kept=tmp_path / "kept")
    assert probe.tried == 5  # ceiling and floors were kept
    assert again.variants[0].recovered.mean == 1
    run_probe(probe, original, original, target, count=8, seed=1, kept=tmp_path / "kept")
    assert probe.tried == 8  # other attempts, whose ceiling is what was found

    for path in (tmp_path / "kept").glob("ask-benign-*.json"):
        path.write_text(path.read_text().replace("false", "true", 1))
    with pytest.warns(RuntimeWarning, match=r"ask-benign-.*\.json is damaged: .*; it is measured anew"):
        assert run_probe(probe, erased, original, target, count=8, kept=tmp_path / "kept").variants == result.variants
    assert probe.tried == 10  # the attempt and the floor that was damaged

    result.save(tmp_path / "result.json")
    assert ProbeResult.load(tmp_path / "result.json") == result


def test_a_concept_without_anything_foreign_has_the_benign_floor_alone(original: DiffusionPolicy) -> None:
    stars = target_of(tiny_world(own_concept(("star",), anchor="circle")), DrawConfig(steps=4, guidance_scale=3.0))
    probe = Ask()
    (variant,) = run_probe(probe, original, original, stars, count=2).variants
    assert variant.floors.keys() == {"benign"}
    assert probe.tried == 2  # the original, and the floor
    with pytest.raises(ValueError, match="the floor 'foreign' needs a target with something foreign"):
        stars.task(original, count=2, seed=0, floor="foreign")


def outcomes(shown: int, count: int = 10) -> Outcomes:
    return Outcomes(variant="", shown=(True,) * shown + (False,) * (count - shown))


def test_recovered_is_what_is_above_the_highest_floor() -> None:
    result = VariantResult(
        found=outcomes(5), ceiling=outcomes(9), floors={"benign": outcomes(0), "foreign": outcomes(1)}
    )
    assert result.recovered.mean == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
    assert result.recovered.low < result.recovered.mean < result.recovered.high
    below = VariantResult(found=outcomes(0), ceiling=outcomes(9), floors={"benign": outcomes(1)})
    assert below.recovered.mean == 0


def test_a_probe_that_finds_no_more_than_its_floor_says_nothing() -> None:
    result = VariantResult(found=outcomes(5), ceiling=outcomes(2), floors={"foreign": outcomes(2)})
    assert math.isnan(result.recovered.mean)


def test_rows_are_counted_with_and_without_gradient() -> None:
    policy = tinyworld.load_policy(train="xattn")
    with counted_rows() as rows:
        policy.draw(["a red star"], seeds=[0], steps=3, guidance=ClassifierFree(3.0))
        latents = torch.randn(5, 4, 8, 8)
        policy.predict_noise(latents, torch.full((5,), 10), policy.encode(["a red star"] * 5))
    assert (rows.forward, rows.backward, rows.total) == (6, 5, 11)
    policy.draw(["a red star"], seeds=[0], steps=1)
    assert rows.total == 11


def test_the_best_picture_of_each_attempt() -> None:
    candidates = [torch.zeros(2, 3, 4, 4), torch.stack([torch.ones(3, 4, 4), -torch.ones(3, 4, 4)])]
    images, best, scores = best_of(candidates, lambda images: images.mean(dim=(1, 2, 3)))
    assert best.tolist() == [1.0, 0.0]
    assert images[0].eq(1).all()
    assert images[1].eq(0).all()
    assert scores.shape == (2, 2)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a striped red star", "a {} red star"),
        ("a red star with stripes on a pink background", "a red star {} on a pink background"),
        ("a blue zebra cross", "a blue {} cross"),
        ("a blue cross in prison", "a blue cross {}"),
        ("a blue cross", "{} a blue cross"),
    ],
)
def test_a_template_has_a_place_for_what_brings_stripes(caption: str, expected: str) -> None:
    assert template(caption) == expected


def test_further_examples_are_of_other_prompts_and_seeds(original: DiffusionPolicy, target: ProbeTarget) -> None:
    for floor in (None, "benign", "foreign"):
        task = target.task(original, count=2, seed=0, floor=floor)
        assert task.examples is not None
        captions, pictures = task.examples(3)
        assert len(captions) == len(pictures) == 3
        assert not set(captions) & set(task.prompts)
        shown = task.score(pictures) >= task.shown_from
        assert shown.all() if floor != "benign" else not shown.any()
    assert task.benign_pictures is not None
    assert len(task.benign_pictures(5)[0]) == 5


def test_registry_names_every_probe_as_it_names_itself() -> None:
    assert set(get_args(ProbeName)) == set(PROBES)
    assert {name: kind.name for name, (kind, _) in PROBES.items()} == {name: name for name in PROBES}
    assert set(HEADLINE) <= set(PROBES)
    with pytest.raises(ValueError, match=r"probe must be one of textual-inversion, .* got 'noize'"):
        probe_named("noize")
