"""Walks a request through: embed its prompt, find neighbours, route, run, keep the latents."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from argus.cache.cache import Neighbour
from argus.cache.scope import Scope
from argus.core.family import EXACT, skip_name
from argus.core.job import Job
from argus.server.metrics import Metrics
from argus.server.model import ServedModel
from argus.server.order import Full, Order, Served
from argus.server.retrieval import Retrieval
from argus.server.routing import Choice, Router
from argus.workers.local import LocalWorker, OnPreview

if TYPE_CHECKING:
    from argus.quality.encoder import Embedding, PromptEncoder

T = TypeVar("T")

FIRST_GUESS_S = 1.0
MEMORY = 0.9


@dataclass(frozen=True)
class _Prepared:
    """What is known of an order before its pictures are made."""

    order: Order
    scope: Scope
    embedding: Embedding
    negative_truncated: bool
    looked_up: bool
    begun: float
    deadline_s: float
    encode_ms: float
    retrieve_ms: float
    on_preview: OnPreview | None


class Dispatcher:
    """Serves orders with one model on one worker. For use from one asyncio loop.

    `encoder` may still be loading; orders wait for it.
    """

    def __init__(
        self,
        model: ServedModel,
        router: Router,
        encoder: Future[PromptEncoder],
        retrieval: Retrieval,
        worker: LocalWorker,
        metrics: Metrics,
        queue_limit: int,
        timeout_s: float | None = None,
    ) -> None:
        self._model, self._family, self._router = model, model.family, router
        self._encoder, self._retrieval, self._worker = encoder, retrieval, worker
        self._metrics, self._limit = metrics, queue_limit
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._in_flight = 0
        self._seconds_a_picture = FIRST_GUESS_S

    @property
    def in_flight(self) -> int:
        """Pictures that were accepted and are not answered yet."""
        return self._in_flight

    async def serve(self, order: Order, on_preview: OnPreview | None = None) -> list[Served]:
        """Make an order's pictures, all or none; unfinished ones go to `on_preview`.

        Raises Full at once when there is no room, Expired when its time is over before it begins,
        and what the worker raises.
        """
        excess = self._in_flight + order.count - self._limit
        if excess > 0:
            together = min(self._in_flight, self._worker.model.max_batch)
            wait_s = max(1, math.ceil(excess * self._seconds_a_picture / max(1, together)))
            raise Full(self._in_flight, self._limit, wait_s)
        self._in_flight += order.count
        self._metrics.in_flight.set(self._in_flight)
        try:
            return await self._serve(order, on_preview)
        finally:
            self._in_flight -= order.count
            self._metrics.in_flight.set(self._in_flight)

    async def _serve(self, order: Order, on_preview: OnPreview | None) -> list[Served]:
        begun, deadline_s = time.perf_counter(), time.monotonic() + self._timeout_s
        encoder = await asyncio.shield(asyncio.wrap_future(self._encoder))
        embedding, embed_ms = await _timed(asyncio.to_thread(encoder.embed, order.prompt))
        scope = self._model.scope(
            order.namespace, order.width, order.height, order.guidance, order.negative_prompt
        )
        neighbours: list[Neighbour] = []
        find_ms = 0.0
        looks_up = order.cached and order.steps is None
        if looks_up:
            # Pictures of one request resume from different neighbours: with a sampler that adds
            # no noise, those resumed from the same latents would all be the same.
            search = self._retrieval.find(scope, embedding.vector, order.count)
            neighbours, find_ms = await _timed(search)
        prepared = _Prepared(
            order,
            scope,
            embedding,
            encoder.truncates(order.negative_prompt),
            looks_up,
            begun,
            deadline_s,
            embed_ms,
            find_ms,
            on_preview,
        )
        tasks = [
            asyncio.create_task(
                self._make(prepared, i, neighbours[i] if i < len(neighbours) else None)
            )
            for i in range(order.count)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _make(self, prepared: _Prepared, number: int, neighbour: Neighbour | None) -> Served:
        order, exact = prepared.order, self._family.exact
        decision = self._decide(order, neighbour)
        if number and neighbour is not None:  # the nearest entry is the first picture's
            decision = replace(decision, reason=f"{decision.reason} (neighbour {number + 1})")
        start, fetch_ms = None, 0.0
        skip = self._family.variants[decision.variant].skip
        broken = False
        if skip and neighbour is not None:
            start, fetch_ms = await _timed(self._retrieval.fetch(neighbour, skip))
            if start is None:
                broken = True
                decision = Choice(EXACT, f"the neighbour's latents at K={skip} are unusable")
                skip = 0
        job = Job(
            order.prompt, order.negative_prompt, order.seed + number, order.steps or exact.steps,
            order.guidance, skip, order.width, order.height,
        )  # fmt: skip
        keeps = prepared.looked_up and not skip
        run = await self._worker.run(
            job,
            start=start,
            keep=tuple(self._family.skips) if keeps else (),
            previews=order.previews,
            on_preview=prepared.on_preview,
            deadline_s=prepared.deadline_s,
        )
        if run.kept:
            self._retrieval.keep(prepared.scope, order.prompt, prepared.embedding.vector, run.kept)
        encode_ms = prepared.encode_ms + run.timings_ms["encode"]
        retrieve_ms = prepared.retrieve_ms + fetch_ms
        worked_ms = encode_ms + retrieve_ms + run.timings_ms["denoise"] + run.timings_ms["decode"]
        total_ms = 1000 * (time.perf_counter() - prepared.begun)
        served = Served(
            image=run.image,
            variant=self._name(order, decision),
            model=exact.model,
            reason=decision.reason,
            steps_run=job.steps_run,
            steps_skipped=skip,
            seed=job.seed,
            neighbour=neighbour if skip else None,
            similarity=neighbour.similarity if neighbour else None,
            prompt_truncated=prepared.embedding.truncated,
            negative_truncated=prepared.negative_truncated,
            timings_ms={
                "queue": max(0.0, total_ms - worked_ms),
                "encode": encode_ms,
                "retrieve": retrieve_ms,
                "denoise": run.timings_ms["denoise"],
                "decode": run.timings_ms["decode"],
            },
        )
        if prepared.looked_up:
            result = "hit" if skip else "broken" if broken else "miss"
            self._metrics.lookups.labels(result).inc()
        self._count(served)
        return served

    def _decide(self, order: Order, neighbour: Neighbour | None) -> Choice:
        if order.steps is not None:
            pinned = "the number of steps" if order.variant is None else "this variant"
            return Choice(order.variant or EXACT, f"the request pins {pinned}")
        if order.variant is None:
            if not order.cached:
                return Choice(EXACT, "the request keeps out of the cache")
            if neighbour is None:
                return self._router.choose(None, ())
            return self._router.choose(neighbour.similarity, neighbour.skips)
        asked = self._family.variants[order.variant].skip
        if not asked:
            return Choice(EXACT, "the request pins this variant")
        k = self._family.usable_skip(asked, neighbour.skips if neighbour else ())
        if k == asked:
            return Choice(skip_name(k), "the request pins this variant")
        return Choice(skip_name(k), f"no latents for the pinned {order.variant} are cached")

    def _name(self, order: Order, decision: Choice) -> str:
        if order.steps is None or order.variant is not None:
            return decision.variant
        return f"steps-{order.steps}"

    def _count(self, served: Served) -> None:
        metrics = self._metrics
        metrics.pictures.labels(served.model, served.variant).inc()
        metrics.steps.labels("run").inc(served.steps_run)
        metrics.steps.labels("skipped").inc(served.steps_skipped)
        for stage, spent in served.timings_ms.items():
            metrics.stages.labels(stage).observe(spent / 1000)
        worked_ms = sum(served.timings_ms[stage] for stage in ("encode", "denoise", "decode"))
        self._seconds_a_picture += (1 - MEMORY) * (worked_ms / 1000 - self._seconds_a_picture)


async def _timed(awaitable: Awaitable[T]) -> tuple[T, float]:
    """What is awaited, and the milliseconds it took."""
    begun = time.perf_counter()
    result = await awaitable
    return result, 1000 * (time.perf_counter() - begun)
