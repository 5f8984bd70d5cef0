"""Which worker begins soonest, without looking at all of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from argus.control.policy import Place, Soonest


class SoonestWorkers:
    """The worker of each type and model that begins soonest, among equals the one with fewest
    running requests.

    `kinds`, `models`, `running` and `free_at_s` are lists by worker that their owner changes;
    it calls `update` for each worker that it changed. Time does not go back.
    """

    def __init__(
        self,
        kinds: Sequence[int],
        models: Sequence[int],
        running: Sequence[int],
        free_at_s: Sequence[float],
    ) -> None:
        self._kinds, self._models = kinds, models
        self._running, self._free_at_s = running, free_at_s
        self._versions = [0] * len(kinds)
        # Of each type and model a heap of busy and one of idle workers. What a worker was before
        # its last update stays in them until it comes to the top.
        self._busy: dict[Place, list[tuple[float, int, int, int]]] = {}
        self._idle: dict[Place, list[tuple[int, int, int]]] = {}
        for worker in range(len(kinds)):
            self.update(worker)

    def update(self, worker: int) -> None:
        """Take notice that a worker's model, running requests or `free_at_s` changed."""
        self._versions[worker] = version = self._versions[worker] + 1
        model = self._models[worker]
        if model < 0:
            return
        place = self._kinds[worker], model
        if place not in self._busy:
            self._busy[place], self._idle[place] = [], []
        entry = self._free_at_s[worker], self._running[worker], worker, version
        heapq.heappush(self._busy[place], entry)

    def at(self, now_s: float, slowness: float) -> dict[Place, Soonest]:
        """As `Cluster.soonest`."""
        result: dict[Place, Soonest] = {}
        versions = self._versions
        for place, busy in self._busy.items():
            idle = self._idle[place]
            while busy and (busy[0][0] <= now_s or versions[busy[0][2]] != busy[0][3]):
                _, running, worker, version = heapq.heappop(busy)
                if versions[worker] == version:
                    heapq.heappush(idle, (running, worker, version))
            while idle and versions[idle[0][1]] != idle[0][2]:
                heapq.heappop(idle)
            if len(idle) > 64 + 4 * len(versions):
                idle[:] = [one for one in idle if versions[one[1]] == one[2]]
                heapq.heapify(idle)
            if idle:
                result[place] = 0.0, idle[0][0], idle[0][1]
            elif busy:
                free_at_s, running, worker, _ = busy[0]
                result[place] = (free_at_s - now_s) / slowness, running, worker
        return result


class Waits(Sequence[float]):
    """The waits of all workers, made when they are first looked at after `forget`."""

    def __init__(self, make: Callable[[], list[float]]) -> None:
        self._make = make
        self._known: list[float] | None = None

    def forget(self) -> None:
        self._known = None

    def _all(self) -> list[float]:
        if self._known is None:
            self._known = self._make()
        return self._known

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[float]:
        return iter(self._all())

    @overload
    def __getitem__(self, at: int) -> float: ...
    @overload
    def __getitem__(self, at: slice) -> list[float]: ...
    def __getitem__(self, at: int | slice) -> float | list[float]:
        return self._all()[at]
