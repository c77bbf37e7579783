"""A vision-language model behind a server that speaks OpenAI's protocol, such as vLLM, SGLang or `transformers serve`.

Images travel as base64 in JSON, through the package openai. kvablack/LLaVA-server, which the published reward was
computed with, takes pickled requests instead, which run whatever code they hold; it is not supported.
"""

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from overpaint.policy.types import Images
from overpaint.settings import Field, settings

from .encoded import ImageFormat, encode_images
from .http_json import EXCERPT, HttpConfig, HttpError, check_token, check_url, http_client, json_of
from .remote import read_token
from .vlm import check_questions

if TYPE_CHECKING:
    import httpx2
    import openai


@settings
class ServedVLMConfig:
    """Which server is asked, and how; always for the likeliest token (temperature 0)."""

    model: str = Field(min_length=1)
    """Name that the server knows the model by."""
    url: str = "http://127.0.0.1:8000/v1"
    """Where the server's interface begins; `/chat/completions` is added."""
    token_variable: str | None = None
    """Environment variable that holds the token; none is sent if it is not given."""
    max_tokens: int = Field(64, ge=1)
    """Longest answer, in tokens. 64 is what kvablack/LLaVA-server gives at most."""
    image_format: ImageFormat = "jpeg"
    """How images travel: "jpeg", as kvablack/ddpo-pytorch sends them, or "png", without loss."""
    jpeg_quality: int = Field(80, ge=1, le=100)
    """Quality of a JPEG, from 1 to 100; 80 as in kvablack/ddpo-pytorch."""
    concurrency: int = Field(8, ge=1)
    """Number of questions that the server has at the same time."""
    http: HttpConfig = HttpConfig()
    """How long the server is waited for, and how often it is asked."""

    def __post_init__(self) -> None:
        """Checks the address."""
        check_url(self.url)


class ServedVLM:
    """Answers questions about images by asking a server, several questions at a time.

    Args:
        config: Which server, and how it is asked.
        token: Sent as `Authorization: Bearer`; that of `config.token_variable` where it is not given.

    Raises:
        ImportError: The package openai is missing.
        ValueError: The environment lacks `config.token_variable`, or the token cannot be sent.
    """

    def __init__(self, config: ServedVLMConfig, *, token: str | None = None) -> None:
        try:
            import openai  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError('a served model needs the package openai: pip install "overpaint[vlm]"') from error
        self.config = config
        self._token = read_token(config.token_variable) if token is None and config.token_variable else token
        check_token(self._token)
        self._url = f"{config.url.rstrip('/')}/chat/completions"

    def answer(self, images: Images, questions: Sequence[str]) -> list[str]:
        """Returns the answers, as `VisionLanguageModel.answer` says.

        Raises:
            HttpError: A question got no answer of use; those not yet sent are not sent any more.
        """
        check_questions(images, questions)
        config = self.config
        files = encode_images(images, config.image_format, config.jpeg_quality)
        with self._client() as client, ThreadPoolExecutor(max_workers=config.concurrency) as pool:
            return list(pool.map(lambda file, question: self._ask(client, file, question), files, questions))

    def _client(self) -> "openai.OpenAI":
        """Returns openai's client: everything is given, since it takes from the environment what is not."""
        import openai

        return openai.OpenAI(
            api_key=self._token or "none",  # which `http_client` does not send
            base_url=self.config.url,
            max_retries=0,  # `json_of` retries
            http_client=http_client(self._url, self.config.http, self._token),
        )

    def _ask(self, client: "openai.OpenAI", file: bytes, question: str) -> str:
        """Asks one question."""
        import openai

        config = self.config
        image = f"data:image/{config.image_format};base64,{base64.b64encode(file).decode('ascii')}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
        messages: Any = [{"role": "user", "content": content}]

        def once() -> "httpx2.Response":
            try:
                return client.chat.completions.with_raw_response.create(
                    model=config.model, messages=messages, temperature=0, max_tokens=config.max_tokens
                ).http_response
            except openai.APIStatusError as error:
                return error.response
            except openai.APIConnectionError as error:
                raise error.__cause__ or error from None

        return self._text(json_of(f"POST {self._url}", once, config.http, self._token))

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
