"""Real servers for the tests, in a thread or as a process."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from argus.config import Settings
from argus.server.app import new_app
from argus.server.service import Service

COMMAND = [sys.executable, "-c", "from argus.cli.main import main; main()"]


@dataclass(frozen=True)
class Running:
    """A real server in a thread, and a client for it."""

    service: Service
    url: str
    http: httpx.Client

    def generate(self, prompt: str = "a red fish", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/images/generations", json={"prompt": prompt, **fields})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, among others."""
        samples = [s for one in self.service.metrics.registry.collect() for s in one.samples]
        return sum(
            s.value for s in samples if s.name == name and labels.items() <= s.labels.items()
        )


@contextmanager
def running(settings: Settings, headers: dict[str, str] | None = None) -> Iterator[Running]:
    service = Service(settings)
    config = uvicorn.Config(
        new_app(service), host="127.0.0.1", port=0, log_level="warning",
        timeout_graceful_shutdown=60,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=300, headers=headers) as http:
            wait_until(lambda: http.get("/ready").status_code == 200)
            yield Running(service, url, http)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def served(
    family: Path, data: Path, *flags: str, ready: bool = True, log: list[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`argus serve` as a process of its own, ready (or only listening), with its URL. The lines of
    its log go to `log`."""
    lines = [] if log is None else log
    process = subprocess.Popen(
        [*COMMAND, "serve", "--family", str(family), "--data", str(data), "--port", "0", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            lines.append(line)
            if "Serving on" in line:
                break
        url = lines[-1].split()[-1]
        reading = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reading.start()
        if ready:
            wait_until(lambda: httpx.get(f"{url}/ready").status_code == 200)
        yield process, url
    finally:
        process.kill()
        process.wait()
        reading.join(10)


def wait_until(true: Callable[[], bool], limit_s: float = 300.0) -> None:
    """Poll for what another process does; fails the test if it never does."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)
