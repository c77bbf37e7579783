"""Plain functions as rewards."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from rewards import Clipped, FunctionReward, Incompressibility, Reward, ScoresError, WeightedSum, as_reward, scores_of
from rewards.combine import Standardised
from rewards.function import name_of
from rewards.types import as_scores, reads_prompts

IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(4))
PROMPTS = ["a", "bc", "def"]


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])


EXPECTED = redness(IMAGES, PROMPTS)


class Network(nn.Module):
    """A network that knows nothing of rewards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.layer(images.mean(dim=(2, 3)))


def test_a_function_is_a_reward_with_its_scores_and_gradient() -> None:
    reward = as_reward(redness)
    assert isinstance(reward, Reward)
    assert isinstance(reward, FunctionReward)
    images = IMAGES.clone().requires_grad_()
    scores = reward(images, PROMPTS)
    assert torch.equal(scores, EXPECTED)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == [1 / 16, 0, 0]
    assert (repr(reward), name_of(reward)) == ("FunctionReward(redness)", "redness")


def test_what_is_a_reward_stays_itself() -> None:
    reward = Incompressibility()
    assert as_reward(reward) is reward
    wrapped = as_reward(redness)
    assert as_reward(wrapped) is wrapped


def test_whatever_can_be_called_with_images_and_prompts_is_one() -> None:
    network = Network()
    reward = as_reward(network)
    assert torch.equal(reward(IMAGES, PROMPTS), network(IMAGES, PROMPTS)[:, 0])
    assert isinstance(reward, FunctionReward)
    assert reward.to("meta") is reward
    assert network.layer.weight.device.type == "meta"

    def scaled(factor: float, images: Tensor, prompts: Sequence[str], *, offset: float = 0.0) -> Tensor:
        return factor * redness(images, prompts) + offset

    class Called:
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return redness(images, prompts)

        def method(self, images: Tensor, prompts: Sequence[str], strength: float = 1.0) -> Tensor:
            return strength * redness(images, prompts)

    twice = as_reward(partial(scaled, 2.0))
    assert torch.equal(twice(IMAGES, PROMPTS), 2 * EXPECTED)
    assert name_of(twice) == "scaled"
    some: list[tuple[Callable[..., Any], str]] = [(Called(), "Called"), (Called().method, "method")]
    for function, name in [*some, (lambda images, prompts: redness(images, prompts), "<lambda>")]:
        reward = as_reward(function)
        assert torch.equal(reward(IMAGES, PROMPTS), EXPECTED)
        assert name_of(reward) == name


def test_a_function_may_say_that_it_reads_no_prompts() -> None:
    def free(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    assert reads_prompts(as_reward(free))
    vars(free)["reads_prompts"] = False
    assert not reads_prompts(as_reward(free))


async def later(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


class Later:
    differentiable = False

    async def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Asked(Incompressibility):
    def differentiable(self) -> bool:
        return False


class Narrow(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            Incompressibility,
            r"got the class Incompressibility itself; make an object of it: Incompres",
        ),
        (later, "reward must be callable with .* and give scores, got later, which is a coroutine"),
        (Later(), "got Later, which is a coroutine"),
        ("clip", "reward must be an instance of Reward or callable, got 'clip'"),
        (None, "got None"),
        (lambda images: images, r"reward must be callable with \(images, prompts\), got <lambda>\(images\)"),
        (lambda images, prompts, metadata: images, r"got <lambda>\(images, prompts, metadata\)"),
        (Narrow(), r"got Narrow\(images"),
        (Asked(), "reward.differentiable must be True or False, got <bound method"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(reward: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_reward(reward)


@pytest.mark.parametrize(
    "kind",
    [
        lambda scores: scores[:, None],
        lambda scores: scores.tolist(),
        lambda scores: tuple(scores.tolist()),
        lambda scores: scores.numpy(),
        lambda scores: scores.double().numpy(),
        lambda scores: scores.numpy()[:, None],
        lambda scores: list(scores),
        lambda scores: [score[None] for score in scores],
        lambda scores: list(scores.numpy()),
    ],
)
def test_numbers_of_any_make_are_taken(kind: Callable[[Tensor], Any]) -> None:
    scores = as_reward(lambda images, prompts: kind(redness(images, prompts)))(IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, EXPECTED)


def test_a_list_of_tensors_keeps_its_gradients() -> None:
    images = IMAGES.clone().requires_grad_()
    as_reward(lambda images, prompts: [image.sum() for image in images])(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert torch.equal(images.grad, torch.ones_like(images))


def test_whole_numbers_and_yes_or_no_become_numbers() -> None:
    for given in ([1, 0, 2], numpy.array([1, 0, 2]), torch.tensor([1, 0, 2])):
        assert scores_of("reward", lambda *_, given=given: given, IMAGES, PROMPTS).tolist() == [1.0, 0.0, 2.0]
    assert scores_of("reward", lambda *_: [True, False, True], IMAGES, PROMPTS).tolist() == [1.0, 0.0, 1.0]
    assert as_scores("measure", [True, False, True], IMAGES).dtype == torch.bool


def test_double_precision_of_a_tensor_stays() -> None:
    assert scores_of("reward", lambda *_: EXPECTED.double(), IMAGES, PROMPTS).dtype == torch.float64


def test_scores_come_back_on_the_images_device() -> None:
    for given in ([0.0, 1.0, 2.0], EXPECTED, EXPECTED.numpy()):
        assert as_scores("reward", given, IMAGES.to("meta")).device.type == "meta"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (0.5, "one number for all of them"),
        (torch.tensor(0.5), "one number for all of them"),
        (EXPECTED[:2], r"\(2,\)"),
        (torch.zeros(3, 4, 4), r"\(3, 4, 4\)"),
        (torch.zeros(1, 3), r"\(1, 3\)"),
        ([], r"\(0,\)"),
        (None, "NoneType"),
        ("high", "str"),
        ({"score": 1.0}, "dict"),
        ((EXPECTED, {}), "tuple"),
        (["a", "b", "c"], "list"),
        ([EXPECTED, EXPECTED[:1], EXPECTED], "list"),
        ((one for one in (1.0, 2.0, 3.0)), "generator"),
        (EXPECTED.to(torch.complex64), "Tensor"),
    ],
)
def test_what_is_not_one_number_for_each_image_is_refused_with_the_functions_name(given: Any, found: str) -> None:
    def liked(images: Tensor, prompts: Sequence[str]) -> Any:
        return given

    with pytest.raises(ScoresError, match=rf"^the reward liked must give one .* each of 3 images, got {found}$"):
        as_reward(liked)(IMAGES, PROMPTS)


def test_one_number_for_a_batch_of_one_is_refused_too() -> None:
    with pytest.raises(ScoresError, match="one number for all of them"):
        as_reward(lambda images, prompts: 1.0)(IMAGES[:1], PROMPTS[:1])


@pytest.mark.usefixtures("unchecked")
def test_functions_are_combined_as_rewards_are() -> None:
    both = WeightedSum([redness, Incompressibility()], [2.0, -1.0])
    torch.testing.assert_close(both(IMAGES, PROMPTS), 2 * EXPECTED - Incompressibility()(IMAGES, PROMPTS))
    assert not both.differentiable
    assert repr(both) == "WeightedSum(2.0 * redness + -1.0 * Incompressibility)"
    clipped = Clipped(reward=lambda images, prompts: [0.0, 1.0, 2.0], high=1.5)
    assert clipped(IMAGES, PROMPTS).tolist() == [0.0, 1.0, 1.5]
    assert Standardised.measured(redness, IMAGES, PROMPTS)(IMAGES, PROMPTS).mean().item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(TypeError, match=r"rewards\[1\] must be an instance of Reward or callable, got 3"):
        WeightedSum([redness, 3], [1.0, 1.0])  # ty: ignore[invalid-argument-type]
