"""A reward that another process computes: the client of `rewards.serve`.

Source of the idea: Black et al. (2023), https://arxiv.org/abs/2305.13301, whose alignment reward runs behind HTTP.
Their client and server exchange pickles, which execute whatever the other side likes; here both speak JSON.
"""

import os
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import torch

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field, settings

from .encoded import ImageFormat, encode_images
from .http_json import HttpConfig, HttpError, check_token, check_url, request_json
from .types import check_pairs

LARGEST = torch.finfo(torch.float32).max
"""Largest size of a score."""


@settings
class RemoteConfig:
    """Where a served reward is, and how images travel to it."""

    url: str
    """Address of the server, such as "http://127.0.0.1:8085"."""
    token_variable: str | None = None
    """Environment variable that holds the server's token; None where the server asks for none, or it is an argument."""
    format: ImageFormat = "png"
    """How images travel. A PNG keeps all 8 bits of each value; a JPEG is smaller and changes the scores a little."""
    quality: int = Field(95, ge=1, le=100)
    """Quality of a JPEG, from 1 to 100."""
    images_per_request: int = Field(16, ge=1)
    """Images that are sent at once; not more than the server takes."""
    max_request_bytes: int = Field(64_000_000, ge=1)
    """Size of the largest request that is sent; not more than the server takes."""
    http: HttpConfig = HttpConfig()
    """How long the server is waited for, and how often it is asked."""

    def __post_init__(self) -> None:
        """Checks the address."""
        check_url(self.url)


class RemoteReward:
    """The scores of a reward that `python -m rewards.serve` serves.

    Images are rounded to 8 bits on their way, so that scores equal those of the same reward here for images that were
    8-bit before, and nearly for others. The server sees the images of one request as one batch. Nothing is asked
    before the first call. What the server answers is checked, and never executed. Several threads may call at once.

    With DDPO each try of `ddpo.ScoringConfig` is a whole call with all its tries over HTTP; its timeout should cover
    them.

    Args:
        config: Where the server is, and how it is asked.
        token: The server's token, where no environment variable holds it.

    Raises:
        ValueError: The environment variable is not set, or the token cannot be sent.
    """

    differentiable = False

    def __init__(self, config: RemoteConfig, *, token: str | None = None) -> None:
        self.config = config
        self._url = config.url.rstrip("/")
        self._token = token if config.token_variable is None else read_token(config.token_variable)
        check_token(self._token)

    def __repr__(self) -> str:
        """Returns where the server is, without the token."""
        return f"RemoteReward({self.config.url!r})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the served reward's score of each image, in float32 on the images' device.

        Raises:
            HttpError: The server could not be reached, refused, or did not answer with one finite number per image.
        """
        check_pairs(images, prompts)
        scores: list[float] = []
        size = self.config.images_per_request
        for first in range(0, len(images), size):
            scores += self._scores(images[first : first + size], prompts[first : first + size])
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def check(self) -> str:
        """Returns the name of the reward that the server serves.

        Raises:
            HttpError: The server could not be reached, refused, or is another kind of server.
        """
        url = f"{self._url}/health"
        answer = request_json("GET", url, None, self.config.http, token=self._token)
        if not isinstance(answer, dict) or not isinstance(answer.get("reward"), str):
            raise HttpError(f"GET {url} got an answer that names no reward; is it a server of rewards.serve?")
        return answer["reward"]

    def _scores(self, images: Images, prompts: Sequence[str]) -> list[float]:
        """Asks for the scores of as many images as one request may hold."""
        files = encode_images(images, self.config.format, self.config.quality)
        encoded = [b64encode(file).decode("ascii") for file in files]
        total = sum(len(text) for text in encoded) + sum(len(prompt.encode("utf-8", "replace")) for prompt in prompts)
        if total > self.config.max_request_bytes:
            raise ValueError(
                f"{len(images)} images take {total} bytes, and max_request_bytes is {self.config.max_request_bytes}; "
                "lower images_per_request"
            )
        url = f"{self._url}/score"
        content = {"images": encoded, "prompts": list(prompts)}
        answer = request_json("POST", url, content, self.config.http, token=self._token)
        problem = _problem(answer, len(images))
        if problem is not None:
            raise HttpError(f"POST {url} got an answer that cannot be used: {problem}")
        return [float(score) for score in answer["scores"]]


def read_token(variable: str) -> str:
    """Returns the token that an environment variable holds.

    Raises:
        ValueError: It is not set or empty.
    """
    token = os.environ.get(variable)
    if not token:
        raise ValueError(f"token_variable must name an environment variable that holds the token, got {variable!r}")
    return token


def _problem(answer: Any, count: int) -> str | None:
    """Returns what is wrong with an answer, or None; its text is not repeated, for it may hold anything."""
    if not isinstance(answer, dict) or set(answer) != {"scores"}:
        return "it must be an object with the one key scores"
    scores = answer["scores"]
    if not isinstance(scores, list) or len(scores) != count:
        found = f"a list of {len(scores)}" if isinstance(scores, list) else type(scores).__name__
        return f"scores must be a list of {count}, got {found}"
    for index, score in enumerate(scores):
        # A boolean is an int to Python; a whole number may be too large for a float.
        if type(score) not in (int, float) or not abs(score) <= LARGEST:
            found = repr(score)[:20] if type(score) in (int, float) else type(score).__name__
            return f"scores[{index}] must be a finite number, got {found}"
    return None
