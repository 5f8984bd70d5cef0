"""Image servers with the APIs of vLLM-Omni and SGLang Diffusion, without Argus's code or a model.

A server is a process of its own (`python -m tests.workers.upstreams`), which tests can kill. What
its two APIs accept and answer follows these sources:

- vLLM-Omni (github.com/vllm-project/vllm-omni): `generate_images`, `health` and
  `show_available_models` in vllm_omni/entrypoints/openai/api_server.py (commit 005fd8ea), the
  request's fields and limits in entrypoints/openai/protocol/images.py (00a3619b), the metrics'
  names in vllm_omni/metrics/prometheus.py (01aa7cca) and the errors in
  docs/serving/image_generation_api.md (00a3619b). Unknown fields are ignored; another model than
  the served one is a 400, a value out of range a 422, both with `detail`; pictures come as PNG in
  b64_json; a request whose client is gone is aborted (`with_cancellation`).
- SGLang Diffusion (github.com/sgl-project/sglang), under python/sglang/multimodal_gen/runtime:
  `generations` in entrypoints/openai/image_api.py (0230ddc2), `process_generation_batch` in
  entrypoints/openai/utils.py (00f0b39a), `available_models` in entrypoints/openai/common_api.py
  (0730031c), the queue in managers/scheduler.py (007d0be8). `model` is not looked at;
  `response_format` is "url" and the format JPEG unless the request says otherwise; a URL needs a
  store (400) or is a path of the server; the answer has `id` and `inference_time_s`; a failure is a
  500 without a reason; what a client that is gone asked for is made all the same; requests run one
  at a time unless batching is asked for (docs, dynamic_batching.md).

The engine takes as many queued requests as its batch holds, and denoises them together: a step of
b pictures takes `step_s * (1 + growth * (b - 1))` seconds of waiting. A picture is a pattern that
its prompt determines (`pattern`) under noise that its seed determines and more steps reduce, more
slowly for longer prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import io
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

GRID = 8  # fields of a pattern, each way
OVERSIZED = 80_000_000  # bytes


def pattern(prompt: str) -> NDArray[np.float64]:
    """The fields (8, 8, 3) from 0 to 1 that a picture of a prompt shows."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8])
    return np.random.default_rng(seed).random((GRID, GRID, 3))


def picture(prompt: str, seed: int, steps: int, width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(seed % 2**32).normal(size=(GRID, GRID, 3))
    left = math.exp(-3.0 * steps / (4 + len(prompt.split())))
    fields = np.clip(pattern(prompt) + left * noise, 0, 1)
    return Image.fromarray((255 * fields).astype(np.uint8)).resize((width, height), 0)


class PatternScorer:
    """Scores a picture from 0 to 1 by how near it is to its prompt's pattern."""

    @classmethod
    def load(cls, source: str | None, device: str) -> PatternScorer:
        return cls()

    def score(self, prompts: list[str], images: list[Image.Image]) -> NDArray[np.float32]:
        found = []
        for prompt, image in zip(prompts, images, strict=True):
            fields = np.asarray(image.resize((GRID, GRID), 4)) / 255
            found.append(1 - np.abs(fields - pattern(prompt)).mean())
        return np.array(found, np.float32)


@dataclass(eq=False)
class Asked:
    body: dict[str, Any]
    steps: int
    size: tuple[int, int]
    done: asyncio.Future[float]
    aborted: bool = False


@dataclass
class Engine:
    """Denoises queued requests in batches. `mode` is how the server behaves: `ok`, `slow`,
    `hang`, `unhealthy`, or as in `_misbehaviour`."""

    api: str
    model: str
    step_s: float
    growth: float
    batch: int
    key: str | None
    stored: bool  # whether SGLang keeps its pictures, for URLs
    checked: bool  # whether it has /health
    side: int  # pixels of a picture whose request has no size
    mode: str = "ok"
    waiting: list[Asked] = field(default_factory=list)
    running: list[Asked] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[dict[str, Any]] = field(default_factory=list)
    most: int = 0  # requests at the server at once
    aborted: int = 0
    files: dict[str, bytes] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.waiting:
                self.running = self.waiting[: self.batch]
                self.waiting = self.waiting[self.batch :]
                begun, done = time.perf_counter(), 0
                while any(not one.aborted and one.steps > done for one in self.running):
                    slow = 20.0 if self.mode == "slow" else 1.0
                    size = len(self.running)
                    await asyncio.sleep(slow * self.step_s * (1 + self.growth * (size - 1)))
                    done += 1
                    while self.mode == "hang":
                        await asyncio.sleep(0.05)
                    self.running = [one for one in self.running if not one.aborted]
                for one in self.running:
                    if not one.done.done():
                        one.done.set_result(time.perf_counter() - begun)
                self.running = []

    async def made(self, one: Asked) -> float:
        """Seconds of denoising of a request."""
        self.waiting.append(one)
        self.most = max(self.most, len(self.waiting) + len(self.running))
        self.arrived.set()
        return await one.done


def app(engine: Engine) -> Starlette:
    async def generations(request: Request) -> Response:
        if (
            engine.key is not None
            and request.headers.get("authorization") != f"Bearer {engine.key}"
        ):
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = json.loads(await request.body())
        engine.seen.append(body)
        wrong = _misbehaviour(engine, request) or _wrong(engine, body)
        if wrong is not None:
            return wrong
        width, height = map(int, (body.get("size") or f"{engine.side}x{engine.side}").split("x"))
        done: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        one = Asked(body, body.get("num_inference_steps") or 8, (width, height), done)
        making = asyncio.create_task(engine.made(one))
        if engine.api == "vllm-omni":  # SGLang goes on without its client
            gone = asyncio.create_task(_disconnected(request))
            await asyncio.wait((making, gone), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            if not making.done():
                one.aborted = True
                engine.aborted += 1
                engine.waiting = [other for other in engine.waiting if other is not one]
                making.cancel()
                return Response(status_code=499)
        return _answer(engine, one, await making)

    async def health(_: Request) -> Response:
        if engine.mode == "unhealthy":
            return JSONResponse({"status": "unhealthy"}, 503)
        return JSONResponse({"status": "healthy" if engine.api == "vllm-omni" else "ok"})

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": engine.model, "object": "model"}]})

    async def metrics(_: Request) -> Response:
        label = f'{{model_name="{engine.model}"}}'
        return PlainTextResponse(
            "# TYPE vllm_omni:num_requests_running gauge\n"
            f"vllm_omni:num_requests_running{label} {len(engine.running)}.0\n"
            "# TYPE vllm_omni:num_requests_waiting gauge\n"
            f"vllm_omni:num_requests_waiting{label} {len(engine.waiting)}.0\n"
        )

    async def content(request: Request) -> Response:
        return Response(engine.files[request.path_params["id"]], media_type="image/png")

    async def control(request: Request) -> Response:
        for name, value in (await request.json()).items():
            setattr(engine, name, value)
        return JSONResponse({})

    async def report(_: Request) -> Response:
        return JSONResponse(
            {
                "seen": engine.seen, "most": engine.most, "aborted": engine.aborted,
                "running": len(engine.running), "waiting": len(engine.waiting),
            }
        )  # fmt: skip

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(engine.run())
        yield
        task.cancel()

    routes = [
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/images/{id}/content", content),
        Route("/v1/models", models),
        Route("/control", control, methods=["POST"]),
        Route("/report", report),
    ]
    if engine.checked:
        routes.append(Route("/health", health))
    if engine.api == "vllm-omni":
        routes.append(Route("/metrics", metrics))
    return Starlette(routes=routes, lifespan=lifespan)


def _misbehaviour(engine: Engine, request: Request) -> Response | None:
    """The answer of a server that does not do what it should."""
    if engine.mode == "fail":
        return PlainTextResponse("Internal Server Error", 500)
    if engine.mode == "full":
        return JSONResponse({"detail": "busy"}, 429, {"Retry-After": "0.2"})
    if engine.mode == "redirect":
        return RedirectResponse(str(request.url).replace("/v1/images", "/elsewhere"), 307)
    if engine.mode == "oversized":
        return Response(b'{"data": "' + b"A" * OVERSIZED + b'"}', media_type="application/json")
    if engine.mode == "endless":

        async def chunks() -> AsyncIterator[bytes]:
            while True:
                yield b"A" * 65536

        return StreamingResponse(chunks(), media_type="application/json")
    if engine.mode == "garbage":
        return JSONResponse({"data": [{"b64_json": base64.b64encode(b"no picture").decode()}]})
    if engine.mode == "bomb":  # few bytes of a picture of 9,000 pixels a side
        return JSONResponse({"data": [{"b64_json": _base64(Image.new("1", (9_000, 9_000)))}]})
    if engine.mode == "elsewhere":
        return JSONResponse({"data": [{"url": "http://127.0.0.1:9/picture.png"}]})
    return None


def _wrong(engine: Engine, body: dict[str, Any]) -> Response | None:
    """The answer to a request that cannot be served."""
    if engine.api == "sglang":
        if (body.get("response_format") or "url") == "url" and not engine.stored:
            said = "response_format='url' requires cloud storage to be configured."
            return JSONResponse({"detail": said}, 400)
        return None
    if body.get("model") not in (None, engine.model):
        said = (
            f"Model mismatch: request specifies '{body['model']}' but server is running "
            f"'{engine.model}'."
        )
        return JSONResponse({"detail": said}, 400)
    limits = {"num_inference_steps": (1, 200), "guidance_scale": (0, 20), "n": (1, 10)}
    for name, (least, most) in limits.items():
        value = body.get(name)
        if value is not None and not least <= value <= most:
            detail = {"loc": ["body", name], "msg": f"Input should be from {least} to {most}"}
            return JSONResponse({"detail": [detail]}, 422)
    if body.get("response_format", "b64_json") not in ("b64_json", "file"):
        detail = {"loc": ["body", "response_format"], "msg": "Only 'b64_json' is supported"}
        return JSONResponse({"detail": [detail]}, 422)
    return None


def _answer(engine: Engine, one: Asked, seconds: float) -> Response:
    body = one.body
    image = picture(body["prompt"], body.get("seed") or 0, one.steps, *one.size)
    if engine.api == "vllm-omni":
        data: dict[str, Any] = {"b64_json": _base64(image), "url": None, "revised_prompt": None}
        size = f"{one.size[0]}x{one.size[1]}"
        answer = {"created": int(time.time()), "data": [data], "output_format": "png", "size": size}
        return JSONResponse(answer)
    number = f"img{len(engine.seen)}"
    made_as = {"png": "PNG", "webp": "WEBP"}.get(body.get("output_format") or "", "JPEG")
    if engine.stored and body.get("response_format") != "b64_json":
        engine.files[number] = base64.b64decode(_base64(image, made_as))
        data = {"url": f"/v1/images/{number}/content", "revised_prompt": body["prompt"]}
    else:
        data = {"b64_json": _base64(image, made_as), "revised_prompt": body["prompt"]}
    created = int(time.time())
    return JSONResponse(
        {"id": number, "created": created, "data": [data], "inference_time_s": seconds}
    )


def _base64(image: Image.Image, made_as: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, made_as)
    return base64.b64encode(file.getvalue()).decode()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass
class Upstream:
    """A server's process, and the way to it."""

    url: str
    process: subprocess.Popen[bytes]
    command: list[str]

    def control(self, **what: Any) -> None:
        """Set fields of its engine, as `mode` or `step_s`."""
        httpx.post(f"{self.url}/control", json=what).raise_for_status()

    def report(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/report").json()
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def start_again(self) -> None:
        self.process = _started(self.command)


@contextmanager
def upstream(api: str = "vllm-omni", **options: Any) -> Iterator[Upstream]:
    """A server of its own process on a free port of loopback; `options` are those of `main`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    module = [sys.executable, "-m", "tests.workers.upstreams"]
    command = [*module, f"--api={api}", f"--port={port}", *flags]
    scheme = "https" if "certificate" in options else "http"
    one = Upstream(f"{scheme}://127.0.0.1:{port}", _started(command), command)
    try:
        yield one
    finally:
        one.kill()


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it listens
    return process


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--api", choices=("vllm-omni", "sglang"), default="vllm-omni")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="acme/pattern")
    parser.add_argument("--step-s", type=float, default=0.005)
    parser.add_argument("--growth", type=float, default=0.25)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--key")
    parser.add_argument("--stored", type=int, default=0)
    parser.add_argument("--checked", type=int, default=1)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--certificate")
    given = vars(parser.parse_args())
    listening = socket.create_server(("127.0.0.1", given.pop("port")), backlog=256)
    print(listening.getsockname()[1], flush=True)
    certificate = given.pop("certificate")
    config = uvicorn.Config(
        app(Engine(**given)),
        log_level="warning",
        timeout_keep_alive=60,
        ssl_certfile=certificate,
    )
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
