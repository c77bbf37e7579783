"""What holds for every network of ImageReward's structure."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import ImageReward, Reward, image_reward


def test_it_is_a_differentiable_reward(reward: ImageReward) -> None:
    assert isinstance(reward, Reward)
    assert reward.differentiable


def test_score_does_not_depend_on_the_rest_of_the_batch(
    reward: ImageReward, pictures: Tensor, prompts: list[str]
) -> None:
    together = reward(pictures, prompts)
    alone = torch.cat([reward(pictures[i : i + 1], prompts[i : i + 1]) for i in range(5)])
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = reward(pictures[order], [prompts[i] for i in order])
    # Other batch sizes add up in another order: float32 rounding of scores of about 1.
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
    torch.testing.assert_close(permuted, together[order], rtol=0, atol=1e-5)


def test_score_does_not_depend_on_padding(reward: ImageReward, pictures: Tensor) -> None:
    prompts = ["a cat"] * 5
    short = reward(pictures, prompts)
    reward.config = replace(reward.config, max_length=24)
    torch.testing.assert_close(reward(pictures, prompts), short, rtol=0, atol=1e-5)


def test_score_depends_on_image_and_on_every_word(reward: ImageReward, pictures: Tensor) -> None:
    base = reward(pictures[:1], ["a red cat"])
    # Far more than rounding, which is below 1e-5.
    assert (reward(pictures[1:2], ["a red cat"]) - base).abs() > 1e-3
    assert (reward(pictures[:1], ["a red dog"]) - base).abs() > 1e-3
    assert (reward(pictures[:1], ["red a cat"]) - base).abs() > 1e-3


def test_first_token_sees_later_ones(reward: ImageReward, pictures: Tensor) -> None:
    features = reward.features(pictures[:1].expand(2, -1, -1, -1), ["a red cat", "a red dog"])
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_score_is_the_standardised_head_of_the_features(
    reward: ImageReward, pictures: Tensor, prompts: list[str]
) -> None:
    features = reward.features(pictures, prompts)
    raw = reward.raw_score(features)
    assert features.shape == (5, 16)
    by_hand = reward.head(features)[:, 0]
    torch.testing.assert_close(raw, by_hand, rtol=1e-6, atol=1e-6)
    reward.config = replace(reward.config, mean=0.5, std=2.0)
    assert torch.equal(reward(pictures, prompts), (raw - 0.5) / 2)


def test_training_mode_changes_nothing(reward: ImageReward, pictures: Tensor, prompts: list[str]) -> None:
    assert torch.equal(reward.train()(pictures, prompts), reward.eval()(pictures, prompts))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_checkpointing_keeps_scores_and_gradients_bit_identical(
    reward: ImageReward, pictures: Tensor, prompts: list[str], mode: str
) -> None:
    reward.train(mode == "train")
    results = []
    for enabled in (False, True):
        reward.gradient_checkpointing = enabled
        images = pictures.clone().requires_grad_()
        scores = reward(images, prompts)
        gradients = torch.autograd.grad(scores.sum(), [images, *reward.parameters()])
        results.append((scores, *gradients))
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results, strict=True))


def test_checkpointing_keeps_fewer_activations(reward: ImageReward, pictures: Tensor, prompts: list[str]) -> None:
    kept = []
    for enabled in (False, True):
        reward.gradient_checkpointing = enabled
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            reward(pictures.clone().requires_grad_(), prompts)
        kept.append(sum(sizes))
    # The text encoder keeps its own, which is most of it here.
    assert kept[1] < 0.95 * kept[0]


def test_gradient_reaches_pixels_through_the_resize(reward: ImageReward) -> None:
    # 48 x 24 is scaled to 32 x 16, and rows 8..24 of the 32 are kept: rows 0..10 and 37..47 are far outside.
    images = torch.rand(2, 3, 48, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
    reward(images, ["a cat", "a dog"]).sum().backward()
    assert images.grad is not None
    touched = images.grad.abs().sum(dim=(0, 1, 3)) > 0
    assert touched[14:34].all()
    assert not touched[:9].any()
    assert not touched[39:].any()


def test_loaded_weights_are_frozen_and_gradients_still_reach_the_images(
    reward: ImageReward, pictures: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    reward.save_pretrained(tmp_path)
    loaded = ImageReward.from_pretrained(tmp_path)
    images = pictures.clone().requires_grad_()
    loaded(images, prompts).sum().backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.parameters())
    assert images.grad is not None
    assert images.grad.abs().sum(dim=(1, 2, 3)).min() > 0


def test_fresh_network_learns(reward: ImageReward, pictures: Tensor) -> None:
    targets = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0])
    optimizer = torch.optim.Adam(reward.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (reward(pictures, ["a cat"] * 5) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in reward.parameters())
    # The variance of the targets, 0.5, is what a constant answer leaves.
    assert losses[-1] < 0.25


def test_head_stays_in_float32_under_autocast_and_in_half_precision(
    reward: ImageReward, pictures: Tensor, prompts: list[str]
) -> None:
    features = reward.features(pictures, prompts)
    full = reward.raw_score(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward.raw_score(features), full)
    half = reward.to(torch.bfloat16)(pictures, prompts)
    assert half.dtype == torch.float32
    # A rounding to bfloat16 is 0.004 of a number; these scores of up to 2 were off by 0.01.
    torch.testing.assert_close(half, reward.standardise(full), rtol=0, atol=0.06)


def test_saved_network_scores_exactly_the_same(
    reward: ImageReward, pictures: Tensor, prompts: list[str], tmp_path: Path
) -> None:
    reward.config = replace(reward.config, mean=-0.3, std=1.7)
    reward.save_pretrained(tmp_path / "folder")
    loaded = ImageReward.load(tmp_path / "folder")
    assert loaded.config == reward.config
    assert torch.equal(loaded(pictures, prompts), reward(pictures, prompts))


def test_network_saved_in_half_precision_loads_in_float32(reward: ImageReward, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in reward.state_dict().items()}
    reward.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = ImageReward.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, reward.state_dict()[name]) for name, tensor in before.items())
    assert all(torch.equal(loaded[name], tensor.half().float()) for name, tensor in before.items())


def pil_pictures(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray((p * 255).byte().permute(1, 2, 0).contiguous().numpy()) for p in pictures]


def test_score_returns_a_number_for_an_image_and_a_list_for_a_list(
    reward: ImageReward, pictures: Tensor, tmp_path: Path
) -> None:
    images = pil_pictures(pictures)
    images[1].save(tmp_path / "one.png")
    scores = reward.score("a cat", [images[0], str(tmp_path / "one.png"), images[2]])
    assert isinstance(scores, list)
    one = reward.score("a cat", tmp_path / "one.png")
    assert isinstance(one, float)
    assert one == pytest.approx(scores[1], rel=0, abs=1e-5)
    exact = reward((pictures * 255).byte().float() / 255, ["a cat"] * 5)
    assert scores == pytest.approx(exact[:3].tolist(), rel=0, abs=1e-5)


def test_inference_rank_gives_the_best_image_rank_one(reward: ImageReward, pictures: Tensor) -> None:
    ranks, scores = reward.inference_rank("a cat", pil_pictures(pictures))
    assert sorted(ranks) == [1, 2, 3, 4, 5]
    assert [scores[ranks.index(rank)] for rank in range(1, 6)] == sorted(scores, reverse=True)
    assert scores == reward.score("a cat", pil_pictures(pictures))


def test_equal_images_are_ranked_in_their_order(reward: ImageReward, pictures: Tensor) -> None:
    ranks, scores = reward.inference_rank("a cat", pil_pictures(pictures[:1]) * 3)
    assert len(set(scores)) == 1
    assert ranks == [1, 2, 3]


def test_inference_rank_of_one_image_gives_lists(reward: ImageReward, pictures: Tensor) -> None:
    ranks, scores = reward.inference_rank("a cat", pil_pictures(pictures[:1]))
    assert ranks == [1]
    assert len(scores) == 1


def test_many_images_are_scored_in_parts(
    reward: ImageReward, pictures: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reward.score("a cat", pil_pictures(pictures))
    monkeypatch.setattr(image_reward, "IMAGES_PER_CALL", 2)
    assert reward.score("a cat", pil_pictures(pictures)) == pytest.approx(whole, rel=0, abs=1e-5)
