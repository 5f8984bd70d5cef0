"""A request in the server, its finished picture, and the errors that end or reroute it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from argus.cache.cache import Neighbour
from argus.cache.scope import Scope
from argus.control.policy import Decision
from argus.control.request import Request
from argus.control.variants import EXACT
from argus.core.job import Job
from argus.quality.predictor import Numbers, Prediction
from argus.server.keys import EVERYONE
from argus.server.schema import Candidate
from argus.server.slo import DEFAULT, ServedSlo
from argus.workers.worker import Finished, OnPreview

if TYPE_CHECKING:
    from argus.quality.encoder import Embedding

PINNED_STEPS = "steps-pinned"
Q = TypeVar("Q", float, Numbers)


@dataclass(eq=False, kw_only=True)
class ImageRequest(Request):
    """A checked request for `count` pictures, filled in on its way (`docs/architecture.md`).
    `split` makes one request for each picture.

    Asked for: `seed` is that of the first picture. Pictures are made at `width` and `height`,
    resized to `size`, in pixels, and encoded in `output_format`. `pinned_variant` pins a variant by
    name, `pinned_steps` a number of steps; `most_steps` limits the steps of every variant, the
    exact one included. `own_guidance` says that the request sets the guidance. `slo_name` names its
    SLO class; `least_quality` is the least lower bound of a picture's quality; a `cheapest` request
    gets the cheapest such variant that can be in time. `key` is the name of the client's
    API key, `namespace` that of its cache; `cached` says whether the cache may serve and store it.
    A `background` request has no deadline, and is no demand that the planner plans for.
    `on_preview` is called with up to `previews` unfinished pictures. `ignored_fields` are those of
    the body that Argus does not know. `explain` asks for `candidates`, `judge` for a `score`.

    Prepared: `governed` says whether the policy decides; else the picture is made exactly.
    `latency_s` is the SLO class's; it begins at arrival, or when the server can serve, and ends at
    `slo_deadline_s`. `deadline_s` is a margin earlier. The request is dropped at `limit_s`: by then
    it must be finished, or, if it is pinned or not governed, running. `looked_up` says whether the
    cache was searched. `exact_quality` is the predicted quality of the exact variant with
    `most_steps`, relative to that without a limit. `predictor` is the number of the predictor that
    made `prediction`.

    Decided: when it was, `queued_behind` requests were queued at its worker, and it was expected to
    be done after `expected_s` more seconds; `on_decided` is called then. `candidates` are what was
    known of every variant.

    Run: `worker_s`, `joules` and `cost` are what its pictures took, also those that were made
    again. `score` is the scorer's value of the picture.

    Retried: `latents_unusable` is set if its neighbour's latents did not come. `replacement` is
    the variant that replaces `first`, a picture that the policy doubts.
    """

    prompt: str
    negative_prompt: str = ""
    count: int = 1
    seed: int = 0
    width: int
    height: int
    size: tuple[int, int]
    output_format: str = "png"
    guidance: float
    key: str = EVERYONE
    namespace: str
    cached: bool = True
    background: bool = False
    pinned_variant: str | None = None
    pinned_steps: int | None = None
    most_steps: int | None = None
    previews: int = 0
    on_preview: OnPreview | None = None
    on_decided: Callable[[ImageRequest], None] | None = None
    slo_name: str = DEFAULT
    least_quality: float = 0.0
    cheapest: bool = False
    own_guidance: bool = False
    ignored_fields: Sequence[str] = ()
    explain: bool = False
    judge: bool = False

    governed: bool = True
    arrived_s: float = 0.0
    latency_s: float = math.inf
    slo_deadline_s: float = math.inf
    limit_s: float = math.inf
    slo_class: ServedSlo = field(init=False)
    scope: Scope = field(init=False)
    embedding: Embedding = field(init=False)
    negative_truncated: bool = False
    looked_up: bool = False
    neighbours: Sequence[Neighbour] = ()
    neighbour: Neighbour | None = None
    prediction: Prediction | None = None
    exact_quality: float = 1.0
    predictor: int = 0
    decision_ms: dict[str, float] = field(default_factory=dict)

    queued_behind: int = 0
    expected_s: float = 0.0
    candidates: list[Candidate] | None = None

    worker_s: float = 0.0
    joules: float | None = None
    cost: float | None = None
    score: float | None = None

    latents_unusable: bool = False
    replacement: str | None = None
    first: tuple[Decision, Finished] | None = None
    shown: int = -1

    @property
    def pinned(self) -> bool:
        """Whether the request pins a variant or a number of steps."""
        return self.pinned_variant is not None or self.pinned_steps is not None

    @property
    def own_steps(self) -> bool:
        """Whether the request pins a number of steps, and no variant."""
        return self.pinned_steps is not None and self.pinned_variant is None

    def beside_exact(self, quality: Q) -> Q:
        """Predicted quality beside the exact picture with the steps that the request allows: what
        is better than that counts as equal."""
        if self.most_steps is None:
            return quality
        beside: Q = np.minimum(quality / self.exact_quality, 1.0)
        return beside

    def split(self) -> list[ImageRequest]:
        """One request for each picture, each with another neighbour: with a sampler that adds no
        noise, pictures resumed from the same latents would all be the same."""
        pictures = []
        for number in range(self.count):
            one = copy.copy(self)
            one.seed += number
            one.neighbour = self.neighbours[number] if number < len(self.neighbours) else None
            one.decision_ms = dict(self.decision_ms)
            pictures.append(one)
        return pictures

    def show(self, index: int, image: Image.Image) -> None:
        """Pass on a preview; a picture that is made again shows none twice."""
        if index > self.shown and self.on_preview is not None:
            self.shown = index
            self.on_preview(index, image)

    def used(self, finished: Finished, cost_per_s: float | None) -> None:
        """Add what a picture took."""
        self.worker_s += finished.worker_s
        if finished.joules is not None:
            self.joules = (self.joules or 0.0) + finished.joules
        if cost_per_s is not None:
            self.cost = (self.cost or 0.0) + cost_per_s * finished.worker_s

    def spent(self, part: str, ms: float) -> None:
        """Add to the milliseconds that a part of the decision took."""
        self.decision_ms[part] = self.decision_ms.get(part, 0.0) + ms


@dataclass(frozen=True)
class Picture:
    """A finished picture, the content of its `file`, and how it was made.

    `saved_s` are the worker-seconds saved against an exact picture, by the profile, `saved_cost`
    what they would have cost, if costs are set; `on_time` says whether it was
    finished within its SLO class's latency.
    """

    image: Image.Image
    file: bytes
    request: ImageRequest
    decision: Decision
    job: Job
    variant: str
    model: str
    timings_ms: dict[str, float]
    on_time: bool
    saved_s: float = 0.0
    saved_cost: float | None = None

    @property
    def accounted(self) -> str:
        """The variant under which it is accounted: one for all pinned numbers of steps."""
        return PINNED_STEPS if self.request.own_steps else self.variant

    @property
    def took_s(self) -> float:
        """Seconds from the request's arrival to the finished picture."""
        return sum(self.timings_ms.values()) / 1000

    @property
    def neighbour(self) -> Neighbour | None:
        """The cached prompt that it was resumed from."""
        return self.request.neighbour if self.job.skip else None

    @property
    def quality(self) -> float | None:
        """The predicted quality, relative to the exact variant's; None without a prediction."""
        return self._predicted("mean")

    @property
    def quality_bound(self) -> float | None:
        """The lower bound of the predicted quality; None without a prediction."""
        return self._predicted("low")

    def _predicted(self, what: str) -> float | None:
        prediction = self.request.prediction
        if prediction is None or self.request.own_steps:
            return None
        if self.decision.variant == EXACT:
            return self.request.exact_quality
        return float(getattr(prediction, what)[self.decision.variant])


class Shed(Exception):
    """No worker can meet the deadline; one should after `retry_after_s`."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(f"This request was shed: {reason}.")
        self.retry_after_s = retry_after_s


class Closed(Exception):
    """The server ended before it answered."""


class Full(Exception):
    """The queue is full; it should have room after `retry_after_s`."""

    def __init__(self, waiting: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} pictures are queued or running; the limit is {limit}.")
        self.retry_after_s = retry_after_s


class LatentsUnusable(Exception):
    """The neighbour's latents did not come in time or are gone: route again without them."""


class Doubted(Exception):
    """The policy doubts a picture: route again, by the variant that replaces it."""
