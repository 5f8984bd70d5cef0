"""Sends requests to a server at their times, waiting for no answer, and measures the answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from argus.core.errors import ArgusError
from argus.loadgen.traces import TraceRequest

GENERATIONS = "/v1/images/generations"
CONNECTIONS = 1000


@dataclass(frozen=True)
class Answered:
    """An answer: `status` is that of HTTP, 0 without one, `latency_s` counts from when the request
    was sent, `reports` are Argus's on each picture, empty from other servers."""

    status: int
    latency_s: float
    slo_ms: float | None = None
    error: str = ""
    reports: Sequence[dict[str, Any]] = ()

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass(frozen=True)
class Target:
    """The server, and what is put into every request's body that does not have it."""

    url: str
    api_key: str | None = None
    body: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0


async def send(
    target: Target,
    requests: Sequence[TraceRequest],
    rate: float | None = None,
    concurrency: int | None = None,
    speed: float = 1.0,
    seed: int = 0,
) -> tuple[list[Answered], float]:
    """Send the requests, at the trace's times divided by `speed` if it has times, else as a Poisson
    process of `rate` a second, else all at once; no more than `concurrency` at a time. Returns
    the answers in the requests' order, and the seconds until the last."""
    gate = nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
    begun = time.perf_counter()
    async with _client(target) as client:

        async def one(request: TraceRequest, at_s: float) -> Answered:
            await asyncio.sleep(max(0.0, begun + at_s - time.perf_counter()))
            async with gate:
                return await _answered(client, target, request)

        times = _times(requests, rate, speed, seed)
        tasks = (one(request, at_s) for request, at_s in zip(requests, times, strict=False))
        answers = await asyncio.gather(*tasks)
    return answers, time.perf_counter() - begun


async def warm_up(target: Target, request: TraceRequest) -> Answered:
    """Send one request and wait. Raises ArgusError if it is not answered with a picture."""
    async with _client(target) as client:
        answer = await _answered(client, target, request)
    if answer.status == 0:
        raise ArgusError(
            f"No server answers at {target.url} ({answer.error}): start one with argus serve, or "
            "name another with --url."
        )
    if not answer.ok:
        raise ArgusError(f"{target.url} makes no pictures: {answer.error}")
    return answer


def _client(target: Target) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else None
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS)
    return httpx.AsyncClient(
        base_url=target.url, headers=headers, timeout=target.timeout_s, limits=limits
    )


def _times(
    requests: Sequence[TraceRequest], rate: float | None, speed: float, seed: int
) -> Iterator[float]:
    if all(request.at_s is not None for request in requests):
        return ((request.at_s or 0.0) / speed for request in requests)
    if rate is None:
        return itertools.repeat(0.0)
    return poisson_times(rate, random.Random(seed))


def poisson_times(rate: float, rng: random.Random) -> Iterator[float]:
    """The times of an endless Poisson process of `rate` a second, in seconds since the first."""
    gaps = (rng.expovariate(rate) for _ in itertools.count())
    return itertools.accumulate(itertools.chain([0.0], gaps))


async def _answered(client: httpx.AsyncClient, target: Target, request: TraceRequest) -> Answered:
    begun = time.perf_counter()

    def answer(status: int, error: str = "", reports: Sequence[dict[str, Any]] = ()) -> Answered:
        return Answered(status, time.perf_counter() - begun, request.slo_ms, error, reports)

    try:
        response = await client.post(GENERATIONS, json=target.body | request.body)
        if response.status_code != 200:
            return answer(response.status_code, _message(response))
        content = response.json()
    except (httpx.HTTPError, ValueError) as error:
        return answer(0, f"{type(error).__name__}: {error}")
    return answer(200, "", content.get("argus") or ())


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def figures(answers: Sequence[Answered], duration_s: float) -> dict[str, Any]:
    """What vLLM-Omni's and SGLang's clients print, under the names of their JSON, and what Argus
    says of its pictures. Latencies are in seconds, of answers with a picture."""
    done = [answer for answer in answers if answer.ok]
    latencies = np.array([answer.latency_s for answer in done]) if done else np.zeros(1)
    found: dict[str, Any] = {
        "duration": duration_s,
        "completed_requests": len(done),
        "failed_requests": len(answers) - len(done),
        "throughput_qps": len(done) / duration_s if duration_s > 0 else 0.0,
        "latency_mean": float(latencies.mean()),
        "latency_median": float(np.median(latencies)),
        "latency_p50": float(np.percentile(latencies, 50)),
        "latency_p95": float(np.percentile(latencies, 95)),
        "latency_p99": float(np.percentile(latencies, 99)),
    }
    promised = [answer for answer in answers if answer.slo_ms is not None]
    if promised:
        met = sum(one.ok and 1000 * one.latency_s <= (one.slo_ms or 0.0) for one in promised)
        found |= {"slo_attainment_rate": met / len(promised), "slo_met_success": met}
    found["failures"] = dict(Counter(str(one.status or one.error) for one in answers if not one.ok))
    reports = [report for answer in done for report in answer.reports]
    return found | _argus(reports) if reports else found


def _argus(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "variants": dict(Counter(report["variant"] for report in reports).most_common()),
        "on_time": sum(report["on_time"] for report in reports),
        "gpu_seconds": sum(report["gpu_seconds"] for report in reports),
        "saved_gpu_seconds": sum(report["saved_ms"] for report in reports) / 1000,
    }
    known = [report["predicted_quality"] for report in reports if "predicted_quality" in report]
    if known:
        found["predicted_quality"] = sum(known) / len(known)
    costs = [report["cost"] for report in reports if "cost" in report]
    if costs:
        found |= {"cost": sum(costs), "currency": reports[0]["currency"]}
    return found
