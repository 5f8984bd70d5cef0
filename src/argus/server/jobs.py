"""Background jobs: requests that are answered with 202 and served when workers have time.

States and their names are those of background responses in OpenAI's Responses API.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from argus.core.errors import named
from argus.server.asked import image_request
from argus.server.errors import ApiError, invalid
from argus.server.generate import inline_answer, put_urls, serve, wants_url
from argus.server.job_store import (
    CANCELLED,
    COMPLETED,
    FAILED,
    MOST_TRIES,
    Job,
    JobsFull,
    JobStore,
    KeyReused,
    NewJob,
    Taken,
    TooManyJobs,
)
from argus.server.request import ImageRequest
from argus.server.retrieval import OF_ONE_REQUEST
from argus.server.schema import (
    GenerationRequest,
    GenerationResponse,
    JobList,
    JobReport,
    WebhookReport,
)
from argus.server.storage import catalogue_url
from argus.server.threads import Threads, TooManyHang
from argus.server.webhooks import LIMIT_S as WEBHOOK_LIMIT_S
from argus.server.webhooks import Webhooks
from argus.workers.fleet import Yielded

if TYPE_CHECKING:
    from argus.server.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")

JOBS = "jobs"  # the kind of data, as in `StorageHealth`
THREADS = 4
STORE_LIMIT_S = 10.0
POLL_S = 1.0
SWEEP_EVERY_S = 10.0
RENEWALS = 3  # of a lease before it runs out
AGAIN_S = (5.0, 60.0)  # after the first and the second try that failed
YIELD_S = 1.0  # before a job that made room begins again
MOST_YIELDS = 5  # from which a job, one at a time, makes no more room once it has begun
CALLS = 8  # of webhooks at a time
PIXEL_BYTES = 4  # of a picture in an answer, at most: three, in base64
REPORT_BYTES = 65536  # of an answer beside its pictures
MOST_NAMED = 1024  # jobs whose URLs are remembered
MOST_LISTED = 100
STORE_ERRORS = (SQLAlchemyError, OSError, TimeoutError, TooManyHang)
_PLAIN_KEY = re.compile(r"[ -~]{1,255}", re.ASCII)


class Jobs:
    """Accepts background jobs, runs those that are due in the catalogue's database, and calls their
    webhooks. For use from one asyncio loop.

    A job runs when workers have room beside other requests, and makes room for them. It may be
    begun several times, by several servers; one result is recorded. Raises BadRequest for webhook
    settings that cannot be used.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._settings = service, service.settings
        self._health, self._metrics = service.health, service.metrics
        self._webhooks = Webhooks(self._settings.webhook_hosts, self._settings.webhook_secret_file)
        self._url = catalogue_url(self._settings)
        self._store: JobStore | None = None
        self._threads = Threads("jobs", THREADS)
        self._wake = asyncio.Event()
        self._closing = False
        self._loop: asyncio.Task[None] | None = None
        self._running: dict[str, tuple[Taken, asyncio.Task[None]]] = {}  # by lease
        self._steady: str | None = None  # the lease of the job that makes no room
        self._calling: set[asyncio.Task[None]] = set()
        self._names: dict[str, tuple[float, list[str]]] = {}  # of pictures' files, by job
        self._renew_at = self._sweep_at = 0.0
        self._health.add(JOBS, service.cache.probe_catalogue)  # both are in one database

    # --- for clients

    async def accept(
        self, body: GenerationRequest, tenant: str, idempotency_key: str | None
    ) -> JobReport:
        """Store a tenant's request as a job; the known job for an idempotency key that it has sent
        before. Raises ApiError."""
        service, settings = self._service, self._settings
        if service.draining or service.problem is not None:
            raise service.unavailable()
        options = body.argus
        assert options is not None
        if body.stream:
            raise invalid("A background job cannot be streamed: leave stream out.", "stream")
        if body.response_format == "file":
            raise invalid(
                "A job's answer is JSON: ask for b64_json or url, or leave background out.",
                "response_format",
            )
        if options.webhook is not None:
            self._webhooks.check(options.webhook)
        key = None if idempotency_key is None else _plain_key(idempotency_key)
        fingerprint = hashlib.sha256(_json(body.model_dump(mode="json"))).hexdigest()
        asked = image_request(service, body, tenant)
        request = _json(_accepted(body, asked))
        new = NewJob(
            id=f"job_{secrets.token_hex(16)}",
            key=tenant,
            idempotency_key=key,
            fingerprint=fingerprint,
            as_url=wants_url(body),
            created_at=time.time(),
            size_bytes=len(request) + _most_bytes(asked),
            webhook=options.webhook,
            request=request,
        )
        if not self._health.works(JOBS):
            raise _unavailable()
        limit, limit_bytes = settings.jobs_limit, int(settings.jobs_bytes)
        try:
            job = await self._asked(lambda store: store.add(new, limit, limit_bytes))
        except KeyReused as error:
            raise ApiError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "This Idempotency-Key was sent with another body: take a new one for each request.",
                "idempotency_key_reused",
            ) from error
        except TooManyJobs as error:
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{limit} jobs of this API key are unfinished, the most that this server takes.",
                "too_many_jobs",
                headers={"Retry-After": "60"},
            ) from error
        except JobsFull as error:
            raise ApiError(
                HTTPStatus.INSUFFICIENT_STORAGE,
                f"No room is left for this job's pictures: jobs may take {limit_bytes} bytes.",
                "jobs_full",
                headers={"Retry-After": "60"},
            ) from error
        self._wake.set()
        return _report(job)

    async def read(self, job: str, tenant: str, base_url: str) -> JobReport:
        """A tenant's job, with its result if it is completed. Raises ApiError.

        Pictures that are wanted as URLs are saved in this server's folder, for the time that a URL
        works, at least half of which is left.
        """
        now = time.time()
        found = await self._asked(lambda store: store.read(job, tenant, now))
        if found is None:
            raise _unknown(job)
        known, result = found
        shown = _report(known)
        if result is not None:
            shown.result = GenerationResponse.model_validate_json(result)
            if known.as_url:
                put_urls(
                    self._service, shown.result, await self._named(job, shown.result), base_url
                )
        return shown

    async def newest(self, tenant: str, limit: int, after: str | None) -> JobList:
        """A tenant's jobs, newest first, without their results. Raises ApiError."""
        now = time.time()
        found = await self._asked(lambda store: store.newest(tenant, limit + 1, after, now))
        if found is None:
            raise _unknown(after or "")
        shown = [_report(job) for job in found[:limit]]
        return JobList(data=shown, has_more=len(found) > limit)

    async def cancel(self, job: str, tenant: str, base_url: str) -> JobReport:
        """Cancel a tenant's job; one that has ended stays as it is. Raises ApiError."""
        now, ttl_s = time.time(), self._settings.jobs_ttl_s
        if await self._asked(lambda store: store.cancel(job, tenant, now, ttl_s)):
            self._metrics.jobs_ended.labels(CANCELLED).inc()
            for taken, task in self._running.values():
                if taken.id == job:
                    task.cancel()
            self._wake.set()
        return await self.read(job, tenant, base_url)

    async def _named(self, job: str, result: GenerationResponse) -> list[str | None]:
        """The names of the files that a result's pictures are in; None for those that cannot be
        saved now."""
        now, ttl_s = time.time(), self._settings.url_ttl_s
        until, known = self._names.get(job, (0.0, []))
        if now < until:
            return list(known)
        pictures = self._service.pictures
        files = [base64.b64decode(one.b64_json or "") for one in result.data]
        names = [await pictures.put(file, result.output_format) for file in files]
        if None not in names:
            if len(self._names) >= MOST_NAMED:
                del self._names[next(iter(self._names))]
            self._names[job] = now + ttl_s / 2, [name for name in names if name is not None]
        return names

    # --- running

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
        await self._webhooks.close()

    async def _run(self) -> None:
        while not self._closing:
            if self._health.works(JOBS):
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
        now, lease_s = time.time(), self._settings.jobs_lease_s
        await self._sweep(now)
        job, webhook = await self._stored(lambda store: store.due(now))
        if webhook and len(self._calling) < CALLS and not self._closing:
            task = asyncio.create_task(self._call_webhooks())
            self._calling.add(task)
            task.add_done_callback(self._calling.discard)
        if job and self._may_begin:
            lost, ttl_s = _json(_LOST.body["error"]).decode(), self._settings.jobs_ttl_s
            ended = await self._stored(lambda store: store.fail_exhausted(now, ttl_s, lost))
            self._metrics.jobs_ended.labels(FAILED).inc(ended)
        while job and self._may_begin:
            taken = await self._stored(lambda store: store.take(time.time(), lease_s))
            if taken is None:
                break
            self._begin(taken)

    @property
    def _may_begin(self) -> bool:
        """Whether workers have time for a job: those that measure served pictures come first."""
        service = self._service
        able = service.ready and not self._closing and not service.learning.waiting
        return able and service.dispatcher.room > 0

    def _begin(self, taken: Taken) -> None:
        steady = taken.yields >= MOST_YIELDS and self._steady is None
        if steady:
            self._steady = taken.lease
        task = asyncio.create_task(self._make(taken, yields=not steady))
        self._running[taken.lease] = taken, task

        def ended(_: asyncio.Task[None]) -> None:
            del self._running[taken.lease]
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
        if time.monotonic() >= self._renew_at:
            kept = await self._stored(lambda store: store.renew(leases, now + lease_s))
            self._renew_at = time.monotonic() + lease_s / RENEWALS
        else:
            kept = await self._stored(lambda store: store.held(leases))
        for lease in leases:
            if lease not in kept and lease in self._running:
                self._running[lease][1].cancel()

    async def _sweep(self, now: float) -> None:
        """Remove expired jobs, and count the unfinished ones."""
        if time.monotonic() < self._sweep_at:
            return
        self._sweep_at = time.monotonic() + SWEEP_EVERY_S
        await self._stored(lambda store: store.sweep(now))
        for status, count in (await self._stored(lambda store: store.counts())).items():
            self._metrics.jobs.labels(status).set(count)

    async def _make(self, taken: Taken, yields: bool) -> None:
        """Make a job's pictures, and record how that ended."""
        try:
            result = await self._result(taken, yields)
        except Yielded:
            self._metrics.jobs_yielded.inc()
            due_at = time.time() + YIELD_S
            await self._until_stored(
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
            await self._until_stored(
                lambda store: store.give_back(taken, due_at, counts=not leaving)
            )
        else:
            await self._end(taken, FAILED, error=_json(error.body["error"]).decode())

    async def _end(
        self, taken: Taken, status: str, result: bytes | None = None, error: str | None = None
    ) -> None:
        now, ttl_s = time.time(), self._settings.jobs_ttl_s
        ended = await self._until_stored(
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
        """Call the webhook that is due first. Returns False if none is due."""
        now, hold_s = time.time(), 2 * (WEBHOOK_LIMIT_S + STORE_LIMIT_S)
        delivery = await self._stored(lambda store: store.next_delivery(now, now + hold_s))
        if delivery is None:
            return False
        outcome, pause_s = await self._webhooks.call(delivery)
        self._metrics.webhooks.labels(outcome or "repeated").inc()
        again_at = None if pause_s is None else time.time() + pause_s
        await self._until_stored(lambda store: store.delivered(delivery, outcome, again_at))
        return True

    # --- the database

    async def _asked(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store for a client returns. Raises ApiError if the store fails."""
        try:
            return await self._stored(call)
        except STORE_ERRORS as error:
            raise _unavailable() from error

    async def _until_stored(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store returns, which is repeated as long as the store fails."""
        while True:
            if self._health.works(JOBS):
                try:
                    return await self._stored(call)
                except STORE_ERRORS:
                    pass  # reported
            await asyncio.sleep(POLL_S)

    async def _stored(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store returns. Raises one of `STORE_ERRORS` if it fails."""
        try:
            return await self._threads.run(lambda: call(self._opened()), STORE_LIMIT_S)
        except OF_ONE_REQUEST:
            raise
        except STORE_ERRORS as error:
            self._health.failed(JOBS, error)
            raise

    def _opened(self) -> JobStore:
        if self._store is None:
            self._store = JobStore(self._url)
        return self._store


_LOST = ApiError(
    503, f"The job was begun {MOST_TRIES} times, and no server ended it.", "worker_failed"
)


def _unavailable() -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "Background jobs cannot be stored or read now: ask again.",
        "storage_unavailable",
        headers={"Retry-After": "5"},
    )


def _unknown(job: str) -> ApiError:
    return ApiError(
        HTTPStatus.NOT_FOUND, f"There is no job {job[:80]!r}, or it expired.", "not_found"
    )


def _plain_key(value: str) -> str:
    """The key of an Idempotency-Key header: a string in quotes, as the IETF's draft has it, or
    without. Raises ApiError."""
    key = value.strip()
    if len(key) > 1 and key.startswith('"') and key.endswith('"'):
        key = re.sub(r"\\(.)", r"\1", key[1:-1])
    if _PLAIN_KEY.fullmatch(key) is None:
        raise invalid("Idempotency-Key must be 1 to 255 printable ASCII characters.", None)
    return key


def _accepted(body: GenerationRequest, asked: ImageRequest) -> dict[str, Any]:
    """A body as it is stored: with the SLO class that it has now, and of unknown fields only the
    names."""
    fields = body.model_dump(mode="json", exclude_none=True)
    fields["argus"] |= {"slo": asked.slo_name}
    return fields | dict.fromkeys(asked.ignored_fields)


def _most_bytes(asked: ImageRequest) -> int:
    """The most bytes that the answer to a request should take."""
    width, height = asked.size
    return asked.count * (width * height * PIXEL_BYTES + REPORT_BYTES)


def _report(job: Job) -> JobReport:
    webhook = None
    if job.webhook is not None:
        status = job.webhook_outcome or "pending"
        webhook = WebhookReport.model_validate(
            {"url": job.webhook, "status": status, "calls": job.webhook_tries}
        )
    return JobReport.model_validate(
        {
            "id": job.id,
            "status": job.status,
            "created_at": int(job.created_at),
            "started_at": _whole(job.started_at),
            "finished_at": _whole(job.finished_at),
            "expires_at": _whole(job.expires_at),
            "webhook": webhook,
            "error": None if job.error is None else json.loads(job.error),
        }
    )


def _whole(at: float | None) -> int | None:
    return None if at is None else int(at)


def _json(value: Any) -> bytes:
    """A value as JSON in ASCII; equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
