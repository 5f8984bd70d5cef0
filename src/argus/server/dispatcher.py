"""The life of a request: prepare, decide, fetch, run, review, finish."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, NoReturn

from argus.control.breaker import FETCH_SHARE
from argus.control.policy import Decision
from argus.control.variants import EXACT
from argus.core.errors import Expired
from argus.core.job import Job
from argus.server.metrics import NO_VARIANT, Metrics
from argus.server.preparation import Preparation, timed
from argus.server.request import (
    Closed,
    Doubted,
    Full,
    ImageRequest,
    LatentsUnusable,
    Picture,
    Shed,
)
from argus.server.retrieval import Retrieval
from argus.server.router import UNGOVERNED_S, Router, shortest_wait_s
from argus.server.tracing import note, note_stages, span, spanned
from argus.workers.fleet import Fleet, HandedBack, TooLate, Yielded
from argus.workers.worker import Finished, WorkerError

log = logging.getLogger(__name__)

RETRY_S = 5  # while models load
REROUTED = {
    HandedBack: "handed_back", TooLate: "too_late", LatentsUnusable: "latents_unusable",
    Doubted: "doubted",
}  # fmt: skip


class Dispatcher:
    """Serves requests with a fleet. For use from one asyncio loop.

    `router` may not be set yet; requests wait for it. `on_picture` is called with every finished
    picture.
    """

    def __init__(
        self,
        preparation: Preparation,
        router: Future[Router],
        retrieval: Retrieval,
        fleet: Fleet,
        metrics: Metrics,
        queue_limit: int,
        metrics_by_key: bool = False,
        on_picture: Callable[[Picture], None] = lambda picture: None,
    ) -> None:
        self._preparation, self._routing = preparation, router
        model = preparation.model
        self._family, self._table = model.family, model.table
        self._retrieval, self._fleet, self._metrics = retrieval, fleet, metrics
        self._limit, self._on_picture = queue_limit, on_picture
        self._costs = model.cost_per_s
        self._variants = [model.variants[name] for name in model.table.variants]
        self._encoding, self._by_key = preparation.encoding, metrics_by_key
        self._made: set[ImageRequest] = set()  # pictures that workers have made, not answered yet
        self._in_flight = self._yielding = 0
        self.offered = 0  # pictures that requests asked for, background ones aside
        self.outcomes: Counter[str] = Counter()  # of those
        self._closed = False
        self._ends: set[asyncio.Timeout] = set()  # one per request, which `close` lets pass

    @property
    def in_flight(self) -> int:
        """Number of accepted pictures that are not answered yet."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Pictures that were accepted and that no worker makes yet."""
        return max(0, self.unmade - self._fleet.running)

    @property
    def unmade(self) -> int:
        """Number of accepted pictures that no worker has made yet."""
        return self._in_flight - len(self._made)

    @property
    def room(self) -> int:
        """Number of background pictures that workers have room for: none while another request is
        on its way to a worker."""
        if self._on_their_way > 0:
            return 0
        return max(0, self._fleet.room - max(0, self.unmade - self._fleet.backlog))

    @property
    def _on_their_way(self) -> int:
        """Number of pictures, other than background ones, that are not at a worker yet."""
        made = sum(not picture.yields for picture in self._made)
        return max(0, self._in_flight - self._yielding - made - self._fleet.unyielding)

    async def serve(self, request: ImageRequest) -> list[Picture]:
        """Make a request's pictures, all or none.

        Raises Full at once when there is no room, Shed when no worker can meet the deadline,
        Expired when the request was dropped before it ran, Closed when the server ends first,
        Yielded when a background request made room for others, and what the worker raises. Each of
        its pictures counts as one outcome, unless it is in the background. If the request fails,
        all have its outcome, since none of them is answered.
        """
        self.offered += 0 if request.background else request.count
        try:
            pictures = await self._admitted(request)
        except BaseException as error:
            if request.background:
                raise
            outcome = outcome_of(error)
            self.outcomes[outcome] += request.count
            outcomes = self._metrics.outcomes.labels(request.slo_name, outcome, NO_VARIANT)
            outcomes.inc(request.count)
            raise
        for picture in [] if request.background else pictures:
            outcome = "on time" if picture.on_time else "late"
            self.outcomes[outcome] += 1
            labels = request.slo_name, outcome, picture.accounted
            self._metrics.outcomes.labels(*labels).inc()
        return pictures

    async def _admitted(self, request: ImageRequest) -> list[Picture]:
        if not request.background:
            if self._in_flight - self._yielding + request.count > self._limit:
                self._refuse(request)
            if self._yielding:
                self._fleet.make_room(self._on_their_way + request.count)
        yielding = request.count if request.yields else 0
        self._in_flight += request.count
        self._yielding += yielding
        self._metrics.in_flight.set(self._in_flight)
        try:
            return await self._until_closed(self._pictures(request))
        finally:
            self._in_flight -= request.count
            self._yielding -= yielding
            self._metrics.in_flight.set(self._in_flight)

    async def _until_closed(self, serving: Coroutine[Any, Any, list[Picture]]) -> list[Picture]:
        """Await a request's work. Raises Closed at `close`, whatever the work waits for."""
        end = asyncio.timeout(0.0 if self._closed else None)
        try:
            async with end:
                self._ends.add(end)
                return await serving
        except TimeoutError as error:
            if end.expired():
                raise Closed from error
            raise
        finally:
            self._ends.discard(end)

    def close(self) -> None:
        """End every request that is not answered yet. May be called twice."""
        self._closed = True
        self._preparation.close()
        for end in self._ends:
            if not end.expired():
                end.reschedule(0.0)

    async def _pictures(self, request: ImageRequest) -> list[Picture]:
        pictures = await self._preparation.prepare(request)
        tasks: list[asyncio.Task[Picture]] = []
        try:
            if len(pictures) == 1:
                return [await self._make(pictures[0])]
            tasks += [asyncio.create_task(self._make(picture)) for picture in pictures]
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            self._made.difference_update(pictures)

    def _refuse(self, request: ImageRequest) -> NoReturn:
        """Refuse a request because the queue is full; it still counts as demand. Raises Full."""
        router = self._routing
        if not request.pinned and router.done() and router.exception() is None:
            router.result().planning.controller.refused(request.count)
        wait_s = shortest_wait_s(self._fleet.cluster())
        retry_s = RETRY_S if wait_s is None else max(1, math.ceil(wait_s * self._fleet.scale))
        raise Full(self._in_flight, self._limit, retry_s)

    # --- one picture

    @spanned("picture")
    async def _make(self, request: ImageRequest) -> Picture:
        """Make one picture. Failures route the request again (`_again`); if that fails too, a
        picture that the policy doubts is returned."""
        self._router.arrived(request)
        try:
            made = await self._attempts(request)
        except Exception as error:
            if request.first is None:
                raise
            log.info("A doubted picture is returned: no other was made (%s)", type(error).__name__)
            made = request.first
        self._made.add(request)
        with span("finish"):
            encode = self._encoding.encode(made[1].image, request.output_format, request.size)
            file, file_ms = await timed(encode)
            return self._finish(request, *made, file, file_ms)

    async def _attempts(self, request: ImageRequest) -> tuple[Decision, Finished]:
        while True:
            try:
                decision = await self._decide(request)
                start = await self._fetch(request, decision)
                finished = await self._run(request, decision, start)
                await self._review(request, decision, finished)
                return decision, finished
            except (LatentsUnusable, HandedBack, TooLate, Doubted) as reason:
                await self._again(request, reason)

    @spanned("decide")
    async def _decide(self, request: ImageRequest) -> Decision:
        """Decide variant and worker once a worker is ready. Raises Shed if none can finish in
        time."""
        if not self._fleet.ready:
            await self._some_worker(request)
        decision, ms = await timed(self._router.decide(request))
        request.spent("route", ms)
        note(
            variant=self._table.variants[decision.variant], worker=decision.worker,
            reason=decision.reason, price=decision.price, slo=request.slo_name,
        )  # fmt: skip
        if decision.worker is None:
            raise Shed(decision.reason, self._router.retry_after_s(request))
        if request.yields and not self._fleet.spare(decision.worker):
            raise Yielded
        own_steps = self._own_steps(request, decision)
        steps = float(self._table.steps[decision.variant])
        if own_steps is not None:  # what is not a step is in the table's number
            steps = own_steps + float(self._table.steps[EXACT]) - self._family.exact.steps
        request.variant, request.work_steps = decision.variant, steps * request.size_factor
        if decision.best_effort:
            request.expires_s, request.begin_by_s = math.inf, time.monotonic() + UNGOVERNED_S
        else:
            decides = request.governed and not request.pinned
            request.expires_s = request.limit_s if decides else math.inf
            request.begin_by_s = request.limit_s
        model = int(self._table.model[decision.variant])
        queued, made_s = self._fleet.expected(request, decision.worker, model)
        encode_s = self._encoding.expected_s(request.output_format, request.size)
        request.queued_behind, request.expected_s = queued, made_s + encode_s
        if request.on_decided is not None:
            request.on_decided(request)
        return decision

    async def _some_worker(self, request: ImageRequest) -> None:
        slack_s = request.limit_s - time.monotonic()
        try:
            await self._fleet.holding(None, min(UNGOVERNED_S, max(slack_s, 0.0)))
        except WorkerError:
            if self._fleet.problem is not None:
                raise
            raise Shed("no worker is ready", RETRY_S) from None

    async def _fetch(self, request: ImageRequest, decision: Decision) -> bytes | None:
        """The neighbour's latents, for variants that skip. Raises LatentsUnusable."""
        skip = self._variants[decision.variant].skip
        if not skip:
            return None
        assert request.neighbour is not None and decision.worker is not None
        self._fleet.reserve(request, decision.worker)
        try:
            limit_s = FETCH_SHARE * max(0.0, request.deadline_s - time.monotonic())
            with span("fetch"):
                fetch = self._retrieval.fetch(request.neighbour, skip, limit_s)
                latents, ms = await timed(fetch)
                request.spent("fetch", ms)
                if latents is None:
                    raise LatentsUnusable
        except BaseException:
            self._fleet.release(request, decision.worker)
            raise
        return latents

    @spanned("run")
    async def _run(
        self, request: ImageRequest, decision: Decision, start: bytes | None
    ) -> Finished:
        """Have the worker make the picture. Raises HandedBack, TooLate, Yielded and what the worker
        raises."""
        assert decision.worker is not None
        if request.yields and (self._on_their_way or not self._fleet.spare(decision.worker)):
            self._fleet.release(request, decision.worker)  # others came while latents were fetched
            raise Yielded
        whole = decision.variant == EXACT and self._own_steps(request, decision) is None
        keeps = request.looked_up and whole
        finished = await self._fleet.run(
            request,
            self._job(request, decision),
            decision.worker,
            int(self._table.model[decision.variant]),
            start=start,
            keep=tuple(self._family.skips) if keeps else (),
            previews=request.previews,
            on_preview=request.show,
        )
        note_stages(finished.timings_ms)
        request.used(finished, self._cost_per_s(decision.worker))
        return finished

    def _cost_per_s(self, worker: int) -> float | None:
        costs = self._costs
        return None if costs is None else costs[self._fleet.queues[worker].kind]

    def _own_steps(self, request: ImageRequest, decision: Decision) -> int | None:
        """The number of steps that the request sets for its exact picture, None if none."""
        limit = request.most_steps if decision.variant == EXACT else None
        return request.pinned_steps or limit

    def _job(self, request: ImageRequest, decision: Decision) -> Job:
        variant = self._variants[decision.variant]
        own_guidance = request.own_guidance or request.pinned
        width, height = variant.sides(request.width, request.height)
        return Job(
            request.prompt,
            request.negative_prompt,
            request.seed,
            self._own_steps(request, decision) or variant.steps,
            request.guidance if own_guidance else variant.guidance,
            variant.skip,
            width,
            height,
            variant.extra,
        )

    async def _review(self, request: ImageRequest, decision: Decision, finished: Finished) -> None:
        """Have the policy judge the first picture. Raises Doubted if another is to be made and
        time is left."""
        if request.replacement is not None:
            return
        request.replacement = await self._router.replacement(request, decision, finished.image)
        if request.replacement is not None and time.monotonic() < request.limit_s:
            request.first = decision, finished
            raise Doubted

    async def _again(self, request: ImageRequest, reason: Exception) -> None:
        """Prepare a request to be routed again. Raises the error that ends it if it cannot be."""
        if isinstance(reason, LatentsUnusable):
            request.latents_unusable = True
        elif isinstance(reason, TooLate):
            fixed = request.replacement is not None or request.pinned or not request.governed
            if fixed or request.too_late_for >= 0:
                raise reason
            request.too_late_for = request.variant
        elif isinstance(reason, HandedBack):
            if time.monotonic() >= request.limit_s:
                raise Expired("The deadline passed while workers changed.") from None
            await asyncio.sleep(0)
        self._metrics.rerouted.labels(REROUTED[type(reason)]).inc()

    def _finish(
        self,
        request: ImageRequest,
        decision: Decision,
        finished: Finished,
        file: bytes,
        file_ms: float,
    ) -> Picture:
        """Store the latents, and record the picture's account."""
        if finished.kept:
            self._retrieval.keep(
                request.scope, request.prompt, request.embedding.vector, finished.kept
            )
        now, parts = time.monotonic(), request.decision_ms
        name = self._table.variants[decision.variant]
        timings_ms = {
            "encode": parts["embed"] + finished.timings_ms["encode"],
            "retrieve": parts["search"] + parts.get("fetch", 0.0),
            "denoise": finished.timings_ms["denoise"],
            "decode": finished.timings_ms["decode"] + file_ms,
        }
        total_ms = 1000 * (now - request.arrived_s)
        timings_ms = {"queue": max(0.0, total_ms - sum(timings_ms.values())), **timings_ms}
        assert decision.worker is not None
        cost_per_s = self._cost_per_s(decision.worker)
        saved_s = 0.0 if request.own_steps else self._router.saved_s(request, decision.variant)
        picture = Picture(
            image=finished.image,
            file=file,
            request=request,
            decision=decision,
            job=self._job(request, decision),
            variant=f"steps-{request.pinned_steps}" if request.own_steps else name,
            model=self._variants[decision.variant].model,
            timings_ms=timings_ms,
            on_time=now <= request.slo_deadline_s,
            saved_s=saved_s,
            saved_cost=None if cost_per_s is None else saved_s * cost_per_s,
        )
        note(variant=picture.variant, worker=decision.worker, on_time=picture.on_time)
        self._count(picture)
        self._on_picture(picture)
        return picture

    def _count(self, picture: Picture) -> None:
        metrics, request, decision = self._metrics, picture.request, picture.decision
        metrics.pictures.labels(picture.model, picture.accounted).inc()
        metrics.steps.labels("run").inc(picture.job.steps_run)
        metrics.steps.labels("skipped").inc(picture.job.skip)
        key = request.key if self._by_key else ""
        labels = (self._family.name, picture.accounted, request.slo_name, key)
        metrics.gpu_seconds.labels(*labels).inc(request.worker_s)
        if request.cost is not None:
            metrics.cost.labels(*labels).inc(request.cost)
        if request.joules is not None:
            metrics.joules.labels(*labels).inc(request.joules)
        metrics.saved_seconds.labels("served").inc(max(0.0, picture.saved_s))
        if picture.quality is not None:
            metrics.predicted.labels(picture.variant).observe(picture.quality)
        if decision.price is not None and decision.worker is not None:
            metrics.price.labels(self._fleet.type_of(decision.worker), picture.model).set(
                decision.price
            )
        for stage, spent in picture.timings_ms.items():
            metrics.stages.labels(stage).observe(spent / 1000)
        for part, spent in request.decision_ms.items():
            metrics.decision_seconds.labels(part).observe(spent / 1000)
        took_s = sum(picture.timings_ms.values()) / 1000
        metrics.picture_seconds.labels(request.slo_name).observe(took_s)
        if request.latency_s < math.inf:
            metrics.deadline_ratio.labels(request.slo_name).observe(took_s / request.latency_s)
        if request.looked_up:
            if request.similarity is not None:
                metrics.similarity.observe(request.similarity)
            missed = "broken" if request.latents_unusable else "miss"
            metrics.lookups.labels("hit" if picture.job.skip else missed).inc()
        if decision.instead_of is not None:
            self._count_shadow(request, decision.instead_of)

    def _count_shadow(self, request: ImageRequest, decision: Decision) -> None:
        """Count the decision that the policy would have made."""
        if decision.worker is None:
            self._metrics.shadow.labels("shed").inc()
            return
        self._metrics.shadow.labels(self._table.variants[decision.variant]).inc()
        saved_s = self._router.saved_s(request, decision.variant)
        self._metrics.saved_seconds.labels("shadow").inc(max(0.0, saved_s))

    @property
    def _router(self) -> Router:
        return self._routing.result()


def outcome_of(error: BaseException) -> str:
    """The outcome to count for every picture of a request that failed."""
    if isinstance(error, Full | Shed):
        return "shed"
    if isinstance(error, Expired):
        return "dropped"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
