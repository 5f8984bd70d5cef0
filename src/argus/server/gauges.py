"""Sets the gauges of a server's parts when `/metrics` is read.

No file, database or network is asked, and nothing is looked through but the lists of workers.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from argus import __version__
from argus.server.router import shortest_wait_s
from argus.workers.upstream import UpstreamWorker
from argus.workers.worker import State

if TYPE_CHECKING:
    from argus.server.service import Service

STARTING_S = 5.0  # the expected wait while no worker serves


def measure(service: Service) -> None:
    """Set a server's gauges."""
    metrics, retrieval, health = service.metrics, service.retrieval, service.health
    facts = {"version": __version__, "family": service.family.name, "policy": service.policy}
    metrics.server.info(facts)
    metrics.ready.set(service.ready)
    _workers(service)
    _signals(service)
    _classes(service)
    metrics.slowness.set(service.fleet.scale)
    metrics.store_usable.set(retrieval.usable)
    metrics.store_open.set(retrieval.shut)
    metrics.storing.set(retrieval.storing)
    degraded = service.degraded
    for kind in health.kinds:
        metrics.storage_ok.labels(kind).set(kind not in degraded)
    metrics.cache_entries.set(len(service.cache))
    metrics.cache_bytes.set(service.cache.size_bytes)
    metrics.cache_limit.set(service.settings.cache_limit)


def _workers(service: Service) -> None:
    """What every worker is and does; those that left are shown no more."""
    metrics, fleet, table = service.metrics, service.fleet, service.model.table
    for of_workers in (
        metrics.worker_ready, metrics.worker_holds, metrics.worker_requests, metrics.upstream_up,
        metrics.upstream_requests,
    ):  # fmt: skip
        of_workers.clear()
    states: Counter[tuple[str, str]] = Counter()
    holding: Counter[tuple[str, str]] = Counter()
    planned: Counter[tuple[str, str]] = Counter()
    restarts: dict[tuple[str, ...], float] = {}
    busy_s: dict[tuple[str, ...], float] = {}
    for number in fleet.numbers:
        worker, queue, name = fleet.workers[number], fleet.queues[number], str(number)
        kind = table.types[queue.kind]
        states[kind, worker.state.value] += 1
        planned[kind, table.models[queue.target]] += 1
        if queue.serving >= 0:
            holding[kind, table.models[queue.serving]] += 1
            metrics.worker_holds.labels(name, table.models[queue.serving]).set(1)
        metrics.worker_ready.labels(name).set(worker.state is State.READY)
        metrics.worker_requests.labels(name, "queued").set(len(queue.queued))
        metrics.worker_requests.labels(name, "running").set(len(queue.running))
        restarts[(name,)], busy_s[(name,)] = worker.restarts, worker.busy_s
        if isinstance(worker, UpstreamWorker):
            _upstream(service, name, worker)
    metrics.worker_restarts.set(restarts)
    metrics.worker_busy.set(busy_s)
    metrics.model_loads.set({(): fleet.loads})
    for d, kind in enumerate(table.types):
        for state in State:
            metrics.workers.labels(kind, state.value).set(states[kind, state.value])
        for m, model in enumerate(table.models):
            if table.holds[d, m]:
                metrics.workers_holding.labels(kind, model).set(holding[kind, model])
                metrics.workers_planned.labels(kind, model).set(planned[kind, model])


def _upstream(service: Service, name: str, worker: UpstreamWorker) -> None:
    metrics = service.metrics
    up = worker.state is State.READY
    metrics.upstream_up.labels(name, worker.upstream.url).set(up)
    if worker.load_said is not None:
        metrics.upstream_requests.labels(name, "running").set(worker.load_said.running)
        metrics.upstream_requests.labels(name, "waiting").set(worker.load_said.waiting)


def _classes(service: Service) -> None:
    """The SLO classes in force, once the workers' speed is known."""
    if service.router is None:
        return
    for slo in service.router.classes:
        service.metrics.deadline.labels(slo.name).set(slo.deadline_s)
        service.metrics.floor.labels(slo.name).set(slo.floor)


def _signals(service: Service) -> None:
    """What routers in front of this server read."""
    metrics, fleet = service.metrics, service.fleet
    cluster, router = fleet.cluster(), service.router
    wait_s = shortest_wait_s(cluster)
    deadline_s = math.inf if router is None else router.classes.shortest_s
    queue_s = STARTING_S if wait_s is None else wait_s * cluster.slowness
    metrics.signal("running", fleet.running)
    metrics.signal("waiting", service.dispatcher.waiting)
    metrics.signal("queue_seconds", queue_s)
    metrics.signal("backlog_seconds", fleet.backlog_s)
    metrics.signal("saturation", 1.0 if wait_s is None else min(1.0, queue_s / deadline_s))
