"""Runs background jobs that are due when workers have room, and calls their webhooks."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from pydantic import ValidationError

from argus.core.errors import named
from argus.server.asked import image_request
from argus.server.errors import ApiError, invalid
from argus.server.generate import inline_answer, serve
from argus.server.job_store import COMPLETED, FAILED, MOST_SWEPT, MOST_TRIES, Taken
from argus.server.schema import GenerationRequest
from argus.server.stored_jobs import LIMIT_S as STORE_LIMIT_S
from argus.server.stored_jobs import STORE_ERRORS, StoredJobs
from argus.server.threads import TooManyHang
from argus.server.webhooks import CALLS, Webhooks
from argus.server.webhooks import LIMIT_S as WEBHOOK_LIMIT_S
from argus.workers.fleet import Yielded

if TYPE_CHECKING:
    from argus.server.service import Service

log = logging.getLogger(__name__)

POLL_S = 1.0
SWEEP_EVERY_S = 10.0
RENEWALS = 3  # of a lease before it runs out
AGAIN_S = (5.0, 60.0)  # after the first and the second try that failed
YIELD_S = 1.0  # before a job that made room begins again
MOST_YIELDS = 5  # from which a job, one at a time, makes no more room once it has begun


class JobRunner:
    """Runs the due jobs of the database that `stored` calls. For use from one asyncio loop.

    A job begins when workers have room beside other requests, and makes room for them. It may be
    begun several times, by several servers; one result is recorded.
    """

    def __init__(self, service: Service, stored: StoredJobs, webhooks: Webhooks) -> None:
        self._service, self._stored, self._webhooks = service, stored, webhooks
        self._settings, self._metrics = service.settings, service.metrics
        self._wake = asyncio.Event()
        self._closing = False
        self._loop: asyncio.Task[None] | None = None
        self._running: dict[str, tuple[Taken, asyncio.Task[None]]] = {}  # by lease
        self._ending: set[str] = set()  # leases of jobs whose end is being recorded
        self._steady: str | None = None  # the lease of the job that makes no room
        self._calling: set[asyncio.Task[None]] = set()
        self._renewed_s = self._renewed_at = 0.0  # when leases were, by either clock
        self._sweep_at = 0.0

    def look(self) -> None:
        """Look at once for what is due."""
        self._wake.set()

    def cancel(self, job: str) -> None:
        """Stop a job that was cancelled, if it runs here."""
        for taken, task in self._running.values():
            if taken.id == job:
                task.cancel()
        self._wake.set()

    def start(self) -> None:
        """Run jobs until `close`."""
        self._loop = asyncio.create_task(self._run())

    async def close(self, limit_s: float) -> None:
        """Wait up to `limit_s` seconds until the jobs of this server, which the dispatcher has
        ended, are queued again for others."""
        self._closing = True
        self._wake.set()
        if self._loop is None:
            return
        for task in self._calling:
            task.cancel()
        until = time.monotonic() + limit_s
        await asyncio.wait((self._loop,), timeout=limit_s)
        tasks = {self._loop, *(task for _, task in self._running.values())}
        await asyncio.wait(tasks, timeout=max(0.0, until - time.monotonic()))
        for task in tasks:
            task.cancel()
        self._webhooks.close()

    async def _run(self) -> None:
        while not self._closing:
            if self._stored.works:
                try:
                    await self._look()
                except STORE_ERRORS:
                    pass  # reported
                except Exception:
                    log.exception("Background jobs cannot be run; they are tried again")
            try:
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _look(self) -> None:
        """Do what is due."""
        await self._check_leases()
        now = time.time()
        await self._sweep(now)
        job, webhook = await self._stored.call(lambda store: store.due(now))
        if webhook and len(self._calling) < CALLS and not self._closing:
            task = asyncio.create_task(self._call_webhooks())
            self._calling.add(task)
            task.add_done_callback(self._calling.discard)
        if job and self._may_begin:
            lost, ttl_s, own = _LOST, self._settings.jobs_ttl_s, list(self._running)
            ended = await self._stored.call(
                lambda store: store.fail_exhausted(now, ttl_s, lost, own)
            )
            self._metrics.jobs_ended.labels(FAILED).inc(ended)
        while job and self._may_begin:
            taken = await self._take()
            if taken is None:
                break
            self._begin(taken)

    async def _take(self) -> Taken | None:
        lease_s, own = self._settings.jobs_lease_s, list(self._running)
        return await self._stored.call(lambda store: store.take(time.time(), lease_s, own))

    @property
    def _may_begin(self) -> bool:
        """Whether workers have time for a job. Idle ones measure served pictures first."""
        service, closing = self._service, self._closing
        measuring = service.learning.waiting and not service.fleet.unyielding
        return service.ready and not closing and not measuring and service.dispatcher.room > 0

    def _begin(self, taken: Taken) -> None:
        steady = taken.yields >= MOST_YIELDS and self._steady is None
        if steady:
            self._steady = taken.lease
        task = asyncio.create_task(self._make(taken, yields=not steady))
        self._running[taken.lease] = taken, task

        def ended(_: asyncio.Task[None]) -> None:
            del self._running[taken.lease]
            self._ending.discard(taken.lease)
            if self._steady == taken.lease:
                self._steady = None
            self._wake.set()

        task.add_done_callback(ended)

    async def _check_leases(self) -> None:
        """Keep the leases of the running jobs, and end those that were cancelled or that another
        server has taken."""
        if not self._running:
            return
        leases, lease_s, now = list(self._running), self._settings.jobs_lease_s, time.time()
        # Leases end by the clock of the day, which steps, and goes on while a machine sleeps.
        passed_s = max(time.monotonic() - self._renewed_s, abs(now - self._renewed_at))
        if passed_s >= lease_s / RENEWALS:
            kept = await self._stored.call(lambda store: store.renew(leases, now + lease_s))
            self._renewed_s, self._renewed_at = time.monotonic(), now
        else:
            kept = await self._stored.call(lambda store: store.held(leases))
        for lease in leases:
            if lease not in kept and lease in self._running and lease not in self._ending:
                self._running[lease][1].cancel()

    async def _sweep(self, now: float) -> None:
        """Remove expired jobs, and count the unfinished ones."""
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + SWEEP_EVERY_S
        if await self._stored.call(lambda store: store.sweep(now)) == MOST_SWEPT:
            self._sweep_at = 0.0  # the others at the next look, after what is due
        for status, count in (await self._stored.call(lambda store: store.counts())).items():
            self._metrics.jobs.labels(status).set(count)

    async def _make(self, taken: Taken, yields: bool) -> None:
        """Make a job's pictures, and record how that ended."""
        try:
            result = await self._result(taken, yields)
        except Yielded:
            self._metrics.jobs_yielded.inc()
            due_at = time.time() + YIELD_S
            await self._stored.until_done(
                lambda store: store.give_back(taken, due_at, counts=False, yielded=True)
            )
        except ApiError as error:
            await self._failed(taken, error)
        except Exception:
            log.exception("Background job %s failed", taken.id)
            await self._failed(
                taken, ApiError(500, "The server failed; its log has the error.", "internal_error")
            )
        else:
            await self._end(taken, COMPLETED, result=result)

    async def _result(self, taken: Taken, yields: bool) -> bytes:
        """The answer to a job's request, as JSON. Raises ApiError and Yielded."""
        try:
            body = GenerationRequest.model_validate_json(taken.request)
        except ValidationError as error:  # an older version accepted it
            raise invalid("This version of the server cannot read the job.", None) from error
        asked = image_request(self._service, body, taken.key)
        asked.background, asked.yields = True, yields
        pictures = await serve(self._service, asked)
        answer = inline_answer(self._service, body, asked, pictures, taken.id)
        return answer.model_dump_json(exclude_none=True).encode()

    async def _failed(self, taken: Taken, error: ApiError) -> None:
        """Queue a job again whose try failed, unless another would fail too."""
        leaving = self._service.leaving or self._service.problem is not None
        busy = error.status_code >= 500 or error.status_code == HTTPStatus.TOO_MANY_REQUESTS
        if leaving or (busy and taken.tries < MOST_TRIES):
            due_at = time.time() + (0.0 if leaving else AGAIN_S[taken.tries - 1])
            log.info("Background job %s is queued again (%s)", taken.id, error.code)
            await self._stored.until_done(
                lambda store: store.give_back(taken, due_at, counts=not leaving)
            )
        else:
            await self._end(taken, FAILED, error=json.dumps(error.body["error"]))

    async def _end(
        self, taken: Taken, status: str, result: bytes | None = None, error: str | None = None
    ) -> None:
        now, ttl_s = time.time(), self._settings.jobs_ttl_s
        self._ending.add(taken.lease)
        ended = await self._stored.until_done(
            lambda store: store.finish(taken, now, ttl_s, result, error)
        )
        if ended:
            self._metrics.jobs_ended.labels(status).inc()

    # --- webhooks

    async def _call_webhooks(self) -> None:
        """Call webhooks one by one, until none is due."""
        try:
            while await self._call_webhook():
                pass
        except STORE_ERRORS:
            pass  # reported
        except Exception as error:
            log.warning("Webhooks cannot be called: %s", named(error))

    async def _call_webhook(self) -> bool:
        """Call the webhook that is due first. Returns False if none is due, or none can be called
        now."""
        now, hold_s = time.time(), 2 * (WEBHOOK_LIMIT_S + STORE_LIMIT_S)
        delivery = await self._stored.call(lambda store: store.next_delivery(now, now + hold_s))
        if delivery is None:
            return False
        try:
            outcome, pause_s = await self._webhooks.call(delivery)
        except TooManyHang:
            later = time.time() + AGAIN_S[0]
            await self._stored.until_done(
                lambda store: store.delivered(delivery, None, later, called=False)
            )
            return False
        self._metrics.webhooks.labels(outcome or "repeated").inc()
        again_at = None if pause_s is None else time.time() + pause_s
        await self._stored.until_done(lambda store: store.delivered(delivery, outcome, again_at))
        return True


_LOST = json.dumps(
    ApiError(
        503, f"The job was begun {MOST_TRIES} times, and no server ended it.", "worker_failed"
    ).body["error"]
)
