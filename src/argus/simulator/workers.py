"""Virtual workers: requests are done when the queue predicts it."""

from __future__ import annotations

from argus.control.worker_queue import WorkerQueue
from argus.simulator.requests import SimulatedRequest


class Worker(WorkerQueue[SimulatedRequest]):
    """A virtual worker: its queue's predictions are what happens."""

    def finished_by(self, now: float) -> list[SimulatedRequest]:
        """Let time pass until `now`; the requests that are done by then."""
        self.advance(now)
        return self.pop_done()
