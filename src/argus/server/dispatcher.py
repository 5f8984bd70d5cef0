"""Walks a request through: prepared, it is routed, run, perhaps again, and its latents are kept."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from PIL import Image

from argus.cache.cache import Neighbour
from argus.control.breaker import FETCH_SHARE
from argus.core.errors import BadRequest, Expired
from argus.core.family import EXACT, Variant
from argus.core.job import Job
from argus.server.foresight import Foresight
from argus.server.intake import PATIENCE_S, Intake, Prepared, Started, timed
from argus.server.learning import Judge
from argus.server.metrics import Metrics
from argus.server.model import ServedFamily
from argus.server.order import Closed, Full, Order, Served, Shed
from argus.server.retrieval import Retrieval
from argus.server.steering import Asked, Choice, Steering, shortest_wait_s
from argus.workers.fleet import Fleet, HandedBack, TooLate, Work
from argus.workers.local import OnPreview
from argus.workers.messages import Finished, WorkerError

if TYPE_CHECKING:
    from argus.quality.encoder import Embedding

log = logging.getLogger(__name__)

RETRY_S = 5  # while models are loaded


class Dispatcher:
    """Serves orders with a fleet. For use from one asyncio loop.

    `started` may still be on its way; orders wait for it. `judge` says what a picture is worth, for
    policies that ask; `on_served` is told of every picture that was made.
    """

    def __init__(
        self,
        model: ServedFamily,
        intake: Intake,
        started: Future[Started],
        retrieval: Retrieval,
        fleet: Fleet,
        foresight: Foresight,
        metrics: Metrics,
        queue_limit: int,
        judge: Judge | None = None,
        on_served: Callable[[Order, Embedding, Served], None] = lambda order, embedding, made: None,
    ) -> None:
        self._family = model.family
        self._intake, self._started = intake, started
        self._retrieval, self._fleet, self._foresight = retrieval, fleet, foresight
        self._metrics, self._limit = metrics, queue_limit
        self._judge, self._on_served = judge, on_served
        steps = model.menu.steps.tolist()
        self._units = dict(zip(model.menu.variants, steps, strict=True))
        self._extra = self._units[EXACT] - self._family.exact.steps
        self._models = dict(
            zip(model.menu.variants, model.menu.model.tolist(), strict=True)
        )  # of the menu, by variant
        self._in_flight = 0
        self._closed = False
        self._ends: set[asyncio.Future[None]] = set()  # one an order, done when the server ends

    @property
    def in_flight(self) -> int:
        """Pictures that were accepted and are not answered yet."""
        return self._in_flight

    async def serve(self, order: Order, on_preview: OnPreview | None = None) -> list[Served]:
        """Make an order's pictures, all or none; unfinished ones go to `on_preview`.

        Raises Full at once when there is no room, Shed when nobody can keep the promise, Expired
        when its time is over before it begins, Closed when the server ends first, and what the
        worker raises. Whatever happens, each
        of its pictures is counted as one outcome: that of the order if it fails, since then none of
        them is answered.
        """
        try:
            served = await self._admitted(order, on_preview)
        except BaseException as error:
            # An order is answered whole: where one picture was not made, nobody got the others.
            self._metrics.outcomes.labels(order.slo, _outcome_of(error)).inc(order.count)
            raise
        for one in served:
            outcome = "on time" if one.on_time else "late"
            self._metrics.outcomes.labels(order.slo, outcome).inc()
        return served

    async def _admitted(self, order: Order, on_preview: OnPreview | None) -> list[Served]:
        if self._in_flight + order.count > self._limit:
            self._refused(order)
        self._in_flight += order.count
        self._metrics.in_flight.set(self._in_flight)
        try:
            return await self._until_closed(self._serve(order, on_preview))
        finally:
            self._in_flight -= order.count
            self._metrics.in_flight.set(self._in_flight)

    async def _until_closed(self, serving: Coroutine[Any, Any, list[Served]]) -> list[Served]:
        """What an order's work gives. Raises Closed at `close`, whatever the work waits for."""
        work = asyncio.create_task(serving)
        end = asyncio.get_running_loop().create_future()
        self._ends.add(end)
        try:
            if not self._closed:
                await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise Closed
            return work.result()
        except asyncio.CancelledError:
            work.cancel()
            await asyncio.wait((work,))
            raise
        finally:
            self._ends.discard(end)
            work.cancel()
            work.add_done_callback(_look_at)

    def close(self) -> None:
        """End every order that is not answered yet. May be called twice."""
        self._closed = True
        for end in self._ends:
            if not end.done():
                end.set_result(None)

    def _refused(self, order: Order) -> NoReturn:
        """There is no room for an order, which counts as demand all the same. Raises Full."""
        started = self._started
        if not order.pinned and started.done() and started.exception() is None:
            started.result().steering.refused(order.count)
        wait_s = shortest_wait_s(self._fleet.cluster())
        retry_s = RETRY_S if wait_s is None else max(1, math.ceil(wait_s * self._fleet.scale))
        raise Full(self._in_flight, self._limit, retry_s)

    async def _serve(self, order: Order, on_preview: OnPreview | None) -> list[Served]:
        prepared = await self._intake.prepare(order, on_preview)
        tasks = [asyncio.create_task(self._make(prepared, i)) for i in range(order.count)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _make(self, prepared: Prepared, number: int) -> Served:
        """One picture: routed until a worker makes it, and again if the policy doubts it."""
        order, steering = prepared.order, self._started.result().steering
        neighbour = prepared.neighbour(number)
        begun, foretold_by = time.perf_counter(), self._foresight.number
        prediction = self._foresight.predict(
            prepared.embedding.vector, neighbour.similarity if neighbour else None
        )
        predict_ms, route_ms = 1000 * (time.perf_counter() - begun), 0.0
        fetch_ms, broken, counted, shown = 0.0, False, False, -1
        replacing: str | None = None
        hopeless: str | None = None  # the variant that there is no time for any more
        doubted: tuple[Work, Choice, Finished] | None = None  # better than none

        def show(index: int, image: Image.Image) -> None:
            nonlocal shown
            if index > shown and prepared.on_preview is not None:
                shown = index  # a picture that is made again shows nothing twice
                prepared.on_preview(index, image)

        deaths = 0
        try:
            while True:
                if not self._fleet.ready:
                    await self._some_worker(prepared)
                stored = () if neighbour is None or broken else neighbour.skips
                asked = Asked(
                    prediction,
                    neighbour.similarity if neighbour else None,
                    () if self._retrieval.shut and not order.pinned else stored,
                    prepared.slo,
                    min(prepared.due_s, prepared.deadline_s) - time.monotonic(),
                    prepared.effort,
                    order.least,
                    order.own_guidance,
                )
                steering.usable = self._retrieval.usable
                if not counted and not order.pinned:
                    steering.arrived(asked, prepared.governed)
                    counted = True
                routing = self._choose(prepared, asked, broken, replacing)
                choice, took_ms = await timed(routing)
                route_ms += took_ms
                if choice.variant == hopeless:
                    choice = replace(choice, worker=None)
                if choice.worker is None and hopeless is not None:
                    raise Expired("The deadline left no time to make the picture.")
                if choice.worker is None:
                    raise Shed(choice.reason, steering.retry_after_s(asked))
                variant = self._family.variants[choice.variant]
                work = self._work(prepared, variant, choice.variant, number)
                work.deaths, work.on_preview = deaths, show
                if choice.patient:
                    work.expires_s, work.begin_by_s = math.inf, time.monotonic() + PATIENCE_S
                if variant.skip:
                    assert neighbour is not None
                    self._fleet.reserve(work, choice.worker)
                    limit_s = FETCH_SHARE * max(0.0, asked.left_s)
                    try:
                        fetch = self._retrieval.fetch(neighbour, variant.skip, limit_s)
                        work.start, took_ms = await timed(fetch)
                    except BaseException:
                        self._fleet.release(work, choice.worker)
                        raise
                    fetch_ms += took_ms
                    if work.start is None:
                        self._fleet.release(work, choice.worker)
                        broken = True
                        continue
                try:
                    run = await self._fleet.run(work, choice.worker, self._models[choice.variant])
                except TooLate:
                    if (
                        doubted is not None
                        or order.pinned
                        or not prepared.governed
                        or hopeless is not None
                    ):
                        raise
                    hopeless = choice.variant
                    continue
                except HandedBack:
                    deaths = work.deaths
                    if time.monotonic() >= prepared.deadline_s:
                        raise Expired("The deadline passed while workers changed.") from None
                    await asyncio.sleep(0)
                    continue
                reviewed = prepared.governed and not order.pinned and replacing is None
                if steering.policy.reviews and reviewed:
                    replacing = await self._doubted(steering, asked, order, choice, run)
                    if replacing is not None and time.monotonic() < prepared.deadline_s:
                        doubted = work, choice, run
                        continue
                break
        except Exception as error:
            if doubted is None:
                raise
            log.info("A doubted picture is kept: it was not made again (%s)", type(error).__name__)
            work, choice, run = doubted
        if run.kept:
            self._retrieval.keep(prepared.scope, order.prompt, prepared.embedding.vector, run.kept)
        decision_ms = {
            "embed": prepared.encode_ms, "search": prepared.retrieve_ms, "predict": predict_ms,
            "route": route_ms, "fetch": fetch_ms,
        }  # fmt: skip
        served = self._served(prepared, work.job, choice, run, neighbour, decision_ms)
        served = replace(served, foretold_by=foretold_by)
        if choice.instead_of is not None:
            self._record(choice.instead_of)
        if prepared.looked_up:
            result = "hit" if served.steps_skipped else "broken" if broken else "miss"
            self._metrics.lookups.labels(result).inc()
        self._count(served)
        self._on_served(order, prepared.embedding, served)
        return served

    async def _some_worker(self, prepared: Prepared) -> None:
        """Wait until any worker is ready. Raises Shed if none is in time."""
        left_s = prepared.deadline_s - time.monotonic()
        try:
            await self._fleet.holding(None, min(PATIENCE_S, max(left_s, 0.0)))
        except WorkerError:
            if self._fleet.problem is not None:
                raise
            raise Shed("no worker is ready", RETRY_S) from None

    async def _choose(
        self,
        prepared: Prepared,
        asked: Asked,
        broken: bool,
        replacing: str | None,
    ) -> Choice:
        order, steering = prepared.order, self._started.result().steering
        if order.pinned:
            variant, reason = self._pinned(order, asked)
            return await self._held(variant, reason, prepared, asked)
        if replacing is not None:
            return await self._held(replacing, "the first picture was doubted", prepared, asked)
        choice = steering.choose(asked)
        if prepared.governed and choice.worker is None and self._fleet.idle and self._fleet.ready:
            # Nobody waits for anything: better late than refused.
            choice = steering.however_late(asked, f"{choice.reason}, and nobody else waits")
        if not prepared.governed:
            made = await self._held(EXACT, self._would_be(choice), prepared, asked)
            return replace(made, instead_of=choice)
        if broken and choice.worker is not None:
            choice = choice.because(f"{choice.reason}; the neighbour's latents are unusable")
        return choice

    async def _held(self, variant: str, reason: str, prepared: Prepared, asked: Asked) -> Choice:
        """A choice that is made whatever the policy says, by whoever holds the variant's model."""
        model = self._models[variant]
        if model not in self._fleet.targets:
            self._fleet.require(model)
        left_s = prepared.deadline_s - time.monotonic()
        worker = await self._fleet.holding(model, max(0.0, min(left_s, PATIENCE_S)))
        return self._started.result().steering.forced(variant, worker, reason, asked)

    def _pinned(self, order: Order, asked: Asked) -> tuple[str, str]:
        variant = order.variant or EXACT
        if order.steps is not None and order.variant is None:
            return EXACT, "the request pins the number of steps"
        asked_skip = self._family.variants[variant].skip
        if asked_skip:
            k = self._family.usable_skip(asked_skip, tuple(asked.stored))
            if k != asked_skip:
                name = self._started.result().steering.usable_skip(variant, asked.stored)
                return name, f"no latents for the pinned {variant} are cached"
        return variant, "the request pins this variant"

    def _work(self, prepared: Prepared, variant: Variant, name: str, number: int) -> Work:
        order = prepared.order
        steps = order.steps or variant.steps
        guidance = order.guidance if order.own_guidance or order.pinned else variant.guidance
        job = Job(
            order.prompt, order.negative_prompt, order.seed + number, steps, guidance,
            variant.skip, order.width, order.height,
        )  # fmt: skip
        keeps = prepared.looked_up and name == EXACT
        units = self._units[name] if order.steps is None else order.steps + self._extra
        return Work(
            job,
            units * prepared.effort,
            min(prepared.due_s, prepared.deadline_s),
            prepared.deadline_s if prepared.governed and not order.pinned else math.inf,
            begin_by_s=prepared.deadline_s,
            effort=prepared.effort,
            keep=tuple(self._family.skips) if keeps else (),
            previews=order.previews,
        )

    async def _doubted(
        self, steering: Steering, asked: Asked, order: Order, choice: Choice, run: Finished
    ) -> str | None:
        """The variant that is to replace a picture, None if it will do or cannot be judged."""
        predictor = self._foresight.predictor
        if self._judge is None or predictor is None:
            raise WorkerError("This policy judges pictures: it needs a scorer and a predictor.")
        try:
            (score,) = await self._judge.scores(order.prompt, [run.image])
            judged = predictor.quality_of(score)
        except Exception as error:  # its message may quote the prompt
            if not isinstance(error, BadRequest):
                log.warning("Pictures cannot be judged (%s)", type(error).__name__)
            return None
        return steering.again(asked, choice.variant, judged)

    def _would_be(self, choice: Choice) -> str:
        """What Argus would have done, where it does not decide."""
        if choice.worker is None:
            return f"shadow: Argus would have shed this request: {choice.reason}"
        told = "" if choice.quality is None else f", of predicted quality {choice.quality:.2f}"
        return f"shadow: Argus would have made {choice.variant}{told}"

    def _record(self, choice: Choice) -> None:
        if choice.worker is None:
            self._metrics.shadow.labels("shed").inc()
            return
        self._metrics.shadow.labels(choice.variant).inc()
        saved_s = self._started.result().steering.saved_s(choice.variant)
        self._metrics.saved_seconds.labels("shadow").inc(max(0.0, saved_s))

    def _served(
        self,
        prepared: Prepared,
        job: Job,
        choice: Choice,
        run: Finished,
        neighbour: Neighbour | None,
        decision_ms: dict[str, float],
    ) -> Served:
        order, steering = prepared.order, self._started.result().steering
        assert choice.worker is not None
        encode_ms = prepared.encode_ms + run.timings_ms["encode"]
        retrieve_ms = prepared.retrieve_ms + decision_ms["fetch"]
        worked_ms = encode_ms + retrieve_ms + run.timings_ms["denoise"] + run.timings_ms["decode"]
        now = time.monotonic()
        total_ms = 1000 * (now - prepared.begun_s)
        free = order.steps is not None and order.variant is None
        return Served(
            image=run.image,
            variant=f"steps-{order.steps}" if free else choice.variant,
            model=self._family.variants[choice.variant].model,
            reason=choice.reason,
            steps_run=job.steps_run,
            steps_skipped=job.skip,
            seed=job.seed,
            neighbour=neighbour if job.skip else None,
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
            decision_ms=decision_ms,
            worker=choice.worker,
            slo=order.slo,
            deadline_s=prepared.allowed_s,
            on_time=now <= prepared.promised_s,
            quality=None if free else choice.quality,
            low=None if free else choice.low,
            price=choice.price,
            saved_s=0.0 if free else steering.saved_s(choice.variant),
        )

    def _count(self, served: Served) -> None:
        metrics = self._metrics
        metrics.pictures.labels(served.model, served.variant).inc()
        metrics.steps.labels("run").inc(served.steps_run)
        metrics.steps.labels("skipped").inc(served.steps_skipped)
        metrics.saved_seconds.labels("served").inc(max(0.0, served.saved_s))
        if served.quality is not None:
            metrics.predicted.labels(served.variant).observe(served.quality)
        if served.price is not None:
            metrics.price.set(served.price)
        for stage, spent in served.timings_ms.items():
            metrics.stages.labels(stage).observe(spent / 1000)


def _look_at(work: asyncio.Task[list[Served]]) -> None:
    """Asyncio logs errors that nobody looked at."""
    if not work.cancelled():
        work.exception()


def _outcome_of(error: BaseException) -> str:
    """What is counted for every picture of an order that ended with an error."""
    if isinstance(error, Full | Shed):
        return "shed"
    if isinstance(error, Expired):
        return "dropped"
    return "cancelled" if isinstance(error, asyncio.CancelledError) else "failed"
