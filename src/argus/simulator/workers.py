"""Virtual workers: how long batches take, who waits, who is made."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from argus.control.batching import Batching, Queue
from argus.control.policy import NOTHING
from argus.simulator.requests import Job

RATE_MEMORY_S = 30.0


@dataclass
class Worker:
    """One worker of a type of device. It makes pictures of the one model it holds.

    With stepwise batching all that are made advance together, a step in the time that a batch of
    their number takes: `progress` counts steps, and a request is done when it has advanced by its
    units. With request batching nobody joins a batch or leaves it.
    """

    number: int
    kind: int
    model: int
    step_s: Callable[[int, int, int], float]
    batching: Batching
    full: Callable[[int, int], int]
    most: int
    alive: bool = True
    ready: bool = True
    slowness: float = 1.0
    waiting: list[tuple[float, int, Job]] = field(default_factory=list)
    making: list[tuple[float, int, Job]] = field(default_factory=list)
    progress: float = 0.0
    at_s: float = 0.0
    ends_s: float = math.inf
    queued_s: float = 0.0
    busy_s: float = 0.0
    limit: float = 1.0
    version: int = 0
    arrivals: float = 0.0
    arrivals_at_s: float = 0.0
    free_at_s: float = 0.0
    _order: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def serves(self) -> int:
        """The model it can serve now."""
        return self.model if self.alive and self.ready else NOTHING

    def cost_s(self, job: Job) -> float:
        """Worker-seconds of a request in full batches."""
        size = self._size_limit()
        return job.units * self._step(size) / size

    def reserve(self, job: Job, now: float) -> None:
        """Count on a request whose latents are still on their way."""
        job.reserved = True
        self.queued_s += self.cost_s(job)
        self.free_at_s = max(self.free_at_s, now) + self.cost_s(job)

    def release(self, job: Job) -> None:
        """Count no longer on a request that goes elsewhere."""
        if job.reserved:
            self._count_off(job)
        job.reserved = False

    def enqueue(self, job: Job, now: float) -> None:
        heapq.heappush(self.waiting, (job.deadline_s, next(self._order), job))
        if not job.reserved:
            self.queued_s += self.cost_s(job)
        job.reserved = False
        self.arrivals *= math.exp((self.arrivals_at_s - now) / RATE_MEMORY_S)
        self.arrivals, self.arrivals_at_s = self.arrivals + 1 / RATE_MEMORY_S, now

    def advance(self, now: float) -> list[Job]:
        """Let time pass until `now`; who is done by then."""
        if self.making:
            self.busy_s += now - self.at_s
        done: list[Job] = []
        if self.batching.stepwise:
            if self.making:
                self.progress += (now - self.at_s) / self._step(len(self.making))
            while self.making and self.making[0][0] <= self.progress + 1e-9:
                done.append(heapq.heappop(self.making)[2])
        elif self.making and self.ends_s <= now + 1e-9:
            done = [job for _, _, job in self.making]
            self.limit = self.batching.learn(self.limit, all(job.deadline_s >= now for job in done))
            self.making = []
        self.at_s = now
        return done

    def begin(self, now: float) -> list[Job]:
        """Begin what can be begun; who was dropped, having no time left for it."""
        dropped: list[Job] = []
        if not (self.alive and self.ready):
            return dropped
        if self.batching.stepwise:
            limit = self._size_limit()
            while self.waiting and len(self.making) < limit:
                step = self._step(len(self.making) + 1)
                job = self.waiting[0][2]
                if now + job.units * self._step(1) > job.deadline_s:
                    dropped.append(self._next())
                    continue
                if not self._bearable(job, step, now):
                    break
                self._next()
                heapq.heappush(self.making, (self.progress + job.units, next(self._order), job))
        elif self.waiting and not self.making:
            late, size = self.batching.choose(self._queue(now))
            dropped = [self._next() for _ in range(late)]
            batch = [self._next() for _ in range(size)]
            self.making = [(0.0, next(self._order), job) for job in batch]
            self.ends_s = now + self._together_s(batch)
        return dropped

    def next_s(self, now: float) -> float:
        """When something happens here next: someone is done, or a batch may begin."""
        self.version += 1
        if self.making:
            if self.batching.stepwise:
                left = self.making[0][0] - self.progress
                at = now + max(0.0, left) * self._step(len(self.making))
            else:
                at = self.ends_s
        elif self.waiting and self.alive and self.ready:
            at = now + max(0.05, 0.1 * (self.waiting[0][0] - now))
        else:
            at = math.inf
        full = len(self.making) >= self._size_limit() or not self.batching.stepwise
        blocked = self.making and (full or self.waiting or not self._has_room(now))
        self.free_at_s = self.queued_s + (at if blocked else now)
        return at

    def _bearable(self, job: Job, step: float, now: float) -> bool:
        """Whether a batch that steps so slowly makes nobody late who would be in time."""
        if self.making and now + job.units * step > job.deadline_s:
            return False
        before = self._step(max(1, len(self.making)))
        for end, _, other in self.making:
            left = end - self.progress
            if now + left * step > other.deadline_s >= now + left * before:
                return False
        return True

    def _has_room(self, now: float) -> bool:
        """Whether one more like the last to begin could begin at once."""
        last = max(self.making)[2]
        return self._bearable(last, self._step(len(self.making) + 1), now)

    def hand_back(self, all_of_them: bool) -> list[Job]:
        """Who waits here, and with `all_of_them` also who is made: they go elsewhere."""
        jobs = [job for _, _, job in self.waiting]
        self.queued_s = max(0.0, self.queued_s - sum(self.cost_s(job) for job in jobs))
        self.waiting = []
        if all_of_them:
            jobs += [job for _, _, job in self.making]
            self.making, self.ends_s = [], math.inf
        return jobs

    def _next(self) -> Job:
        job = heapq.heappop(self.waiting)[2]
        self._count_off(job)
        return job

    def _count_off(self, job: Job) -> None:
        self.queued_s = max(0.0, self.queued_s - self.cost_s(job))

    def _step(self, size: int) -> float:
        return self.slowness * self.step_s(self.kind, self.model, size)

    def _size_limit(self) -> int:
        return self.full(self.kind, self.model)

    def _together_s(self, batch: list[Job]) -> float:
        """Seconds of a batch that ends together: who skips more, joins it later."""
        units = sorted(job.units for job in batch)
        steps = [self._step(size) for size in range(len(units), 0, -1)]
        before, total = 0.0, 0.0
        for own, step in zip(units, steps, strict=True):
            total += (own - before) * step
            before = own
        return total

    def _queue(self, now: float) -> Queue:
        first = sorted(self.waiting)[: 4 * self.most]
        units = sum(job.units for _, _, job in first) / len(first)
        memory = math.exp((self.arrivals_at_s - now) / RATE_MEMORY_S)
        return Queue(
            left_s=[deadline - now for deadline, _, _ in first],
            most=self.most,
            batch_s=lambda size: units * self._step(size),
            rate=self.arrivals * memory,
            limit=self.limit,
        )
