"""The HTTP API: OpenAI's Images API, and the routes for operators."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from argus import __version__
from argus.core.errors import BadRequest, ModelError, named
from argus.server.errors import ApiError, answer_errors, invalid
from argus.server.gauges import measure
from argus.server.generate import generate, unless_left
from argus.server.jobs import MOST_LISTED
from argus.server.keys import EVERYONE, KeyRing
from argus.server.live import BURST, EVENTS, LIVE, POLICY
from argus.server.live_schema import (
    BurstReport,
    BurstRequest,
    LiveReport,
    PolicyAnswer,
    PolicyRequest,
)
from argus.server.middleware import BodyLimit, Counting, Leaving, RequestId
from argus.server.page import add_page
from argus.server.pictures import MEDIA_TYPES
from argus.server.schema import (
    ErrorBody,
    GenerationRequest,
    GenerationResponse,
    Health,
    JobList,
    JobReport,
    ModelData,
    ModelList,
    Readiness,
    ServedData,
    UsageReport,
)
from argus.server.served import served
from argus.server.service import Service
from argus.server.stream import stream
from argus.server.threads import Threads, TooManyHang
from argus.server.tracing import Traced
from argus.server.usage import usage_report

log = logging.getLogger(__name__)

IMAGES = "/v1/images/"
GENERATIONS = IMAGES + "generations"
JOBS = "/v1/argus/jobs"
FILES = (*MEDIA_TYPES.values(), "application/zip")
SWEEP_EVERY_S = 60.0
ORPHANS_EVERY_S = 3600.0  # by one of the servers that share a cache
NEAR_EVERY_S = 3600.0
TURN_EVERY_S = 600.0  # between two looks whether it is this server's turn
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 413, 429, 500, 503)
}


async def tenant_of(request: Request) -> str:
    """The name of the request's API key, `EVERYONE` if the server has no keys. Raises ApiError for
    a missing or wrong key."""
    keys: KeyRing | None = request.app.state.keys
    if keys is None:
        return EVERYONE
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    owner = keys.owner_of(key.strip()) if scheme.lower() == "bearer" else None
    if owner is None:
        raise ApiError(
            HTTPStatus.UNAUTHORIZED,
            "Missing or wrong API key. Send it as 'Authorization: Bearer KEY'.",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return owner


Tenant = Annotated[str, Depends(tenant_of)]


def new_app(service: Service) -> FastAPI:
    """The API over a service, which the app starts and closes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        sweeping = _sweep(service)
        yield
        for task in sweeping:
            task.cancel()
        await service.close()

    app = FastAPI(
        title="Argus",
        version=__version__,
        description="Text-to-image serving behind the OpenAI Images API.",
        lifespan=lifespan,
        docs_url=None,  # `add_page` serves it without a CDN
        redoc_url=None,
    )
    app.state.keys = service.keys
    app.add_middleware(BodyLimit, limit=service.settings.body_limit)
    app.add_middleware(Counting, path=GENERATIONS, metrics=service.metrics)
    app.add_middleware(Leaving, path=IMAGES, service=service)
    if service.tracing is not None:
        app.add_middleware(Traced, path=GENERATIONS, tracing=service.tracing)
    app.add_middleware(RequestId)
    answer_errors(app)
    _operator_routes(app, service)
    _api_routes(app, service)
    _job_routes(app, service)
    _live_routes(app, service)
    _without_422(app)
    add_page(app)
    return app


def _operator_routes(app: FastAPI, service: Service) -> None:
    reading = asyncio.Lock()

    @app.get("/health", summary="Whether the server answers")
    async def health() -> Health:
        return Health(version=__version__, keys=service.keys is not None)

    @app.get(
        "/ready",
        summary="Whether the server can make pictures, and what it cannot store or read now",
        response_model_exclude_none=True,
        responses={503: ERRORS[503]},
    )
    async def ready() -> Readiness:
        if not service.ready:
            raise service.unavailable()
        return Readiness(status="ready", degraded=service.degraded or None)

    @app.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        async with reading:  # else one would empty the gauges that another reads
            measure(service)
            text = await asyncio.to_thread(generate_latest, service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _api_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="Families and variants", responses={401: ERRORS[401]})
    async def models(_: Tenant) -> ModelList:
        return ModelList(data=[_model(service, name) for name in service.model_names])

    @app.get(
        "/v1/models/{name:path}",
        summary="A family or a variant",
        responses={s: ERRORS[s] for s in (401, 404)},
    )
    async def model(name: str, _: Tenant) -> ModelData:
        service.variant_of(name)
        return _model(service, name)

    @app.post(
        GENERATIONS,
        summary="Make pictures",
        response_model=GenerationResponse | JobReport,
        response_model_exclude_none=True,
        responses=ERRORS
        | {200: {"content": {media: {} for media in ("text/event-stream", *FILES)}}}
        | {202: {"model": JobReport, "description": "The job of a request in the background."}}
        | {status: {"model": ErrorBody} for status in (422, 507)},
    )
    async def generations(
        body: GenerationRequest,
        request: Request,
        response: Response,
        tenant: Tenant,
        idempotency_key: Annotated[
            str | None, Header(description="With `argus.background`: equal keys, one job.")
        ] = None,
    ) -> JobReport | Response:
        if body.argus is not None and body.argus.background:
            job = await service.jobs.accept(body, tenant, idempotency_key)
            response.status_code = HTTPStatus.ACCEPTED
            response.headers["location"] = f"{JOBS}/{job.id}"
            return job
        if body.argus is not None and body.argus.webhook is not None:
            raise invalid("A webhook is called for background jobs only.", "argus.webhook")
        if body.stream:
            return await unless_left(request, stream(service, body, tenant, request))
        return await unless_left(request, generate(service, body, tenant, request))

    @app.get(
        "/v1/argus/served",
        summary="What can be asked for: variants, SLO classes, sizes",
        response_model_exclude_none=True,
        responses={401: ERRORS[401]},
    )
    async def what_is_served(tenant: Tenant) -> ServedData:
        return served(service, tenant)

    @app.get(
        "/v1/argus/usage",
        summary="What pictures took, by key, SLO class and variant",
        responses={status: ERRORS[status] for status in (400, 401, 403, 503)},
    )
    async def usage(
        tenant: Tenant,
        begin: Annotated[
            datetime | None,
            Query(alias="from", description="Time in ISO 8601 or seconds since the epoch."),
        ] = None,
        end: Annotated[datetime | None, Query(alias="to")] = None,
        key: Annotated[str | None, Query(description="The name of an API key.")] = None,
    ) -> UsageReport:
        return await usage_report(service, tenant, begin, end, key)

    @app.get(GENERATIONS, include_in_schema=False)
    async def not_a_picture() -> None:
        raise ApiError(405, "Send a POST.", "method_not_allowed", headers={"Allow": "POST"})

    @app.get(
        "/v1/images/{name}",
        summary="A picture of a url answer",
        response_class=Response,
        responses={
            200: {"content": {m: {} for m in MEDIA_TYPES.values()}},
            404: ERRORS[404],
            503: ERRORS[503],
        },
    )
    async def picture(name: str) -> Response:
        try:
            data = await service.pictures.get(name)
        except (OSError, TooManyHang) as error:
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "The picture cannot be read now: ask again.",
                "storage_unavailable",
                headers={"Retry-After": "5"},
            ) from error
        if data is None:
            raise ApiError(HTTPStatus.NOT_FOUND, "No such picture, or it expired.", "not_found")
        return Response(data, media_type=MEDIA_TYPES[name.rpartition(".")[2]])


def _job_routes(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        status: ERRORS[status] for status in (400, 401, 404, 503)
    }

    @app.get(JOBS, summary="Background jobs", response_model_exclude_none=True, responses=errors)
    async def jobs(
        tenant: Tenant,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
        after: Annotated[str | None, Query(description="The id of a job.")] = None,
    ) -> JobList:
        return await service.jobs.newest(tenant, limit, after)

    @app.get(
        JOBS + "/{job}",
        summary="A background job",
        response_model_exclude_none=True,
        responses=errors,
    )
    async def job(job: str, request: Request, tenant: Tenant) -> JobReport:
        return await service.jobs.read(job, tenant, str(request.base_url))

    @app.post(
        JOBS + "/{job}/cancel",
        summary="Cancel a background job",
        response_model_exclude_none=True,
        responses=errors,
    )
    async def cancel(job: str, request: Request, tenant: Tenant) -> JobReport:
        return await service.jobs.cancel(job, tenant, str(request.base_url))


def _live_routes(app: FastAPI, service: Service) -> None:
    """What the page shows of the server, and its controls; with API keys for `admin_keys` alone."""
    errors: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403)}
    refusals = errors | {status: ERRORS[status] for status in (400, 503)}

    async def admin(tenant: Tenant) -> None:
        if not service.is_admin(tenant):
            raise ApiError(
                HTTPStatus.FORBIDDEN, "This needs one of the admin_keys.", "not_an_admin_key"
            )

    async def operator(tenant: Tenant) -> None:
        await admin(tenant)
        if not service.operable:
            raise ApiError(
                HTTPStatus.FORBIDDEN,
                "Anyone may reach this server: set api_key_file and admin_keys to switch the "
                "policy and to start bursts here, or let it listen on 127.0.0.1.",
                "not_an_admin_key",
            )

    only, changes = [Depends(admin)], [Depends(operator)]

    @app.get(LIVE, summary="The server now, and in the last minutes", dependencies=only,
             response_model=LiveReport, responses=errors)  # fmt: skip
    async def live() -> Response:
        return Response(await service.live.json(), media_type="application/json")

    @app.get(EVENTS, dependencies=only, include_in_schema=False)  # it does not end: no tool's call
    async def events() -> StreamingResponse:
        if service.leaving:
            raise service.unavailable()

        async def sent() -> AsyncIterator[str]:
            async for event in service.live.events():
                yield f"event: sample\ndata: {event.model_dump_json()}\n\n"

        headers = {"Cache-Control": "no-store"}
        return StreamingResponse(sent(), media_type="text/event-stream", headers=headers)

    @app.post(POLICY, summary="Have another policy decide", dependencies=changes,
              responses=refusals)  # fmt: skip
    async def policy(body: PolicyRequest) -> PolicyAnswer:
        before = service.policy
        try:
            service.switch(body.policy)
        except (BadRequest, ModelError) as error:
            raise invalid(str(error), "policy") from error
        return PolicyAnswer(policy=service.policy, before=before)

    @app.post(BURST, summary="Send a burst of requests, for a demonstration", dependencies=changes,
              status_code=HTTPStatus.ACCEPTED,
              responses={**refusals, 409: {"model": ErrorBody}})  # fmt: skip
    async def burst(body: BurstRequest) -> BurstReport:
        try:
            return await service.bursts.begin(body.rate, body.seconds, body.ramp_s)
        except (BadRequest, ModelError) as error:
            raise invalid(str(error), None) from error

    @app.delete(BURST, summary="End the burst; answers with the last one", dependencies=changes,
                responses=errors)  # fmt: skip
    async def end_burst() -> BurstReport | None:
        return await service.bursts.stop()


def _model(service: Service, name: str) -> ModelData:
    return ModelData(id=name, created=service.created)


def _sweep(service: Service) -> list[asyncio.Task[None]]:
    """Delete expired pictures and, rarely, latents that crashes left behind and those on this
    server's disk that others removed. These are separate tasks, so that a latent store that hangs
    keeps nothing on the disk."""
    orphans, near = Threads("cache-sweep", 1), Threads("cache-sweep-near", 1)

    async def forget_orphans() -> None:
        await orphans.run(lambda: service.cache.sweep_in_turn(ORPHANS_EVERY_S))

    async def forget_near() -> None:
        await near.run(service.cache.sweep_near)

    return [
        asyncio.create_task(_repeat(service.pictures.sweep, SWEEP_EVERY_S)),
        asyncio.create_task(_repeat(forget_near, NEAR_EVERY_S)),
        asyncio.create_task(_repeat(forget_orphans, TURN_EVERY_S)),
    ]


async def _repeat(sweep: Callable[[], Awaitable[None]], every_s: float) -> None:
    while True:
        try:
            await sweep()
        except Exception as error:
            log.warning("Sweeping failed: %s", named(error))
        await asyncio.sleep(every_s)


def _without_422(app: FastAPI) -> None:
    """Remove FastAPI's 422 from the API's schema, which it documents for wrong bodies; this API
    answers 400, as OpenAI does."""
    schema = app.openapi()
    for path in schema["paths"].values():
        for operation in path.values():
            if "ValidationError" in str(operation["responses"].get("422")):
                operation["responses"].pop("422")
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
