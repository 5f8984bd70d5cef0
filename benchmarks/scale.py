"""How many requests a second does one server decide, and what does it add to each?

    python benchmarks/scale.py [--workers 16,64,256] [--rate 250] [--seconds 20] [--json]

A real server (HTTP, prompt encoder, cache search, prediction, `price`, fleet, PNG, metrics) in a
process of its own, in front of workers that only wait: a picture takes the time that the profile
says for the number in flight, scaled so that the offered rate keeps the workers `--busy` of the
time. Every request has a prompt of its own. First as many as the server can answer: 64 clients or
more, each asking as soon as it is answered (`requests_per_s`), before workers that wait a tenth as
long, since they would be the limit. Then, by a second server, `--rate` a second in an open loop:
`added_ms` is the latency as the client sees it less the time that the worker waited, `cpu_ms` the
server's CPU time for a request. The client is a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from argus.config import Settings, SloClass
from argus.core.job import Job
from argus.workers.worker import Finished, Model, OnPreview, State

CLIENTS = 64  # at least, and one a worker, who ask as soon as they are answered
FASTER = 10  # workers, where the server is to be the limit
WARM_UP_S = 3.0
WORDS = [
    "red",
    "blue",
    "green",
    "small",
    "large",
    "striped",
    "fish",
    "house",
    "boat",
    "tree",
    "key",
    "cup",
    "moon",
    "star",
    "flower",
    "sea",
]


class WaitingWorker:
    """A worker whose engine only waits."""

    def step_s(self, model: Model, size: int) -> float:
        """Seconds of a step of `size` pictures."""
        raise NotImplementedError

    def __init__(self, model: Model) -> None:
        self.device_type, self.opaque = 0, False
        self.model, self.state = model, State.STARTING
        self.problem: Exception | None = None
        self.restarts, self.busy_s, self.silent_s = 0, 0.0, 0.0
        self.silence_s: Callable[[], float] = lambda: math.inf
        self.on_change: Callable[[], None] = lambda: None
        self._running = 0
        self._picture = Image.effect_noise((64, 64), 50).convert("RGB")

    def start(self) -> None:
        self.state = State.READY
        asyncio.get_running_loop().call_soon(lambda: self.on_change())

    async def ready(self) -> None: ...

    def load(self, model: Model) -> None:
        self.model, self.state = model, State.READY
        asyncio.get_running_loop().call_soon(lambda: self.on_change())

    restart = load

    def at_hand(self, model: Model) -> bool:
        return False

    async def keep(self, models: Sequence[Model], limit_s: float) -> None: ...

    async def run(
        self,
        job: Job,
        start: bytes | None = None,
        keep: tuple[int, ...] = (),
        previews: int = 0,
        on_preview: OnPreview | None = None,
    ) -> Finished:
        self._running += 1
        begun = time.perf_counter()
        try:
            await asyncio.sleep(job.steps_run * self.step_s(self.model, self._running))
        finally:
            self._running -= 1
        waited_ms = 1000 * (time.perf_counter() - begun)
        timings = {"encode": 0.0, "denoise": waited_ms, "decode": 0.0}
        return Finished(self._picture, {}, timings, waited_ms / 1000)

    async def stop(self, grace_s: float) -> None:
        self.state = State.STOPPED

    def kill(self) -> None: ...


def serve(port: int, workers: int, rate: float, busy: float, latency: str, data: str) -> None:
    """The server's process."""
    import argus.server.service as service
    from argus.server.model import ServedFamily
    from argus.server.run import serve as run

    settings = Settings(
        port=port, data=Path(data), workers=workers, device="cpu", queue_limit=4096,
        slo={"default": SloClass(latency=latency)}, truth_share=0, log_level="warning",
    )  # fmt: skip
    model = ServedFamily.of(settings)
    table = model.table
    exact_s = float(table.cost_s(math.inf)[0, 0])  # a worker's seconds for an exact picture
    factor = busy * workers / rate / exact_s
    numbers = {one.source: m for m, one in enumerate(model.models[0])}

    class Waiting(WaitingWorker):
        def step_s(self, model: Model, size: int) -> float:
            return factor * table.batch_step_s(0, numbers[model.source], size)

    vars(service)["LocalWorker"] = Waiting
    run(settings)


class Client:
    """Asks a server over connections that it keeps; as little work as can be."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._numbers, self._random = count(), random.Random(0)

    async def ask(self) -> tuple[float, float]:
        """Latency in seconds, and the worker's part of it; NaN if it was refused."""
        words = self._random.choices(WORDS, k=6)
        body = json.dumps({"prompt": f"{' '.join(words)} {next(self._numbers)}"}).encode()
        begun = time.perf_counter()
        reader, writer = (
            self._idle.pop()
            if self._idle
            else await asyncio.open_connection("127.0.0.1", self._port)
        )
        writer.write(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        answer = json.loads(await reader.readexactly(length))
        self._idle.append((reader, writer))
        took_s = time.perf_counter() - begun
        if b" 200 " not in head.split(b"\r\n")[0]:
            return took_s, math.nan
        return took_s, answer["argus"][0]["timings_ms"]["denoise"] / 1000

    async def closed(self, clients: int, seconds: float) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        until = time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < until:
                found.append(await self.ask())

        await asyncio.gather(*(one() for _ in range(clients)))
        return found

    async def open(self, rate: float, seconds: float) -> list[tuple[float, float]]:
        tasks, at = [], time.perf_counter()
        for _ in range(int(rate * seconds)):
            at += self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*tasks))


def measured(workers: int, rate: float, seconds: float, busy: float) -> dict[str, float]:
    with _serving(workers, rate, busy / FASTER, "60s") as (client, _):
        most_per_s = asyncio.run(_most(client, max(CLIENTS, workers), seconds))
    with _serving(workers, rate, busy, "10x") as (client, server):
        return {"requests_per_s": most_per_s} | asyncio.run(_offered(client, server, rate, seconds))


@contextmanager
def _serving(
    workers: int, rate: float, busy: float, latency: str
) -> Iterator[tuple[Client, psutil.Process]]:
    with tempfile.TemporaryDirectory() as data:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        ours = [
            sys.executable,
            __file__,
            "--serve",
            f"{port} {workers} {rate} {busy} {latency} {data}",
        ]
        process = subprocess.Popen(ours)
        try:
            _until_ready(port, process)
            yield Client(port), psutil.Process(process.pid)
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/ready").is_success:
                return
        time.sleep(0.1)
    raise SystemExit("The server ended before it was ready.")


async def _most(client: Client, clients: int, seconds: float) -> float:
    await client.closed(4, WARM_UP_S)
    begun = time.perf_counter()
    most = await client.closed(clients, seconds)
    served = sum(not math.isnan(waited) for _, waited in most)
    return round(served / (time.perf_counter() - begun), 1)


async def _offered(
    client: Client, server: psutil.Process, rate: float, seconds: float
) -> dict[str, float]:
    await client.closed(4, WARM_UP_S)
    before = _cpu_s(server)
    offered = await client.open(rate, seconds)
    cpu_s = _cpu_s(server) - before
    added = sorted(1000 * (took - waited) for took, waited in offered if not math.isnan(waited))
    return {
        "offered_per_s": rate,
        "answered": round(len(added) / len(offered), 4),
        "added_p50_ms": round(statistics.median(added), 2),
        "added_p99_ms": round(added[int(0.99 * len(added))], 2),
        "cpu_ms": round(1000 * cpu_s / len(offered), 2),
    }


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main(
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "16,64,256",
    rate: Annotated[float, typer.Option(help="Requests a second in the open loop.")] = 250.0,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 20.0,
    busy: Annotated[float, typer.Option(help="Share of time that exact pictures take.")] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
    serving: Annotated[str, typer.Option("--serve", hidden=True)] = "",
) -> None:
    if serving:
        port, number, offered, share, latency, data = serving.split()
        serve(int(port), int(number), float(offered), float(share), latency, data)
        return
    found = {int(n): measured(int(n), rate, seconds, busy) for n in workers.split(",")}
    table = Table("workers", "most requests/s", "answered", "added p50", "p99", "CPU a request")
    for n, one in found.items():
        table.add_row(
            str(n), f"{one['requests_per_s']:.0f}", f"{one['answered']:.1%}",
            f"{one['added_p50_ms']:.1f} ms", f"{one['added_p99_ms']:.1f} ms",
            f"{one['cpu_ms']:.2f} ms",
        )  # fmt: skip
    table.caption = f"{os.cpu_count()} cores; added and CPU at {rate:g} requests a second"
    Console().print(table)
    if as_json:
        print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
