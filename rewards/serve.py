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
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .encoded import decode_image
from .http_json import check_token, is_loopback
from .named import reward_named
from .remote import read_token
from .scores import scores_of
from .types import Reward

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request

LOG = logging.getLogger("rewards.serve")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What is served, to whom, and how much it takes at once."""

    reward: str
    """A name such as "compressibility", or package.module:factory, called without arguments."""
    host: str = "127.0.0.1"
    """Address to listen at. Any but this machine's own needs a token."""
    port: int = 8085
    """Port to listen at; 0 takes a free one, which the first line of the output names."""
    token_variable: str | None = None
    """Environment variable that holds the token that clients must send."""
    device: str = "cpu"
    """Where the reward computes, such as "cuda"."""
    max_images: int = 64
    """Images in a request."""
    max_pixels: int = 2**25
    """Pixels of all images of a request together; the default is 128 images of 512 x 512."""
    max_bytes: int = 64_000_000
    """Size of a request."""
    max_seconds: float = 120.0
    """Time that the sending of a request may take."""
    max_connections: int = 16
    """Clients at a time; more are told to come again."""

    def __post_init__(self) -> None:
        """Checks every field."""
        if not is_loopback(self.host) and self.token_variable is None:
            raise ValueError(f"token_variable must be given where others can reach the server, got host {self.host!r}")
        if self.port not in range(65536):
            raise ValueError(f"port must be in 0..65535, got {self.port!r}")
        for name in ("max_images", "max_pixels", "max_bytes", "max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not 0 < self.max_seconds < math.inf:
            raise ValueError(f"max_seconds must be positive and finite, got {self.max_seconds!r}")


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
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body must be JSON") from error
    encoded, prompts = _fields(content, config.max_images)
    images, pixels_left = [], config.max_pixels
    for index, text in enumerate(encoded):
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
        scores = scores_of("reward", reward, torch.stack(images).to(config.device), prompts).float().cpu()
    if not torch.isfinite(scores).all():
        raise RefusedError(500, "the reward gave a score that is not finite")
    return scores.tolist()


def application(reward: Reward, config: ServeConfig, token: str | None = None) -> "Starlette":
    """Returns the ASGI application that serves a reward.

    Args:
        reward: What scores images; its calls come one at a time, from changing threads.
        config: Its name and the limits; host and port do not matter here.
        token: What clients must send; None lets anybody in.
    """
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    one_at_a_time = asyncio.Lock()

    async def health(request: Request) -> dict[str, Any]:
        return {"reward": config.reward}

    async def score(request: Request) -> dict[str, Any]:
        # A web page cannot send this type to a server that does not allow it to.
        if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "Content-Type must be application/json")
        body = await _body(request, config)
        async with one_at_a_time:
            if await request.is_disconnected():  # it has given up, and may have asked again
                raise RefusedError(408, "the client has gone")
            return {"scores": await asyncio.to_thread(scores_for, body, reward, config)}

    def guarded(answer: Any) -> Any:
        async def endpoint(request: Request) -> JSONResponse:
            try:
                _check_caller(request.headers, token)
                return JSONResponse(await answer(request))
            except RefusedError as refused:
                return JSONResponse({"error": str(refused)}, refused.status)
            except Exception as error:  # of the reward, whatever it is: the client is told, and others are served
                LOG.exception("the reward failed")
                return JSONResponse({"error": f"the reward failed with {type(error).__name__}; see the log"}, 500)

        return endpoint

    return Starlette(
        routes=[
            Route("/health", guarded(health), methods=["GET"]),
            Route("/score", guarded(score), methods=["POST"]),
        ]
    )


def serve(config: ServeConfig) -> None:
    """Serves a reward until a signal ends it; requests that are being scored are answered first.

    Raises:
        ImportError: starlette or uvicorn is missing.
        ValueError: There is no such reward, or no token in the environment variable.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ModuleNotFoundError as error:
        raise ImportError(
            "a server needs starlette and uvicorn, which the extra server brings: pip install overpaint[server]"
        ) from error

    token = None
    if config.token_variable is not None:
        token = read_token(config.token_variable)
        check_token(token)
    reward = reward_named(config.reward)
    if isinstance(reward, nn.Module):
        reward.to(config.device)
    settings = uvicorn.Config(
        application(reward, config, token),
        host=config.host,
        port=config.port,
        server_header=False,
        access_log=False,
        limit_concurrency=config.max_connections,
        timeout_graceful_shutdown=30,
        lifespan="off",
    )
    listener = settings.bind_socket()
    listener.listen()  # whoever reads the line below may ask at once
    host, port = listener.getsockname()[:2]
    sys.stdout.write(f"{config.reward} at http://{f'[{host}]' if ':' in host else host}:{port}\n")
    sys.stdout.flush()
    uvicorn.Server(settings).run(sockets=[listener])


def _fields(content: Any, max_images: int) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the images and prompts of a request."""
    if not isinstance(content, dict) or set(content) != {"images", "prompts"}:
        raise RefusedError(400, "the body must be an object with the keys images and prompts and no other")
    for name, values in content.items():
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise RefusedError(400, f"{name} must be a list of strings")
    images, prompts = content["images"], content["prompts"]
    if len(images) != len(prompts):
        raise RefusedError(400, f"there must be one prompt for each image, got {len(prompts)} for {len(images)}")
    if len(images) > max_images:
        raise RefusedError(413, f"a request may hold {max_images} images, got {len(images)}")
    return images, prompts


async def _body(request: "Request", config: ServeConfig) -> bytes:
    """Reads the body of a request, whatever size its header claims."""
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
    if size > config.max_bytes:
        raise RefusedError(413, f"a request may have {config.max_bytes} bytes")
    return bytes(body)


def _check_caller(headers: Mapping[str, str], token: str | None) -> None:
    """Refuses a caller without the token, in a time that does not tell how much of it was right."""
    sent = headers.get("Authorization", "")
    if token is not None and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        raise RefusedError(401, "the token is missing or wrong")


if __name__ == "__main__":
    import tyro

    serve(tyro.cli(ServeConfig, description=__doc__))
