"""`POST /v1/images/generations`: from a request's body to its answer."""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from http import HTTPStatus
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Message

from argus.core.errors import BadRequest, Expired, ModelError, NotEnoughMemory
from argus.core.job import MAX_SEED
from argus.server.errors import ApiError, invalid
from argus.server.keys import SHARED
from argus.server.middleware import CLIENT_LEFT
from argus.server.pictures import encode_picture
from argus.server.request import Closed, Full, ImageRequest, Picture, Shed
from argus.server.schema import (
    ArgusOptions,
    GenerationRequest,
    GenerationResponse,
    NeighbourReport,
    PictureData,
    PictureReport,
)
from argus.server.service import Service
from argus.server.slo import class_of
from argus.workers.worker import OnPreview, WorkerError

T = TypeVar("T")


async def generate(
    service: Service, body: GenerationRequest, tenant: str, base_url: str
) -> GenerationResponse:
    """Answer a tenant's request. Raises ApiError."""
    asked = image_request(service, body, tenant)
    pictures = await serve(service, asked)
    output_format = body.output_format or "png"
    files = [await asyncio.to_thread(encode_picture, one.image, output_format) for one in pictures]
    data = [PictureData(b64_json=base64.b64encode(file).decode()) for file in files]
    reports = [report(service, picture) for picture in pictures]
    if body.response_format == "url":
        base = (service.settings.public_url or base_url).rstrip("/")
        for i, file in enumerate(files):
            name = await service.pictures.put(file, output_format)
            if name is None:
                reports[i].inline = True
            else:
                data[i] = PictureData(url=f"{base}/v1/images/{name}")
    return GenerationResponse(
        created=int(time.time()),
        data=data,
        output_format=output_format,
        size=f"{asked.width}x{asked.height}",
        argus=reports,
    )


async def serve(service: Service, request: ImageRequest) -> list[Picture]:
    """Make a request's pictures. Raises ApiError."""
    if service.draining or service.problem is not None:
        raise service.unavailable()
    try:
        return await service.dispatcher.serve(request)
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
        raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "worker_failed") from error


def image_request(
    service: Service,
    body: GenerationRequest,
    tenant: str,
    on_preview: OnPreview | None = None,
) -> ImageRequest:
    """The checked request of a client. Raises ApiError."""
    exact = service.family.exact
    if not body.prompt.strip():
        raise invalid("prompt is blank. Say what the picture shows.", "prompt")
    if "\0" in body.prompt:  # PostgreSQL cannot store it
        raise invalid("prompt contains a NUL character: leave it out.", "prompt")
    if body.stream and (body.n or 1) > 1:
        raise invalid("stream shows one picture at a time; leave n out.", "n")
    if body.stream and body.response_format == "url":
        raise invalid("stream sends pictures as b64_json; leave response_format out.", "stream")
    options = body.argus or ArgusOptions()
    variant = _pinned(service, body, options)
    if variant is not None and body.num_inference_steps is not None:
        raise invalid(
            f"The variant {variant} is pinned, and num_inference_steps pins another number of "
            "steps: give one of the two.",
            "num_inference_steps",
        )
    if options.min_quality and (variant is not None or body.num_inference_steps is not None):
        raise invalid(
            "A pinned variant is used whatever its quality: leave out min_quality or the pin.",
            "argus.min_quality",
        )
    count = body.n or 1
    if count > service.settings.queue_limit:
        raise invalid(
            f"n is {count}; this server accepts at most {service.settings.queue_limit}.", "n"
        )
    settings = exact if variant is None else service.model.variants[variant]
    steps = body.num_inference_steps
    if variant is not None and service.family.strategy(variant) == "steps":
        steps = settings.steps
    seed = secrets.randbelow(2**32) if body.seed is None else body.seed
    if seed + count - 1 > MAX_SEED:
        raise invalid(f"seed {seed} plus the next {count - 1} pass {MAX_SEED}.", "seed")
    guidance = settings.guidance if body.guidance_scale is None else body.guidance_scale
    if body.negative_prompt and guidance <= 1:
        raise invalid(
            f"negative_prompt has no effect at guidance_scale {guidance:g}: give a guidance_scale "
            "above 1, or leave it out.",
            "negative_prompt",
        )
    width, height = service.size_of(body.size)
    return ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        count=count,
        seed=seed,
        width=width,
        height=height,
        guidance=guidance,
        namespace=SHARED if service.settings.cache_scope == "shared" else tenant,
        cached=options.cache,
        pinned_variant=variant,
        pinned_steps=steps,
        previews=(body.partial_images or 0) if body.stream else 0,
        on_preview=on_preview,
        slo_name=class_of(service.settings.slo, options.slo, tenant),
        least_quality=options.min_quality or 0.0,
        own_guidance=body.guidance_scale is not None,
    )


def _pinned(service: Service, body: GenerationRequest, options: ArgusOptions) -> str | None:
    """The variant that the request pins, by `model` or `argus.variant`. Raises ApiError."""
    variant = service.variant_of(body.model) if body.model else None
    if options.variant is None:
        return variant
    if options.variant not in service.model.variants:
        known = ", ".join(service.model.variants)
        raise invalid(
            f"There is no variant {options.variant!r}; the variants are {known}.", "argus.variant"
        )
    if variant not in (None, options.variant):
        raise invalid(
            f"model pins {variant} and argus.variant {options.variant}: give one of the two.",
            "argus.variant",
        )
    return options.variant


def report(service: Service, picture: Picture) -> PictureReport:
    """The report of how a picture was made, without other tenants' prompts."""
    request, decision, job = picture.request, picture.decision, picture.job
    assert decision.worker is not None
    neighbour, similarity = None, request.similarity
    if picture.neighbour is not None:
        own = service.settings.cache_scope == "key"
        prompt = picture.neighbour.prompt if own else None
        neighbour = NeighbourReport(entry=picture.neighbour.entry, prompt=prompt)
    latency_s = request.latency_s
    return PictureReport(
        variant=picture.variant,
        model=picture.model,
        reason=decision.reason,
        steps_run=job.steps_run,
        steps_skipped=job.skip,
        neighbour=neighbour,
        similarity=None if similarity is None else round(similarity, 4),
        seed=job.seed,
        prompt_truncated=request.embedding.truncated,
        negative_prompt_truncated=request.negative_truncated,
        timings_ms={stage: round(ms, 2) for stage, ms in picture.timings_ms.items()},
        decision_ms={part: round(ms, 2) for part, ms in request.decision_ms.items()},
        predicted_quality=_rounded(picture.quality),
        quality_bound=_rounded(picture.quality_bound),
        price=_rounded(decision.price),
        saved_ms=round(1000 * picture.saved_s, 1),
        worker=decision.worker,
        slo=request.slo_name,
        deadline_ms=None if math.isinf(latency_s) else round(1000 * latency_s),
        on_time=picture.on_time,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work. Cancels it and raises ApiError if the client disconnects."""
    task = asyncio.create_task(work)
    left = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(CLIENT_LEFT, "The client closed the connection.", "client_left")
        return task.result()
    finally:
        left.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnected(receive: Callable[[], Awaitable[Message]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
