"""`stream: true`: unfinished pictures and the finished one, as OpenAI's server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from PIL import Image

from argus.server.asked import image_request
from argus.server.errors import ApiError
from argus.server.generate import named_size, report, serve
from argus.server.pictures import encode_picture
from argus.server.request import ImageRequest, Picture
from argus.server.schema import GenerationRequest, Usage
from argus.server.service import Service

log = logging.getLogger(__name__)

Event = tuple[str, dict[str, Any]]
QUEUED = "queued"  # an event that is sent as a comment, which clients of OpenAI's API skip


async def stream(
    service: Service, body: GenerationRequest, tenant: str, request: Request
) -> StreamingResponse:
    """Answer a tenant's request with events. Returns once the first event is known.

    Raises ApiError for what fails before that; later failures are an `error` event.
    """
    events = _Making(service, body, tenant).events()
    first = await anext(events)

    async def sent() -> AsyncIterator[str]:
        try:
            yield _worded(first)
            async for event in events:
                yield _worded(event)
        except ApiError as error:
            request.state.failed = error.status_code
            yield _worded(("error", error.body))
        except Exception:
            log.exception("A stream failed")
            request.state.failed = 500
            failure = ApiError(500, "The server failed on this picture.", "internal_error")
            yield _worded(("error", failure.body))
        finally:
            await events.aclose()

    return StreamingResponse(sent(), media_type="text/event-stream")


def _worded(event: Event) -> str:
    name, data = event
    if name == QUEUED:
        return f": {QUEUED} {json.dumps(data)}\n\n"
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _place(request: ImageRequest) -> dict[str, Any]:
    """A decided request's place in the queue, and when its picture is expected."""
    expected_ms = round(1000 * request.expected_s)
    return {"queued_behind": request.queued_behind, "expected_ms": expected_ms}


class _Making:
    """A picture that is being made. Closing the generator of its events cancels the work."""

    def __init__(self, service: Service, body: GenerationRequest, tenant: str) -> None:
        self._service = service
        self._quality = body.quality or "auto"
        self._news: asyncio.Queue[tuple[int, Image.Image] | ImageRequest | None] = asyncio.Queue()
        tell = self._news.put_nowait
        self._request = image_request(
            service, body, tenant, lambda index, image: tell((index, image)), tell
        )

    async def events(self) -> AsyncGenerator[Event]:
        task = asyncio.create_task(self._made())
        try:
            while (news := await self._news.get()) is not None:
                if isinstance(news, ImageRequest):
                    yield QUEUED, _place(news)
                    continue
                index, image = news
                file = await asyncio.to_thread(encode_picture, image, self._request.output_format)
                content = self._content(file, image.size, "partial_image")
                yield "image_generation.partial_image", content | {"partial_image_index": index}
            picture = await task
            content = self._content(picture.file, self._request.size, "completed")
            content |= {"usage": Usage().model_dump()}
            if self._request.ignored_fields:
                content["ignored_fields"] = list(self._request.ignored_fields)
            made = report(self._service, picture).model_dump(exclude_none=True)
            yield "image_generation.completed", content | {"argus": [made]}
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def _made(self) -> Picture:
        try:
            return (await serve(self._service, self._request))[0]
        finally:
            self._news.put_nowait(None)

    def _content(self, file: bytes, size: tuple[int, int], kind: str) -> dict[str, Any]:
        return {
            "type": f"image_generation.{kind}",
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "size": named_size(size),
            "quality": self._quality,
            "background": "opaque",
            "output_format": self._request.output_format,
        }
