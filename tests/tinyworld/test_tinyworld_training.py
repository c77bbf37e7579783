"""The programs that train the tiny world's weights."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from overpaint.policy import DiffusionPolicy
from overpaint.tinyworld import components, workers
from overpaint.tinyworld.caption import parse, training_scene
from overpaint.tinyworld.render import render
from overpaint.tinyworld.scene import to_tensors
from overpaint.tinyworld.train_diffusion import DiffusionTrainingConfig, questions, read_captions, tokenize
from overpaint.tinyworld.train_flow import encoded
from overpaint.tinyworld.train_reward import build_reward, candidate, changed, pairs
from overpaint.tinyworld.train_vae import pictures, reconstruction_loss, whiten
from overpaint.tinyworld.workers import cosine


def test_whitening_gives_unit_latents_and_changes_no_reconstruction() -> None:
    torch.manual_seed(0)
    vae = components.build_vae().eval()
    images = pictures(random.Random(0), 16)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        whiten(vae, images)
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mean).sample
    latents = posterior.mean * components.LATENT_SCALE
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


def test_the_reconstruction_loss_by_hand() -> None:
    drawn, target = torch.tensor([[0.0, 1.0]]).view(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    two_rows = [t.expand(1, 1, 2, 2) for t in (drawn, target)]
    # 2 * mean(square) + 0.15 * mean(abs) + mean square of horizontal differences + vertical ones
    assert reconstruction_loss(*two_rows).item() == pytest.approx(2 * 0.5 + 0.15 * 0.5 + 1.0 + 0.0, rel=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    rates = [cosine(step, 1000) for step in range(1001)]
    assert rates[0] == 0.01
    assert rates[100] == 1.0
    assert rates[550] == 0.5
    assert rates[1000] < 1e-12


def test_the_text_encoder_learns_to_read() -> None:
    tokenizer = components.build_tokenizer()
    losses = []
    for steps in (1, 40):
        torch.manual_seed(0)
        config = DiffusionTrainingConfig(reading_steps=steps)
        losses.append(read_captions(components.build_text_encoder(tokenizer), tokenizer, config))
    assert losses[1] < 0.7 * losses[0]


def test_questions_list_what_a_caption_asks_for() -> None:
    row = questions(["a striped red star above a blue circle on a pink background"])[0].tolist()
    # star, red, circle, blue, pink, above; then the ten routes: "striped" comes early in the caption
    assert row == [4, 1, 1, 3, 3, 1, 1, *[0] * 9]
    assert questions(["a red star above a striped blue circle"])[0].tolist() == [4, 1, 1, 3, 0, 1, 2, *[0] * 9]


def test_one_change_makes_a_scene_mismatch_its_caption() -> None:
    from overpaint.tinyworld.train_reward import scene_mismatches

    rng = random.Random(2)
    spoilt = []
    for _ in range(200):
        caption, scene = training_scene(rng)
        assert scene_mismatches(parse(caption), scene) == 0
        spoilt.append(scene_mismatches(parse(caption), changed(scene, rng)) > 0)
    assert sum(spoilt) / len(spoilt) > 0.6  # an unnamed background may change unpunished


def test_pairs_hold_better_and_worse_pictures() -> None:
    prompts, scenes, images, worth = pairs(20, random.Random(0), torch.Generator().manual_seed(0), None)
    assert (len(prompts), len(scenes), len(images), len(worth)) == (20, 40, 40, 40)
    assert (worth[:20] - worth[20:]).abs().max() > 2
    drawn = render(to_tensors([candidate(scenes[0], random.Random(1))]))
    assert drawn.shape == (1, 3, 64, 64)


def test_the_reward_model_has_the_structure_of_image_reward() -> None:
    reward = build_reward()
    score = reward(torch.rand(2, 3, 64, 64), ["a red star", "a blue circle"])
    assert score.shape == (2,)
    assert sum(p.numel() for p in reward.parameters()) < 1e6


def _average_of_two(rank: int, count: int, folder: str) -> None:
    module = nn.Linear(2, 1)
    nn.init.constant_(module.weight, float(rank))
    workers.average([module])
    if rank == 1:
        torch.save(module.weight.detach(), f"{folder}/weight.pt")


def test_workers_average_their_weights(tmp_path) -> None:
    workers.run_workers(_average_of_two, str(tmp_path), count=2)
    assert torch.load(tmp_path / "weight.pt").tolist() == [[0.5, 0.5]]


def test_a_projected_text_encoder_reads_as_before_and_gives_the_end_as_the_whole_text() -> None:
    tokenizer = components.build_tokenizer()
    torch.manual_seed(0)
    plain = components.build_text_encoder(tokenizer).eval()
    ids = tokenize(tokenizer, ["a striped red circle"])
    with torch.no_grad():
        before, after = plain(ids), components.projected(plain).eval()(ids)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.text_embeds, before.pooler_output)


def test_the_flow_pipeline_reads_texts_in_training_as_the_policy_does(tmp_path: Path) -> None:
    tokenizer = components.build_tokenizer()
    torch.manual_seed(0)
    encoders = [components.projected(components.build_text_encoder(tokenizer)).eval() for _ in range(2)]
    prompts = ["a striped red circle", ""]
    tokens, pooled = encoded(encoders, tokenize(tokenizer, prompts))
    vae, transformer = components.build_vae(), components.build_transformer()
    components.save_flow_pipeline(tmp_path, vae, encoders, tokenizer, transformer)
    policy = DiffusionPolicy.from_pretrained(tmp_path, device="cpu", max_sequence_length=1)
    found = policy.encode(prompts)
    torch.testing.assert_close(found.tokens, tokens, rtol=0, atol=2e-2)  # weights are saved in half precision
    torch.testing.assert_close(found.pooled, pooled, rtol=0, atol=2e-2)
    assert policy.latent_shape() == (4, 8, 8)
    assert policy.draw(prompts, seeds=[1, 2], steps=2).shape == (2, 3, 64, 64)
