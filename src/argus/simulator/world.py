"""A world: what a simulated cluster can serve, and what its prompts are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from argus.control.variants import EXACT, Numbers, VariantTable


@dataclass(frozen=True)
class Drawing:
    """How arrivals choose their topics: a share `novel` are of new ones, the others repeat one of
    the last `alive` topics, recent ones more often. The cache keeps `capacity` of them."""

    novel: float
    alive: int
    capacity: int


@dataclass(frozen=True)
class Store:
    """The latent store: the median seconds of a retrieval, and how much longer the slowest
    percent takes."""

    median_s: float
    tail: float

    @cached_property
    def spread(self) -> float:
        """The deviation of the logarithm of a retrieval's seconds."""
        return math.log(self.tail) / 2.326 if self.tail > 1 else 0.0


@dataclass(frozen=True)
class Neighbourhood:
    """Prompts whose neighbours are sought among what was made in full, not drawn by topic.

    `vectors` (p, d) are the prompts' embeddings, `cached` (c, d) those of what is cached at the
    beginning, all of length 1. `worth` gives the quality (v,) of a prompt (d,) whose neighbour has
    a similarity, NaN without one.
    """

    vectors: Numbers
    cached: Numbers
    worth: Callable[[Numbers, float], Numbers]


@dataclass(frozen=True)
class World:
    """A table, and prompts (p,) drawn at random.

    `truth` (p, v) is quality, `predicted` (p, v) what an informed policy is told, `similarity` (p,)
    that of the neighbour when it is cached (NaN: it has none). `doubt` is the standard deviation of
    a discriminator's error. `sources` says of every parameter whether it is sourced, fitted or
    assumed. `slo` is the promise in multiples of the exact variant's latency. `capacity_qpm` are
    the exact pictures a minute that traces are published for; None is what the workers carry.
    With `judged_apart` the truth is as noisy as the predictions, by judges that nobody heard, and
    there is nothing better to know than the predictions. In a `neighbourhood` every prompt is asked
    for once, and truth, predictions and similarity are what they are when it comes.
    """

    name: str
    table: VariantTable
    truth: Numbers
    predicted: Numbers
    similarity: Numbers
    drawing: Drawing
    store: Store
    doubt: float
    slo: float
    sources: dict[str, str]
    capacity_qpm: float | None = None
    judged_apart: bool = False
    neighbourhood: Neighbourhood | None = None

    def with_noise(self, deviation: float, seed: int) -> World:
        """The world with predictions that are the truth with noise; infinite is useless ones."""
        rng = np.random.default_rng(seed)
        if np.isinf(deviation):
            predicted = np.broadcast_to(self.truth.mean(axis=0), self.truth.shape).copy()
        else:
            predicted = self.truth + rng.normal(0.0, deviation, self.truth.shape)
        predicted[:, EXACT] = 1.0
        return replace(self, predicted=predicted)

    def capacity_rps(self, kinds: list[int]) -> float:
        """Exact pictures a second that workers of types `kinds` make in full batches."""
        cost = self.table.cost_s(self.slo * self.table.slo_s)[EXACT]
        return float(sum(1 / cost[kind] for kind in kinds))
