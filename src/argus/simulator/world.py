"""A world: the variant table of a simulated cluster, and prompts with the quality of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from argus.control.variants import EXACT, Numbers, VariantTable


@dataclass(frozen=True)
class Drawing:
    """How topics of arrivals are drawn: a share `novel` are new, the others repeat one of the last
    `alive` topics, recent ones more often. The cache holds `capacity` topics."""

    novel: float
    alive: int
    capacity: int


@dataclass(frozen=True)
class Store:
    """The latent store: the median seconds of a fetch, and `tail`, the 99th percentile as a
    multiple of the median."""

    median_s: float
    tail: float

    @cached_property
    def spread(self) -> float:
        """The standard deviation of the logarithm of a fetch's seconds."""
        return math.log(self.tail) / 2.326 if self.tail > 1 else 0.0


@dataclass(frozen=True)
class Neighbourhood:
    """Prompts whose neighbours are found by embedding among earlier full runs, not by topic.

    `vectors` (p, d) are the prompts' embeddings, `cached` (c, d) those cached at the beginning, all
    of length 1. `worth` gives the qualities (n, v) of a prompt (d,) beside each of n neighbours
    (n, d), or (1, v) without one. Policies that look at predictions have a `choice` of the nearest.
    """

    vectors: Numbers
    cached: Numbers
    worth: Callable[[Numbers, Numbers], Numbers]
    choice: int = 1


@dataclass(frozen=True)
class Pictures:
    """Single pictures: their `quality` (p, v, s), and what a discriminator that sees one of them
    says of it, `judged` (p, v, s): it does not know what another variant would have made of the
    prompt. A request gets one of the seeds s."""

    quality: Numbers
    judged: Numbers


@dataclass(frozen=True)
class World:
    """A variant table, and prompts (p,) that are drawn at random.

    `truth` (p, v) is the quality, `predicted` (p, v) what an informed policy gets, `similarity`
    (p,) that of the neighbour when it is cached (NaN: it has none). `judging_error` is the standard
    deviation of a discriminator's error. `sources` says of every parameter whether it is sourced,
    fitted or assumed. `slo` is the deadline in multiples of the exact variant's latency.
    `capacity_qpm` are the exact pictures a minute that traces are scaled to; None: what the workers
    serve. With `judged_apart` the truth comes from other raters than the predictions and is as
    noisy, so that even `oracle` gets the predictions. In a `neighbourhood` every prompt is
    requested once; truth, predictions and similarity are set when it arrives. With `pictures` the
    quality of a request is that of a single one, and the truth, which `oracle` knows, their mean.
    """

    name: str
    table: VariantTable
    truth: Numbers
    predicted: Numbers
    similarity: Numbers
    drawing: Drawing
    store: Store
    judging_error: float
    slo: float
    sources: dict[str, str]
    capacity_qpm: float | None = None
    judged_apart: bool = False
    neighbourhood: Neighbourhood | None = None
    pictures: Pictures | None = None

    def with_noise(self, deviation: float, seed: int) -> World:
        """The world with predictions that are the truth plus noise of a standard deviation; for an
        infinite one they are the variants' means."""
        rng = np.random.default_rng(seed)
        if np.isinf(deviation):
            predicted = np.broadcast_to(self.truth.mean(axis=0), self.truth.shape).copy()
        else:
            predicted = self.truth + rng.normal(0.0, deviation, self.truth.shape)
        predicted[:, EXACT] = 1.0
        return replace(self, predicted=predicted)

    def capacity_rps(self, kinds: list[int]) -> float:
        """Exact pictures a second of workers of types `kinds` in full batches."""
        cost = self.table.cost_s(self.slo * self.table.slo_s)[EXACT]
        return float(sum(1 / cost[kind] for kind in kinds))
