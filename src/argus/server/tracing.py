"""OpenTelemetry traces: a trace for each request for pictures, with a span for each of its steps.

Off unless the settings or the environment name a collector; OpenTelemetry is imported only then. No
attribute quotes a prompt or an error's message, which may quote one.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argus import __version__
from argus.config import Settings
from argus.core.errors import BadRequest, named
from argus.server.logs import REQUEST_ID
from argus.server.threads import Threads

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, Span
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
    from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

TRACES = "/v1/traces"
COLLECTORS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # variables
EXPORT_S = 5.0  # for the collector to take a batch
NS = 1_000_000_000

_OFF = nullcontext()
# The tracer of the request that is served, None if it is not traced.
_TRACER: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


def span(name: str) -> AbstractContextManager[None]:
    """A span of the request that is served, around a step. An error ends it as failed, under the
    error's name alone."""
    tracer = _TRACER.get()
    return _OFF if tracer is None else _span(tracer, name)


@contextmanager
def _span(tracer: Tracer, name: str) -> Iterator[None]:
    from opentelemetry.trace import StatusCode

    with tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        try:
            yield
        except BaseException as error:
            current.set_attribute("error.type", type(error).__qualname__)
            current.set_status(StatusCode.ERROR)
            raise


def spanned(
    name: str,
) -> Callable[[Callable[P, Awaitable[T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Makes each call of a coroutine function a `span`."""

    def wrapped(step: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(step)
        async def traced(*given: P.args, **named: P.kwargs) -> T:
            with span(name):
                return await step(*given, **named)

        return traced

    return wrapped


def note(**attributes: str | float | bool | None) -> None:
    """Set attributes of the present span, as `argus.NAME`; those that are None are left out."""
    if _TRACER.get() is not None:
        current = _current()
        for name, value in attributes.items():
            if value is not None:
                current.set_attribute(f"argus.{name}", value)


def note_stages(timings_ms: Mapping[str, float]) -> None:
    """Give the present span, which ends now, a span for each stage of a worker, one after the
    other; `queue` is what came before them."""
    tracer = _TRACER.get()
    if tracer is None:
        return
    current, end = _current(), time.time_ns()
    if not current.is_recording():  # of a trace that is not sampled
        return
    at = current.start_time or end
    queue_ms = max(0.0, (end - at) * 1000 / NS - sum(timings_ms.values()))
    for name, ms in {"queue": queue_ms, **timings_ms}.items():
        stage = tracer.start_span(name, start_time=at)
        at = min(end, at + int(ms * NS / 1000))
        stage.end(at)


def _current() -> Span:
    from opentelemetry import trace

    return cast("Span", trace.get_current_span())


class Tracing:
    """Sends spans to a collector, in a thread of its own. The variables of OpenTelemetry's SDK
    (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS, ...) hold."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        given = "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        own = {} if given or os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "argus"}
        resource = Resource.create({**own, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("argus", __version__)
        self._threads = Threads("traces", 1)

    @classmethod
    def of(cls, settings: Settings) -> Tracing | None:
        """The tracing that the settings or the environment ask for, None without any.

        Raises BadRequest if the settings ask for it and OpenTelemetry is not installed.
        """
        asked = settings.otlp_endpoint
        if asked is None and not any(os.environ.get(name) for name in COLLECTORS):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError as error:
            advice = f"Traces need OpenTelemetry ({error}): pip install 'argus-t2i[otel]'."
            if asked is not None:
                raise BadRequest(advice) from error
            log.warning("%s No traces are sent.", advice)
            return None
        for chatty in ("opentelemetry", "urllib3"):  # they warn of every batch and every try
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        endpoint = None if asked is None else asked.rstrip("/").removesuffix(TRACES) + TRACES
        return cls(_told(OTLPSpanExporter(endpoint, timeout=EXPORT_S)))

    async def close(self, limit_s: float) -> None:
        """Send what was not sent yet, in at most `limit_s` seconds."""
        with suppress(TimeoutError):
            await self._threads.run(self._provider.shutdown, limit_s)


def _told(exporter: SpanExporter) -> SpanExporter:
    """An exporter that logs when the collector takes no spans any more, and when it does again."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Told(SpanExporter):
        fails = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            try:
                result, why = exporter.export(spans), "it refuses them or does not answer"
            except Exception as error:
                result, why = SpanExportResult.FAILURE, named(error)
            failed = result is not SpanExportResult.SUCCESS
            if failed and not self.fails:
                log.warning("Traces are lost: the collector cannot be sent them (%s)", why)
            if self.fails and not failed:
                log.info("The collector takes traces again")
            self.fails = failed
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    return Told()


class Traced:
    """Begins a trace for each request on one path, or goes on with the one that the client's
    `traceparent` names."""

    def __init__(self, app: ASGIApp, path: str, tracing: Tracing) -> None:
        self._app, self._path, self._tracer = app, path, tracing.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            return await self._app(scope, receive, send)
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, StatusCode

        names = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        facts = {"http.request.method": scope["method"], "http.route": self._path}
        with self._tracer.start_as_current_span(
            f"{scope['method']} {self._path}",
            propagate.extract(names),
            SpanKind.SERVER,
            facts | {"argus.request_id": REQUEST_ID.get()},
            record_exception=False,
            set_status_on_exception=False,
        ) as request:

            def end(status: int) -> None:
                request.set_attribute("http.response.status_code", int(status))
                if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    request.set_status(StatusCode.ERROR)

            async def noted(message: Message) -> None:
                if message["type"] == "http.response.start":
                    end(message["status"])
                await send(message)

            outer = _TRACER.set(self._tracer)
            try:
                await self._app(scope, receive, noted)
                if "failed" in scope.get("state", {}):  # a stream that began with 200
                    end(scope["state"]["failed"])
            except Exception:
                end(HTTPStatus.INTERNAL_SERVER_ERROR)
                raise
            finally:
                _TRACER.reset(outer)
