"""SLD against the authors' code, and against diffusers' deprecated pipeline of their method."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure.methods.sld import SLDChange, SLDConfig, SLDGuard, safety_term
from overpaint.policy import ClassifierFree, DiffusionPolicy, StepContext
from tests.erasure.erasure_case import TINY_SD, ErasureCase

CASE = ErasureCase(
    "sld",
    {
        "cross_check_max_abs_diff_to_diffusers_deprecated_pipeline/*": "zero between two programs on the machine that "
        "wrote the file; here that pipeline is compared with ours, within rounding"
    },
)
HYPER = CASE.record["hyper"]
STEPS = HYPER["steps"]
CASES = sorted(HYPER["cases"])
SINGLE = sorted({int(step) for name in CASE.tensors for step in re.findall(r"/step(\d+)/", name)})
"""Steps that can be checked alone."""


@pytest.fixture
def golden_policy() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, device="cpu")


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


def drawn(policy: DiffusionPolicy) -> Tensor:
    """The latents after each step from the stored noise."""
    embeddings, guidance = policy.encode([HYPER["prompt"]]), ClassifierFree(HYPER["guidance_scale"])
    states = [CASE.tensors["latents_init"]]
    with torch.no_grad():
        for step in range(STEPS):
            states.append(policy.denoise(states[-1], embeddings, step=step, steps=STEPS, guidance=guidance))
    return torch.cat(states[1:])


def test_cases_are_the_presets() -> None:
    text = HYPER["safety_concept"]
    assert config_of("medium") == replace(SLDConfig.medium(), concept_text=text)
    warmup = HYPER["cases"]["medium_warm4"]["sld_warmup_steps"]
    assert config_of("medium_warm4") == replace(SLDConfig.medium(), concept_text=text, warmup_steps=warmup)
    assert config_of("max") == replace(SLDConfig.max(), concept_text=text)


def test_the_schedule_is_the_one_that_the_policy_draws_by(golden_policy: DiffusionPolicy) -> None:
    schedule: Any = golden_policy.scheduler.config
    betas = f"{schedule.beta_start}..{schedule.beta_end} {schedule.beta_schedule}"
    # That it neither adds noise nor clips is no setting: the trajectories show it.
    assert HYPER["scheduler"] == (
        f"DDIM, eta 0, num_train_timesteps {golden_policy.num_timesteps}, beta {betas}, "
        f"clip_sample False, set_alpha_to_one {schedule.set_alpha_to_one}, "
        f"steps_offset {schedule.steps_offset}"
    )
    for case in CASES:
        assert golden_policy.plan(STEPS).timesteps.tolist() == CASE.tensors[f"{case}/timesteps"].tolist()


def test_texts_are_read_as_in_the_authors_code(golden_policy: DiffusionPolicy) -> None:
    CASE.check_embedding(golden_policy, "emb_empty", "")
    CASE.check_embedding(golden_policy, "emb_prompt", HYPER["prompt"])
    CASE.check_embedding(golden_policy, "emb_safety", HYPER["safety_concept"])


@pytest.mark.parametrize("step", SINGLE)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_authors_code(case: str, step: int) -> None:
    given, config = CASE.tensors.under(f"{case}/step{step}/"), config_of(case)
    away, prompt, safety = given["eps_uncond"], given["eps_prompt"], given["eps_safety"]
    term, momentum = safety_term(away, prompt, safety, given["momentum_before"], config)
    CASE.check(f"{case}/step{step}/safety_term", term)
    CASE.check(f"{case}/step{step}/momentum_after", momentum)
    towards = prompt - term if step >= config.warmup_steps else prompt
    moment = StepContext(torch.tensor([step]), STEPS, torch.ones(1))
    guided = ClassifierFree(HYPER["guidance_scale"]).combine(torch.stack([away, towards]), moment)
    CASE.check(f"{case}/step{step}/eps_guided", guided)


@pytest.mark.parametrize("case", CASES)
def test_a_trajectory_is_that_of_the_authors_code(case: str, golden_policy: DiffusionPolicy) -> None:
    SLDChange(config_of(case)).apply(golden_policy)
    CASE.check(f"{case}/latents_after_step", drawn(golden_policy))


def test_medium_never_acts_within_its_warm_up(golden_policy: DiffusionPolicy) -> None:
    assert config_of("medium").warmup_steps >= STEPS
    CASE.check("medium/latents_after_step", drawn(golden_policy))


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

    SLDChange(replace(config, concept_text=HYPER["safety_concept"])).apply_to_pipeline(pipeline)
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
    SLDChange(config_of("max")).apply(golden_policy)
    assert isinstance(golden_policy.guard, SLDGuard)
    assert "guidance_scale=5000.0" in repr(golden_policy.guard)
