"""The OpenAI Images API of another server: a job as its request, its answer as a picture, and what
its errors mean.

Nothing that it answers is trusted: redirects are refused, answers are read up to a limit that the
picture's size sets, and a picture of another size is refused before it is decoded.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import re
import ssl
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
from PIL import Image

from argus.config import Upstream
from argus.core.errors import BadRequest
from argus.core.job import Job

GENERATIONS, MODELS, METRICS = "/v1/images/generations", "/v1/models", "/metrics"
HEALTH = ("/health", MODELS)  # where an upstream's health is asked for, unless it is set
CONNECT_S, SEND_S, LOOK_S = 5.0, 30.0, 5.0  # limits of a connection, of a request, of a look
PIXEL_BYTES = 6  # of an answer: four bytes a pixel, uncompressed, as base64
ANSWER_BYTES, ERROR_BYTES, REPORT_BYTES = 1 << 20, 1 << 16, 1 << 22
DEFAULT_PIXELS = 1 << 22  # of a picture whose size the server chooses
MOST_WORDS = 300  # characters of an error that are passed on
FORMATS = ("PNG", "JPEG", "WEBP")
REFUSED = (
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
)
BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
PAUSE_S, LEAST_PAUSE_S, MOST_PAUSE_S = 1.0, 0.1, 30.0
_GAUGE = re.compile(
    r"^(vllm_omni:|vllm:omni_|vllm:)num_requests_(running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$",
    re.MULTILINE,
)


class Unable(Exception):
    """The server did not make the picture. Where `pause_s` is given, it takes no other request for
    so many seconds; else this request alone may be why. `words` are the server's, which may quote
    the prompt; `reason` does not."""

    def __init__(self, reason: str, pause_s: float | None = None, words: str = "") -> None:
        super().__init__(f"{reason}: {words}" if words else f"{reason}.")
        self.reason, self.pause_s = reason, pause_s


@dataclass(frozen=True)
class Answer:
    """A picture, and milliseconds: `denoise` as the server says, or until its answer was read;
    `decode` to decode it here."""

    image: Image.Image
    timings_ms: dict[str, float]


@dataclass(frozen=True)
class Load:
    """Numbers of requests at a server, its other clients' included."""

    running: int
    waiting: int


class ImagesApi:
    """A client of one server, for use from one asyncio loop.

    A connection that cannot be made or breaks off raises httpx.TransportError, and at times what
    lies under httpx (an AttributeError of a socket that is gone).
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._headers = {"Accept-Encoding": "identity"}
        if upstream.key is not None:
            self._headers["Authorization"] = f"Bearer {upstream.key}"
        trusted = None if upstream.ca_file is None else str(upstream.ca_file)
        limits = httpx.Limits(
            max_connections=upstream.concurrency + 4, max_keepalive_connections=None
        )
        self._client = httpx.AsyncClient(
            headers=self._headers,
            verify=ssl.create_default_context(cafile=trusted),
            timeout=httpx.Timeout(None, connect=CONNECT_S, write=SEND_S),
            limits=limits,
            follow_redirects=False,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, job: Job) -> Answer:
        """Have the server make a job's picture.

        Raises BadRequest if it refuses the job, and Unable if it does not make the picture.
        Cancelling the caller closes the connection.
        """
        begun = time.monotonic()
        body = self._body(job)
        limit = ANSWER_BYTES + PIXEL_BYTES * _pixels(job)
        content = await asyncio.to_thread(
            _parsed, await self._read("POST", GENERATIONS, limit, body)
        )
        data = _first(content)
        if isinstance(data.get("b64_json"), str):
            file = await asyncio.to_thread(_decoded, data["b64_json"])
        elif isinstance(data.get("url"), str):
            file = await self._read("GET", self._own_path(data["url"]), limit)
        else:
            raise Unable("it answers with no picture: neither b64_json nor url")
        read = time.monotonic()
        image = await asyncio.to_thread(_picture, file, job)
        denoise_s, decode_s = read - begun, time.monotonic() - read
        said_s = content.get("inference_time_s")
        if isinstance(said_s, float) and 0 <= said_s <= denoise_s:
            denoise_s = said_s
        timings_ms = {"encode": 0.0, "denoise": 1000 * denoise_s, "decode": 1000 * decode_s}
        return Answer(image, timings_ms)

    async def problem(self) -> str | None:
        """Why the server does not work, None if it does."""
        own = self._upstream.health
        paths = HEALTH if own is None else (own,)
        status = 0
        for path in paths:
            try:
                async with asyncio.timeout(LOOK_S), self._stream("GET", path) as response:
                    status = response.status_code
            except TimeoutError:
                return f"{path} does not answer within {LOOK_S:g} s"
            except Exception as error:
                return f"it cannot be reached ({type(error).__name__})"
            if status == HTTPStatus.OK:
                return None
            if status not in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
                break
        return f"{path} answers {status}"

    async def unserved(self) -> str | None:
        """Why the server does not have the model that it is asked for; None if it has it, or does
        not say which it has."""
        wanted = self._upstream.served_model
        if wanted is None:
            return None
        try:
            async with asyncio.timeout(LOOK_S):
                content = _parsed(await self._read("GET", MODELS, REPORT_BYTES))
            names = [str(one["id"]) for one in content["data"]]
        except Exception:
            return None
        if wanted in names:
            return None
        return f"it serves {', '.join(names)[:MOST_WORDS] or 'no model'}, not {wanted}"

    async def load(self) -> Load | None:
        """How many requests the server has, None if it does not say."""
        try:
            async with asyncio.timeout(LOOK_S):
                text = (await self._read("GET", METRICS, REPORT_BYTES)).decode()
            found = _GAUGE.findall(text)
            prefix = found[0][0]
            count = {"running": 0.0, "waiting": 0.0}
            for one, name, value in found:
                if one == prefix:
                    count[name] += float(value)
            return Load(int(count["running"]), int(count["waiting"]))
        except Exception:
            return None

    # --- one exchange

    def _body(self, job: Job) -> dict[str, Any]:
        """The request for a job's picture."""
        upstream = self._upstream
        fields: dict[str, Any] = {
            "n": 1,
            "response_format": "b64_json",
            "output_format": "png",
            "num_inference_steps": job.steps,
            "guidance_scale": job.guidance,
            "seed": job.seed,
        }
        if job.width is not None and job.height is not None:
            fields["size"] = f"{job.width}x{job.height}"
        if job.negative_prompt:
            fields["negative_prompt"] = job.negative_prompt
        body: dict[str, Any] = {"prompt": job.prompt}
        if upstream.served_model is not None:
            body["model"] = upstream.served_model
        for name, value in fields.items():
            renamed = upstream.fields.get(name, name)
            if renamed is not None:
                body[renamed] = value
        return body | upstream.extra | dict(job.extra)

    def _stream(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> AbstractAsyncContextManager[httpx.Response]:
        return self._client.stream(method, self._upstream.url + path, json=body)

    async def _read(
        self, method: str, path: str, limit: int, body: dict[str, Any] | None = None
    ) -> bytes:
        """The body of an answer, of `limit` bytes at most. Raises as `ask`."""
        async with self._stream(method, path, body) as response:
            status = response.status_code
            if status != HTTPStatus.OK:
                words = await _words(response)
                if status in REFUSED:
                    raise BadRequest(f"The image server refuses this request: {words}")
                raise _unable(status, words, response.headers)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Unable("it compresses its answers, which are read uncompressed only")
            content = await _up_to(limit, response)
            if content is None:
                raise Unable(f"its answer has more than {limit:,} bytes")
            return content

    def _own_path(self, url: str) -> str:
        """The path of a picture's URL. Raises Unable for the URL of another server."""
        base = urlsplit(self._upstream.url)
        found = urlsplit(urljoin(f"{self._upstream.url}/", url))
        if (found.scheme, found.netloc) != (base.scheme, base.netloc):
            raise Unable("it answers with the URL of another server, which is not fetched")
        path = found.path.removeprefix(base.path) or "/"
        return f"{path}?{found.query}" if found.query else path


def _unable(status: int, words: str, headers: httpx.Headers) -> Unable:
    """The error of an answer that is neither a picture nor a refusal of the job."""
    if status in BUSY:
        return Unable(f"it is busy ({status})", _pause_s(headers), words)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return Unable(f"it redirects ({status}), which is refused", MOST_PAUSE_S)
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Unable(f"it refuses the key ({status})", MOST_PAUSE_S, words)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        return Unable(f"it has no such route or model ({status})", MOST_PAUSE_S, words)
    return Unable(f"it fails ({status})", words=words)


def _pause_s(headers: httpx.Headers) -> float:
    """The seconds of Retry-After, within limits."""
    try:
        asked_s = float(headers.get("retry-after", PAUSE_S))
    except ValueError:  # a date
        return PAUSE_S
    return min(MOST_PAUSE_S, max(LEAST_PAUSE_S, asked_s)) if math.isfinite(asked_s) else PAUSE_S


async def _up_to(limit: int, response: httpx.Response) -> bytes | None:
    """The body of a response; None if it has more than `limit` bytes, of which no more are read."""
    if int(response.headers.get("content-length", 0)) > limit:
        return None
    content = bytearray()
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > limit:
            return None
    return bytes(content)


async def _words(response: httpx.Response) -> str:
    """What an error says, in one bounded line: OpenAI's `error.message`, FastAPI's `detail`, or the
    text."""
    content = await _up_to(ERROR_BYTES, response)
    if content is None:
        return "a long text"
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error") or found.get("detail") or found
        if isinstance(found, list):
            found = "; ".join(str(one["msg"]) for one in found)
        if isinstance(found, dict):
            found = found["message"]
        text = str(found)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable())[:MOST_WORDS] or "no reason given"


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        raise Unable("its answer is not JSON") from None
    if not isinstance(found, dict):
        raise Unable("its answer is no JSON object")
    return found


def _first(content: dict[str, Any]) -> dict[str, Any]:
    data = content.get("data")
    if not isinstance(data, list) or not data or not isinstance(data[0], dict):
        raise Unable("its answer has no pictures in `data`")
    first: dict[str, Any] = data[0]
    return first


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise Unable("its picture is not base64") from None


def _picture(file: bytes, job: Job) -> Image.Image:
    """The picture in a file. Its size is checked before its pixels are decoded."""
    try:
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            if job.width is not None and image.size != (job.width, job.height):
                asked, made = f"{job.width}x{job.height}", "x".join(map(str, image.size))
                raise Unable(f"it answers with a picture of {made}, asked for {asked}")
            if image.width * image.height > DEFAULT_PIXELS and job.width is None:
                raise Unable("it answers with too large a picture")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise Unable("it answers with what is no PNG, JPEG or WebP picture") from None


def _pixels(job: Job) -> int:
    if job.width is None or job.height is None:
        return DEFAULT_PIXELS
    return job.width * job.height
