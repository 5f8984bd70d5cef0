"""Plans for real workers: looks at the load by the clock, asks for plans, and has workers moved."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from argus.control.controller import Controller
from argus.control.policy import Cluster
from argus.control.slowness import LOOKS
from argus.server.metrics import Metrics
from argus.workers.fleet import Fleet

log = logging.getLogger(__name__)


class Planning:
    """Drives a controller with the wall's clock and a fleet. `changed` is set when a worker comes
    or goes.

    `usable` gives the share of cached latents that come in time. With `moves` off the workers hold
    what they hold, and the policy routes as if they held what it planned: their queues are those of
    exact pictures, longer than its own would be.
    """

    def __init__(
        self,
        controller: Controller,
        fleet: Fleet,
        metrics: Metrics,
        usable: Callable[[], float],
        moves: bool = True,
    ) -> None:
        self.controller, self._fleet, self._metrics = controller, fleet, metrics
        self._usable, self._moves = usable, moves
        self._planned: list[int] = []  # only where plans move nothing
        self.changed = asyncio.Event()

    def cluster(self) -> Cluster:
        """The workers as the policy sees them."""
        cluster = self._fleet.cluster()
        if self._planned:
            cluster.models = self._planned
        return cluster

    async def run(self) -> None:
        """Plan every window, and at once when the controller or a worker gives reason to; does not
        end. Looks and windows go by the clock: a plan that a worker caused moves neither."""
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
            except Exception:
                log.exception("A plan failed; the last one stays")

    def plan(self) -> None:
        """Ask the policy what the workers are to hold, and have them hold it."""
        fleet, metrics = self._fleet, self._metrics
        plan = self.controller.plan(
            fleet.cluster(),
            self._planned or fleet.targets,
            [queue.alive for queue in fleet.queues],
            self._usable(),
        )
        for name, value in plan.figures.items():
            metrics.figures.labels(name.replace(" ", "_")).set(value)
        metrics.rate.set(self.controller.rate(time.monotonic()))
        models = [int(model) for model in plan.models]
        if self._moves:
            fleet.move(models)
        else:
            self._planned = models
