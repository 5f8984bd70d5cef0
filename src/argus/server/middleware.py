"""Middleware: limits bodies, counts answers, and ends connections at shutdown."""

from __future__ import annotations

import re
import secrets
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from argus.server.errors import ApiError
from argus.server.logs import REQUEST_ID
from argus.server.metrics import Metrics

if TYPE_CHECKING:
    from argus.server.service import Service

_PLAIN_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
CLIENT_LEFT = 499  # nginx's status, only for the metrics: it is never sent


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
    """Counts the answers on one path by status once they are complete, and times those with 200.

    A stream that began with 200 and failed later sets `request.state.failed` to the status that it
    is counted as.
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
                count(status)  # before it is sent, so that clients find their answers counted
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if not counted:
                count(HTTPStatus.INTERNAL_SERVER_ERROR)
            raise
        finally:
            if not counted:  # the client disconnected
                count(CLIENT_LEFT)


class RequestId:
    """Gives every request an id: the client's X-Request-Id, if it is a plain one, else a new one.
    The answer's header has it, `request.state.request_id`, and what is logged on its way."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        own = given if _PLAIN_ID.fullmatch(given) else f"img-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = own
        REQUEST_ID.set(own)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (b"x-request-id", own.encode())]
                message = {**message, "headers": headers}
            await send(message)

        return await self._app(scope, receive, named)


class Leaving:
    """Counts the requests below a path that were accepted and are not answered in full. While the
    server shuts down, each answer closes its connection: the client's next request opens another
    one, to another server, and none is lost on a connection that closes just then."""

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
