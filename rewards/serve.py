"""A server that scores images with any reward, so that training and grading need not share a process or a machine.

    python -m rewards.serve --reward compressibility
    python -m rewards.serve --reward image-reward --device cuda --host 0.0.0.0 --token-variable OVERPAINT_TOKEN

`rewards.remote.RemoteReward` is its client. `POST /score` takes {"images": [base64 of a PNG or JPEG, ...], "prompts":
[string, ...]} and answers {"scores": [number, ...]}; `GET /health` answers {"reward": name}; whatever goes wrong is
{"error": reason}. Requests are scored one after the other. There is no TLS: over a network that others read, put a
proxy or a tunnel before it.
"""

import asyncio
import base64
import hmac
import logging
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import Field
from pydantic_core import from_json

from overpaint.settings import settings

from .encoded import decode_image
from .function import as_reward
from .http_json import check_token, is_loopback
from .named import reward_named
from .remote import read_token
from .types import Reward, RewardLike, scores_of, to_device

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from uvicorn.protocols.http.h11_impl import H11Protocol

LOG = logging.getLogger("rewards.serve")


@settings
class ServeConfig:
    """What is served, to whom, and how much it takes at once."""

    reward: str
    """A name such as "compressibility"; module:name or path/to/file.py:name of a function, a class or a factory."""
    reward_weights: str | None = None
    """File or folder with the reward's weights, where it takes any."""
    vocab: str | None = None
    """File or folder with BERT's vocabulary, for image-reward and blip."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a token."""
    port: int = Field(8085, ge=0, le=65535)
    """Port to listen at; 0 takes a free one, which the first line of the output names."""
    token_variable: str | None = None
    """Environment variable that holds the token that clients must send."""
    device: str = "cpu"
    """Where the reward computes, such as "cuda"."""
    max_images: int = Field(64, ge=1)
    """Images in a request."""
    max_pixels: int = Field(2**25, ge=1)
    """Pixels of all images of a request together; the default is 128 images of 512 x 512."""
    max_bytes: int = Field(64_000_000, ge=1)
    """Size of a request."""
    max_seconds: float = Field(120.0, gt=0)
    """Time that the head of a request may take to arrive, and its body; in seconds."""
    max_requests: int = Field(16, ge=1)
    """Requests in memory at a time; others wait, unread."""
    max_connections: int = Field(256, ge=1)
    """Clients at a time; more are told to come again."""

    def __post_init__(self) -> None:
        """Checks that a server that others can reach has a token."""
        if not is_loopback(self.host) and self.token_variable is None:
            raise ValueError(f"token_variable must be given where others can reach the server, got host {self.host!r}")


class ScoreRequest(NamedTuple):
    """What `POST /score` takes."""

    images: list[str]
    """Base64 of a PNG or a JPEG each."""
    prompts: list[str]
    """One for each image."""


class RefusedError(Exception):
    """A request that is not answered with scores, and the HTTP status that says so."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def scores_for(body: bytes, reward: Reward, config: ServeConfig) -> list[float]:
    """Returns the score of each image of a request.

    Args:
        body: The request, as it came.
        reward: What scores them.
        config: The limits, and the device.

    Raises:
        RefusedError: The request is malformed or too large, or a score is not finite.
    """
    request = _parsed(body, config.max_images)
    images, pixels_left = [], config.max_pixels
    for index, text in enumerate(request.images):
        try:
            image = decode_image(base64.b64decode(text, validate=True), pixels_left)
        except ValueError as error:
            raise RefusedError(400, f"images[{index}] must be base64 of an image: {error}") from error
        if images and image.shape != images[0].shape:
            raise RefusedError(400, f"images must all have the same size, got another one for images[{index}]")
        images.append(image)
        pixels_left -= image.shape[1] * image.shape[2]
    if not images:
        return []
    with torch.no_grad():
        scores = scores_of("reward", reward, torch.stack(images).to(config.device), request.prompts).float().cpu()
    if not torch.isfinite(scores).all():
        raise RefusedError(500, "the reward gave a score that is not finite")
    return scores.tolist()


def application(reward: RewardLike, config: ServeConfig, token: str | None = None) -> "FastAPI":
    """Returns the ASGI application that serves a reward.

    Args:
        reward: What scores images; its calls come one at a time, from changing threads.
        config: Its name and the limits; host and port do not matter here.
        token: What clients must send; None lets anybody in.
    """
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse

    scorer = as_reward(reward)
    in_memory, one_at_a_time = asyncio.Semaphore(config.max_requests), asyncio.Lock()

    def authorised(request: Request) -> None:
        # In a time that does not tell how much of the token was right.
        sent = request.headers.get("Authorization", "")
        if token is not None and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
            raise RefusedError(401, "the token is missing or wrong")

    app = FastAPI(dependencies=[Depends(authorised)], openapi_url=None)

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, refused: RefusedError) -> JSONResponse:
        return JSONResponse({"error": str(refused)}, refused.status)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"reward": config.reward}

    @app.post("/score")
    async def score(request: Request) -> dict[str, list[float]]:
        # A web page cannot send this type to a server that does not allow it to.
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "Content-Type must be application/json")
        async with in_memory:
            body = await _body(request, config)
            async with one_at_a_time:
                if await request.is_disconnected():  # it has given up, and may have asked again
                    raise RefusedError(408, "the client has gone")
                try:
                    return {"scores": await asyncio.to_thread(scores_for, body, scorer, config)}
                except RefusedError:
                    raise
                except Exception as error:  # of the reward, whatever it is: the client is told, and others are served
                    LOG.exception("the reward failed")
                    raise RefusedError(500, f"the reward failed with {type(error).__name__}; see the log") from error

    return app


def serve(config: ServeConfig) -> None:
    """Serves a reward until a signal ends it; requests that are being scored are answered first.

    Raises:
        ImportError: fastapi or uvicorn is missing.
        ValueError: There is no such reward, or no token in the environment variable.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ImportError(
            "a server needs fastapi and uvicorn, which the extra server brings: pip install overpaint[server]"
        ) from error

    token = None if config.token_variable is None else read_token(config.token_variable)
    check_token(token)
    reward = reward_named(config.reward, weights=config.reward_weights, vocab=config.vocab)
    to_device(reward, config.device)
    options = uvicorn.Config(
        application(reward, config, token),
        host=config.host,
        port=config.port,
        http=_hurried_protocol(config.max_seconds),
        server_header=False,
        access_log=False,
        limit_concurrency=config.max_connections,
        timeout_graceful_shutdown=30,
        lifespan="off",
    )
    listener = options.bind_socket()
    listener.listen()  # whoever reads the line below may ask at once
    host, port = listener.getsockname()[:2]
    sys.stdout.write(f"{config.reward} at http://{f'[{host}]' if ':' in host else host}:{port}\n")
    sys.stdout.flush()
    uvicorn.Server(options).run(sockets=[listener])


def _hurried_protocol(seconds: float) -> "type[H11Protocol]":
    """Returns uvicorn's side of a connection, which by itself waits for ever for the head of a request.

    It waits no longer for what a client still sends of a request that has been answered.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Hurried(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._end_wait()

        def _look(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._end_wait()
            elif self.waiting is None:
                self.waiting = self.loop.call_later(seconds, self.transport.abort)

        def _end_wait(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

    return Hurried


def _parsed(body: bytes, max_images: int) -> ScoreRequest:
    """Returns the images and prompts of a request; what is wrong is told without repeating it.

    By hand, because pydantic's list of all that is wrong takes a hundred times the memory of a request of nonsense.
    """
    try:
        content = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError:
        raise RefusedError(400, "the body must be JSON") from None
    if not isinstance(content, dict) or content.keys() != {"images", "prompts"}:
        raise RefusedError(400, "the body must be an object with the keys images and prompts and no other")
    for name, texts in content.items():
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise RefusedError(400, f"{name} must be a list of strings")
    images, prompts = len(content["images"]), len(content["prompts"])
    if images != prompts:
        raise RefusedError(400, f"there must be one prompt for each image, got {prompts} for {images}")
    if images > max_images:
        raise RefusedError(413, f"a request may hold {max_images} images, got {images}")
    return ScoreRequest(**content)


async def _body(request: "Request", config: ServeConfig) -> bytes:
    """Reads the body of a request, whatever size its header claims."""
    from starlette.requests import ClientDisconnect

    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(config.max_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size <= config.max_bytes:
                    body += piece
                elif size > 2 * config.max_bytes:
                    break  # until here it was read and dropped, because a client that still writes hears no answer
    except TimeoutError as error:
        raise RefusedError(408, f"a request may take {config.max_seconds:g} s to arrive") from error
    except ClientDisconnect as error:
        raise RefusedError(408, "the client has gone") from error
    if size > config.max_bytes:
        raise RefusedError(413, f"a request may have {config.max_bytes} bytes")
    return bytes(body)


if __name__ == "__main__":
    import tyro

    serve(tyro.cli(ServeConfig, description=__doc__))
