"""What probes need of a model, that they draw in the size that is asked for, and what works on which family."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from erasure import Concept
from overpaint import tinyworld
from overpaint.evaluation.experiments.experiment import tiny_world
from overpaint.evaluation.experiments.probing import target_of
from overpaint.evaluation.images.plan import DrawConfig
from overpaint.evaluation.probes import inpainting
from overpaint.evaluation.probes.completion import Completion, CompletionConfig
from overpaint.evaluation.probes.probe import Probe, why_not
from overpaint.evaluation.probes.registry import PROBES
from overpaint.evaluation.probes.run import key_of, run_probe
from overpaint.evaluation.probes.seeds import seed_of
from overpaint.evaluation.probes.target import ProbeTarget
from overpaint.policy import ClassifierFree, DiffusionPolicy, SampleNoise
from overpaint.policy.process import add_noise
from overpaint.policy.types import Images, Latents, PerSample
from overpaint.policy.unet_rows import counted_rows
from rewards import as_reward
from tests.evaluation.probes.killed_probes import LESS, smaller

FAMILIES = ("sd", "sdxl", "sd3", "flux")
DIFFUSION = ("noise", "classifier-guidance", "inverted-latents")
OTHERS = ("completion", "inpainting", "tracing", "resurgence", "relearning", "semantics")
TRIED = {"sdxl": (*DIFFUSION, *OTHERS), "sd3": OTHERS, "flux": OTHERS}
"""Which probes can be tried on which family; on a Stable Diffusion all can."""


def family(name: str) -> DiffusionPolicy:
    if name == "sd":
        return tinyworld.load_policy()
    options: dict[str, Any] = {} if name == "sdxl" else {"max_sequence_length": 32}
    return DiffusionPolicy.from_pretrained(GOLDEN / "flow" / f"tiny-{name}", device="cpu", **options)


@pytest.fixture(scope="module")
def policies() -> dict[str, DiffusionPolicy]:
    return {name: family(name) for name in FAMILIES}


def probe_of(name: str) -> Probe:
    make, tiny = PROBES[name]
    less = {"noised_to": (700,)} if name == "completion" else {}
    return make(smaller(tiny, {**LESS.get(name, {}), **less}))


def redness(images: Images, prompts: Any = ()) -> PerSample:
    return images[:, 0].mean(dim=(1, 2))


def target_in(size: int | None) -> ProbeTarget:
    def prompts(kind: str, count: int, seed: int) -> list[str]:
        return ["a striped circle", "a striped cat"][:count] * (count // 2 or 1)

    return ProbeTarget(
        name="redness",
        concept=Concept(name="stripes", phrases=("striped",)),
        prompts=prompts,
        template=lambda prompt: prompt.replace("striped", "{}"),
        score=redness,
        shown_from=2.0,
        wordings={"name": lambda count, seed: prompts("", count, seed)},
        reward=as_reward(redness),
        steps=3,
        guidance_scale=3.0,
        size=size,
    )


@contextmanager
def sizes_seen() -> Generator[set[int]]:
    """Sides of the latents that go through any UNet or any decoder in a `with` block."""
    seen: set[int] = set()

    def note(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if type(module).__name__ in ("UNet2DConditionModel", "Decoder"):
            seen.add(arguments[0].shape[-1])

    handle = register_module_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", PROBES)
def test_everything_is_drawn_in_the_size_that_is_asked_for(name: str, policies: dict[str, DiffusionPolicy]) -> None:
    with sizes_seen() as seen:
        target = target_in(32)
        task = target.task(policies["sd"], count=2, seed=0, progress=False)
        attempts = probe_of(name).attempt(policies["sd"], task)
    assert seen == {4}
    assert all(one.images.shape[-2:] == (32, 32) for one in attempts)


def test_sizes_have_ceilings_of_their_own(policies: dict[str, DiffusionPolicy]) -> None:
    probe = probe_of("semantics")
    assert len({key_of(probe, policies["sd"], target_in(size), 2, 0) for size in (None, 32, 40)}) == 3


def test_stripes_are_not_looked_for_in_pictures_of_another_size() -> None:
    assert target_of(tiny_world(), DrawConfig(size=64)).size == 64
    with pytest.raises(ValueError, match=r"size must be 64 in probes of stripes, .* or None, got 128"):
        target_of(tiny_world(), DrawConfig(size=128))


@pytest.mark.parametrize("of", TRIED)
def test_what_can_be_tried_works_and_the_rest_is_refused_before_any_work(
    of: str, policies: dict[str, DiffusionPolicy]
) -> None:
    policy, target = policies[of], target_in(32)
    assert {name for name in PROBES if why_not(probe_of(name), policy) is None} == set(TRIED[of])
    for name in PROBES:
        if name in TRIED[of]:
            result = run_probe(probe_of(name), policy, policy, target, count=2, progress=False)
            assert result.rows_forward > 0
            continue
        with counted_rows() as rows, pytest.raises(ValueError, match=f"{name} cannot be tried: a model .* is needed"):
            run_probe(probe_of(name), policy, policy, target, count=2, progress=False)
        assert rows.total == 0


def test_the_original_has_to_have_what_is_needed_too(policies: dict[str, DiffusionPolicy]) -> None:
    with pytest.raises(ValueError, match="noise cannot be tried: a model of diffusion is needed, and a StableDiff"):
        run_probe(probe_of("noise"), policies["sd"], policies["sd3"], target_in(64), count=2, progress=False)


@pytest.mark.parametrize("of", FAMILIES)
def test_rows_are_those_of_every_familys_network(of: str, policies: dict[str, DiffusionPolicy]) -> None:
    policy = policies[of]
    branches = 1 if of == "flux" else 2
    with counted_rows() as rows:
        policy.draw(["a cat"] * 3, seeds=[1, 2, 3], steps=2, guidance=ClassifierFree(3.0), height=64, width=64)
    assert (rows.forward, rows.backward) == (3 * 2 * branches, 0)


def test_rows_of_a_network_in_parts_are_counted() -> None:
    class FSDPUNet2DConditionModel(type(tinyworld.load_policy().unet)):
        """As torch names the class of a sharded network."""

    policy = tinyworld.load_policy()
    policy.unet.__class__ = FSDPUNet2DConditionModel
    with counted_rows() as rows:
        policy.draw(["a cat"], seeds=[1], steps=2, guidance=ClassifierFree(1.0))
    assert rows.total == 2


@pytest.mark.parametrize("of", FAMILIES)
def test_the_empty_prompt_is_finished_with_the_tasks_guidance(of: str, policies: dict[str, DiffusionPolicy]) -> None:
    scored: list[Images] = []

    def score(images: Images) -> PerSample:
        scored.append(images)
        return redness(images)

    task = target_in(64).task(policies[of], count=2, seed=0, progress=False)
    task = replace(task, prompts=("", ""), score=score)
    Completion(CompletionConfig(steps_before=(1,), noised_to=())).attempt(policies[of], task)
    words, empty = scored
    torch.testing.assert_close(words, empty, rtol=0, atol=1e-5)


def test_levels_of_a_flow_are_those_of_the_size(
    policies: dict[str, DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, levels = policies["flux"], []

    def noted(process: Any, clean: Latents, noise: Latents, level: PerSample) -> Latents:
        levels.append(level[0])
        return add_noise(process, clean, noise, level)

    monkeypatch.setattr(inpainting, "add_noise", noted)
    task = target_in(32).task(policy, count=2, seed=0, progress=False)
    plan = policy.plan(3, 32, 32)
    assert not torch.allclose(plan.levels, policy.plan(3).levels)

    completed = Completion(CompletionConfig(steps_before=(1,), noised_to=(500,), empty_prompt=False))
    after, _ = completed.attempt(policy, task)
    torch.testing.assert_close(after.images, task.pictures, rtol=0, atol=1e-5)
    latents, step = completed._noised(500, task)
    assert step == int((plan.timesteps - 500).abs().argmin())
    seeds = [seed_of("completion from 500", seed) for seed in task.seeds]
    noise = SampleNoise(seeds, latents.shape[1:], policy.device).draw()
    torch.testing.assert_close(latents, add_noise(policy.process, task.picture_latents, noise, plan.levels[[step] * 2]))

    inpainting.Inpainting().attempt(policy, task)
    assert levels == [*plan.next_levels[:-1]] * 2
