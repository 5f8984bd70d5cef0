"""How a worker forms batches: step by step as the engine does, or as a published system does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Queue:
    """The queue of an idle worker that can begin a batch, as `WorkerQueue` gives it to `choose`.

    `slack_s` are the seconds to the deadline of each queued request, earliest deadline first,
    `most` is the largest batch, `batch_s` gives the seconds of a batch of a size, `rate` is the
    recent rate of arrivals a second, `limit` the worker's own limit (see `learn`).
    """

    slack_s: Sequence[float]
    most: int
    batch_s: Callable[[int], float]
    rate: float
    limit: float


class Batching(Protocol):
    """A policy's rule for batches. If `stepwise`, requests join and leave at every step, up to the
    best batch; else `choose` and `learn` form batches that begin together."""

    stepwise: bool

    def choose(self, queue: Queue) -> tuple[int, int]:
        """Number of first requests to drop, and of next ones to begin; to begin 0 is to wait."""

    def learn(self, limit: float, size: int, most: int, in_time: bool) -> float:
        """A worker's limit after a batch of `size` requests; `in_time` says whether all met their
        deadlines, `most` is the largest batch it may form."""


class StepBatching:
    """Requests join and leave at every step, as in the engine."""

    stepwise = True

    def choose(self, queue: Queue) -> tuple[int, int]:
        return 0, min(len(queue.slack_s), queue.most)

    def learn(self, limit: float, size: int, most: int, in_time: bool) -> float:
        return limit


class AdditiveIncrease:
    """Clipper's (Crankshaw et al., NSDI 2017, section 4.3): the limit grows by one after a batch in
    time that was as large as the limit, and shrinks by a tenth after a late one. It never exceeds
    the largest batch. Requests that would be late in the batch are dropped; if all would be, the
    batch is smaller."""

    stepwise = False

    def choose(self, queue: Queue) -> tuple[int, int]:
        return _in_time(queue, min(queue.most, max(1, int(queue.limit))))

    def learn(self, limit: float, size: int, most: int, in_time: bool) -> float:
        if not in_time:
            return max(1.0, 0.9 * limit)
        return min(float(most), limit + 1) if size >= int(limit) else limit


class Adaptive:
    """Proteus' (Ahmad et al., ASPLOS 2024, section 5): wait for the next request as long as a batch
    with it would still meet the first deadline.

    Deviations: the wait is never longer than the batch itself, as it would be on an idle server;
    when more requests are queued than fill a batch, those that would be late in a full one are
    dropped, as Nexus does (Shen et al., SOSP 2019, section 6.3), since their deadlines would keep
    all batches small.
    """

    stepwise = False

    def choose(self, queue: Queue) -> tuple[int, int]:
        waiting = len(queue.slack_s)
        if waiting >= queue.most:
            late = _late(queue, queue.most)
            if waiting - late >= queue.most:
                return late, queue.most
        late = _late(queue, 1)
        if late == waiting:
            return late, 0
        first, waiting = queue.slack_s[late], waiting - late
        fits = max(n for n in range(1, queue.most + 1) if n == 1 or queue.batch_s(n) <= first)
        if waiting >= fits:
            return late, fits
        next_s = 1 / queue.rate if queue.rate > 0 else float("inf")
        batch_s = queue.batch_s(waiting + 1)
        waits = next_s + batch_s < first and next_s < batch_s
        return late, 0 if waits else waiting

    def learn(self, limit: float, size: int, most: int, in_time: bool) -> float:
        return limit


class Switch:
    """Argus': batches of one while they keep up with the load, the largest batches otherwise.

    The published figures give its throughput and latency at low and high load
    (`argus_reference.json`), not its rule. Assumed: it switches when batches of one cannot keep up
    with the arrivals. Requests that would be late in their batch are dropped; if all would be, the
    batch is smaller.
    """

    stepwise = False

    def choose(self, queue: Queue) -> tuple[int, int]:
        waiting = len(queue.slack_s)
        calm = queue.rate * queue.batch_s(1) < 0.9 and waiting * queue.batch_s(1) < queue.slack_s[0]
        return _in_time(queue, 1 if calm else queue.most)

    def learn(self, limit: float, size: int, most: int, in_time: bool) -> float:
        return limit


def _in_time(queue: Queue, most: int) -> tuple[int, int]:
    """Number of requests to drop and to begin, for the largest batch of at most `most` in which not
    all requests are late."""
    waiting = len(queue.slack_s)
    size = min(waiting, most)
    late = _late(queue, size)
    while late == waiting and size > 1:
        size -= 1
        late = _late(queue, size)
    return late, min(size, waiting - late)


def _late(queue: Queue, size: int) -> int:
    """Number of first requests that would be late in a batch of `size`."""
    needed = queue.batch_s(size)
    return next((n for n, left in enumerate(queue.slack_s) if left >= needed), len(queue.slack_s))
