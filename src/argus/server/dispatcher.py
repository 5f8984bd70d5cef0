"""Walks a request through: embed its prompt, find neighbours, route, run, keep the latents."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.index import Vector
from argus.cache.scope import Scope
from argus.control.policy import Candidate, Decision, Policy
from argus.core.family import EXACT, Family, skip_name
from argus.core.job import Job
from argus.quality.encoder import PromptEncoder
from argus.server.metrics import Metrics
from argus.workers.local import LocalWorker
from argus.workers.messages import Finished, pack, unpack

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_GUESS_S = 1.0
MEMORY = 0.9


@dataclass(frozen=True)
class Order:
    """A checked request. `width` and `height` are pixels; the first picture has `seed`.

    `variant` pins a variant by name, `steps` the exact model at another number of steps.
    `namespace` is the tenant's; `cached` says whether the cache may serve and keep it.
    """

    prompt: str
    negative_prompt: str
    count: int
    seed: int
    width: int
    height: int
    guidance: float
    namespace: str
    cached: bool = True
    variant: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Served:
    """A picture and how it was made; the neighbour is set if the picture was resumed from it."""

    image: Image.Image
    variant: str
    model: str
    reason: str
    steps_run: int
    steps_skipped: int
    seed: int
    neighbour: Neighbour | None
    similarity: float | None
    truncated: bool
    timings_ms: dict[str, float]


class Full(Exception):
    """No room for more pictures; `retry_after_s` is when there should be."""

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} pictures are waiting or running, and {limit} may.")
        self.retry_after_s = retry_after_s


class Dispatcher:
    """Serves orders with one family on one worker. For use from one asyncio loop.

    `model_id` names the weights, so that latents of other weights never match.
    """

    def __init__(
        self,
        family: Family,
        model_id: str,
        policy: Policy,
        encoder: PromptEncoder,
        cache: ApproximateCache,
        worker: LocalWorker,
        metrics: Metrics,
        queue_limit: int,
    ) -> None:
        self.family, self._model_id, self._policy = family, model_id, policy
        self._encoder, self._cache, self.worker = encoder, cache, worker
        self._metrics, self._limit = metrics, queue_limit
        self._in_flight = 0
        self._seconds_a_picture = FIRST_GUESS_S
        self._keeping: set[asyncio.Task[None]] = set()
        self._keep_in_turn = asyncio.Lock()

    @property
    def in_flight(self) -> int:
        """Pictures that were accepted and are not answered yet."""
        return self._in_flight

    @property
    def storing(self) -> int:
        """Pictures that were answered and whose latents are not stored yet."""
        return len(self._keeping)

    async def serve(self, order: Order) -> list[Served]:
        """Make an order's pictures, all or none.

        Raises Full at once when there is no room, and what the worker raises.
        """
        if self._in_flight + order.count > self._limit:
            wait_s = max(1, math.ceil(self._in_flight * self._seconds_a_picture))
            raise Full(self._in_flight, self._limit, wait_s)
        self._in_flight += order.count
        self._metrics.in_flight.set(self._in_flight)
        try:
            return await self._serve(order)
        finally:
            self._in_flight -= order.count
            self._metrics.in_flight.set(self._in_flight)

    async def settle(self) -> None:
        """Wait until the latents of answered pictures are stored."""
        await asyncio.gather(*self._keeping)

    async def _serve(self, order: Order) -> list[Served]:
        embedding, embed_ms = await _timed(asyncio.to_thread(self._encoder.embed, order.prompt))
        scope = self._scope(order)
        neighbours: list[Neighbour] = []
        find_ms = 0.0
        if order.cached and order.steps is None:
            # Pictures of one request resume from different neighbours: with a sampler that adds
            # no noise, those resumed from the same latents would all be the same.
            neighbours, find_ms = await _timed(self._find(scope, embedding.vector, order.count))
        before = {"encode": embed_ms, "retrieve": find_ms}
        tasks = [
            asyncio.create_task(
                self._make(
                    order,
                    order.seed + i,
                    neighbours[i] if i < len(neighbours) else None,
                    scope,
                    embedding.vector,
                    embedding.truncated,
                    before,
                )
            )
            for i in range(order.count)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _make(
        self,
        order: Order,
        seed: int,
        neighbour: Neighbour | None,
        scope: Scope,
        vector: Vector,
        truncated: bool,
        before_ms: dict[str, float],
    ) -> Served:
        decision = self._decide(order, neighbour)
        start, fetch_ms = None, 0.0
        skip = self.family.variants[decision.variant].skip
        if skip and neighbour is not None:
            start, fetch_ms = await _timed(self._fetch(neighbour, skip))
            if start is None:
                self._metrics.lookups.labels("broken").inc()
                decision = Decision(EXACT, f"the neighbour's latents at K={skip} are unusable")
                skip = 0
        exact = self.family.exact
        job = Job(
            order.prompt, order.negative_prompt, seed, order.steps or exact.steps, order.guidance,
            skip, order.width, order.height,
        )  # fmt: skip
        keeps = order.cached and order.steps is None and not skip
        run, total_ms = await _timed(
            self.worker.run(
                job,
                start=None if start is None else pack(start),
                keep=tuple(self.family.skips) if keeps else (),
            )
        )
        if run.kept:
            self._keep(scope, order.prompt, vector, run)
        engine = run.timings_ms
        timings = {
            "queue": max(0.0, total_ms - sum(engine.values())),
            "encode": before_ms["encode"] + engine["encode"],
            "retrieve": before_ms["retrieve"] + fetch_ms,
            "denoise": engine["denoise"],
            "decode": engine["decode"],
        }
        self._count(decision.variant, job, timings, order.cached)
        name = decision.variant if order.steps is None else f"steps-{order.steps}"
        return Served(
            run.image,
            name,
            exact.model,
            decision.reason,
            job.steps_run,
            job.skip,
            seed,
            neighbour if skip else None,
            neighbour.similarity if neighbour else None,
            truncated,
            timings,
        )

    def _decide(self, order: Order, neighbour: Neighbour | None) -> Decision:
        if order.steps is not None:
            return Decision(EXACT, "the request pins the number of steps")
        if order.variant is None:
            if not order.cached:
                return Decision(EXACT, "the request keeps out of the cache")
            if neighbour is None:
                return self._policy.route(Candidate())
            return self._policy.route(Candidate(neighbour.similarity, neighbour.skips))
        asked = self.family.variants[order.variant].skip
        if not asked:
            return Decision(EXACT, "the request pins this variant")
        k = self.family.usable_skip(asked, neighbour.skips if neighbour else ())
        if k == asked:
            return Decision(skip_name(k), "the request pins this variant")
        return Decision(skip_name(k), f"no latents for the pinned {order.variant} are cached")

    def _scope(self, order: Order) -> Scope:
        exact = self.family.exact
        return Scope(
            order.namespace, self._model_id, exact.sampler, order.width, order.height,
            exact.steps, order.guidance, order.negative_prompt,
        )  # fmt: skip

    async def _find(self, scope: Scope, vector: Vector, count: int) -> list[Neighbour]:
        try:
            return await asyncio.to_thread(self._cache.find, scope, vector, count)
        except (SQLAlchemyError, OSError) as error:
            log.warning("The cache cannot be searched: %s", error)
            return []

    async def _fetch(self, neighbour: Neighbour, k: int) -> Tensor | None:
        try:
            return await asyncio.to_thread(self._cache.fetch, neighbour, k)
        except (SQLAlchemyError, OSError) as error:
            log.warning("Latents cannot be fetched: %s", error)
            return None

    def _keep(self, scope: Scope, prompt: str, vector: Vector, run: Finished) -> None:
        """Store a run's latents behind the answer."""

        async def store() -> None:
            latents = {k: unpack(data) for k, data in run.kept.items()}
            try:
                async with self._keep_in_turn:  # two runs of one prompt are stored once
                    await asyncio.to_thread(self._cache.keep, scope, prompt, vector, latents)
            except (SQLAlchemyError, OSError) as error:
                log.warning("Latents cannot be stored: %s", error)
            self._metrics.cache_entries.set(len(self._cache))
            self._metrics.cache_bytes.set(self._cache.size_bytes)

        task = asyncio.create_task(store())
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)

    def _count(self, variant: str, job: Job, timings_ms: dict[str, float], cached: bool) -> None:
        metrics = self._metrics
        metrics.pictures.labels(self.family.exact.model, variant).inc()
        metrics.steps.labels("run").inc(job.steps_run)
        metrics.steps.labels("skipped").inc(job.skip)
        if cached:
            metrics.lookups.labels("hit" if job.skip else "miss").inc()
        for stage, spent in timings_ms.items():
            metrics.stages.labels(stage).observe(spent / 1000)
        worked_s = sum(timings_ms[stage] for stage in ("encode", "denoise", "decode")) / 1000
        self._seconds_a_picture = MEMORY * self._seconds_a_picture + (1 - MEMORY) * worked_s


async def _timed(awaitable: Awaitable[T]) -> tuple[T, float]:
    """What is awaited, and the milliseconds it took."""
    begun = time.perf_counter()
    result = await awaitable
    return result, 1000 * (time.perf_counter() - begun)
