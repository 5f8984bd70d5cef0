"""Middleware: limits bodies, counts answers, and ends connections at shutdown."""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argus.server.errors import ApiError
from argus.server.metrics import Metrics

if TYPE_CHECKING:
    from argus.server.service import Service

CLIENT_LEFT = 499  # nobody reads it; nginx's number for the metrics


class BodyLimit:
    """Refuses a body of more than `limit` bytes while it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise ApiError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"The body is over the limit of {self._limit} bytes.",
                    "body_too_large",
                )
            return message

        return await self._app(scope, counted, send)


class Counting:
    """Counts the answers on one path by status once they are out, and times those that are 200.

    An answer that began as a 200 and failed later, as streams may, sets `request.state.failed` to
    the status that it would have been.
    """

    def __init__(self, app: ASGIApp, path: str, metrics: Metrics) -> None:
        self._app, self._path, self._metrics = app, path, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != self._path:
            return await self._app(scope, receive, send)
        begun, status, counted = time.perf_counter(), CLIENT_LEFT, False

        def count(status: int) -> None:
            nonlocal counted
            counted = True
            status = scope.get("state", {}).get("failed", status)
            self._metrics.requests.labels(str(int(status))).inc()
            if status == HTTPStatus.OK:
                self._metrics.request_seconds.observe(time.perf_counter() - begun)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                count(status)  # before it is sent: whoever has an answer finds it counted
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if not counted:
                count(HTTPStatus.INTERNAL_SERVER_ERROR)
            raise
        finally:
            if not counted:  # there is nobody to send the rest to
                count(CLIENT_LEFT)


class Leaving:
    """Counts the requests below a path that were accepted and whose answers are not out yet. Once
    the server is to leave, each answer ends its connection: the client's next one is another
    server's, and none is lost on a connection that is closed just then."""

    def __init__(self, app: ASGIApp, path: str, service: Service) -> None:
        self._app, self._path, self._service = app, path, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def last(message: Message) -> None:
            if message["type"] == "http.response.start" and self._service.leaving:
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
            await send(message)

        accepted = scope["path"].startswith(self._path) and not self._service.draining
        self._service.accepted += accepted
        try:
            await self._app(scope, receive, last)
        finally:
            self._service.accepted -= accepted
