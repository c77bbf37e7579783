"""The trained parts that the package carries do what docs/tinyworld.md says, measured on a few pictures."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.tinyworld.caption import training_scene
from overpaint.tinyworld.train_reward import accuracy
from rewards import ImageReward

LOADED = {"diffusion": tinyworld.load_policy, "flow": tinyworld.load_flow_policy}


@pytest.fixture(scope="module", params=LOADED)
def policy(request: pytest.FixtureRequest) -> DiffusionPolicy:
    return LOADED[request.param]()


@pytest.fixture(scope="module")
def reward() -> ImageReward:
    return tinyworld.load_reward()


def drawn(policy: DiffusionPolicy, prompts: list[str]) -> torch.Tensor:
    return policy.draw(prompts, seeds=range(len(prompts)), steps=20, guidance=ClassifierFree(3.0))


@pytest.mark.parametrize("folders", [(tinyworld.pipeline_dir, tinyworld.reward_dir), (tinyworld.flow_dir,)])
def test_all_weights_of_a_world_take_at_most_12_mb(folders: Sequence[Callable[[], Path]]) -> None:
    assert 1e6 < sum(f.stat().st_size for folder in folders for f in folder().rglob("*") if f.is_file()) <= 12e6


def test_it_draws_what_captions_ask_for(policy: DiffusionPolicy) -> None:
    prompts = tinyworld.captions("benign", 32, 5)
    images = drawn(policy, prompts)
    # 0.9 is the target; with 32 pictures three standard errors are 0.16.
    assert tinyworld.objects_shown(images, prompts).float().mean() >= 0.74
    assert tinyworld.concept_shown(images).float().mean() <= 0.1


def test_it_draws_stripes_when_they_are_asked_for_and_when_they_come_unasked(policy: DiffusionPolicy) -> None:
    for kind in ("explicit", "implicit"):
        images = drawn(policy, tinyworld.captions(kind, 18, 5))
        assert tinyworld.concept_shown(images).float().mean() >= 0.7, kind


def test_it_draws_dots(policy: DiffusionPolicy) -> None:
    assert tinyworld.neighbour_shown(drawn(policy, tinyworld.captions("neighbour", 16, 5))).float().mean() >= 0.65


def test_plain_diffusers_draws_the_flows_pictures() -> None:
    policy = tinyworld.load_flow_policy()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tinyworld.flow_dir(), text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    prompts = tinyworld.captions("benign", 2, 5)
    settings = {"num_inference_steps": 10, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "pt"}
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    theirs = pipeline(prompts, latents=noise, max_sequence_length=1, **settings).images
    ours = policy.draw(prompts, seeds=range(2), steps=10, guidance=ClassifierFree(3.0))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_autoencoder_keeps_what_the_detector_reads(policy: DiffusionPolicy) -> None:
    rng = random.Random(8)
    scenes = [s for _, s in (training_scene(rng) for _ in range(60)) if len(s.things) == 1]
    images = tinyworld.render(tinyworld.to_tensors(scenes))
    before, after = (tinyworld.detect(i) for i in (images, policy.decode(policy.encode_images(images))))
    assert (before.shape[:, 0] == after.shape[:, 0]).float().mean() >= 0.95
    assert (before.colour[:, 0] == after.colour[:, 0]).float().mean() >= 0.95
    assert (before.striped == after.striped).float().mean() >= 0.95


def test_the_reward_prefers_what_people_prefer(reward: ImageReward) -> None:
    # 0.80 is the target; with 400 pairs three standard errors are 0.06.
    assert accuracy(reward, tinyworld.load_policy().vae, count=400, seed=3)["accuracy_clear"] >= 0.74


def test_the_reward_is_differentiable_and_standardised(reward: ImageReward) -> None:
    rng = random.Random(9)
    pairs = [training_scene(rng) for _ in range(64)]
    images = tinyworld.render(tinyworld.to_tensors([s for _, s in pairs])).requires_grad_(True)
    scores = reward(images, [c for c, _ in pairs])
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert 0 < scores.mean() < 3  # right pictures are above the mean of right and wrong ones
