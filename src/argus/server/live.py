"""Samples the server's state every second for the page, and keeps the last quarter of an hour."""

from __future__ import annotations

import asyncio
import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from argus.control.policies import POLICIES
from argus.control.variants import EXACT
from argus.core.errors import ArgusError
from argus.server.live_schema import (
    CacheReport,
    LiveEvent,
    LiveReport,
    LiveState,
    PolicyReport,
    Sample,
    SloReport,
    VariantReport,
    WorkerReport,
    WorkerState,
)
from argus.server.request import PINNED_STEPS, Picture
from argus.server.router import check_policy, shortest_wait_s
from argus.workers.worker import State

if TYPE_CHECKING:
    from argus.control.request import Request
    from argus.control.worker_queue import WorkerQueue
    from argus.server.service import Service

log = logging.getLogger(__name__)

LIVE = "/v1/argus/live"
EVENTS = LIVE + "/events"
POLICY, BURST = "/v1/argus/policy", "/v1/argus/burst"
EVERY_S = 1.0
KEPT = 900  # samples: a quarter of an hour
STREAM_S = 600.0  # then a reader asks again, and is let in or not
LATENCY_WINDOW_S = 10.0
OUTCOMES = {
    "on_time": "on time", "late": "late", "shed": "shed", "dropped": "dropped",
    "failed": "failed", "cancelled": "cancelled",
}  # fmt: skip
DIGITS = 4  # of what a sample gives


class Live:
    """The samples of a server. For use from one asyncio loop.

    Outcomes and measurements are counted where they are known; the rest is of the pictures that
    `saw` was told of.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._table = service.model.table
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._taken = 0  # number of samples so far
        self._pictures: list[Picture] = []  # finished since the last sample
        self._latencies: deque[tuple[float, float]] = deque()  # when, and seconds
        self._totals, self._at = self._counted(), time.monotonic()
        self._busy_s: dict[int, float] = {}  # by worker, as of the last sample
        self._busy: dict[int, float] = {}  # as a share of the last sample's time
        self._policies: list[PolicyReport] = []
        self._changed, self._ended = asyncio.Event(), False

    def saw(self, picture: Picture) -> None:
        """Count a finished picture."""
        self._pictures.append(picture)

    async def run(self) -> None:
        """Take a sample every `EVERY_S` seconds; does not return."""
        at = time.monotonic()
        while True:
            at = max(at + EVERY_S, time.monotonic())
            await asyncio.sleep(at - time.monotonic())
            try:
                self._samples.append(self._sample())
            except Exception:
                log.exception("A sample of the server's state failed")
            else:
                self._taken += 1
                self._tell()

    def end(self) -> None:
        """End all streams of events. May be called twice."""
        self._ended = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self) -> AsyncIterator[LiveEvent]:
        """Every new sample, for `STREAM_S` or until `end`; for a slow reader at most the last
        `KEPT`."""
        seen, until = self._taken, time.monotonic() + STREAM_S
        while not self._ended and time.monotonic() < until:
            if seen == self._taken:
                await self._changed.wait()
                continue
            new, seen = min(self._taken - seen, len(self._samples)), self._taken
            for sample in list(islice(reversed(self._samples), new))[::-1]:
                yield LiveEvent(sample=sample, state=self.state())

    async def json(self) -> str:
        """All that the page shows, a `LiveReport`. Its history is put together in a thread: it
        takes milliseconds, for which no request is to wait."""
        report, samples = self._report(), list(self._samples)
        return await asyncio.to_thread(_with_history, report, samples)

    def _report(self) -> LiveReport:
        """What the page shows, but for the history."""
        service, table = self._service, self._table
        family, router = service.family, service.router
        classes = [] if router is None else router.classes.all
        return LiveReport(
            family=family.name,
            models=list(table.models),
            variants=[
                VariantReport(name=name, model=table.models[m], strategy=strategy)
                for name, m, strategy in zip(
                    table.variants, table.model.tolist(), table.strategies, strict=True
                )
            ]
            + [VariantReport(name=PINNED_STEPS, model=table.models[0], strategy="steps")],
            policies=self._policy_reports(),
            slos=[
                SloReport(
                    name=one.name,
                    latency_s=None if math.isinf(one.deadline_s) else one.deadline_s,
                    quality=one.floor,
                )
                for one in classes
            ],
            exact_s=None if router is None else router.classes.exact_s,
            latency_window_s=LATENCY_WINDOW_S,
            burst=service.bursts.defaults,
            state=self.state(),
            history={},
        )

    def state(self) -> LiveState:
        """The server now."""
        service = self._service
        cache, learns = service.cache, service.predictions.predictor is not None
        now, fleet = time.monotonic(), service.fleet
        return LiveState(
            policy=service.policy,
            workers=[self._worker(queue, now) for queue in fleet.queues_present],
            cache=CacheReport(
                entries=len(cache),
                size_bytes=cache.size_bytes,
                limit_bytes=cache.limit_bytes,
                usable=service.retrieval.usable,
            ),
            drifted=service.learning.drifted if learns else None,
            burst=service.bursts.report,
        )

    @property
    def exact_rate(self) -> float | None:
        """Exact pictures a second that the workers could make, all holding the exact model, as fast
        as they were when the server started and idled: so it is the same before, in and after a
        burst. None while that is not known."""
        service, table = self._service, self._table
        if service.router is None or not service.model.profiled:
            return None
        scale = service.fleet.idle_scale
        shortest_s = min(slo.deadline_s for slo in service.router.classes.slos(scale))
        costs_s, runs = table.cost_s(shortest_s)[EXACT], table.runs[EXACT]
        kinds = [one.kind for one in service.fleet.queues_present if one.alive]
        return float(sum(1 / (costs_s[kind] * scale) for kind in kinds if runs[kind]))

    def _policy_reports(self) -> list[PolicyReport]:
        if not self._policies:
            self._policies = [self._policy(name) for name in POLICIES]
        return self._policies

    def _policy(self, name: str) -> PolicyReport:
        try:
            check_policy(name, self._service.model)
        except ArgusError as error:
            return PolicyReport(name=name, problem=str(error))
        return PolicyReport(name=name)

    def _worker(self, queue: WorkerQueue[Request], now: float) -> WorkerReport:
        table, fleet, number = self._table, self._service.fleet, queue.number
        worker = fleet.workers[number]
        state: WorkerState = worker.state.value
        if worker.state is State.READY and not queue.ready:
            state = "leaving" if queue.model != queue.target else "starting"
        running = Counter(table.variants[one.variant] for _, _, one in queue.running)
        moves = queue.model != queue.target
        return WorkerReport(
            number=number,
            type=fleet.type_of(number),
            state=state,
            model=table.models[queue.model],
            next=table.models[queue.target] if moves else None,
            running=dict(running),
            queued=len(queue.queued),
            wait_s=_rounded(max(0.0, queue.free_at_s - now)),
            busy=_rounded(self._busy.get(number, 0.0)),
            restarts=worker.restarts,
        )

    # --- a sample

    def _sample(self) -> Sample:
        service, now = self._service, time.monotonic()
        fleet, router = service.fleet, service.router
        seconds, self._at = now - self._at, now
        counts = self._counts()
        pictures, self._pictures = self._pictures, []
        made = Counter(picture.accounted for picture in pictures)
        half_s, most_s = self._percentiles(pictures, now)
        self._measure_busy(seconds, now)
        cluster = fleet.cluster()
        wait_s = shortest_wait_s(cluster)
        prices = {} if router is None else router.prices()
        forecast = 0.0 if router is None else router.planning.controller.rate(now)
        exact_rate, measurements = self.exact_rate, counts["measurements"]
        measured = counts["measured"] / measurements if measurements else None
        looked_up = [one for one in pictures if one.request.looked_up]
        predicted = [one.quality for one in pictures if one.quality is not None]
        similar = [one.request.similarity for one in pictures if one.request.similarity is not None]
        return Sample(
            at=round(time.time(), 2),
            seconds=round(seconds, 3),
            policy=service.policy,
            burst=service.bursts.running,
            offered=int(counts["offered"]),
            **{name: int(counts.get(word, 0)) for name, word in OUTCOMES.items()},
            variants=[made[name] for name in (*self._table.variants, PINNED_STEPS)],
            predicted=_mean(predicted),
            predictions=len(predicted),
            measured=None if measured is None else _rounded(measured),
            measurements=int(measurements),
            hits=sum(one.job.skip > 0 for one in looked_up),
            misses=sum(one.job.skip == 0 for one in looked_up),
            similarity=_mean(similar),
            prices=[
                _rounded(prices[m]) if m in prices else None for m in range(len(self._table.models))
            ],
            forecast=_rounded(forecast),
            exact_rate=None if exact_rate is None else _rounded(exact_rate),
            waiting=service.dispatcher.waiting,
            running=fleet.running,
            wait_s=None if wait_s is None else _rounded(wait_s * cluster.slowness),
            latency_p50_s=half_s,
            latency_p95_s=most_s,
            busy=_mean(self._busy.values()) or 0.0,
            serving=sum(one.serving >= 0 for one in fleet.queues_present),
            entries=len(service.cache),
            usable=_rounded(service.retrieval.usable),
        )

    def _counts(self) -> dict[str, float]:
        """What was counted since the last sample."""
        before, self._totals = self._totals, self._counted()
        return {name: total - before.get(name, 0) for name, total in self._totals.items()}

    def _counted(self) -> dict[str, float]:
        """What the server has counted so far."""
        dispatcher, learning = self._service.dispatcher, self._service.learning
        return {
            **dispatcher.outcomes,
            "offered": dispatcher.offered,
            "measurements": learning.measurements,
            "measured": learning.measured,
        }

    def _percentiles(
        self, pictures: list[Picture], now: float
    ) -> tuple[float | None, float | None]:
        """Median and 95th percentile of the latencies of the last `LATENCY_WINDOW_S`."""
        self._latencies.extend((now, one.took_s) for one in pictures if not one.request.background)
        while self._latencies and self._latencies[0][0] <= now - LATENCY_WINDOW_S:
            self._latencies.popleft()
        if not self._latencies:
            return None, None
        half, most = np.percentile([took_s for _, took_s in self._latencies], (50, 95))
        return _rounded(half), _rounded(most)

    def _measure_busy(self, seconds: float, now: float) -> None:
        before, self._busy_s, self._busy = self._busy_s, {}, {}
        for queue in self._service.fleet.queues_present:
            queue.advance(now)
            self._busy_s[queue.number] = queue.busy_s
            spent_s = queue.busy_s - before.get(queue.number, queue.busy_s)
            self._busy[queue.number] = min(1.0, max(0.0, spent_s / seconds)) if seconds else 0.0


def _with_history(report: LiveReport, samples: list[Sample]) -> str:
    columns = {name: [getattr(one, name) for one in samples] for name in Sample.model_fields}
    return report.model_copy(update={"history": columns}).model_dump_json()


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return _rounded(statistics.fmean(known)) if known else None


def _rounded(value: float) -> float:
    return round(float(value), DIGITS)
