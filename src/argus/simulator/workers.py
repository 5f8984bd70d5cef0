"""Virtual workers: they are done when they were foretold to be."""

from __future__ import annotations

from argus.control.station import Station
from argus.simulator.requests import Job


class Worker(Station[Job]):
    """A station whose forecast comes true."""

    def advance(self, now: float) -> list[Job]:
        """Let time pass until `now`; who is done by then."""
        self.elapse(now)
        return self.due()
