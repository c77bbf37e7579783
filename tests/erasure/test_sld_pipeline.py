"""SLD attached to a plain diffusers pipeline."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure import Concept
from erasure.guards import detach
from erasure.methods.sld import SLD, SLDChange, SLDConfig
from overpaint.policy import ClassifierFree, DiffusionPolicy, SampleNoise

STRIPED = Concept(name="stripes", phrases=("striped", "with stripes"))
PROMPTS = ["a striped red circle", "a dotted blue square"]
SEEDS = [1, 2]
STEPS = 6
EARLY = SLDConfig(warmup_steps=2, guidance_scale=20.0, threshold=0.1, momentum_scale=0.5, momentum_beta=0.6)
CHANGE = SLDChange(
    SLDConfig(
        warmup_steps=2,
        guidance_scale=20.0,
        threshold=0.1,
        momentum_scale=0.5,
        momentum_beta=0.6,
        concept_text="striped",
    )
)
CFG = ClassifierFree(3.0)


@pytest.fixture(params=["epsilon", "v_prediction"])
def either(request: pytest.FixtureRequest) -> DiffusionPolicy:
    return request.getfixturevalue("policy" if request.param == "epsilon" else "v_policy")


@pytest.fixture
def pipeline(make_policy: Callable[..., DiffusionPolicy]) -> Any:
    return ddim(make_policy().to_pipeline())


def ddim(pipeline: Any) -> Any:
    """Returns the pipeline with the policy's sampler."""
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(seeds: list[int] = SEEDS) -> Tensor:
    return SampleNoise(seeds, (4, 8, 8), torch.device("cpu")).draw()


def draw(pipeline: Any, **options: Any) -> Tensor:
    wanted = {"prompt": PROMPTS, "latents": noise(), "guidance_scale": 3.0, "num_inference_steps": STEPS} | options
    images = pipeline(**wanted, output_type="pt").images
    assert images.isfinite().all()
    return images


def test_pipeline_and_policy_draw_the_same(either: DiffusionPolicy) -> None:
    pipeline = ddim(either.to_pipeline())
    plain = draw(pipeline)
    erasure = SLD(EARLY).erase(either, STRIPED)
    erasure.apply_to_pipeline(pipeline)
    erasure.apply(either)
    erased = draw(pipeline)
    torch.testing.assert_close(erased, either.draw(PROMPTS, steps=STEPS, seeds=SEEDS, guidance=CFG), rtol=0, atol=1e-5)
    assert (erased - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipeline), erased)


def test_a_safe_policys_pipeline_is_safe(policy: DiffusionPolicy) -> None:
    CHANGE.apply(policy)
    expected = policy.draw(PROMPTS, steps=STEPS, seeds=SEEDS, guidance=CFG)
    torch.testing.assert_close(draw(ddim(policy.to_pipeline())), expected, rtol=0, atol=1e-5)


def test_negative_prompts_and_several_images_for_a_prompt(policy: DiffusionPolicy) -> None:
    CHANGE.apply(policy)
    negative = ["a cat", "a dog"]
    drawn = draw(
        ddim(policy.to_pipeline()), negative_prompt=negative, num_images_per_prompt=2, latents=noise([1, 2, 3, 4])
    )
    twice = [prompt for prompt in PROMPTS for _ in range(2)]
    away = policy.encode([text for text in negative for _ in range(2)])
    expected = policy.draw(twice, steps=STEPS, seeds=[1, 2, 3, 4], guidance=ClassifierFree(3.0, away))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-5)


def test_scale_of_guidance_is_the_pipelines(policy: DiffusionPolicy) -> None:
    CHANGE.apply(policy)
    expected = policy.draw(PROMPTS, steps=STEPS, seeds=SEEDS, guidance=ClassifierFree(6.0))
    drawn = draw(ddim(policy.to_pipeline()), guidance_scale=6.0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-5)


def test_it_acts_without_guidance_too(policy: DiffusionPolicy) -> None:
    pipeline = ddim(policy.to_pipeline())
    plain = draw(pipeline, guidance_scale=1.0)
    CHANGE.apply_to_pipeline(pipeline)
    CHANGE.apply(policy)
    expected = policy.draw(PROMPTS, steps=STEPS, seeds=SEEDS, guidance=ClassifierFree(1.0))
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(draw(pipeline, guidance_scale=1.0), expected, rtol=0, atol=1e-5)
    draw(pipeline)
    torch.testing.assert_close(draw(pipeline, guidance_scale=1.0), expected, rtol=0, atol=1e-5)


def test_strength_zero_changes_nothing(pipeline: Any, policy: DiffusionPolicy) -> None:
    plain = draw(pipeline)
    SLD(EARLY).erase(policy, STRIPED, 0.0).apply_to_pipeline(pipeline)
    assert torch.equal(draw(pipeline), plain)


def test_detaching_gives_back_the_pipeline_to_the_bit(pipeline: Any) -> None:
    plain = draw(pipeline)
    with pytest.raises(ValueError, match="the pipeline must have a guard attached, got none"):
        detach(pipeline)
    CHANGE.apply_to_pipeline(pipeline)
    with pytest.raises(ValueError, match=r"a pipeline takes one guard, and this one has .*SLDGuard"):
        CHANGE.apply_to_pipeline(pipeline)
    draw(pipeline)
    detach(pipeline)
    assert torch.equal(draw(pipeline), plain)
    assert not pipeline.unet._forward_hooks
    assert not pipeline.unet._forward_pre_hooks


@pytest.mark.parametrize("scheduler", ["PNDM", "EulerAncestralDiscrete", "HeunDiscrete", "UniPCMultistep"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_every_step_of_other_samplers_is_counted(scheduler: str, pipeline: Any) -> None:
    import diffusers

    pipeline.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipeline.scheduler.config)
    plain, generator = draw(pipeline, generator=torch.Generator().manual_seed(0)), torch.Generator()
    calls = len(pipeline.scheduler.timesteps)
    drawn = []
    for warmup in (calls, calls - 1, 0):
        config = SLDConfig(guidance_scale=20.0, threshold=0.1, warmup_steps=warmup, concept_text="striped")
        SLDChange(config).apply_to_pipeline(pipeline)
        drawn.append(draw(pipeline, generator=generator.manual_seed(0)))
        assert torch.equal(draw(pipeline, generator=generator.manual_seed(0)), drawn[-1])
        detach(pipeline)
    assert torch.equal(drawn[0], plain)
    assert not torch.equal(drawn[1], plain)
    assert not torch.equal(drawn[2], drawn[1])


def test_a_run_after_one_that_was_broken_off_begins_anew(pipeline: Any) -> None:
    CHANGE.apply_to_pipeline(pipeline)
    whole = draw(pipeline)

    def stop(pipeline: Any, step: int, timestep: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        pipeline._interrupt = step == 2
        return kept

    draw(pipeline, callback_on_step_end=stop)
    assert torch.equal(draw(pipeline), whole)
    draw(pipeline, num_inference_steps=3, prompt=["a cat"], latents=noise([5]))
    assert torch.equal(draw(pipeline), whole)


def test_three_parts_go_through_the_network_in_one_call(pipeline: Any) -> None:
    sizes: list[int] = []
    pipeline.unet.conv_in.register_forward_hook(lambda layer, inputs, output: sizes.append(len(output)))
    CHANGE.apply_to_pipeline(pipeline)
    draw(pipeline, num_inference_steps=2)
    detach(pipeline)
    SLDChange(replace(CHANGE.config, guidance_scale=0.0)).apply_to_pipeline(pipeline)
    draw(pipeline, num_inference_steps=2)
    assert sizes == [6, 6, 4, 4]


def test_whoever_else_calls_the_network_is_told(pipeline: Any) -> None:
    draw(pipeline)
    policy = DiffusionPolicy(pipeline, device="cpu")
    CHANGE.apply_to_pipeline(pipeline)
    with pytest.raises(ValueError, match=r"the UNet must compute as its class does, got a hook of erasure.methods.sld"):
        DiffusionPolicy(pipeline, device="cpu")
    with pytest.raises(ValueError, match="a UNet with SLD attached must be called by the pipeline"):
        policy.draw(PROMPTS, steps=2, seeds=SEEDS)
    with pytest.raises(ValueError, match="SLD needs every step of a pipeline's run from the first on, got timestep 7"):
        pipeline.unet(noise().repeat(2, 1, 1, 1), torch.tensor(7), encoder_hidden_states=torch.zeros(4, 24, 16))


def test_image_prompts_are_refused(pipeline: Any) -> None:
    draw(pipeline)
    CHANGE.apply_to_pipeline(pipeline)
    with pytest.raises(ValueError, match="SLD in a pipeline must be used without image prompts"):
        pipeline.unet(
            noise().repeat(2, 1, 1, 1),
            pipeline.scheduler.timesteps[0],
            encoder_hidden_states=torch.zeros(4, 24, 16),
            added_cond_kwargs={"image_embeds": [torch.zeros(4, 1, 16)]},
        )


def test_half_precision(pipeline: Any) -> None:
    exact = SLDChange(CHANGE.config)
    exact.apply_to_pipeline(pipeline)
    expected = draw(pipeline, num_inference_steps=3)
    detach(pipeline)
    pipeline.to(torch.bfloat16)
    exact.apply_to_pipeline(pipeline)
    drawn = draw(pipeline, num_inference_steps=3, latents=noise().bfloat16())
    # Images from 0 to 1: a quarter of bfloat16's unit, and room for another rounding.
    assert (drawn.float() - expected).abs().mean() < torch.finfo(torch.bfloat16).eps
