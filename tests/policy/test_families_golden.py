"""Texts, network calls, samplings, densities, pictures and LoRAs of each family are those of diffusers and authors.

Stored numbers: golden/flow. The models are very small and random; folders and LoRAs are in diffusers' formats.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN, GoldenCase
from torch import Tensor

from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Guidance, TrueGuidance

FOLDER = GOLDEN / "flow"
TEXTS = {
    "lora/rank": "read from the LoRA's file",
    "lora/alpha": "read from the LoRA's file",
    "lora/targets": "read from the LoRA's file",
    "lora/keys": "read from the LoRA's file",
}
SDXL = GoldenCase("flow/sdxl", {**TEXTS, "unconditional_of_guidance": "words"})
SD3 = GoldenCase("flow/sd3", TEXTS)
FLUX = GoldenCase("flow/flux", TEXTS)
CASES = {"sdxl": SDXL, "sd3": SD3, "flux": FLUX}


def load(name: str, folder: Path | None = None, **options: Any) -> DiffusionPolicy:
    record = CASES[name].record
    if "max_sequence_length" in record:
        options["max_sequence_length"] = record["max_sequence_length"]
    return DiffusionPolicy.from_pretrained(folder or FOLDER / f"tiny-{name}", device="cpu", **options)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, DiffusionPolicy]:
    return request.param, load(request.param)


@pytest.fixture(scope="module")
def policies() -> dict[str, DiffusionPolicy]:
    return {name: load(name) for name in CASES}


def close(name: str, tensor: str, found: Tensor) -> None:
    """Checks a tensor by the rule of its case: the largest difference by the largest value."""
    case = CASES[name]
    expected, tolerance = case.tensors[tensor], case.record["tensors"][tensor]["tol"]
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_texts_are_read_as_diffusers_reads_them(name: str, policies: dict[str, DiffusionPolicy]) -> None:
    policy = policies[name]
    for prefix, texts in (("", CASES[name].record["prompts"]), ("empty_", ["", ""])):
        found = policy.encode(texts)
        assert found.pooled is not None
        close(name, f"text/{prefix}tokens", found.tokens)
        close(name, f"text/{prefix}pooled", found.pooled)


def call(name: str, policy: DiffusionPolicy) -> Tensor:
    """What the network predicts for the stored inputs, through the policy."""
    given = CASES[name].tensors.under("unet/" if name == "sdxl" else "transformer/")
    told: dict[str, Any] = {part: given[part] for part in ("pooled", "sizes", "guidance") if part in given}
    conditioning = Conditioning(("",) * 3, given["tokens"], **told)
    return policy.predict(given["latents"], given["timesteps"], conditioning)


@pytest.mark.parametrize("name", CASES)
def test_networks_are_called_as_diffusers_calls_them(name: str, policies: dict[str, DiffusionPolicy]) -> None:
    with torch.no_grad():
        close(name, f"{'unet' if name == 'sdxl' else 'transformer'}/output", call(name, policies[name]))


@pytest.mark.parametrize("name", CASES)
def test_loras_of_diffusers_draw_the_same(name: str) -> None:
    policy = load(name)
    policy.load_lora(FOLDER / f"lora-{name}")
    with torch.no_grad():
        close(name, "lora/output", call(name, policy))


def test_flux_reads_the_scale_of_guidance_and_schnell_refuses_one(policies: dict[str, DiffusionPolicy]) -> None:
    policy = policies["flux"]
    assert policy.model.config["guidance_embeds"] == FLUX.record["guidance_embeds"]
    conditioning = policy.encode(["a cat"])
    few: dict[str, Any] = {"steps": 2, "seeds": [0], "height": 64, "width": 64}
    drawn = [policy.sample(conditioning, guidance=ClassifierFree(scale), **few) for scale in (1.0, 4.0)]
    assert not torch.equal(*drawn)

    pipeline: Any = policy.to_pipeline()
    settings = {**pipeline.transformer.config, "guidance_embeds": False}
    pipeline.transformer = type(pipeline.transformer).from_config(settings)
    schnell = DiffusionPolicy(pipeline, device="cpu")
    conditioning = schnell.encode(["a cat"])
    with pytest.raises(ValueError, match=r"must be 1 for a model without guidance embedding, got 4.0; pass TrueGuid"):
        schnell.sample(conditioning, guidance=ClassifierFree(4.0), **few)
    schnell.sample(conditioning, guidance=ClassifierFree(1.0), **few)
    schnell.sample(conditioning, guidance=TrueGuidance(4.0), **few)


def test_flux_is_told_the_embedded_scale_with_one_branch_too_and_takes_no_negative_prompt_with_it() -> None:
    policy = load("flux")
    conditioning = policy.encode(["a cat"])
    few: dict[str, Any] = {"steps": 2, "seeds": [0], "height": 64, "width": 64}
    embedded = policy.sample(conditioning, guidance=ClassifierFree(3.5), **few)
    assert torch.equal(policy.sample(conditioning, guidance=TrueGuidance(1.0, embedded=3.5), **few), embedded)
    negative = policy.encode(["a dog"])
    with pytest.raises(ValueError, match=r"no negative prompt for a model with one branch, .* TrueGuidance\(3\.5, neg"):
        policy.sample(conditioning, guidance=ClassifierFree(3.5, negative), **few)


def test_flux_packs_channel_slowest() -> None:
    from overpaint.policy.families.flux import packed, places, unpacked

    latents = FLUX.tensors["transformer/latents"]
    close("flux", "transformer/packed", packed(latents))
    close("flux", "transformer/image_ids", places(latents))
    assert torch.equal(unpacked(packed(latents), latents.shape), latents)


@pytest.mark.parametrize("run", SDXL.record["runs"], ids=lambda run: run["prefix"])
def test_sdxl_samples_as_diffusers_does(run: Any) -> None:
    prefix, negative = run["prefix"], run["negative_prompt"]
    policy = load("sdxl")
    policy.scheduler.register_to_config(prediction_type=run["prediction_type"])
    policy.process = policy.family.process()
    guidance = ClassifierFree(run["guidance_scale"], None if negative is None else policy.encode([negative]))
    sizes: dict[str, Any] = {"height": run["height"], "width": run["width"], "steps": run["steps"]}
    conditioning = policy.encode(SDXL.record["prompts"])
    assert policy.plan(**sizes).timesteps.tolist() == run["timesteps"]
    states = [
        policy.sample(conditioning, guidance=guidance, eta=run["eta"], seeds=run["seeds"], until=until, **sizes)
        for until in range(run["steps"] + 1)
    ]
    noise = SDXL.tensors[f"{prefix}/noise"]
    assert torch.equal(states[0], noise[:, 0])
    close("sdxl", f"{prefix}/latents", torch.stack(states, dim=1))
    close("sdxl", f"{prefix}/images", policy.decode(states[-1]))


EULER = [(name, run) for name in ("sd3", "flux") for run in CASES[name].record["runs"] if run["kind"] == "euler"]
CHAINS = [(name, run) for name in ("sd3", "flux") for run in CASES[name].record["runs"] if run["kind"] != "euler"]


def guidance_of(name: str, run: Any) -> Guidance:
    scale = run["guidance_scale"]
    true = run.get("true_cfg_scale", 1.0)
    return TrueGuidance(true, embedded=scale) if true != 1 else ClassifierFree(scale)


@pytest.mark.parametrize(("name", "run"), EULER, ids=lambda one: one if isinstance(one, str) else one["prefix"])
def test_flows_sample_as_diffusers_does(name: str, run: Any, policies: dict[str, DiffusionPolicy]) -> None:
    policy, case, prefix = policies[name], CASES[name], run["prefix"]
    guidance = guidance_of(name, run)
    sizes: dict[str, Any] = {"height": run["height"], "width": run["width"], "steps": run["steps"]}
    conditioning, plan = policy.encode(case.record["prompts"]), policy.plan(**sizes)
    assert plan.timesteps.tolist() == pytest.approx(run["timesteps"], rel=1e-6)
    if name == "flux":
        close(name, f"{prefix}/sigmas", torch.cat([plan.levels, plan.next_levels[-1:]]))
    states = [
        policy.sample(conditioning, guidance=guidance, seeds=run["seeds"], until=until, **sizes)
        for until in range(run["steps"] + 1)
    ]
    assert torch.equal(states[0], case.tensors[f"{prefix}/noise"])
    close(name, f"{prefix}/latents", torch.stack(states, dim=1))
    close(name, f"{prefix}/images", policy.decode(states[-1]))
    with torch.no_grad():
        clean = policy.predict_clean(states[1], conditioning, step=1, steps=run["steps"], guidance=guidance)
    close(name, f"{prefix}/clean_at_1", clean)


@pytest.mark.parametrize(("name", "run"), CHAINS, ids=lambda one: one if isinstance(one, str) else one["prefix"])
def test_flows_draw_and_score_steps_as_the_authors_do(
    name: str, run: Any, policies: dict[str, DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, case, prefix, steps = policies[name], CASES[name], run["prefix"], run["steps"]
    monkeypatch.setattr(policy, "process", policy.family.process("cps" if prefix == "cps" else "sde"))
    noise = case.tensors[f"{prefix}/noise"]
    drawn = iter(noise.unbind(1))
    monkeypatch.setattr("overpaint.policy.noise.draw_noise", lambda *_: next(drawn))
    conditioning, guidance = policy.encode(case.record["prompts"]), guidance_of(name, run)
    options: dict[str, Any] = {"guidance": guidance, "eta": run["noise_level"]}
    chosen = run["stochastic_steps"]
    trajectory = policy.rollout(
        conditioning, steps=steps, seeds=[0, 1], height=64, width=64, stochastic=chosen, **options
    )
    close(name, f"{prefix}/latents", trajectory.latents)
    close(name, f"{prefix}/log_probs", trajectory.log_probs[:, chosen])
    others = [step for step in range(steps) if step not in chosen]
    assert trajectory.log_probs[:, others].isnan().all()

    samples, at = (index.flatten() for index in torch.meshgrid(torch.arange(2), torch.tensor(chosen), indexing="ij"))
    with torch.no_grad():
        again = policy.log_prob(trajectory, samples, at, **options)
    close(name, f"{prefix}/log_probs", again.view(2, -1))


def test_gradients_of_densities_and_clean_latents_are_the_stored_ones() -> None:
    policy = load("sd3", train="full")
    run = next(run for run in SD3.record["runs"] if run["prefix"] == "sde")
    options: dict[str, Any] = {"guidance": ClassifierFree(run["guidance_scale"])}
    conditioning = policy.encode(SD3.record["prompts"])
    states = SD3.tensors["sde/latents"]
    from overpaint.policy import Trajectory

    steps = run["steps"]
    trajectory = Trajectory(states, SD3.tensors["sde/log_probs"], policy.plan(steps).timesteps, conditioning)
    density = policy.log_prob(trajectory, torch.tensor([0, 1]), torch.tensor([1, 1]), eta=run["noise_level"], **options)
    clean = policy.predict_clean(states[:, 1], conditioning, step=1, steps=steps, **options)
    weights = dict(policy.model.named_parameters())
    for prefix, value in (("grad_log_prob", density.sum()), ("grad_clean", (clean**2).mean())):
        names = [name.removeprefix(f"{prefix}/") for name in SD3.tensors if name.startswith(f"{prefix}/")]
        assert len(names) == 3
        gradients = torch.autograd.grad(value, [weights[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            close("sd3", f"{prefix}/{name}", gradient)
