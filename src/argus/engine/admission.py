"""Queued jobs: the order in which they join the batch, and those whose deadline has passed."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass

from torch import Tensor

from argus.core.errors import Expired
from argus.core.job import Job
from argus.engine.slots import OnPreview, OnStep


@dataclass(frozen=True)
class Waiting:
    """A queued job, with the arguments of `Engine.admit`; `size` is width and height in pixels.

    `previews` are the numbers of steps after which an unfinished picture is due.
    """

    ticket: int
    job: Job
    start: Tensor | None
    keep: frozenset[int]
    on_step: OnStep | None
    previews: tuple[int, ...]
    on_preview: OnPreview | None
    size: tuple[int, int]


class Queue:
    """The engine's queued jobs, earliest deadline first, in seconds of `time.monotonic`; first
    come, first served among equals."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiting]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, one: Waiting, deadline_s: float) -> None:
        heapq.heappush(self._heap, (deadline_s, one.ticket, one))

    def drop(self, ticket: int) -> None:
        """Remove a job, if it is queued."""
        self._heap = [entry for entry in self._heap if entry[1] != ticket]
        heapq.heapify(self._heap)

    def first(self, count: int) -> list[int]:
        """The tickets of the jobs that `take` would return."""
        return [ticket for _, ticket, _ in heapq.nsmallest(count, self._heap)]

    def take(self, count: int) -> list[Waiting]:
        """Remove and return the first `count` jobs, or all if they are fewer."""
        return [heapq.heappop(self._heap)[2] for _ in range(min(count, len(self._heap)))]

    def expire(self) -> list[tuple[int, Expired]]:
        """Remove the jobs whose deadline has passed; their tickets and errors."""
        now, gone = time.monotonic(), list[tuple[int, Expired]]()
        while self._heap and self._heap[0][0] <= now:
            deadline_s, ticket, _ = heapq.heappop(self._heap)
            late = f"The deadline passed {now - deadline_s:.1f} s before there was room for it."
            gone.append((ticket, Expired(late)))
        return gone
