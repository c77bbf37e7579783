"""What all ten methods promise, whatever family they are of; a new method is one row of METHODS."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from erasure import Concept, ConceptBatch, Erasure, Objective, ObjectiveConstraint
from erasure.descend import DescentConfig
from erasure.methods.ac import AC, ACConfig
from erasure.methods.ant import ANT, ANTConfig
from erasure.methods.ant.saliency import SaliencyConfig
from erasure.methods.eraseflow import EraseFlow, EraseFlowConfig
from erasure.methods.esd import ESD, ESDConfig
from erasure.methods.mace import MACE, MACEConfig
from erasure.methods.receler import Receler, RecelerConfig
from erasure.methods.sa import SA, SAConfig
from erasure.methods.sa.fisher import FisherConfig
from erasure.methods.safree import SAFREE, SAFREEConfig
from erasure.methods.sld import SLD, SLDConfig
from erasure.methods.uce import UCE
from erasure.registry import METHODS as NAMES
from erasure.registry import MethodName, erase, method_named
from overpaint.policy import ClassifierFree, DiffusionPolicy, SampleNoise
from overpaint.policy.weights import base_parameters
from overpaint.tinyworld.presets import PRESETS

STRIPED = Concept(name="stripes", phrases=("striped", "with stripes"))
DOTTED = Concept(name="dots", phrases=("dotted",))
PROMPTS = ["a striped red circle", "a dotted blue square"]
ELICITING = ["a striped red circle", "a cat with stripes"]
PICTURES = ("a red circle", "a cat", "a blue square")
DESCENT = DescentConfig(iterations=2, learning_rate=3e-3, batch_size=2)


def saliency(concept: Concept) -> SaliencyConfig:
    return SaliencyConfig(prompts=concept.phrases, seeds=(3,), iterations=1, learning_rate=1e-3)


METHODS: dict[str, Callable[[Concept], Any]] = {
    "sld": lambda concept: SLD(SLDConfig(warmup_steps=1, guidance_scale=20.0, threshold=0.1)),
    "safree": lambda concept: SAFREE(SAFREEConfig(filtered_steps=50, midpoint=0.0)),
    "uce": lambda concept: UCE(),
    "mace": lambda concept: MACE(
        MACEConfig(
            templates=("a {} circle",), prior=PICTURES, prior_weight=0.1, fusion_prior_weight=0.1, prior_size=None,
            prompts=("a {}",), images=2, steps=2, guidance_scale=3.0, mask_timesteps=(400,), descent=DESCENT,
        )
    ),
    "esd": lambda concept: ESD(ESDConfig(train="xattn", steps=2, descent=DESCENT)),
    "ac": lambda concept: AC(
        ACConfig(anchors=PICTURES, templates=("{concept} {anchor}",), images=3, steps=2, descent=DESCENT)
    ),
    "sa": lambda concept: SA(
        SAConfig(
            train="xattn", surrogates=PICTURES, replay=("a dog",), images=3, steps=2,
            fisher=FisherConfig(images=1, timesteps=2), descent=DESCENT,
        )
    ),
    "receler": lambda concept: Receler(
        RecelerConfig(rank=4, tokens=2, inner_steps=2, steps=2, descent=DESCENT)
    ),
    "ant": lambda concept: ANT(ANTConfig(steps=2, saliency=saliency(concept), descent=DESCENT)),
    "eraseflow": lambda concept: EraseFlow(EraseFlowConfig(steps=2, retain_share=0.0, descent=DESCENT)),
}  # fmt: skip
"""Each with settings that take a moment on the tiny pipeline."""

REFUSED = {
    "sld": "a policy takes one guard",
    "safree": "a policy takes one guard",
    "receler": "erasers must be the first networks",
}
"""Where two concepts are two phrases of one erasure."""

every_method = pytest.mark.parametrize("name", list(METHODS))
every_safeguard = pytest.mark.parametrize("name", ["sld", "safree"])
every_objective = pytest.mark.parametrize("name", ["mace", "esd", "ac", "sa", "receler", "ant", "eraseflow"])


def erased_by(name: str, policy: DiffusionPolicy, concept: Concept = STRIPED) -> Erasure:
    return erase(METHODS[name](concept), policy, concept, progress=False)


def draw(policy: DiffusionPolicy, prompts: list[str] = PROMPTS, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    return policy.draw(prompts, seeds=list(seeds), steps=3, guidance=ClassifierFree(3.0))


def ddim(pipeline: Any) -> Any:
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights(policy: DiffusionPolicy) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base_parameters(policy.unet).items()}


def test_the_table_has_every_method() -> None:
    assert METHODS.keys() == NAMES.keys() == PRESETS.keys()


@every_method
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_erasing_leaves_the_policy_as_it_was_and_applying_changes_its_pictures(
    make_policy: Callable[..., DiffusionPolicy],
    pipeline_dir: Path,
    v_pipeline_dir: Path,
    name: str,
    prediction: str,
) -> None:
    policy = make_policy(path=pipeline_dir if prediction == "epsilon" else v_pipeline_dir)
    before, plain = weights(policy), draw(policy)
    erasure = erased_by(name, policy)
    assert all(torch.equal(value, before[key]) for key, value in weights(policy).items())
    assert torch.equal(draw(policy), plain)
    erasure.apply(policy)
    erased = draw(policy)
    assert erased.isfinite().all()
    assert not torch.equal(erased[0], plain[0])


@every_method
def test_what_was_saved_and_loaded_draws_the_same_bits_in_a_policy_and_in_a_plain_pipeline(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path, name: str
) -> None:
    policy, other, third = make_policy(), make_policy(), make_policy()
    erasure = erased_by(name, policy)
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path)
    assert (loaded.method, loaded.config, loaded.concept) == (erasure.method, erasure.config, erasure.concept)
    erasure.apply(policy)
    loaded.apply(other)
    expected = draw(policy)
    assert torch.equal(draw(other), expected)
    pipeline = ddim(third.to_pipeline())
    loaded.apply_to_pipeline(pipeline)
    noise = SampleNoise([1, 2], (4, 8, 8), torch.device("cpu")).draw()
    images = pipeline(PROMPTS, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


@every_method
def test_a_second_concept_is_erased_otherwise(make_policy: Callable[..., DiffusionPolicy], name: str) -> None:
    drawn = []
    for concept in (STRIPED, DOTTED):
        policy = make_policy()
        erased_by(name, policy, concept).apply(policy)
        drawn.append(draw(policy))
    assert not torch.equal(*drawn)


@every_method
def test_a_second_concept_is_erased_after_the_first_or_refused(
    make_policy: Callable[..., DiffusionPolicy], name: str
) -> None:
    policy = make_policy()
    erased_by(name, policy, STRIPED).apply(policy)
    first = draw(policy)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            erased_by(name, policy, DOTTED).apply(policy)
        assert torch.equal(draw(policy), first)
    else:
        second = erased_by(name, policy, DOTTED)
        second.apply(policy)
        assert not torch.equal(draw(policy), first)
        with pytest.raises(ValueError, match=r"must have the weights that .* erased 'dots' from"):
            second.apply(make_policy())


@every_safeguard
def test_a_picture_does_not_depend_on_its_batch(make_policy: Callable[..., DiffusionPolicy], name: str) -> None:
    policy = make_policy()
    erased_by(name, policy).apply(policy)
    both = draw(policy)
    alone = torch.cat([draw(policy, [prompt], (seed,)) for prompt, seed in zip(PROMPTS, (1, 2), strict=True)])
    torch.testing.assert_close(alone, both, rtol=1e-4, atol=1e-5)


@every_objective
def test_its_loss_is_a_constraint_whose_gradient_reaches_what_is_trained(policy: DiffusionPolicy, name: str) -> None:
    method = METHODS[name](STRIPED)
    assert isinstance(method, Objective)
    method.prepare(policy, STRIPED)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter += 0.05
    constraint = ObjectiveConstraint(method, STRIPED, ELICITING)
    constraint.violation(policy, ConceptBatch(ELICITING, [1, 2])).mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.trainable_parameters())


@every_method
@pytest.mark.parametrize("settings", [{}, PRESETS], ids=["official", "tiny-world"])
def test_settings_of_either_preset_can_be_made(name: str, settings: Mapping[str, Any]) -> None:
    method = method_named(name, settings.get(name), seed=7)
    assert name not in settings or type(settings[name]) is type(method.config)
    if hasattr(method.config, "descent"):
        assert method.config.descent.seed == 7


def test_the_type_of_a_setting_names_the_methods_of_the_registry_in_their_order() -> None:
    assert get_args(MethodName) == tuple(NAMES)
