"""Rewards made of other rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import Clipped, Reward, WeightedSum
from rewards.combine import Standardised, reads_prompts

IMAGES = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(4))
PROMPTS = ["a"] * 4


class Brightness:
    """The mean of one channel."""

    def __init__(self, channel: int, differentiable: bool = True) -> None:
        self.channel = channel
        self.differentiable = differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, self.channel].mean(dim=(1, 2))


def test_weighted_sum_adds_scores_and_gradients() -> None:
    images = IMAGES.clone().requires_grad_()
    reward = WeightedSum([Brightness(0), Brightness(2)], [2.0, -0.5])
    scores = reward(images, PROMPTS)
    expected = 2 * IMAGES[:, 0].mean(dim=(1, 2)) - 0.5 * IMAGES[:, 2].mean(dim=(1, 2))
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == [0.5, 0.0, -0.125]


def test_sum_is_differentiable_only_where_all_are() -> None:
    assert WeightedSum([Brightness(0), Brightness(1)], [1.0, 1.0]).differentiable
    assert not WeightedSum([Brightness(0), Brightness(1, differentiable=False)], [1.0, 1.0]).differentiable


def test_clipped_reward_stays_within_its_bounds() -> None:
    reward = Clipped(reward=Brightness(0), low=0.4, high=0.5)
    assert isinstance(reward, Reward)
    assert reward.differentiable
    assert torch.equal(reward(IMAGES, PROMPTS), IMAGES[:, 0].mean(dim=(1, 2)).clamp(0.4, 0.5))
    assert torch.equal(Clipped(reward=Brightness(0))(IMAGES, PROMPTS), Brightness(0)(IMAGES, PROMPTS))


def test_wrong_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="rewards must hold at least one"):
        WeightedSum([], [])
    with pytest.raises(ValueError, match="one number for each of 1 rewards, got 2"):
        WeightedSum([Brightness(0)], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"weights\[0\] must be a finite number, got inf"):
        WeightedSum([Brightness(0)], [float("inf")])
    with pytest.raises(ValueError, match=r"low must be below high, got 1\.0 and 0\.5"):
        Clipped(reward=Brightness(0), low=1.0, high=0.5)
    with pytest.raises(ValueError, match="mean must be a finite number, got nan"):
        Standardised(reward=Brightness(0), mean=float("nan"), std=1.0)
    for std in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"std must be (above 0|a finite number), got {std}"):
            Standardised(reward=Brightness(0), mean=0.0, std=std)


# Standardised


def test_standardised_reward_has_mean_0_and_deviation_1_on_its_reference() -> None:
    reward = Standardised.measured(Brightness(0), IMAGES, PROMPTS)
    assert isinstance(reward, Reward)
    inner = IMAGES[:, 0].mean(dim=(1, 2)).double()
    assert reward.mean == pytest.approx(inner.mean().item(), rel=1e-7)
    # Of the pairs as a population: divided by four, not by three.
    assert reward.std == pytest.approx(((inner - inner.mean()) ** 2).mean().sqrt().item(), rel=1e-7)
    scores = reward(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert reward(IMAGES[:1], PROMPTS[:1]).item() == pytest.approx(scores[0].item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 100])
def test_the_size_of_batches_does_not_change_what_is_measured(batch_size: int) -> None:
    class WithPrompts(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            assert len(images) == len(prompts) <= batch_size
            return super().__call__(images, prompts) + torch.tensor([float(len(prompt)) for prompt in prompts])

    prompts = ["a", "bcd", "", "ef"]
    reward = Standardised.measured(WithPrompts(1), IMAGES, prompts, batch_size=batch_size)
    scores = IMAGES[:, 1].mean(dim=(1, 2)) + torch.tensor([1.0, 3.0, 0.0, 2.0])
    assert reward.mean == pytest.approx(scores.mean().item(), rel=1e-6)
    assert reward.std == pytest.approx(scores.std(correction=0).item(), rel=1e-6)


def test_standardising_scales_the_gradient_and_measuring_takes_none() -> None:
    images = IMAGES.clone().requires_grad_()
    reward = Standardised.measured(Brightness(0), images, PROMPTS)
    assert reward.differentiable
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == pytest.approx([0.25 / reward.std, 0, 0])
    assert not Standardised(reward=Brightness(0, differentiable=False), mean=0.0, std=1.0).differentiable


class Constant:
    """One number for every image, but for rounding."""

    differentiable = False

    def __init__(self, value: float, rounding: float = 0.0) -> None:
        self.value, self.rounding = value, rounding

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.value + self.rounding * torch.arange(len(images), dtype=torch.float32)


@pytest.mark.parametrize("reward", [Constant(0.0), Constant(-99.3), Constant(8.0, 1e-6)])
def test_a_constant_reward_cannot_be_standardised(reward: Constant) -> None:
    with pytest.raises(ValueError, match=r"reward must tell the reference pairs apart, got .* for all 4 from Constant"):
        Standardised.measured(reward, IMAGES, PROMPTS)


def test_small_differences_that_are_not_rounding_can_be_standardised() -> None:
    reward = Standardised.measured(Constant(0.0, 1e-9), IMAGES, PROMPTS)
    assert reward(IMAGES, PROMPTS)[-1].item() == pytest.approx(1.5 / (1.25**0.5), rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reference_score_that_is_not_finite_is_named(value: float) -> None:
    images = IMAGES.clone()
    images[2, 0] = value
    with pytest.raises(ValueError, match=rf"reward must be finite, got {value} for image 2 of 4, prompt 'a'"):
        Standardised.measured(Brightness(0), images, PROMPTS, batch_size=1)


@pytest.mark.usefixtures("unchecked")
def test_wrong_references_are_refused() -> None:
    with pytest.raises(ValueError, match="images must hold at least two, got 1"):
        Standardised.measured(Brightness(0), IMAGES[:1], PROMPTS[:1])
    with pytest.raises(ValueError, match="prompts must hold one string for each image, got 1 for 4 images"):
        Standardised.measured(Brightness(0), IMAGES, ["a"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Standardised.measured(Brightness(0), IMAGES, PROMPTS, batch_size=0)


# What holds for all


def test_no_combination_hides_a_score_that_is_not_a_number() -> None:
    images = IMAGES.clone()
    images[1, 0] = float("nan")
    inner = Brightness(0)
    for reward in (
        WeightedSum([Brightness(1), inner], [1.0, 0.0]),
        Clipped(reward=inner, low=0.0, high=1.0),
        Standardised(reward=inner, mean=0.5, std=0.1),
    ):
        assert reward(images, PROMPTS).isnan().tolist() == [False, True, False, False]


def test_combinations_say_what_they_are_made_of() -> None:
    class Network(torch.nn.Linear):
        differentiable = True

    standardised = Standardised(reward=Network(2, 2), mean=0.25, std=2.0)
    clipped = Clipped(reward=Brightness(0), high=2.0)
    assert repr(WeightedSum([standardised, clipped], [1.0, -0.5])) == (
        "WeightedSum(1.0 * Standardised(Network, mean=0.25, std=2.0) + -0.5 * Clipped(Brightness, low=-inf, high=2.0))"
    )


def test_combinations_move_the_networks_that_they_are_made_of() -> None:
    class Network(torch.nn.Linear):
        differentiable = True

    networks = [Network(1, 1) for _ in range(3)]
    parts = [
        networks[0],
        Clipped(reward=networks[1], high=1.0),
        Standardised(reward=networks[2], mean=0.0, std=1.0),
        Brightness(0),
    ]
    both = WeightedSum(parts, [1.0] * 4)
    assert both.to("meta") is both
    assert [network.weight.device.type for network in networks] == ["meta"] * 3


def test_a_combination_reads_prompts_if_a_part_does() -> None:
    class PromptFree(Brightness):
        reads_prompts = False

    assert reads_prompts(Brightness(0))
    assert not reads_prompts(PromptFree(0))
    assert reads_prompts(WeightedSum([PromptFree(0), Brightness(0)], [1.0, 1.0]))
    assert not reads_prompts(WeightedSum([PromptFree(0)], [1.0]))
    assert not reads_prompts(Clipped(reward=Standardised(reward=PromptFree(0), mean=0.0, std=1.0), high=1.0))


@pytest.mark.parametrize(
    "given",
    [lambda scores: scores.tolist(), lambda scores: scores.numpy(), lambda scores: scores[:, None]],
    ids=["list", "array", "column"],
)
def test_scores_of_any_kind_are_combined(given: Callable[[Tensor], Any]) -> None:
    class Other(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
            return given(super().__call__(images, prompts))

    for make in (lambda reward: Clipped(reward=reward, low=0.4, high=0.5),
                 lambda reward: Standardised(reward=reward, mean=0.5, std=0.1)):  # fmt: skip
        torch.testing.assert_close(make(Other(0))(IMAGES, PROMPTS), make(Brightness(0))(IMAGES, PROMPTS))


def test_gradients_of_a_list_of_tensors_are_kept() -> None:
    class Listed(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any:
            return list(super().__call__(images, prompts))

    images = IMAGES.clone().requires_grad_()
    Clipped(reward=Standardised(reward=Listed(0), mean=0.5, std=0.1), high=99.0)(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == pytest.approx([2.5, 0, 0])


def test_a_part_that_gives_no_number_for_each_image_is_named() -> None:
    class Column(Brightness):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().__call__(images, prompts)[:, None].expand(-1, 2)

    with pytest.raises(ValueError, match=r"rewards\[1\] must give one number for each of 4 images, got \(4, 2\)"):
        WeightedSum([Brightness(0), Column(0)], [1.0, 1.0])(IMAGES, PROMPTS)
    for combined in (Clipped(reward=Column(0)), Standardised(reward=Column(0), mean=0.0, std=1.0)):
        with pytest.raises(ValueError, match=r"reward must give one number for each of 4 images, got \(4, 2\)"):
            combined(IMAGES, PROMPTS)
