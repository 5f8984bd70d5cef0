"""`POST /v1/images/generations`: from a checked request to its answer."""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from starlette.types import Message

from argus.core.errors import BadRequest, Expired, ModelError, NotEnoughMemory, named
from argus.server.asked import image_request
from argus.server.errors import ApiError, invalid
from argus.server.middleware import CLIENT_LEFT
from argus.server.pictures import MEDIA_TYPES, zipped
from argus.server.request import Closed, Full, ImageRequest, Picture, Shed
from argus.server.schema import (
    GenerationRequest,
    GenerationResponse,
    NeighbourReport,
    PictureData,
    PictureReport,
)
from argus.workers.worker import WorkerError

if TYPE_CHECKING:
    from argus.server.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")


async def generate(
    service: Service,
    body: GenerationRequest,
    tenant: str,
    request: Request,
) -> Response:
    """Answer a tenant's request. Raises ApiError."""
    asked = image_request(service, body, tenant)
    pictures = await serve(service, asked)
    output_format, files = asked.output_format, [picture.file for picture in pictures]
    account = {
        "x-argus-variant": ", ".join(dict.fromkeys(one.variant for one in pictures)),
        "x-argus-gpu-seconds": f"{sum(one.request.worker_s for one in pictures):.6f}",
    }
    if body.response_format == "file":
        return _file(files, output_format, account)
    answer = inline_answer(service, body, asked, pictures, request.state.request_id)
    if wants_url(body):
        names = [await service.pictures.put(file, output_format) for file in files]
        put_urls(service, answer, names, str(request.base_url))
    content = answer.model_dump_json(exclude_none=True)  # it is a checked one already
    return Response(content, media_type="application/json", headers=account)


def inline_answer(
    service: Service,
    body: GenerationRequest,
    asked: ImageRequest,
    pictures: list[Picture],
    request_id: str,
) -> GenerationResponse:
    """The answer to a request, with its pictures in it."""
    return GenerationResponse(
        id=request_id,
        created=int(time.time()),
        data=[PictureData(b64_json=base64.b64encode(one.file).decode()) for one in pictures],
        output_format=asked.output_format,
        size=named_size(asked.size),
        quality=body.quality or "auto",
        ignored_fields=list(asked.ignored_fields) or None,
        argus=[report(service, picture) for picture in pictures],
    )


def put_urls(
    service: Service, answer: GenerationResponse, names: list[str | None], base_url: str
) -> None:
    """Replace an answer's pictures by the URLs of the files that they were saved to; a picture that
    was not saved (None) stays in the answer."""
    base = (service.settings.public_url or base_url).rstrip("/")
    for i, name in enumerate(names):
        if name is None:
            answer.argus[i].inline = True
        else:
            answer.data[i] = PictureData(url=f"{base}/v1/images/{name}")


def wants_url(body: GenerationRequest) -> bool:
    """Whether an answer has URLs: clients that ask for a DALL·E expect them unless they say."""
    if body.response_format is None:
        return (body.model or "").startswith("dall-e")
    return body.response_format == "url"


def _file(files: list[bytes], output_format: str, headers: dict[str, str]) -> Response:
    """The answer to `response_format: file`."""
    if len(files) == 1:
        name, media_type, content = f"image.{output_format}", MEDIA_TYPES[output_format], files[0]
    else:
        name, media_type = "images.zip", "application/zip"
        content = zipped(files, output_format)
    named = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=media_type, headers=headers | named)


def named_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


async def serve(service: Service, request: ImageRequest) -> list[Picture]:
    """Make a request's pictures. Raises ApiError."""
    if service.draining or service.problem is not None:
        raise service.unavailable()
    try:
        pictures = await service.dispatcher.serve(request)
    except Closed as error:
        raise service.unavailable() from error
    except Full as error:
        raise ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{error} Try again in {error.retry_after_s} s.",
            "queue_full",
            headers={"Retry-After": str(error.retry_after_s)},
        ) from error
    except Shed as error:
        raise ApiError(
            HTTPStatus.TOO_MANY_REQUESTS,
            f"{error} Try again in {error.retry_after_s} s.",
            "shed",
            headers={"Retry-After": str(error.retry_after_s)},
        ) from error
    except BadRequest as error:
        raise invalid(str(error), None) from error
    except Expired as error:
        raise ApiError(HTTPStatus.GATEWAY_TIMEOUT, str(error), "expired") from error
    except ModelError as error:  # the model can never be loaded
        raise service.unavailable() from error
    except (NotEnoughMemory, WorkerError) as error:
        log.warning("A request failed: %s", named(error))
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "worker_failed") from error
    if request.judge:
        scores = await service.scorer.asked(request.prompt, [one.image for one in pictures])
        for picture, score in zip(pictures, scores, strict=True):
            picture.request.score = score
    return pictures


def report(service: Service, picture: Picture) -> PictureReport:
    """The report of how a picture was made, without other tenants' prompts."""
    request, decision, job = picture.request, picture.decision, picture.job
    assert decision.worker is not None
    neighbour, similarity = None, request.similarity
    if picture.neighbour is not None:
        own = service.settings.cache_scope == "key"
        prompt = picture.neighbour.prompt if own else None
        neighbour = NeighbourReport(entry=picture.neighbour.entry, prompt=prompt)
    assert job.width is not None and job.height is not None
    latency_s, painted = request.latency_s, (job.width, job.height)
    predictor = service.predictions.predictor
    judged = None
    if request.score is not None and predictor is not None and "scores" in predictor.weights:
        judged = predictor.quality_of(request.score)
    return PictureReport(
        variant=picture.variant,
        model=picture.model,
        reason=decision.reason,
        steps_run=job.steps_run,
        steps_skipped=job.skip,
        steps_limit=request.most_steps,
        painted_at=None if painted == request.size else named_size(painted),
        neighbour=neighbour,
        similarity=None if similarity is None else round(similarity, 4),
        seed=job.seed,
        unknown_words=service.words.unknown(request.prompt),
        prompt_truncated=request.embedding.truncated,
        negative_prompt_truncated=request.negative_truncated,
        timings_ms={stage: round(ms, 2) for stage, ms in picture.timings_ms.items()},
        decision_ms={part: round(ms, 2) for part, ms in request.decision_ms.items()},
        predicted_quality=_beside_exact(picture.quality, request),
        quality_bound=_beside_exact(picture.quality_bound, request),
        price=_rounded(decision.price),
        saved_ms=round(1000 * picture.saved_s, 1),
        gpu_seconds=round(request.worker_s, 6),
        cost=_rounded(request.cost, 9),
        saved_cost=_rounded(picture.saved_cost, 9),
        currency=None if request.cost is None else service.settings.currency,
        energy_joules=_rounded(request.joules, 3),
        queued_behind=request.queued_behind,
        expected_ms=round(1000 * request.expected_s),
        worker=decision.worker,
        worker_type=service.fleet.type_of(decision.worker),
        slo=request.slo_name,
        deadline_ms=None if math.isinf(latency_s) else round(1000 * latency_s),
        on_time=picture.on_time,
        score=_rounded(request.score),
        judged_quality=_rounded(judged),
        candidates=request.candidates,
    )


def _beside_exact(quality: float | None, request: ImageRequest) -> float | None:
    return None if quality is None else _rounded(float(request.beside_exact(quality)))


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work. Cancels it and raises ApiError if the client disconnects."""
    limit = asyncio.timeout(None)
    left = asyncio.create_task(_disconnected(request.receive, limit))
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if limit.expired():
            message = "The client closed the connection."
            raise ApiError(CLIENT_LEFT, message, "client_left") from error
        raise
    finally:
        left.cancel()


async def _disconnected(receive: Callable[[], Awaitable[Message]], limit: asyncio.Timeout) -> None:
    """Let a time limit pass when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    limit.reschedule(0.0)
