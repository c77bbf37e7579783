"""Two small networks of ImageReward's structure, the golden one in the official layout; and a served reward."""

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import jaxtyping
import pytest
import torch
from golden_case import GOLDEN, GoldenCase, Record, Tensors, image_reward_config
from torch import Tensor

from rewards import BlipTokenizer, ImageReward, ImageRewardConfig

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "on", "the", "table", "##s")


@pytest.fixture(scope="session")
def golden() -> Tensors:
    """Inputs and expected outputs, computed with the official network."""
    return GoldenCase("image_reward_small").tensors


@pytest.fixture(scope="session")
def golden_case() -> Record:
    """Prompts, vocabulary and sizes of the golden case."""
    return GoldenCase("image_reward_small").record


@pytest.fixture(scope="session")
def golden_weights() -> Path:
    """Weights with the names of the official checkpoint."""
    return GOLDEN / "image_reward_small_weights.safetensors"


@pytest.fixture(scope="session")
def golden_config(golden_case: Record) -> ImageRewardConfig:
    """Sizes of the golden network."""
    return image_reward_config(golden_case)


@pytest.fixture(scope="session")
def golden_reward(golden_weights: Path, golden_config: ImageRewardConfig, golden_case: Record) -> ImageReward:
    """The golden network; frozen, not to be changed by a test."""
    return ImageReward.from_official(golden_weights, golden_config, golden_case["vocab"])


@pytest.fixture
def reward() -> ImageReward:
    """A fresh trainable network of a few thousand weights."""
    config = ImageRewardConfig(
        image_size=16,
        patch_size=8,
        vision_hidden_size=12,
        vision_layers=2,
        vision_heads=2,
        vision_intermediate_size=24,
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        text_layers=2,
        text_heads=4,
        text_intermediate_size=32,
        max_positions=24,
        max_length=12,
        head_widths=(8,),
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageReward(config, BlipTokenizer(WORDS))


@pytest.fixture
def pictures() -> Tensor:
    """Five random images in [0, 1] of the small network's size."""
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prompts() -> list[str]:
    """Five prompts of different lengths, the last one cut by the tokenizer."""
    return [
        "a cat",
        "red dogs on the table",
        "",
        "a blue cat on a red table",
        "the dog on the table on the red table " * 2,
    ]


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turns the shape checker off, which users do not have: what is tested is the message that they get."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def started_server(
    *options: str, reward: str = "compressibility", folder: Path = ROOT
) -> Generator[tuple[subprocess.Popen[str], str]]:
    """Runs the program in a folder, on a free port; gives it and its URL."""
    command = [sys.executable, "-m", "rewards.serve", "--reward", reward, "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SERVE_TOKEN": "a-long-and-secret-token"}
    program = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert program.stdout is not None
        name, _, url = program.stdout.readline().strip().partition(" at ")
        assert name == reward
        yield program, url
    finally:
        program.kill()
        program.communicate()


@pytest.fixture(scope="session")
def server() -> Callable[..., AbstractContextManager[tuple[subprocess.Popen[str], str]]]:
    """Starts `python -m rewards.serve` for the length of a `with` block."""
    return started_server
