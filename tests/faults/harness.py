"""Load on a real server while something fails, and the account of what came of every request."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from argus.workers.local import LocalWorker
from tests.server.running import Running

OUTCOMES = {
    "on time": {200},
    "late": {200},
    "shed": {429},
    "dropped": {504},
    "failed": {400, 500, 503, 507},
}


class Load:
    """Sends `count` requests, `per_second` of them a second whatever becomes of them, from a thread
    of its own; once it is over, `answers` has the statuses and `pictures` the bodies of those that
    were served."""

    def __init__(self, server: Running, count: int, per_second: float, **fields: Any) -> None:
        self._server, self._count, self._pause_s = server, count, 1 / per_second
        self._fields = fields
        self._before = outcomes(server)
        self.answers: Counter[int] = Counter()
        self.pictures: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    async def _send(self) -> None:
        async with httpx.AsyncClient(base_url=self._server.url, timeout=300) as http:

            async def one(number: int) -> httpx.Response:
                body = {"prompt": f"{number} red fish", "seed": number, **self._fields}
                return await http.post("/v1/images/generations", json=body)

            tasks = []
            for number in range(self._count):
                tasks.append(asyncio.create_task(one(number)))
                await asyncio.sleep(self._pause_s)
            answers = await asyncio.gather(*tasks)
            self.answers = Counter(answer.status_code for answer in answers)
            self.pictures = [answer.json() for answer in answers if answer.is_success]

    def account(self) -> Counter[str]:
        """The outcomes of the load. Fails unless every request had one answer and one outcome, and
        the two agree."""
        assert sum(self.answers.values()) == self._count
        found = outcomes(self._server)
        found.subtract(self._before)
        found = +found
        assert sum(found.values()) == self._count, f"{found}, {self._count} sent"
        for outcome, number in found.items():
            assert outcome in OUTCOMES, f"{outcome} of requests that were all answered"
            assert number <= sum(self.answers[status] for status in OUTCOMES[outcome])
        assert found["on time"] + found["late"] == self.answers[200]
        return found


def outcomes(server: Running) -> Counter[str]:
    """The server's count of outcomes so far."""
    found: Counter[str] = Counter()
    for metric in server.service.metrics.outcomes.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                found[sample.labels["outcome"]] += int(sample.value)
    return found


def tell(worker: LocalWorker, how: signal.Signals) -> None:
    """Send a signal to a worker's process."""
    assert worker.pid is not None
    os.kill(worker.pid, how)


@contextmanager
def slowed(worker: LocalWorker, on_s: float = 0.02, off_s: float = 0.06) -> Iterator[None]:
    """A worker whose process gets the CPU for `on_s` seconds of `on_s + off_s`."""
    over = threading.Event()

    def alternate() -> None:
        while not over.is_set():
            with suppress(ProcessLookupError):
                tell(worker, signal.SIGSTOP)
                time.sleep(off_s)
                tell(worker, signal.SIGCONT)
            over.wait(on_s)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def hold_up(server: Running, seconds: float) -> None:
    """Keep the server's event loop from running for a while, as a machine that swaps does."""
    server.service.loop.call_soon_threadsafe(time.sleep, seconds)
