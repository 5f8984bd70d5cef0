"""What a client asked for: from the checked fields of a body to an `ImageRequest`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from argus.config import QUALITY_LEVELS, QualityLevel
from argus.core.family import EXACT, SIDE_STEP, Family
from argus.core.job import MAX_SEED, MAX_STEPS
from argus.server.errors import invalid, unknown_field
from argus.server.keys import SHARED
from argus.server.request import ImageRequest
from argus.server.schema import ArgusOptions, GenerationRequest
from argus.server.slo import class_of
from argus.workers.worker import OnPreview

if TYPE_CHECKING:
    from argus.server.service import Service

MOST_AREA = 4  # pixels of all pictures of a request, as a multiple of the largest picture's
UNPROMISED = ("low", "fast", "medium")  # `quality` where nothing is predicted
MOST_NAMES, LONGEST_NAME = 32, 64  # of unknown fields that the answer names
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


def image_request(
    service: Service,
    body: GenerationRequest,
    tenant: str,
    on_preview: OnPreview | None = None,
    on_decided: Callable[[ImageRequest], None] | None = None,
) -> ImageRequest:
    """The checked request of a client. Raises ApiError."""
    exact, settings = service.family.exact, service.settings
    ignored = _ignored_fields(service, body)
    if not body.prompt.strip():
        raise invalid("prompt is blank. Say what the picture shows.", "prompt")
    if "\0" in body.prompt:  # PostgreSQL cannot store it
        raise invalid("prompt contains a NUL character: leave it out.", "prompt")
    if body.stream and (body.n or 1) > 1:
        raise invalid("stream shows one picture at a time; leave n out.", "n")
    if body.stream and body.response_format not in (None, "b64_json"):
        raise invalid("stream sends pictures as b64_json; leave response_format out.", "stream")
    options = body.argus or ArgusOptions()
    variant = _pinned_variant(service, body, options)
    pinned_steps, most_steps = _steps(service, body, options, variant)
    pinned = variant is not None or pinned_steps is not None
    if pinned and options.min_quality:
        raise invalid(
            "A pinned variant is used whatever its quality: leave out min_quality or the pin.",
            "argus.min_quality",
        )
    if options.score and not service.scorer.able:
        raise invalid(
            f"The family {service.family.name} names no scorer: leave argus.score out.",
            "argus.score",
        )
    level = _level(service, body)
    least = 0.0 if pinned else max(level.least, options.min_quality or 0.0)
    count = body.n or 1
    if count > settings.queue_limit:
        raise invalid(f"n is {count}; this server accepts at most {settings.queue_limit}.", "n")
    seed = secrets.randbelow(2**32) if body.seed in (None, -1) else body.seed
    if seed + count - 1 > MAX_SEED:
        raise invalid(f"seed {seed} plus the next {count - 1} pass {MAX_SEED}.", "seed")
    usual = exact.guidance if variant is None else service.model.variants[variant].guidance
    guidance = usual if body.guidance_scale is None else body.guidance_scale
    if body.negative_prompt and guidance <= 1:
        raise invalid(
            f"negative_prompt has no effect at guidance_scale {guidance:g}: give a guidance_scale "
            "above 1, or leave it out.",
            "negative_prompt",
        )
    size, sizes = size_of(service.family, body.size), service.family.sizes
    width, height = sizes.nearest(*size) if sizes.limit else size
    if sizes.limit and count * size[0] * size[1] > MOST_AREA * sizes.limit**2:
        raise invalid(
            f"{count} pictures of {size[0]}x{size[1]} are too many pixels for one request: ask for "
            "fewer, or smaller ones.",
            "n",
        )
    return ImageRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt or "",
        count=count,
        seed=seed,
        width=width,
        height=height,
        size=size,
        output_format=body.output_format or "png",
        guidance=guidance,
        key=tenant,
        namespace=SHARED if settings.cache_scope == "shared" else tenant,
        cached=options.cache,
        pinned_variant=variant,
        pinned_steps=pinned_steps,
        most_steps=most_steps,
        previews=(body.partial_images or 0) if body.stream else 0,
        on_preview=on_preview,
        on_decided=on_decided,
        slo_name=class_of(settings.slo, options.slo, tenant),
        least_quality=least,
        cheapest=level.cheapest and not pinned,
        own_guidance=guidance != usual,
        ignored_fields=ignored,
        explain=options.explain,
        judge=options.score,
    )


def _ignored_fields(service: Service, body: GenerationRequest) -> list[str]:
    """The fields of a body that Argus does not know. Raises ApiError if it refuses them."""
    extra = body.model_extra or {}
    unknown = [name[:LONGEST_NAME] for name in sorted(extra)[:MOST_NAMES]]
    extra.clear()  # their values would stay in memory for as long as the request is served
    if unknown and service.settings.unknown_fields == "refuse":
        raise unknown_field(unknown[0], GenerationRequest)
    return unknown


def size_of(family: Family, size: str | None) -> tuple[int, int]:
    """Width and height in pixels that a request's `size` asks for.

    Raises ApiError for a size of which the family makes no pictures.
    """
    exact, sizes = family.exact, family.sizes
    if size is None or size == "auto":
        return exact.width, exact.height
    match = _SIZE.fullmatch(size)
    sides = (int(match[1]), int(match[2])) if match else (0, 0)
    if sizes.limit is not None:
        if not 1 <= min(sides) <= max(sides) <= sizes.limit:
            raise invalid(
                f"size is {size!r}; it must be auto or WIDTHxHEIGHT with sides from 1 to "
                f"{sizes.limit}.",
                "size",
            )
        return sides
    if sides in sizes.native:
        return sides
    for side, own in zip(sides, (exact.width, exact.height), strict=True):
        if not own // 2 <= side <= own * 2 or side % SIDE_STEP:
            raise invalid(
                f"size is {size!r}; it must be auto or WIDTHxHEIGHT in multiples of "
                f"{SIDE_STEP}, from {exact.width // 2}x{exact.height // 2} to "
                f"{exact.width * 2}x{exact.height * 2}. This family is made for "
                f"{exact.width}x{exact.height}.",
                "size",
            )
    return sides


def _pinned_variant(service: Service, body: GenerationRequest, options: ArgusOptions) -> str | None:
    """The variant that the request pins, by `model`, `argus.variant` or `argus.exact`. Raises
    ApiError."""
    variant = service.variant_of(body.model) if body.model else None
    if options.variant is not None:
        if options.variant not in service.model.variants:
            known = ", ".join(service.model.variants)
            raise invalid(
                f"There is no variant {options.variant!r}; the variants are {known}.",
                "argus.variant",
            )
        if variant not in (None, options.variant):
            raise invalid(
                f"model pins {variant} and argus.variant {options.variant}: give one of the two.",
                "argus.variant",
            )
        variant = options.variant
    if not options.exact:
        return variant
    if variant not in (None, EXACT):
        raise invalid(
            f"{variant} is pinned, and argus.exact asks for exact: give one of the two.",
            "argus.exact",
        )
    return None if body.num_inference_steps else EXACT


def _steps(
    service: Service, body: GenerationRequest, options: ArgusOptions, variant: str | None
) -> tuple[int | None, int | None]:
    """The number of steps that the request pins, and the most that it allows. Raises ApiError."""
    family, meaning = service.family, service.settings.client_steps
    steps = None if meaning == "ignore" else body.num_inference_steps
    if options.exact:
        return _possible(body.num_inference_steps), None
    if variant is None:
        if steps is None or meaning == "pin":
            return _possible(steps), None
        return None, (steps if steps < family.exact.steps else None)
    chosen = family.variants[variant]
    own, run = chosen.steps, chosen.steps - chosen.skip
    if steps is not None and not (steps in (own, run) if meaning == "pin" else steps >= run):
        raise invalid(
            f"The variant {variant} is pinned, which runs {run} steps, and num_inference_steps "
            f"asks for {steps}: give one of the two.",
            "num_inference_steps",
        )
    return (own if family.strategy(variant) == "steps" else None), None


def _possible(steps: int | None) -> int | None:
    if steps is not None and steps > MAX_STEPS:
        raise invalid(
            f"num_inference_steps is {steps}; at most {MAX_STEPS} can be pinned.",
            "num_inference_steps",
        )
    return steps


def _level(service: Service, body: GenerationRequest) -> QualityLevel:
    """What the request's `quality` means. Raises ApiError."""
    levels = QUALITY_LEVELS | service.settings.quality_levels
    level = levels.get(body.quality or "auto")
    if level is None:
        raise invalid(f"quality is {body.quality!r}; it must be {', '.join(levels)}.", "quality")
    if service.predictions.predictor is None and body.quality in UNPROMISED:
        return QualityLevel()  # nothing is known of any variant: what the policy chooses will do
    return level
