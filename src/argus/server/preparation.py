"""Prepares a request for the decision: deadline, embedding, neighbours, predictions."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from argus.cache.cache import Neighbour
from argus.control.breaker import FETCH_SHARE
from argus.control.variants import EXACT
from argus.quality.predictor import Prediction
from argus.server.embedding import Embedder
from argus.server.model import ServedFamily
from argus.server.pictures import Encoding
from argus.server.predictions import Predictions
from argus.server.request import ImageRequest
from argus.server.retrieval import Retrieval
from argus.server.router import UNGOVERNED_S, Router
from argus.server.slo import MARGIN
from argus.server.threads import loaded
from argus.server.tracing import spanned

if TYPE_CHECKING:
    from argus.quality.encoder import PromptEncoder

T = TypeVar("T")

OTHERS = 3  # neighbours beside the nearest from which the best is chosen
LEAST_EXACT = 0.1  # quality of an exact picture with few steps, to which others are relative


class Preparation:
    """Sets a request's deadline, its prompt's embedding and neighbours, and the predicted quality
    of every variant.

    `encoding` encodes finished pictures: the time that it takes is left of the deadline. `encoder`
    and `router` may not be set yet; requests wait for them. `rollout` is the share of
    requests that the policy decides; the others are made exactly.
    """

    def __init__(
        self,
        model: ServedFamily,
        encoder: Future[PromptEncoder],
        router: Future[Router],
        retrieval: Retrieval,
        predictions: Predictions,
        rollout: float = 1.0,
        timeout_s: float | None = None,
    ) -> None:
        self.encoding, self._embedder = Encoding(), Embedder(encoder)
        self.model, self._router = model, router
        self._retrieval, self._predictions = retrieval, predictions
        self._rollout, self._timeout_s = rollout, timeout_s

    def close(self) -> None:
        self.encoding.close()
        self._embedder.close()

    @spanned("prepare")
    async def prepare(self, request: ImageRequest) -> list[ImageRequest]:
        """Prepare a request; returns one request for each of its pictures."""
        request.arrived_s = time.monotonic()
        encoder = await self._embedder.encoder()
        router = await loaded(self._router)
        self._give_deadline(request, router)
        request.embedding, ms = await timed(self._embedder.embed(request.prompt))
        request.spent("embed", ms)
        if request.negative_prompt:
            request.negative_truncated = encoder.truncates(request.negative_prompt)
        informed = router.informed
        await self._search(request, informed)
        return self._predict(request, informed)

    def _give_deadline(self, request: ImageRequest, router: Router) -> None:
        """Set the deadlines. The SLO's time begins now, since the server could not serve before."""
        now, classes = time.monotonic(), router.classes
        request.slo_class = slo = classes[request.slo_name]
        request.slo, request.size_factor = slo.index, self._size_factor(request)
        request.governed = random.random() < self._rollout
        if request.most_steps is not None:
            whole = float(self.model.table.steps[EXACT])  # what is not a step is in it
            left = self.model.family.exact.steps - request.most_steps
            request.exact_share = (whole - left) / whole
        if not (request.pinned or request.background):
            alone_s = slo.deadline_s + (request.count - 1) * classes.exact_s
            request.latency_s = request.size_factor * alone_s
        request.slo_deadline_s = now + request.latency_s
        request.limit_s = now + (self._timeout_s or UNGOVERNED_S)
        if request.governed and not request.pinned:
            limited = self._timeout_s is not None
            request.limit_s = min(request.slo_deadline_s, request.limit_s if limited else math.inf)
        if request.background:
            request.limit_s = math.inf
        encode_s = self.encoding.expected_s(request.output_format, request.size)
        due_s = now + (1 - MARGIN) * request.latency_s - encode_s
        request.deadline_s = min(due_s, request.limit_s)

    def _size_factor(self, request: ImageRequest) -> float:
        """A picture's work as a multiple of that at the family's own size and guidance."""
        exact = self.model.family.exact
        area = request.width * request.height / (exact.width * exact.height)
        return area * (1 + (request.guidance > 1)) / (1 + (exact.guidance > 1))

    async def _search(self, request: ImageRequest, informed: bool) -> None:
        """Find a neighbour for each picture, nearest first, and for an `informed` policy some more
        to choose from."""
        request.scope = self.model.scope(
            request.namespace, request.width, request.height, request.guidance,
            request.negative_prompt,
        )  # fmt: skip
        request.looked_up = request.cached and request.pinned_steps is None
        request.spent("search", 0.0)
        if request.looked_up:
            left_s = min(request.slo_deadline_s, request.limit_s) - time.monotonic()
            vector, count = request.embedding.vector, request.count
            choice = OTHERS if informed and self._predictions.predictor is not None else 0
            search = self._retrieval.find(
                request.scope, vector, count + choice, FETCH_SHARE * left_s
            )
            request.neighbours, ms = await timed(search)
            request.spent("search", ms)

    def _predict(self, request: ImageRequest, informed: bool) -> list[ImageRequest]:
        """One request for each picture, with its neighbour and prediction. Neighbours are the
        nearest, or with an `informed` policy those that are predicted to be worth most."""
        begun = time.perf_counter()
        vector, predictions = request.embedding.vector, self._predictions
        request.predictor = predictions.number
        known: dict[Neighbour, Prediction | None] = {}
        if informed:
            known = predictions.predict_best_first(vector, request.neighbours)
            request.neighbours = list(known)
        pictures = request.split()
        for picture in pictures:
            near = picture.neighbour
            picture.prediction = known[near] if near in known else predictions.predict(vector, near)
            if picture.most_steps is not None and picture.prediction is not None:
                limited = self._limited(picture.prediction, picture.most_steps)
                picture.exact_quality = max(LEAST_EXACT, limited)
            picture.spent("predict", 1000 * (time.perf_counter() - begun))
            picture.spent("fetch", 0.0)
        return pictures

    def _limited(self, prediction: Prediction, steps: int) -> float:
        """Predicted quality of the exact model with so many steps: that of the variant which
        differs from exact in steps alone and has the fewest of those with at least as many, so that
        others do not look better beside it than they are."""
        exact, variants = self.model.family.exact, self.model.family.variants
        known = [
            (variants[name].steps, float(prediction.mean[v]))
            for v, name in enumerate(self.model.table.variants)
            if v != EXACT and replace(variants[name], steps=exact.steps) == exact
        ]
        return min((one for one in known if one[0] >= steps), default=(exact.steps, 1.0))[1]


async def timed(awaitable: Awaitable[T]) -> tuple[T, float]:
    """The awaited result, and the milliseconds it took."""
    begun = time.perf_counter()
    result = await awaitable
    return result, 1000 * (time.perf_counter() - begun)
