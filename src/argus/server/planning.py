"""Plans for real workers: measures the load every window, computes plans, and applies them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

import numpy as np

from argus.control.controller import Controller
from argus.control.policy import KEPT, Cluster, Plan, Policy
from argus.control.slowness import LOOKS
from argus.control.variants import VariantTable
from argus.server.metrics import Metrics
from argus.workers.fleet import Fleet

log = logging.getLogger(__name__)


class Planning:
    """Drives a controller with the monotonic clock and a fleet. `changed` is set when a worker
    starts or dies.

    `usable` returns the share of fetches that bring latents in time. Without `moves` (shadow mode)
    workers keep their models, and the policy routes as if its plan were applied; the queues that it
    sees are those of exact pictures, longer than its own would be.
    """

    def __init__(
        self,
        controller: Controller,
        fleet: Fleet,
        table: VariantTable,
        metrics: Metrics,
        usable: Callable[[], float],
        moves: bool = True,
    ) -> None:
        self.controller, self._fleet, self._table = controller, fleet, table
        self._metrics = metrics
        self._usable, self._moves = usable, moves
        self._planned: list[int] = []  # only with `moves` off
        self._settling_until = -math.inf
        self.changed = asyncio.Event()

    def cluster(self) -> Cluster:
        """The cluster state that the policy sees."""
        cluster = self._fleet.cluster()
        if self._planned:
            cluster.models = self._grown(cluster.models)
        return cluster

    def _grown(self, models: list[int]) -> list[int]:
        """The planned models, and those of workers that came since."""
        return [*self._planned, *models[len(self._planned) :]]

    def adopt(self, policy: Policy) -> None:
        """Have another policy plan, at once, and route."""
        self.controller.adopt(policy)
        loads_s = 2 * float(self._table.load_s.max()) * max(1.0, self._fleet.scale)
        self._settling_until = time.monotonic() + self.controller.look_s + loads_s
        self.changed.set()

    @property
    def settling(self) -> bool:
        """Whether workers do not hold the models yet that a newly adopted policy wants: at most for
        about as long as two loads take."""
        if not self.changed.is_set() and self._fleet.settled:
            self._settling_until = -math.inf
        return time.monotonic() < self._settling_until

    async def run(self) -> None:
        """Plan at every window, and at once when the controller or a worker's change requires it;
        does not return. A plan between two windows does not move the windows."""
        controller, looks = self.controller, 0
        at = time.monotonic() + controller.look_s
        while True:
            try:
                await asyncio.wait_for(self.changed.wait(), max(0.0, at - time.monotonic()))
            except TimeoutError:
                now = time.monotonic()
                looks, at = looks + 1, now + controller.look_s
                over = looks % LOOKS == 0
                if over:
                    controller.end_window(now)
                if not controller.look(now, self._fleet.scale) and not over:
                    continue
            self.changed.clear()
            try:
                self.plan()
                if self._fleet.settled:
                    self._settling_until = -math.inf
            except Exception:
                self._metrics.plans.labels("failed").inc()
                log.exception("Planning failed; the last plan stays in force")

    def plan(self) -> None:
        """Compute the policy's placement of models, and apply it."""
        fleet = self._fleet
        begun = time.perf_counter()
        plan = self.controller.plan(
            fleet.cluster(),
            self._grown(fleet.planned),
            [queue.alive for queue in fleet.queues],
            self._usable(),
        )
        took_s = time.perf_counter() - begun
        models = [int(model) for model in plan.models]
        if self._moves:
            fleet.move(models)
        else:
            self._planned = models
        self._report(plan, took_s)

    def _report(self, plan: Plan, took_s: float) -> None:
        metrics, table = self._metrics, self._table
        metrics.plans.labels(plan.source).inc()
        metrics.planned_at.set_to_current_time()
        if plan.source != KEPT:
            metrics.plan_seconds.observe(took_s)
            metrics.figures.clear()
            metrics.plan_price.clear()
            if plan.prices is None:  # another policy has been adopted
                metrics.price.clear()
        for name, value in plan.figures.items():
            metrics.figures.labels(name.replace(" ", "_")).set(value)
        if plan.prices is not None:
            for d, m in np.argwhere(~np.isnan(plan.prices)).tolist():
                metrics.plan_price.labels(table.types[d], table.models[m]).set(plan.prices[d, m])
        metrics.rate.set(self.controller.rate(time.monotonic()))
