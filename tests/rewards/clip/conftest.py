"""A CLIP of a few thousand random weights, its tokenizer, and the check of gradients that its rewards share."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewards.clip_encoder import END, START, ClipEncoder, ClipTokenizer

WORDS = ("a", "the", "red", "blue", "cat", "dog", "on", "table")
POSITIONS = 12
"""Length of the text tower's context, on purpose not CLIP's 77."""


@pytest.fixture(scope="session")
def tokenizer() -> ClipTokenizer:
    """Every byte, and the words above as one token each."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left, *others = [*word[:-1], f"{word[-1]}</w>"]
        for right in others:
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += [START, END]
    return ClipTokenizer({piece: index for index, piece in enumerate(vocabulary)}, merges)


@pytest.fixture
def config(tokenizer: ClipTokenizer) -> dict[str, Any]:
    """Sizes of the network; its exact GELU is open_clip's."""
    shared = {"num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 24}
    return {
        "model_type": "clip",
        "projection_dim": 24,
        "text_config": shared
        | {
            "vocab_size": len(tokenizer),
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "max_position_embeddings": POSITIONS,
            "bos_token_id": tokenizer.vocabulary[START],
            "eos_token_id": tokenizer.end_id,
        },
        "vision_config": shared
        | {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    }


@pytest.fixture
def encoder(config: dict[str, Any], tokenizer: ClipTokenizer) -> ClipEncoder:
    """A fresh trainable network, whose weights are large enough for every input to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = ClipEncoder(deepcopy(config), tokenizer)
        for name, parameter in encoder.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return encoder


@pytest.fixture
def pictures() -> Tensor:
    """Five random images in [0, 1] that are neither square nor of the network's size."""
    return torch.rand(5, 3, 48, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def check_gradient(pictures: Tensor, prompts: list[str]) -> Callable[[nn.Module], None]:
    """Compares the gradient to the images with differences of the scores, in float64."""

    def check(reward: nn.Module) -> None:
        reward.double()
        images = pictures.double().requires_grad_()
        (gradient,) = torch.autograd.grad(reward(images, prompts).sum(), images)
        step = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 1e-5
        with torch.no_grad():
            difference = (reward(images + step, prompts) - reward(images - step, prompts)) / 2
        by_gradient = (gradient * step).sum(dim=(1, 2, 3))
        assert by_gradient.abs().min() > 0
        # The error of central differences is of third order in the step: far below.
        torch.testing.assert_close(difference, by_gradient, rtol=1e-5, atol=0)

    return check


@pytest.fixture
def check_batches(pictures: Tensor, prompts: list[str]) -> Callable[[nn.Module], None]:
    """Compares scores of a batch with those of its images alone and in another order."""

    def check(reward: nn.Module) -> None:
        together = reward(pictures, prompts)
        alone = torch.cat([reward(pictures[i : i + 1], prompts[i : i + 1]) for i in range(5)])
        order = torch.tensor([3, 0, 4, 2, 1])
        permuted = reward(pictures[order], [prompts[i] for i in order])
        assert together.std() > 1e-2
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
        torch.testing.assert_close(permuted, together[order], rtol=0, atol=1e-5)

    return check
