"""SLD against the authors' code, and against diffusers' deprecated pipeline of their method."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from erasure.sld import SafetyGuidance, SLDConfig, SLDSafeguard, safety_term
from policy import ClassifierFree, DiffusionPolicy, Moment

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "sld.json").read_text(encoding="utf-8"))
HYPER = RECORD["hyper"]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "sld.safetensors")


@pytest.fixture
def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu")


def config_of(case: str) -> SLDConfig:
    settings = HYPER["cases"][case]
    return SLDConfig(
        warmup_steps=settings["sld_warmup_steps"],
        guidance_scale=float(settings["sld_guidance_scale"]),
        threshold=settings["sld_threshold"],
        momentum_scale=settings["sld_momentum_scale"],
        momentum_beta=settings["sld_mom_beta"],
        concept_text=HYPER["safety_concept"],
    )


def check(actual: Tensor, name: str, tensors: dict[str, Tensor]) -> None:
    expected = tensors[name]
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() / expected.abs().max() <= RECORD["tensors"][name]["tol"], name


def test_cases_are_the_presets() -> None:
    text = HYPER["safety_concept"]
    assert config_of("medium") == replace(SLDConfig.medium(), concept_text=text)
    assert config_of("medium_warm4") == replace(SLDConfig.medium(), concept_text=text, warmup_steps=4)
    assert config_of("max") == replace(SLDConfig.max(), concept_text=text)


@pytest.mark.parametrize("step", [3, 7])
@pytest.mark.parametrize("case", sorted(HYPER["cases"]))
def test_a_step_is_that_of_the_authors_code(case: str, step: int, tensors: dict[str, Tensor]) -> None:
    def given(name: str) -> Tensor:
        return tensors[f"{case}/step{step}/{name}"]

    config = config_of(case)
    away, prompt, safety = given("eps_uncond"), given("eps_prompt"), given("eps_safety")
    term, momentum = safety_term(away, prompt, safety, given("momentum_before"), config)
    check(term, f"{case}/step{step}/safety_term", tensors)
    check(momentum, f"{case}/step{step}/momentum_after", tensors)
    towards = prompt - term if step >= config.warmup_steps else prompt
    guided = ClassifierFree(HYPER["guidance_scale"]).combine(
        torch.stack([away, towards]), Moment(torch.tensor([step]), 10, torch.ones(1))
    )
    check(guided, f"{case}/step{step}/eps_guided", tensors)


@pytest.mark.parametrize("case", sorted(HYPER["cases"]))
def test_a_trajectory_is_that_of_the_authors_code(
    case: str, golden_policy: DiffusionPolicy, tensors: dict[str, Tensor]
) -> None:
    SafetyGuidance(config_of(case)).apply(golden_policy)
    embeddings = golden_policy.encode([HYPER["prompt"]])
    torch.testing.assert_close(embeddings, tensors["emb_prompt"], rtol=0, atol=1e-5)  # of order 1
    guidance, steps = ClassifierFree(HYPER["guidance_scale"]), HYPER["steps"]
    assert golden_policy.timesteps(steps).tolist() == tensors[f"{case}/timesteps"].tolist()
    states = [tensors["latents_init"]]
    with torch.no_grad():
        for step in range(steps):
            states.append(golden_policy.denoise(states[-1], embeddings, step=step, steps=steps, guidance=guidance))
    check(torch.cat(states[1:]), f"{case}/latents_after_step", tensors)


def test_medium_never_acts_within_its_warm_up(golden_policy: DiffusionPolicy, tensors: dict[str, Tensor]) -> None:
    latents, embeddings = tensors["latents_init"], golden_policy.encode([HYPER["prompt"]])
    guidance, steps = ClassifierFree(HYPER["guidance_scale"]), HYPER["steps"]
    with torch.no_grad():
        for step in range(steps):
            latents = golden_policy.denoise(latents, embeddings, step=step, steps=steps, guidance=guidance)
    expected = tensors["medium/latents_after_step"][-1:]
    assert (latents - expected).abs().max() / expected.abs().max() <= 3e-5


def states_of(pipeline: Any, **options: Any) -> Tensor:
    """Returns the latents after each step of a pipeline's run."""
    states: list[Tensor] = []
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        [HYPER["prompt"], "a cat"], latents=latents, guidance_scale=7.5, num_inference_steps=14, output_type="np",
        callback=lambda step, timestep, latents: states.append(latents.clone()), callback_steps=1, **options,
    )  # fmt: skip
    return torch.stack(states)


# Both pipelines are driven through arguments that diffusers has deprecated, and one is deprecated altogether.
@pytest.mark.filterwarnings("ignore:.*deprecate.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "config", "negative"),
    [
        ("DDIMScheduler", SLDConfig.medium(), None),
        ("DDIMScheduler", SLDConfig.max(), None),
        ("PNDMScheduler", SLDConfig.medium(), None),
        ("PNDMScheduler", SLDConfig.max(), None),
        ("DPMSolverMultistepScheduler", SLDConfig.strong(), ["a dog", "painting"]),
    ],
    ids=["ddim-medium", "ddim-max", "pndm-medium", "pndm-max", "dpm-strong-negative"],
)
def test_a_plain_pipeline_is_diffusers_deprecated_safe_pipeline(
    scheduler: str, config: SLDConfig, negative: list[str] | None, golden_policy: DiffusionPolicy
) -> None:
    import diffusers

    pipeline = golden_policy.to_pipeline()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config({**pipeline.scheduler.config, "clip_sample": False})
    make: Any = diffusers.StableDiffusionPipelineSafe
    oracle = make(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=pipeline.unet,
        scheduler=type(pipeline.scheduler).from_config(pipeline.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    oracle.safety_concept = HYPER["safety_concept"]
    expected = states_of(
        oracle,
        negative_prompt=negative,
        sld_warmup_steps=config.warmup_steps,
        sld_guidance_scale=config.guidance_scale,
        sld_threshold=config.threshold,
        sld_momentum_scale=config.momentum_scale,
        sld_mom_beta=config.momentum_beta,
    )
    plain = states_of(pipeline, negative_prompt=negative)

    SafetyGuidance(replace(config, concept_text=HYPER["safety_concept"])).apply_to_pipeline(pipeline)
    actual = states_of(pipeline, negative_prompt=negative)
    # Theirs subtracts from the difference of the two predictions, ours from the prompt's: rounding, which grows.
    error = (actual - expected).abs().amax(dim=(1, 2, 3, 4)) / expected.abs().max()
    assert error.max() <= 5e-5
    # PNDM's first step is two calls of the network, of which the first is not reported: warm-up counts it.
    quiet = max(config.warmup_steps - (scheduler == "PNDMScheduler"), 0)
    assert torch.equal(actual[:quiet], plain[:quiet])
    assert not torch.equal(actual[quiet], plain[quiet])
    assert (actual[-1] - plain[-1]).abs().max() / expected.abs().max() > 1e-2


def test_the_safeguard_shows_its_settings(golden_policy: DiffusionPolicy) -> None:
    SafetyGuidance(config_of("max")).apply(golden_policy)
    assert isinstance(golden_policy.safeguard, SLDSafeguard)
    assert "guidance_scale=5000.0" in repr(golden_policy.safeguard)
