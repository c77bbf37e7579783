"""A vision-language model behind a server that speaks OpenAI's protocol, such as vLLM, SGLang or `transformers serve`.

Images travel as base64 in JSON. kvablack/LLaVA-server, which the published reward was computed with, takes pickled
requests instead, which run whatever code they hold; it is not supported.
"""

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from overpaint.policy.types import Images

from .encoded import ImageFormat, check_format, encode_images
from .http_json import EXCERPT, HttpConfig, HttpError, check_token, check_url, request_json
from .vlm import check_questions


@dataclass(frozen=True, kw_only=True)
class ServedVLMConfig:
    """Which server is asked, and how; always for the likeliest token (temperature 0)."""

    model: str
    """Name that the server knows the model by."""
    url: str = "http://127.0.0.1:8000/v1"
    """Where the server's interface begins; `/chat/completions` is added."""
    token_variable: str | None = None
    """Environment variable that holds the token; none is sent if it is not given."""
    max_tokens: int = 64
    """Longest answer, in tokens. 64 is what kvablack/LLaVA-server gives at most."""
    image_format: ImageFormat = "jpeg"
    """How images travel: "jpeg", as kvablack/ddpo-pytorch sends them, or "png", without loss."""
    jpeg_quality: int = 80
    """Quality of a JPEG, from 1 to 100; 80 as in kvablack/ddpo-pytorch."""
    concurrency: int = 8
    """Number of questions that the server has at the same time."""
    http: HttpConfig = field(default_factory=HttpConfig)
    """How long the server is waited for, and how often it is asked."""

    def __post_init__(self) -> None:
        """Checks every field."""
        if not self.model:
            raise ValueError(f"model must be the name that the server knows the model by, got {self.model!r}")
        check_url(self.url)
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        check_format(self.image_format, self.jpeg_quality)


class ServedVLM:
    """Answers questions about images by asking a server, several questions at a time.

    Args:
        config: Which server, and how it is asked.
        token: Sent as `Authorization: Bearer`; that of `config.token_variable` where it is not given.

    Raises:
        ValueError: The environment lacks `config.token_variable`, or the token cannot be sent.
    """

    def __init__(self, config: ServedVLMConfig, *, token: str | None = None) -> None:
        self.config = config
        if token is None and config.token_variable is not None:
            token = os.environ.get(config.token_variable)
            if token is None:
                raise ValueError(f"token_variable must be set in the environment, got no {config.token_variable}")
        if token is not None:
            check_token(token)
        self._token = token
        self._url = f"{config.url.rstrip('/')}/chat/completions"

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Returns the answer to each question about its image, without white space around it.

        Args:
            images: RGB in [0, 1]; rounded to 8 bits, and values outside clamped.
            questions: One for each image.

        Raises:
            TypeError: A question is not a string, or the images are not floating point.
            ValueError: The images are not a batch of finite RGB images, or there is not one question for each.
            HttpError: A question got no answer of use; those not yet sent are not sent any more.
        """
        check_questions(images, questions)
        config = self.config
        files = encode_images(images, config.image_format, config.jpeg_quality)
        with ThreadPoolExecutor(max_workers=config.concurrency) as pool:
            return list(pool.map(self._ask, files, questions))

    def _ask(self, file: bytes, question: str) -> str:
        """Asks one question."""
        config = self.config
        image = f"data:image/{config.image_format};base64,{base64.b64encode(file).decode('ascii')}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        request = {
            "model": config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": config.max_tokens,
        }
        return self._text(request_json("POST", self._url, request, config.http, token=self._token))

    def _text(self, answer: Any) -> str:
        """Returns the text of an answer, or says what there is instead."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if isinstance(text, str):
            return text.strip()
        shown = ascii(answer)
        if self._token is not None:
            shown = shown.replace(self._token, "[token]")
        raise HttpError(f"POST {self._url} got no text at choices[0].message.content: {shown[:EXCERPT]}")
