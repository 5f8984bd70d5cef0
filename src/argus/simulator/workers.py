"""Virtual workers: they are done when they were predicted to be."""

from __future__ import annotations

from argus.control.worker_queue import WorkerQueue
from argus.simulator.requests import SimulatedRequest


class Worker(WorkerQueue[SimulatedRequest]):
    """A queue whose forecast comes true."""

    def finished_by(self, now: float) -> list[SimulatedRequest]:
        """Let time pass until `now`; who is done by then."""
        self.advance(now)
        return self.pop_done()
