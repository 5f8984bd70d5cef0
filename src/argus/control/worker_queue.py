"""One worker as control sees it: its queued and running requests, and how long they take.

The server's workers and the simulator's use the same queue. Times are seconds of the driver's
clock.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from argus.control.batching import Batching, Queue
from argus.control.policy import NOTHING
from argus.control.request import Request
from argus.control.step_curve import StepCurve

RATE_MEMORY_S = 30.0
TRUST, ALARM = 0.05, 0.1  # weight of one measured picture; of one that took longer
SLOWEST = 50.0


R = TypeVar("R", bound=Request)


def mean_slowness(queues: Sequence[WorkerQueue[R]]) -> float:
    """The geometric mean of the slowness of measured workers that are alive; of all measured ones
    if none of those is alive; 1 if none was measured."""
    known = [one for one in queues if one.known]
    living = [one for one in known if one.alive] or known
    return math.exp(sum(math.log(one.slowness) for one in living) / max(1, len(living)))


@dataclass
class WorkerQueue(Generic[R]):
    """The queued and running requests of one worker, driven by the fleet or the simulator.

    Running requests advance together, a step in the time that a batch of their number takes:
    `progress` counts steps, and a request is done after its `work_steps`. With stepwise batching
    queued requests join at any step; with request batching none joins until all are done.

    `kind` is the type of device, `model` what it holds, `target` what it is to hold. `step_s` gives
    the seconds of a step by type, model and batch, `batch_limit` the most that it runs at once by
    type and model, `largest_batch` the most that a batching rule may ask for. `slowness` is the
    time that a step takes as a multiple of `step_s`, once that is `known`. A worker that is not
    `alive` does not advance; one that is not `ready` begins nothing. A request with no more than
    `handover_steps` to go makes room for the next, to hide the time of the handover. A `curve`
    takes the place of `step_s`, and learns from every picture how the number of running requests
    changes their time. `guests` run with the model before, in turn with the others; slowness is not
    learnt from them, nor from what began beside them.
    """

    number: int
    kind: int
    model: int
    step_s: Callable[[int, int, int], float]
    batching: Batching
    batch_limit: Callable[[int, int], int]
    largest_batch: int
    target: int = 0
    handover_steps: float = 0.0
    alive: bool = True
    ready: bool = True
    slowness: float = 1.0
    known: bool = True
    curve: StepCurve | None = None
    queued: list[tuple[float, int, R]] = field(default_factory=list)
    running: list[tuple[float, int, R]] = field(default_factory=list)
    progress: float = 0.0
    at_s: float = 0.0
    queued_s: float = 0.0
    busy_s: float = 0.0
    limit: float = 1.0
    version: int = 0
    arrivals: float = 0.0
    arrivals_at_s: float = 0.0
    free_at_s: float = 0.0
    guests: set[R] = field(default_factory=set)
    _before: int = NOTHING
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _untypical: set[R] = field(default_factory=set)
    _crowd_s: float = 0.0
    _begun_at: dict[R, tuple[float, float]] = field(default_factory=dict)
    _all_in_time: bool = True
    _judged: bool = True
    _begun: int = 0
    _counted: int = 0

    @property
    def serving(self) -> int:
        """The model that it serves now, `NOTHING` if none."""
        return self.model if self.alive and self.ready else NOTHING

    @property
    def moves(self) -> bool:
        """Whether it is to be drained, since it is to hold another model."""
        return self.alive and self.ready and self.model != self.target

    def cost_s(self, request: R) -> float:
        """Worker-seconds of a request in full batches."""
        size = self._size_limit()
        return request.work_steps * self._step(size) / size

    def reserve(self, request: R, now: float) -> None:
        """Reserve time for a request while its latents are being fetched."""
        self._count(request)
        self.free_at_s = max(self.free_at_s, now) + request.reserved_s

    def release(self, request: R) -> None:
        """Release what was reserved for a request that goes elsewhere."""
        self._count_off(request)

    def enqueue(self, request: R, now: float) -> None:
        heapq.heappush(self.queued, (request.deadline_s, next(self._order), request))
        self._count(request)
        self.arrivals *= math.exp((self.arrivals_at_s - now) / RATE_MEMORY_S)
        self.arrivals, self.arrivals_at_s = self.arrivals + 1 / RATE_MEMORY_S, now

    def advance(self, now: float) -> None:
        """Let time pass until `now`."""
        if self.running and self.alive:
            self.busy_s += now - self.at_s
            self._crowd_s += (now - self.at_s) * len(self.running)
            self.progress += (now - self.at_s) / self._round(len(self.running))
        self.at_s = now

    def take_up(self, model: int, now: float) -> None:
        """Serve with another model from now on; what runs goes on with its own."""
        self.advance(now)
        self._before, self.model, self.ready = self.model, model, True
        self.guests = {request for _, _, request in self.running}
        self._untypical |= self.guests

    def set_slowness(self, slowness: float) -> None:
        """Set its measured slowness."""
        self.slowness, self.known = slowness, True

    def rebatch(self, batching: Batching, handover_steps: float) -> None:
        """Form batches by another rule from now on, of which nothing is learnt yet."""
        self.batching, self.handover_steps = batching, handover_steps
        self.limit, self._judged, self._all_in_time = 1.0, True, True

    def restart_at(self, now: float) -> None:
        """It holds its model from now on. Requests that ran when it died begin again."""
        died = not self.alive
        self.alive, self.ready, self.at_s = True, True, now
        if died:
            self._judged = self._all_in_time = True
            requests = [request for _, _, request in self.running]
            self.running = []
            self._forget({*requests})
            for request in requests:
                self._start(request)

    def pop_done(self) -> list[R]:
        """Remove and return the requests that are predicted to be done by now."""
        done: list[R] = []
        while self.running and self.running[0][0] <= self.progress + 1e-9:
            done.append(heapq.heappop(self.running)[2])
            self._begun_at.pop(done[-1], None)
            if self._untypical:
                self._forget({done[-1]})
            self._all_in_time &= done[-1].deadline_s >= self.at_s
        return done

    def remove(self, request: R, now: float, done: bool = True) -> None:
        """Remove a request that is `done`, or no longer wanted."""
        self.advance(now)
        for entry in self.running:
            if entry[2] is request:
                self.running.remove(entry)
                heapq.heapify(self.running)
                begun_s, crowd_s = self._begun_at.pop(request, (now, 0.0))
                if done and request not in self._untypical:
                    # steps predicted for its time, and steps done
                    took = self.progress - entry[0] + request.work_steps
                    if self.curve is None:
                        self._measure(took, request.work_steps)
                    elif now > begun_s:
                        crowd = (self._crowd_s - crowd_s) / (now - begun_s)
                        self._measure(took, request.work_steps, crowd)
                self._all_in_time &= not done or now <= request.deadline_s
                self._forget({request})
                return
        for entry in self.queued:
            if entry[2] is request:
                self.queued.remove(entry)
                heapq.heapify(self.queued)
                self._count_off(request)
                return

    def begin(self, now: float) -> tuple[list[R], list[R]]:
        """Start what can run now. Returns the requests that were started, and those dropped since
        they cannot be done, or run, in time."""
        begun: list[R] = []
        dropped: list[R] = []
        if not (self.alive and self.ready):
            return begun, dropped
        if self.batching.stepwise:
            limit = self._size_limit()
            while self.queued and self._occupied() < limit:
                request = self.queued[0][2]
                joins = self._joins(request, now)
                if joins is None:
                    dropped.append(self._next())
                    continue
                if not joins:
                    break
                begun.append(self._next())
                self._start(request)
        elif self.queued and not self._occupied():
            self._judge()
            begun, dropped = self._batch(now)
            self._take_out([*begun, *dropped])
            for request in begun:
                self._start(request)
            self._judged, self._begun = not begun, len(begun)
        return begun, dropped

    def next_s(self, now: float) -> float:
        """When a request is done or a batch may begin next. Updates `free_at_s`."""
        self.version += 1
        if self.running:
            left = self.running[0][0] - self.progress
            at = now + max(0.0, left) * self._round(len(self.running))
        elif self.queued and self.alive and self.ready:
            deadline, _, first = self.queued[0]
            at = now + max(0.05, min(0.1 * (deadline - now), first.work_steps * self._step(1)))
        else:
            at = math.inf
        free = at
        if self.running and not self.batching.stepwise:
            free = now + self._together_s([end - self.progress for end, _, _ in self.running])
        full = self._occupied() >= self._size_limit() or not self.batching.stepwise
        blocked = self.running and (full or self.queued or not self._has_room(now))
        self.free_at_s = self.queued_s + (free if blocked else now)
        return at

    @property
    def longest_s(self) -> float:
        """Seconds that the longest of the running requests takes in all, while so many run."""
        work_steps = max((request.work_steps for _, _, request in self.running), default=0.0)
        return work_steps * self._step(max(1, len(self.running)))

    @property
    def backlog_s(self) -> float:
        """Seconds of work that the queued and running requests are, as of the last `advance`."""
        return self.queued_s + self._together_s([end - self.progress for end, _, _ in self.running])

    def drain(self) -> list[R]:
        """Stop serving, so that another model can be loaded once what runs is finished. Removes the
        queued requests, so that they can be routed again."""
        self.ready = False
        return self.evict(running=False)

    def evict(self, running: bool) -> list[R]:
        """Remove queued requests, with `running` also running ones, so that they can be routed
        again."""
        requests = [request for _, _, request in self.queued]
        for request in requests:
            self._count_off(request)
        self.queued = []
        if running:
            requests += [request for _, _, request in self.running]
            self.running = []
            self._forget({*requests})
            self._begun_at.clear()
            self._judged = self._all_in_time = True  # the limit is not learnt from a lost batch
        return requests

    def _judge(self) -> None:
        """Learn from the batch that is over, once."""
        if not self._judged:
            learn, in_time = self.batching.learn, self._all_in_time
            self.limit = learn(self.limit, self._begun, self.largest_batch, in_time)
            self._judged = self._all_in_time = True

    def _measure(self, took: float, predicted: float, crowd: float = 0.0) -> None:
        """Correct the slowness, and the curve, by a measured time and the predicted one of a
        request that was one of `crowd` on average."""
        if took > 0 and predicted > 0:
            trust = ALARM if took > predicted else TRUST
            corrected = self.slowness * (took / predicted) ** trust
            if self.curve is not None:
                corrected *= self.curve.learn(crowd, took / predicted, trust)
            self.set_slowness(min(SLOWEST, max(1 / SLOWEST, corrected)))

    def _occupied(self) -> int:
        """Running requests that take room in the batch."""
        if not self.handover_steps:
            return len(self.running)
        gone = self.progress + self.handover_steps
        return sum(end > gone for end, _, _ in self.running)

    def _joins(self, request: R, now: float) -> bool | None:
        """Whether a request joins the running ones now; None if it can be done in time neither now
        nor later.

        It waits for them only where that makes it meet its deadline and joining does not: a request
        that is late anyway must not have a worker to itself while others are queued.
        """
        joined = now + request.work_steps * self._round(len(self.running) + 1)
        if joined <= request.deadline_s:
            return self._is_bearable(now)
        left = [end - self.progress for end, _, _ in self.running]
        alone = now + self._together_s(left) + request.work_steps * self._step(1)
        if min(joined, alone) > request.expires_s:
            return None
        return joined <= request.expires_s and alone > request.deadline_s and self._is_bearable(now)

    def _is_bearable(self, now: float) -> bool:
        """Whether one more makes no running request miss its deadline."""
        size = len(self.running)
        before, after = self._round(size), self._round(size + 1)
        for end, _, other in self.running:
            left = end - self.progress
            if now + left * after > other.deadline_s >= now + left * before:
                return False
        return True

    def _has_room(self, now: float) -> bool:
        """Whether one more like the last one started could start at once."""
        own = [entry for entry in self.running if entry[2] not in self.guests]
        return bool(self._joins(max(own or self.running)[2], now))

    def _batch(self, now: float) -> tuple[list[R], list[R]]:
        """The batch that begins now, and the requests that are dropped.

        The batching rule drops requests by their deadlines. Those that it would drop, but that can
        be done before they expire, come last in the batch instead, with their expiry as deadline.
        """
        alone_s = self._step(1)
        in_time: list[R] = []
        late: list[R] = []
        dropped: list[R] = []
        for _, _, request in sorted(self.queued):
            end = now + request.work_steps * alone_s
            kind = in_time if end <= request.deadline_s else late
            (kind if end <= request.expires_s else dropped).append(request)
        while in_time or late:
            count, size = self.batching.choose(self._queue(in_time, late, now))
            given_up = [*in_time, *late][:count]
            step_s = self._step(max(1, size))
            excused = {
                id(request)
                for request in in_time[:count]
                if request.deadline_s < now + request.work_steps * step_s <= request.expires_s
            }
            if not excused:
                return [*in_time, *late][count : count + size], [*dropped, *given_up]
            late = [*(request for request in in_time if id(request) in excused), *late]
            in_time = [request for request in in_time if id(request) not in excused]
        return [], dropped

    def _take_out(self, requests: Sequence[R]) -> None:
        """Remove queued requests."""
        gone = {id(request) for request in requests}
        self.queued = [entry for entry in self.queued if id(entry[2]) not in gone]
        heapq.heapify(self.queued)
        for request in requests:
            self._count_off(request)

    def _forget(self, gone: set[R]) -> None:
        """Forget of requests that do not run any more what was special about them."""
        self.guests -= gone
        self._untypical -= gone

    def _start(self, request: R) -> None:
        if self.guests:
            self._untypical.add(request)
        heapq.heappush(
            self.running, (self.progress + request.work_steps, next(self._order), request)
        )
        if self.curve is not None:
            self._begun_at[request] = self.at_s, self._crowd_s

    def _next(self) -> R:
        request = heapq.heappop(self.queued)[2]
        self._count_off(request)
        return request

    def _count(self, request: R) -> None:
        if not request.reserved_s:
            request.reserved_s = self.cost_s(request)
            self.queued_s += request.reserved_s
            self._counted += 1

    def _count_off(self, request: R) -> None:
        if request.reserved_s:
            self._counted -= 1
            self.queued_s = max(0.0, self.queued_s - request.reserved_s) if self._counted else 0.0
            request.reserved_s = 0.0

    def _step(self, size: int) -> float:
        if self.curve is not None:
            return self.slowness * self.curve.step_s(size)
        return self.slowness * self.step_s(self.kind, self.model, size)

    def _round(self, size: int) -> float:
        """Seconds of a step of so many running requests: those of guests' and own models are made
        in turn."""
        guests = len(self.guests)
        if not 0 < guests <= size:
            return self._step(size)
        own_s = self._step(size - guests) if size > guests else 0.0
        return own_s + self.slowness * self.step_s(self.kind, self._before, guests)

    def _size_limit(self) -> int:
        return self.batch_limit(self.kind, self.model)

    def _together_s(self, work_steps: list[float]) -> float:
        """Seconds until a batch with these steps to go is done, if no request joins it."""
        left = sorted(max(0.0, one) for one in work_steps)
        steps = [self._round(size) for size in range(len(left), 0, -1)]
        before, total = 0.0, 0.0
        for own, step in zip(left, steps, strict=True):
            total += (own - before) * step
            before = own
        return total

    def _queue(self, in_time: Sequence[R], late: Sequence[R], now: float) -> Queue:
        limits = [(request, request.deadline_s) for request in in_time]
        limits += [(request, request.expires_s) for request in late]
        first = limits[: 4 * self.largest_batch]
        work_steps = sum(request.work_steps for request, _ in first) / len(first)
        memory = math.exp((self.arrivals_at_s - now) / RATE_MEMORY_S)
        return Queue(
            slack_s=[limit - now for _, limit in first],
            most=self.largest_batch,
            batch_s=lambda size: work_steps * self._step(size),
            rate=self.arrivals * memory,
            limit=self.limit,
        )
