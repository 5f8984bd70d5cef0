"""Background jobs: requests that are answered with 202 and served when workers have time.

States and their names are those of background responses in OpenAI's Responses API.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from argus.server.asked import image_request
from argus.server.errors import ApiError, invalid
from argus.server.generate import put_urls, wants_url
from argus.server.job_runner import JobRunner
from argus.server.job_store import (
    CANCELLED,
    Job,
    JobsFull,
    JobStore,
    KeyReused,
    NewJob,
    TooManyJobs,
)
from argus.server.request import ImageRequest
from argus.server.schema import (
    GenerationRequest,
    GenerationResponse,
    JobList,
    JobReport,
    WebhookReport,
)
from argus.server.storage import catalogue_url
from argus.server.stored_jobs import STORE_ERRORS, StoredJobs
from argus.server.webhooks import Webhooks

if TYPE_CHECKING:
    from argus.server.service import Service

T = TypeVar("T")

PIXEL_BYTES = 4  # of a picture in an answer, at most: three, in base64
REPORT_BYTES = 65536  # of an answer beside its pictures
MOST_NAMED = 1024  # jobs whose URLs are remembered
MOST_LISTED = 100
_ID = re.compile(r"job_[0-9a-f]{32}")
_PLAIN_KEY = re.compile(r"[ -~]{1,255}", re.ASCII)


class Jobs:
    """The background jobs of a server, in the catalogue's database. For use from one asyncio loop.
    Raises BadRequest for webhook settings that cannot be used."""

    def __init__(self, service: Service) -> None:
        self._service, self._settings = service, service.settings
        self._webhooks = Webhooks(self._settings.webhook_hosts, self._settings.webhook_secret_file)
        probe = service.cache.probe_catalogue  # both are in one database
        self._stored = StoredJobs(catalogue_url(self._settings), service.health, probe)
        self.runner = JobRunner(service, self._stored, self._webhooks)
        self._names: dict[str, tuple[float, list[str]]] = {}  # of pictures' files, by job

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
        fingerprint = _fingerprint(body)
        asked = image_request(service, body, tenant)
        request = _json(_accepted(body, asked))
        try:
            GenerationRequest.model_validate_json(request)  # as it is read when the job begins
        except ValidationError as error:
            raise invalid(
                "The request has text that is not Unicode, such as \\ud800.", None
            ) from error
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
        if not self._stored.works:
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
                f"No room is left for this job's pictures: jobs may take {limit_bytes} bytes, "
                "those of one API key half of that.",
                "jobs_full",
                headers={"Retry-After": "60"},
            ) from error
        self.runner.look()
        return _report(job)

    async def read(self, job: str, tenant: str, base_url: str) -> JobReport:
        """A tenant's job, with its result if it is completed. Raises ApiError.

        Pictures that are wanted as URLs are saved in this server's folder, for the time that a URL
        works, at least half of which is left.
        """
        now = time.time()
        _check_id(job)
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
        if after is not None:
            _check_id(after)
        found = await self._asked(lambda store: store.newest(tenant, limit + 1, after, now))
        if found is None:
            raise _unknown(after or "")
        shown = [_report(job) for job in found[:limit]]
        return JobList(data=shown, has_more=len(found) > limit)

    async def cancel(self, job: str, tenant: str, base_url: str) -> JobReport:
        """Cancel a tenant's job; one that has ended stays as it is. Raises ApiError."""
        now, ttl_s = time.time(), self._settings.jobs_ttl_s
        _check_id(job)
        if await self._asked(lambda store: store.cancel(job, tenant, now, ttl_s)):
            self._service.metrics.jobs_ended.labels(CANCELLED).inc()
            self.runner.cancel(job)
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

    async def _asked(self, call: Callable[[JobStore], T]) -> T:
        """What a call of the store for a client returns. Raises ApiError if the store fails."""
        try:
            return await self._stored.call(call)
        except STORE_ERRORS as error:
            raise _unavailable() from error


def _unavailable() -> ApiError:
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "Background jobs cannot be stored or read now: ask again.",
        "storage_unavailable",
        headers={"Retry-After": "5"},
    )


def _check_id(job: str) -> None:
    """Raises ApiError for what is no job's id: not every database can look for any text."""
    if _ID.fullmatch(job) is None:
        raise _unknown(job)


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


def _fingerprint(body: GenerationRequest) -> str:
    """A hash of the fields that a body gives: the same in versions that know more fields."""
    fields = body.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return hashlib.sha256(_json(fields)).hexdigest()


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
