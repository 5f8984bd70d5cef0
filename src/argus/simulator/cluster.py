"""The virtual cluster: a discrete-event simulation of requests, workers, cache and policy."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from argus.control.breaker import FETCH_SHARE, LEAST_S, PROBE_S, Breaker
from argus.control.forecast import Forecast
from argus.control.policy import Cluster, PlanningInput, Policy, Request, Slo, first_free
from argus.control.slowness import WATCHES, SlownessTracker
from argus.control.variants import EXACT
from argus.control.worker_queue import mean_slowness
from argus.simulator.cache import SimilarityCache, VirtualCache
from argus.simulator.requests import DROPPED, LATE, ON_TIME, SHED, Job, Requests
from argus.simulator.workers import Worker
from argus.simulator.world import World

WINDOW_S = 30.0
RECENT = 1000

Happening = Callable[["Simulation"], None]


@dataclass
class Ledger:
    """What a run counted besides its requests."""

    loads: int = 0
    plans: int = 0
    rerouted: int = 0
    hits: int = 0
    lookups: int = 0
    series: list[dict[str, float]] = field(default_factory=list)


class Simulation:
    """One policy, one world, one trace. Build it, then `run`.

    `events` are (seconds, what happens to the simulation), for failures and slowdowns. `known_rate`
    tells the policy the rate to come instead of a forecast. A plan is made every `window_s`
    seconds. `margin` is the share of deadlines that is kept for what nobody predicts. As in the
    server, policies reckon in seconds of the table: when the workers are slower on the whole, more
    seems to come, and less to be left.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        slo: Slo,
        kinds: Sequence[int],
        requests: Requests,
        seed: int,
        events: Sequence[tuple[float, Happening]] = (),
        known_rate: Callable[[float], float] | None = None,
        truthful: bool = False,
        on_progress: Callable[[int], None] | None = None,
        window_s: float = WINDOW_S,
        margin: float = 0.0,
    ) -> None:
        self._window_s, self._margin = window_s, margin
        self.world, self.policy, self.slo = world, policy, slo
        self.requests, self.ledger = requests, Ledger()
        self._last_s = float(requests.arrived_s.max(initial=0.0))
        self._random = np.random.default_rng(seed)
        self._known_rate, self._on_progress = known_rate, on_progress
        table = world.table
        told = world.truth if truthful and not world.judged_apart else world.predicted
        self._told = told if policy.informed else np.broadcast_to(table.mean_quality, told.shape)
        self._told_rows = self._told.tolist()
        self._truth = world.truth
        near = world.neighbourhood
        self._nearby = None if near is None else SimilarityCache(near.vectors, near.cached)
        if near is not None:  # told and true as each prompt comes
            self._told, self._truth = self._told.copy(), self._truth.copy()
        self._similarity = world.similarity.tolist()
        self._skips = [
            bool(k) or s == "refine" for k, s in zip(table.skip, table.strategies, strict=True)
        ]
        self._free = [not skip for skip in self._skips]
        self._all = [True] * len(table.variants)
        self._model, self._work_steps = table.model.tolist(), table.steps.tolist()
        sizes = table.best_batch.tolist()
        self.workers = [
            Worker(
                number=number,
                kind=kind,
                model=int(table.model[EXACT]),
                step_s=table.batch_step_s,
                batching=policy.batching,
                full=lambda kind, model: int(sizes[kind][model]),
                most=int(table.batches[-1]),
            )
            for number, kind in enumerate(kinds)
        ]
        self.cache = VirtualCache(world.drawing.capacity)
        for topic in range(-world.drawing.capacity, 0):
            self.cache.add(topic)
        self.store_slowness = 1.0
        self._scale, self._slowness = (
            1.0,
            SlownessTracker(),
        )  # the workers' slowness now, and over a window
        self._breaker, self._probing = Breaker(lambda: self.now), False
        self._recent: deque[tuple[int, bool]] = deque(maxlen=RECENT)
        self._forecast = Forecast(window_s)
        self._count = self._counted = self._seen = (
            0  # in all, till the last window, till the last look
        )
        self._open = 0  # requests that came and have no outcome yet
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._targets = [worker.model for worker in self.workers]
        self.now = 0.0
        self._cluster = Cluster(
            0.0,
            list(kinds),
            [worker.serving for worker in self.workers],
            [0.0] * len(self.workers),
            [0] * len(self.workers),
        )
        for at, happening in events:
            self._at(at, happening, self)

    def run(self) -> Requests:
        """Serve every request; returns them with their outcomes."""
        requests = self.requests
        self._plan()
        self._at(self._window_s, self._window)
        self._at(self._window_s / WATCHES, self._watch)
        arrived, heap = requests.arrived_s.tolist(), self._heap
        for number, at in enumerate(arrived):
            while heap and heap[0][0] <= at:
                self._step()
            self.now = at
            self._count += 1
            self._open += 1
            self._arrive(number)
            if self._on_progress is not None and number % 1000 == 0:
                self._on_progress(number)
        end = self._last_s + 2 * self.slo.deadline_s
        while heap and (heap[0][0] <= end or self._open):
            self._step()
        return requests

    def _step(self) -> None:
        at, _, action, args = heapq.heappop(self._heap)
        self.now = at
        action(*args)

    def _at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._order), action, args))

    # --- requests

    def _arrive(self, number: int) -> None:
        self._look_around(int(self.requests.prompt[number]))
        near = self._is_near(number)
        self.ledger.lookups += 1
        self.ledger.hits += near
        self._recent.append((int(self.requests.prompt[number]), near))
        promised_s = self.slo.deadline_s
        due_s = self.now + (1 - self._margin) * promised_s
        self._route(Job(number, due_s, self.now + promised_s, near))

    def _look_around(self, prompt: int) -> None:
        """In a neighbourhood, which neighbour the prompt has now, and what that is worth."""
        near = self.world.neighbourhood
        if near is None or self._nearby is None:
            return
        similarity = self._nearby.nearest(prompt)
        worth = near.worth(near.vectors[prompt], similarity)
        self._similarity[prompt], self._truth[prompt] = similarity, worth
        if self.policy.informed:
            self._told[prompt], self._told_rows[prompt] = worth, worth.tolist()

    def _is_near(self, number: int) -> bool:
        """Whether the request's prompt has a neighbour in the cache now."""
        known = not math.isnan(self._similarity[int(self.requests.prompt[number])])
        if self._nearby is not None:
            return known
        return known and self.cache.has(int(self.requests.topic[number]))

    def _request(self, job: Job) -> Request:
        prompt = int(self.requests.prompt[job.number])
        near = job.near and not self._breaker.open
        return Request(
            quality=self._told_rows[prompt],
            allowed=self._all if near else self._free,
            left_s=(job.deadline_s - self.now) / self._scale,
            similarity=self._similarity[prompt] if near else None,
        )

    def _route(self, job: Job) -> None:
        request = self._request(job)
        decision = self.policy.route(request, self._state())
        if decision.worker is None:
            self._end(job, SHED)
            return
        self._send(job, decision.variant, decision.worker)

    def _send(self, job: Job, variant: int, number: int) -> None:
        job.variant, job.work_steps = variant, self._work_steps[variant]
        if not self._skips[variant]:
            self._enqueue(job, number)
            return
        self.workers[number].reserve(job, self.now)
        limit_s = FETCH_SHARE * max(0.0, job.deadline_s - self.now)
        self._fetch(limit_s, lambda came: self._fetched(job, number, came))

    def _fetch(self, limit_s: float, then: Callable[[bool], None]) -> None:
        """Ask the store for latents; `then` is told whether they came within `limit_s`."""
        store, breaker = self.world.store, self._breaker
        spread = math.exp(store.spread * self._random.normal())
        delay = store.median_s * self.store_slowness * spread
        if limit_s < LEAST_S:
            self._at(self.now, then, False)
            return
        trial = breaker.begin()

        def end() -> None:
            if delay < limit_s:
                breaker.success()
            else:
                breaker.failure(trial)
            if breaker.doubted and not self._probing:
                self._probing = True
                self._at(self.now + PROBE_S, self._probe)
            then(delay < limit_s)

        self._at(self.now + min(delay, limit_s), end)

    def _fetched(self, job: Job, number: int, came: bool) -> None:
        if came:
            self._enqueue(job, number)
            return
        self.workers[number].release(job)
        job.near = False
        self._again(job)

    def _probe(self) -> None:
        """See whether a store that failed answers again, as the server does."""
        self._probing = self._breaker.doubted
        if not self._probing:
            return
        if not self._breaker.open:
            limit_s = FETCH_SHARE * (1 - self._margin) * self.slo.deadline_s
            self._fetch(limit_s, lambda came: None)
        self._at(self.now + PROBE_S, self._probe)

    def _enqueue(self, job: Job, number: int) -> None:
        worker = self.workers[number]
        if worker.serving != self._model[job.variant]:  # it died or loads: someone else then
            worker.release(job)
            self.ledger.rerouted += 1
            self._again(job)
            return
        self._settle(worker, worker.finished_by(self.now))
        worker.enqueue(job, self.now)
        self._go_on(worker)

    def _again(self, job: Job) -> None:
        if self.now >= job.expires_s:
            self._end(job, DROPPED)
        elif any(worker.serving >= 0 for worker in self.workers):
            self._route(job)
        else:
            self._at(min(self.now + 1.0, job.expires_s), self._again, job)

    def _go_on(self, worker: Worker) -> None:
        _, dropped = worker.begin(self.now)
        for job in dropped:
            self._drop(job)
        at = worker.next_s(self.now)
        self._cluster.running[worker.number] = len(worker.running)
        if at < math.inf:
            self._at(at, self._wake, worker, worker.version)

    def _drop(self, job: Job) -> None:
        """There is no time left for a request as it is; the policy may know a faster way."""
        request = self._request(job)
        decision = self.policy.route(request, self._state())
        if decision.worker is None or decision.variant == job.variant or job.hopeless:
            self._end(job, DROPPED)
        else:
            job.hopeless = True
            self._send(job, decision.variant, decision.worker)

    def _wake(self, worker: Worker, version: int) -> None:
        if version != worker.version:
            return
        self._settle(worker, worker.finished_by(self.now))
        if not worker.running and not worker.ready:
            self._load(worker)
            return
        self._go_on(worker)

    def _settle(self, worker: Worker, done: list[Job]) -> None:
        for job in done:
            prompt = int(self.requests.prompt[job.number])
            variant = job.variant
            quality = float(self._truth[prompt, variant])
            if variant == EXACT and self._nearby is not None:
                self._nearby.add(prompt)
            elif variant == EXACT:
                self.cache.add(int(self.requests.topic[job.number]))
            judged = quality + self.world.doubt * self._random.normal()
            again = self.policy.review(self._request(job), variant, judged)
            if again is not None and self.now < job.expires_s:
                replacement = first_free(self._state(), self._model[again])
                if replacement is not None:
                    job.first = variant
                    self._send(job, again, replacement)
                    continue
            late = self.now > job.expires_s
            self._end(job, LATE if late else ON_TIME, variant, quality)

    def _end(self, job: Job, outcome: int, variant: int = -1, quality: float = 0.0) -> None:
        requests, number = self.requests, job.number
        if outcome == DROPPED and job.first is not None:  # the doubted picture is better than none
            outcome = LATE if self.now > job.expires_s else ON_TIME
            variant = job.first
            quality = float(self._truth[int(requests.prompt[number]), variant])
        self._open -= 1
        requests.outcome[number] = outcome
        requests.ended_s[number] = self.now
        requests.variant[number] = variant
        requests.quality[number] = quality

    # --- the cluster

    def _state(self) -> Cluster:
        cluster, now = self._cluster, self.now
        cluster.now_s = now
        cluster.wait_s = [
            (worker.free_at_s - now) / self._scale if worker.free_at_s > now else 0.0
            for worker in self.workers
        ]
        return cluster

    def _window(self) -> None:
        self._forecast.add(self._count - self._counted)
        self._counted = self._count
        self._plan()
        if self.now < self._last_s:
            self._at(self.now + self._window_s, self._window)

    def _watch(self) -> None:
        count, elapsed = self._count - self._seen, self._window_s / WATCHES
        self._seen = self._count
        self._slowness.saw(self._scale)
        unknown = self._forecast.level is None
        if unknown or self._forecast.is_burst(count, elapsed):
            self._forecast.jump(count / elapsed)
            self._plan()
        elif self._slowness.outdated:
            self._plan()
        if self.now < self._last_s:
            self._at(self.now + self._window_s / WATCHES, self._watch)

    def _plan(self) -> None:
        rate = self._forecast.next() if self._known_rate is None else self._known_rate(self.now)
        if self._slowness.outdated:
            self._slowness.planned()
            left_s = (1 - self._margin) * self.slo.deadline_s / self._slowness.slowness
            self.policy.set_slos([replace(self.slo, deadline_s=left_s)])
        table, state = self.world.table, self._state()
        prompts = np.array([prompt for prompt, _ in self._recent], dtype=np.int64)
        near = np.array([near for _, near in self._recent], dtype=bool)
        skips = np.array(self._skips)
        inputs = PlanningInput(
            now_s=self.now,
            rate=rate * self._slowness.slowness,
            quality=self._told[prompts].reshape(len(prompts), len(table.variants)),
            allowed=~skips[None, :] | near[:, None],
            slo=np.zeros(len(prompts), dtype=np.int64),
            kinds=np.array([worker.kind for worker in self.workers]),
            models=np.array(self._targets),
            alive=np.array([worker.alive for worker in self.workers]),
            wait_s=np.array(state.wait_s),
            usable=self._breaker.usable,
        )
        plan = self.policy.plan(inputs)
        self.ledger.plans += 1
        for worker, model in zip(self.workers, plan.models.tolist(), strict=True):
            self._targets[worker.number] = model
            if worker.alive and worker.ready and model != worker.model:
                self._drain(worker)
        self.ledger.series.append({"at_s": self.now, "rate": rate, **plan.figures})

    def _drain(self, worker: Worker) -> None:
        """Send away who waits, finish who is made, then load."""
        self._settle(worker, worker.finished_by(self.now))
        worker.ready = False
        self._cluster.models[worker.number] = worker.serving
        for job in worker.evict(running=False):
            self._again(job)
        if worker.running:
            self._go_on(worker)
        else:
            self._load(worker)

    def _load(self, worker: Worker) -> None:
        worker.version += 1
        worker.model = self._targets[worker.number]
        self.ledger.loads += 1
        load_s = float(self.world.table.load_s[worker.kind, worker.model])
        self._at(self.now + load_s, self._loaded, worker, worker.version)

    def _loaded(self, worker: Worker, version: int) -> None:
        if version != worker.version or not worker.alive:
            return
        if self._targets[worker.number] != worker.model:
            self._load(worker)
            return
        worker.ready, worker.at_s = True, self.now
        self._cluster.models[worker.number] = worker.serving
        self._go_on(worker)

    # --- what can happen

    def kill(self, number: int) -> None:
        """A worker dies, if it lives; its requests are routed again."""
        worker = self.workers[number]
        if not worker.alive:
            return
        self._settle(worker, worker.finished_by(self.now))
        worker.alive = False
        worker.version += 1
        self._cluster.models[number] = worker.serving
        for job in worker.evict(running=True):
            self.ledger.rerouted += 1
            self._again(job)
        self._plan()

    def revive(self, number: int) -> None:
        """A worker that is dead comes back, and loads what the plan says."""
        worker = self.workers[number]
        if worker.alive:
            return
        worker.alive, worker.ready = True, False
        self._load(worker)
        self._plan()

    def slow(self, number: int, factor: float) -> None:
        """A worker takes `factor` times as long from now on."""
        worker = self.workers[number]
        self._settle(worker, worker.finished_by(self.now))
        worker.slowness = factor
        self._scale = mean_slowness(self.workers)
        if worker.ready or worker.running:  # a load goes on as it was
            self._go_on(worker)

    def slow_store(self, factor: float) -> None:
        """Retrievals take `factor` times as long from now on."""
        self.store_slowness = factor
