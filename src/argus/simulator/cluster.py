"""The virtual cluster: a discrete-event simulation of requests, workers, cache and policy."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from argus.control.breaker import FETCH_SHARE, LEAST_S, PROBE_S, Breaker
from argus.control.controller import Controller
from argus.control.policy import Cluster, Place, Policy, Slo, Soonest, first_free
from argus.control.slowness import LOOKS
from argus.control.variants import EXACT
from argus.control.worker_queue import mean_slowness
from argus.simulator.cache import SimilarityCache, VirtualCache
from argus.simulator.requests import DROPPED, LATE, ON_TIME, SHED, Requests, SimulatedRequest
from argus.simulator.soonest import SoonestWorkers, Waits
from argus.simulator.workers import Worker
from argus.simulator.world import World

WINDOW_S = 30.0

Happening = Callable[["Simulation"], None]


@dataclass
class Ledger:
    """What a run counts besides its requests. `placements` are (seconds, number of workers that
    hold or load each model), one for each plan."""

    loads: int = 0
    plans: int = 0
    rerouted: int = 0
    hits: int = 0
    lookups: int = 0
    placements: list[tuple[float, list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """The settings of a run besides the world and its requests.

    `kinds` are the workers' types of device. `events` are (seconds, function of the simulation),
    for failures and slowdowns. A plan is made every `window_s` seconds. `margin` is the share of
    deadlines that is reserved for prediction errors. `at_hand` says that workers have every model,
    and take one up without a load, beside the pictures that they still make. `known_rate` gives the
    policy the future requests a second instead of a forecast, `truthful` the true quality.
    """

    slo: Slo
    kinds: Sequence[int]
    seed: int = 0
    events: Sequence[tuple[float, Happening]] = ()
    window_s: float = WINDOW_S
    margin: float = 0.0
    at_hand: bool = False
    known_rate: Callable[[float], float] | None = None
    truthful: bool = False

    def slos(self, slowness: float) -> list[Slo]:
        """The SLO in seconds of the variant table, less the margin, for a slowness of workers."""
        deadline_s = (1 - self.margin) * self.slo.deadline_s / slowness
        return [replace(self.slo, deadline_s=deadline_s)]


class Simulation:
    """One policy, one world, one trace. Build it, then `run`.

    As in the server, policies count in seconds of the variant table: slower workers appear to them
    as a higher rate of requests and shorter deadlines.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        requests: Requests,
        setup: Setup,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.world, self.policy, self.requests, self.ledger = world, policy, requests, Ledger()
        self.setup, self._on_progress = setup, on_progress
        self._last_s = float(requests.arrived_s.max(initial=0.0))
        self._random = np.random.default_rng(setup.seed)
        table = world.table
        predicted = world.truth if setup.truthful and not world.judged_apart else world.predicted
        self._predictions = (
            predicted if policy.informed else np.broadcast_to(table.mean_quality, predicted.shape)
        ).tolist()
        self._truth = world.truth
        near = world.neighbourhood
        self._nearby = None if near is None else SimilarityCache(near.vectors, near.cached)
        if near is not None:  # set as each prompt arrives
            self._truth = self._truth.copy()
        drawn = world.pictures
        self._picture = (
            None
            if drawn is None
            else np.random.default_rng([setup.seed, 1])
            .integers(drawn.quality.shape[2], size=len(requests.outcome))
            .tolist()
        )
        self._similarity = world.similarity.tolist()
        self._skips = [
            bool(k) or s == "refine" for k, s in zip(table.skip, table.strategies, strict=True)
        ]
        self._free = [not skip for skip in self._skips]
        self._all = [True] * len(table.variants)
        self._model, self._steps = table.model.tolist(), table.steps.tolist()
        sizes, first = table.best_batch.tolist(), int(table.model[EXACT])
        self.workers = [
            Worker(
                number=number,
                kind=kind,
                model=first,
                target=first,
                step_s=table.batch_step_s,
                batching=policy.batching,
                batch_limit=lambda kind, model: int(sizes[kind][model]),
                largest_batch=int(table.batches[-1]),
            )
            for number, kind in enumerate(setup.kinds)
        ]
        self.cache = VirtualCache(world.drawing.capacity)
        for topic in range(-world.drawing.capacity, 0):
            self.cache.add(topic)
        self.store_slowness = 1.0
        self._breaker, self._probing = Breaker(lambda: self.now), False
        self._controller = Controller(
            policy, setup.slos, setup.window_s, known_rate=setup.known_rate
        )
        self._looks = 0
        self._open = 0  # requests without an outcome yet
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self.now = 0.0
        count = len(self.workers)
        self._free_at_s, self._waits = [0.0] * count, Waits(self._all_waits)
        self._cluster = Cluster(
            0.0, list(setup.kinds), [first] * count, self._waits, [0] * count, index=self._soonest
        )
        self._index = SoonestWorkers(
            self._cluster.kinds, self._cluster.models, self._cluster.running, self._free_at_s
        )
        for at, happening in setup.events:
            self._at(at, happening, self)

    def run(self) -> Requests:
        """Serve every request; returns them with their outcomes."""
        requests = self.requests
        self._plan()
        self._at(self._controller.look_s, self._look)
        arrived, heap = requests.arrived_s.tolist(), self._heap
        for number, at in enumerate(arrived):
            while heap and heap[0][0] <= at:
                self._step()
            self.now = at
            self._open += 1
            self._arrive(number)
            if self._on_progress is not None and number % 1000 == 0:
                self._on_progress(number)
        end = self._last_s + 2 * self.setup.slo.deadline_s
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
        prompt, setup = int(self.requests.prompt[number]), self.setup
        self._look_around(prompt)
        near = self._is_near(number)
        self.ledger.lookups += 1
        self.ledger.hits += near
        request = SimulatedRequest(
            number=number,
            prompt=prompt,
            near=near,
            quality=self._predictions[prompt],
            allowed=self._all if near else self._free,
            deadline_s=self.now + (1 - setup.margin) * setup.slo.deadline_s,
            expires_s=self.now + setup.slo.deadline_s,
        )
        self._controller.arrived(request)
        self._route(request)

    def _look_around(self, prompt: int) -> None:
        """In a neighbourhood, set the similarity of the prompt's neighbour now and its quality."""
        near = self.world.neighbourhood
        if near is None or self._nearby is None:
            return
        vector = near.vectors[prompt]
        others = self._nearby.nearest(prompt, near.choice if self.policy.informed else 1)
        worth = near.worth(vector, others)
        best = int(worth[:, self.world.table.skip > 0].sum(axis=1).argmax()) if len(others) else 0
        similarity = float(others[best] @ vector) if len(others) else float("nan")
        self._similarity[prompt], self._truth[prompt] = similarity, worth[best]
        if self.policy.informed:
            self._predictions[prompt] = worth[best].tolist()

    def _is_near(self, number: int) -> bool:
        """Whether the request's prompt has a neighbour in the cache now."""
        known = not math.isnan(self._similarity[int(self.requests.prompt[number])])
        if self._nearby is not None:
            return known
        return known and self.cache.has(int(self.requests.topic[number]))

    def _asked(self, request: SimulatedRequest) -> SimulatedRequest:
        """The request with the variants allowed now: without the store none that skips."""
        near = request.near and not self._breaker.open
        request.allowed = self._all if near else self._free
        request.similarity = self._similarity[request.prompt] if near else None
        return request

    def _route(self, request: SimulatedRequest) -> None:
        decision = self._controller.route(self._asked(request), self._state())
        if decision.worker is None:
            self._end(request, SHED)
            return
        self._send(request, decision.variant, decision.worker)

    def _send(self, request: SimulatedRequest, variant: int, number: int) -> None:
        request.variant, request.work_steps = variant, self._steps[variant]
        if not self._skips[variant]:
            self._enqueue(request, number)
            return
        worker = self.workers[number]
        worker.reserve(request, self.now)
        self._changed(worker)
        limit_s = FETCH_SHARE * max(0.0, request.deadline_s - self.now)
        self._fetch(limit_s, lambda came: self._fetched(request, number, came))

    def _fetch(self, limit_s: float, then: Callable[[bool], None]) -> None:
        """Fetch latents; `then` is called with whether they came within `limit_s` seconds."""
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

    def _fetched(self, request: SimulatedRequest, number: int, came: bool) -> None:
        if came:
            self._enqueue(request, number)
            return
        self.workers[number].release(request)
        request.near = False
        self._again(request)

    def _probe(self) -> None:
        """Fetch now and then from a store that failed, as the server does, until it answers."""
        self._probing = self._breaker.doubted
        if not self._probing:
            return
        if not self._breaker.open:
            limit_s = FETCH_SHARE * (1 - self.setup.margin) * self.setup.slo.deadline_s
            self._fetch(limit_s, lambda came: None)
        self._at(self.now + PROBE_S, self._probe)

    def _enqueue(self, request: SimulatedRequest, number: int) -> None:
        worker = self.workers[number]
        if worker.serving != self._model[request.variant]:  # it died or loads
            worker.release(request)
            self.ledger.rerouted += 1
            self._again(request)
            return
        self._settle(worker, worker.finished_by(self.now))
        worker.enqueue(request, self.now)
        self._go_on(worker)

    def _again(self, request: SimulatedRequest) -> None:
        if self.now >= request.expires_s:
            self._end(request, DROPPED)
        elif any(worker.serving >= 0 for worker in self.workers):
            self._route(request)
        else:
            self._at(min(self.now + 1.0, request.expires_s), self._again, request)

    def _go_on(self, worker: Worker) -> None:
        _, dropped = worker.begin(self.now)
        for request in dropped:
            self._drop(request)
        at = worker.next_s(self.now)
        self._cluster.running[worker.number] = len(worker.running)
        self._changed(worker)
        if at < math.inf:
            self._at(at, self._wake, worker, worker.version)

    def _drop(self, request: SimulatedRequest) -> None:
        """Route a request again that has no time left for its variant, by a faster one if the
        policy has one; else drop it."""
        decision = self._controller.faster(self._asked(request), self._state())
        if decision is None or decision.worker is None:
            self._end(request, DROPPED)
        else:
            self._send(request, decision.variant, decision.worker)

    def _wake(self, worker: Worker, version: int) -> None:
        if version != worker.version:
            return
        self._settle(worker, worker.finished_by(self.now))
        if not worker.running and not worker.ready:
            self._load(worker)
            return
        self._go_on(worker)

    def _settle(self, worker: Worker, done: list[SimulatedRequest]) -> None:
        for request in done:
            prompt = request.prompt
            variant = request.variant
            quality, judged = self._worth(request, variant)
            if variant == EXACT and self._nearby is not None:
                self._nearby.add(prompt)
            elif variant == EXACT:
                self.cache.add(int(self.requests.topic[request.number]))
            judged += self.world.judging_error * self._random.normal()
            again = self.policy.review(self._asked(request), variant, judged)
            if again is not None and self.now < request.expires_s:
                replacement = first_free(self._state(), self._model[again])
                if replacement is not None:
                    request.first = variant
                    self._send(request, again, replacement)
                    continue
            late = self.now > request.expires_s
            self._end(request, LATE if late else ON_TIME, variant, quality)

    def _worth(self, request: SimulatedRequest, variant: int) -> tuple[float, float]:
        """A request's quality by a variant, and what a discriminator says of the picture."""
        drawn = self.world.pictures
        if drawn is None or self._picture is None:
            quality = float(self._truth[request.prompt, variant])
            return quality, quality
        at = (request.prompt, variant, self._picture[request.number])
        return float(drawn.quality[at]), float(drawn.judged[at])

    def _end(
        self, request: SimulatedRequest, outcome: int, variant: int = -1, quality: float = 0.0
    ) -> None:
        requests, number = self.requests, request.number
        if outcome == DROPPED and request.first is not None:  # the doubted picture is the answer
            outcome = LATE if self.now > request.expires_s else ON_TIME
            variant = request.first
            quality, _ = self._worth(request, variant)
        self._open -= 1
        requests.outcome[number] = outcome
        requests.ended_s[number] = self.now
        requests.variant[number] = variant
        requests.quality[number] = quality

    # --- the cluster

    def _state(self) -> Cluster:
        self._cluster.now_s = self.now
        self._waits.forget()
        return self._cluster

    def _changed(self, worker: Worker) -> None:
        """Take notice that a worker's `free_at_s`, or what policies are shown of it, changed."""
        self._free_at_s[worker.number] = worker.free_at_s
        self._index.update(worker.number)

    def _all_waits(self) -> list[float]:
        now, slowness = self.now, self._cluster.slowness
        return [(free - now) / slowness if free > now else 0.0 for free in self._free_at_s]

    def _soonest(self) -> dict[Place, Soonest]:
        return self._index.at(self.now, self._cluster.slowness)

    def _look(self) -> None:
        """Look at the load and at the workers' slowness; every `LOOKS`th look ends a window."""
        self._looks += 1
        if self._looks % LOOKS == 0:
            self._controller.end_window(self.now)
            self._plan()
        if self._controller.look(self.now, self._cluster.slowness):
            self._plan()
        if self.now < self._last_s:
            self._at(self.now + self._controller.look_s, self._look)

    def _plan(self) -> None:
        plan = self._controller.plan(
            self._state(),
            [worker.target for worker in self.workers],
            [worker.alive for worker in self.workers],
            self._breaker.usable,
        )
        self.ledger.plans += 1
        for worker, model in zip(self.workers, plan.models.tolist(), strict=True):
            worker.target = model
            if worker.moves:
                self._drain(worker)
        held = np.bincount(plan.models, minlength=len(self.world.table.models))
        self.ledger.placements.append((self.now, held.tolist()))

    def _drain(self, worker: Worker) -> None:
        """Route queued requests again, finish running ones, then load; if models are at hand, serve
        with the next at once."""
        self._settle(worker, worker.finished_by(self.now))
        evicted = worker.drain()
        if self.setup.at_hand:
            self.ledger.loads += 1
            worker.take_up(worker.target, self.now)
        self._cluster.models[worker.number] = worker.serving
        self._changed(worker)
        if worker.running or worker.ready:
            self._go_on(worker)
        else:
            self._load(worker)
        for request in evicted:
            self._again(request)

    def _load(self, worker: Worker) -> None:
        worker.version += 1
        worker.model = worker.target
        self.ledger.loads += 1
        load_s = float(self.world.table.load_s[worker.kind, worker.model])
        self._at(self.now + load_s, self._loaded, worker, worker.version)

    def _loaded(self, worker: Worker, version: int) -> None:
        if version != worker.version or not worker.alive:
            return
        if worker.target != worker.model:
            self._load(worker)
            return
        worker.ready, worker.at_s = True, self.now
        self._cluster.models[worker.number] = worker.serving
        self._changed(worker)
        self._go_on(worker)

    # --- what can happen

    def kill(self, number: int) -> None:
        """A worker dies, if it is alive; its requests are routed again."""
        worker = self.workers[number]
        if not worker.alive:
            return
        self._settle(worker, worker.finished_by(self.now))
        worker.alive = False
        worker.version += 1
        self._cluster.models[number] = worker.serving
        self._changed(worker)
        for request in worker.evict(running=True):
            self.ledger.rerouted += 1
            self._again(request)
        self._plan()

    def revive(self, number: int) -> None:
        """A dead worker comes back and loads its planned model."""
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
        self._cluster.slowness = mean_slowness(self.workers)
        if worker.ready or worker.running:  # a load in progress keeps its time
            self._go_on(worker)

    def slow_store(self, factor: float) -> None:
        """Fetches take `factor` times as long from now on."""
        self.store_slowness = factor
