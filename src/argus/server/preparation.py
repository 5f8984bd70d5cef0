"""What is known of a request before it is decided how its pictures are made."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from argus.cache.cache import Neighbour
from argus.cache.scope import Scope
from argus.control.breaker import FETCH_SHARE
from argus.server.controller import Controller
from argus.server.model import ServedFamily
from argus.server.request import Order
from argus.server.retrieval import Retrieval
from argus.server.slo import MARGIN, Classes, ServedSlo
from argus.workers.worker import OnPreview

if TYPE_CHECKING:
    from argus.quality.encoder import Embedding, PromptEncoder

T = TypeVar("T")

PATIENCE_S = 300.0  # until what Argus does not decide has begun, without `timeout_s`


@dataclass(frozen=True)
class Started:
    """What there is once the first worker works: the policy in charge, and what is promised."""

    controller: Controller
    classes: Classes


@dataclass(frozen=True)
class Prepared:
    """An order, its prompt's embedding and neighbours, and what it is promised.

    `governed` says whether Argus decides. The answer is promised within `allowed_s` of arrival, or
    of when the server could serve at all. Of `time.monotonic`, that is `promised_s`; `due_s` is a
    little before, and `deadline_s` when it is given up: by then it must be done, or, if Argus did
    not decide it, have begun.
    `size_factor` is how many times the work of the family's own size and guidance a picture is.
    """

    order: Order
    slo: ServedSlo
    scope: Scope
    embedding: Embedding
    neighbours: Sequence[Neighbour]
    negative_truncated: bool
    looked_up: bool
    governed: bool
    begun_s: float
    allowed_s: float
    promised_s: float
    due_s: float
    deadline_s: float
    size_factor: float
    encode_ms: float
    retrieve_ms: float
    on_preview: OnPreview | None

    def neighbour(self, number: int) -> Neighbour | None:
        """That of one of the order's pictures. Each resumes from another: with a sampler that adds
        no noise, those resumed from the same latents would all be the same."""
        return self.neighbours[number] if number < len(self.neighbours) else None


class Preparation:
    """Prepares orders. `encoder` and `started` may still be on their way; orders wait for them.
    `rollout` is the share of orders that Argus decides, the others are made exactly."""

    def __init__(
        self,
        model: ServedFamily,
        encoder: Future[PromptEncoder],
        started: Future[Started],
        retrieval: Retrieval,
        rollout: float = 1.0,
        timeout_s: float | None = None,
    ) -> None:
        self._model, self._encoder, self._started = model, encoder, started
        self._retrieval, self._rollout, self._timeout_s = retrieval, rollout, timeout_s

    async def prepare(self, order: Order, on_preview: OnPreview | None) -> Prepared:
        begun_s = time.monotonic()
        encoder = await asyncio.shield(asyncio.wrap_future(self._encoder))
        started = await asyncio.shield(asyncio.wrap_future(self._started))
        loaded_s = time.monotonic()
        slo, size_factor = started.classes[order.slo], self._size_factor(order)
        governed = random.random() < self._rollout
        allowed_s = slo.deadline_s + (order.count - 1) * started.classes.exact_s
        allowed_s = math.inf if order.pinned else size_factor * allowed_s
        promised_s = loaded_s + allowed_s
        deadline_s = loaded_s + (self._timeout_s or PATIENCE_S)
        if governed and not order.pinned:
            limited = self._timeout_s is not None
            deadline_s = min(promised_s, deadline_s) if limited else promised_s
        embedding, encode_ms = await timed(asyncio.to_thread(encoder.embed, order.prompt))
        scope = self._model.scope(
            order.namespace, order.width, order.height, order.guidance, order.negative_prompt
        )
        looks_up = order.cached and order.steps is None
        neighbours: list[Neighbour] = []
        retrieve_ms = 0.0
        if looks_up:
            slack_s = min(promised_s, deadline_s) - time.monotonic()
            search = self._retrieval.find(
                scope, embedding.vector, order.count, FETCH_SHARE * slack_s
            )
            neighbours, retrieve_ms = await timed(search)
        return Prepared(
            order=order,
            slo=slo,
            scope=scope,
            embedding=embedding,
            neighbours=neighbours,
            negative_truncated=bool(order.negative_prompt)
            and encoder.truncates(order.negative_prompt),
            looked_up=looks_up,
            governed=governed,
            begun_s=begun_s,
            allowed_s=allowed_s,
            promised_s=promised_s,
            due_s=loaded_s + (1 - MARGIN) * allowed_s,
            deadline_s=deadline_s,
            size_factor=size_factor,
            encode_ms=encode_ms,
            retrieve_ms=retrieve_ms,
            on_preview=on_preview,
        )

    def _size_factor(self, order: Order) -> float:
        exact = self._model.family.exact
        area = order.width * order.height / (exact.width * exact.height)
        return area * (1 + (order.guidance > 1)) / (1 + (exact.guidance > 1))


async def timed(awaitable: Awaitable[T]) -> tuple[T, float]:
    """What is awaited, and the milliseconds it took."""
    begun = time.perf_counter()
    result = await awaitable
    return result, 1000 * (time.perf_counter() - begun)
