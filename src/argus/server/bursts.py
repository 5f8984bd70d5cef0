"""A load of the server's own, for demonstrations: requests of the family's workload."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING

from argus.lab.prompts import ideas_of
from argus.lab.workload import workload
from argus.loadgen.sender import poisson_times
from argus.server.asked import image_request
from argus.server.dispatcher import outcome_of
from argus.server.errors import ApiError, invalid
from argus.server.keys import BURST
from argus.server.live_schema import BurstDefaults, BurstReport
from argus.server.schema import GenerationRequest

if TYPE_CHECKING:
    from argus.server.service import Service

log = logging.getLogger(__name__)

TIMES_EXACT = 2.5  # the usual rate, as a multiple of what the workers can make exactly
USUAL_S = 40.0
MOST_RATE, MOST_S = 500.0, 600.0


class Bursts:
    """Sends bursts, one at a time, the same way as clients' requests, at the times of a Poisson
    process, whatever is answered. The pictures are discarded. For use from one asyncio loop."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._prompts: Iterator[str] | None = None
        self._last: _Burst | None = None

    @property
    def defaults(self) -> BurstDefaults:
        family = self._service.family
        lacking = f"The family {family.name} has no prompts of its own."
        return BurstDefaults(
            rate=self._usual_rate,
            seconds=USUAL_S,
            most_rate=MOST_RATE,
            most_seconds=MOST_S,
            problem=lacking if family.ideas is None else None,
        )

    @property
    def _usual_rate(self) -> float:
        """More than the workers can make exactly, to two digits."""
        router, fleet = self._service.router, self._service.fleet
        rate = self._service.live.exact_rate
        if rate is None and router is not None:
            rate = len(fleet.present) / router.classes.exact_s
        return min(MOST_RATE, float(f"{TIMES_EXACT * (rate or 1.0):.2g}"))

    @property
    def running(self) -> bool:
        return self._last is not None and self._last.running

    @property
    def report(self) -> BurstReport | None:
        """The last burst."""
        return None if self._last is None else self._last.report

    def begin(self, rate: float | None, seconds: float | None) -> BurstReport:
        """Begin a burst. Raises ApiError while one runs, while the server starts or stops, and for
        what cannot be sent."""
        service = self._service
        rate, seconds = rate or self._usual_rate, seconds or USUAL_S
        if rate > MOST_RATE:
            raise invalid(f"rate is {rate:g}; at most {MOST_RATE:g} a second are sent.", "rate")
        if seconds > MOST_S:
            raise invalid(f"seconds is {seconds:g}; at most {MOST_S:g} are possible.", "seconds")
        if self.running:
            raise ApiError(
                HTTPStatus.CONFLICT,
                "A burst runs already: wait for its end, or end it by a DELETE.",
                "burst_runs",
            )
        ended = self._last is not None and self._last.failed  # its prompts end with an error
        if self._prompts is None or ended:  # may raise: this family may have none
            asked = workload(ideas_of(service.family), seed=random.getrandbits(32))
            self._prompts = (one.prompt for one in asked)
        if service.router is None or service.leaving:
            raise service.unavailable()
        self._last = _Burst(service, self._prompts, rate, seconds)
        log.info("A burst begins: %g requests a second for %g s", rate, seconds)
        return self._last.report

    async def stop(self) -> BurstReport | None:
        """End the burst that runs, if any, and those of its requests that are not answered yet.
        Returns the last burst."""
        self.cancel()
        if self._last is not None:
            await self._last.ended()
        return self.report

    def cancel(self) -> None:
        """End the burst that runs, if any, without waiting."""
        if self._last is not None:
            self._last.cancel()


class _Burst:
    """Requests that are being sent."""

    def __init__(
        self, service: Service, prompts: Iterator[str], rate: float, seconds: float
    ) -> None:
        self._service, self._prompts = service, prompts
        self._rate, self._seconds = rate, seconds
        self._begun_s = time.monotonic()
        self._ended_s: float | None = None
        self._sent, self._outcomes = 0, Counter[str]()
        self.failed = False  # by an error in the prompts
        self._task = asyncio.create_task(self._run())

    @property
    def running(self) -> bool:
        return not self._task.done()

    @property
    def report(self) -> BurstReport:
        now = time.monotonic() if self._ended_s is None else self._ended_s
        return BurstReport(
            rate=self._rate,
            seconds=self._seconds,
            elapsed_s=round(now - self._begun_s, 2),
            running=self.running,
            sent=self._sent,
            outcomes=dict(self._outcomes),
        )

    def cancel(self) -> None:
        self._task.cancel()

    async def ended(self) -> None:
        await asyncio.wait((self._task,))

    async def _run(self) -> None:
        times = poisson_times(self._rate, random.Random())
        try:
            async with asyncio.TaskGroup() as sent:
                for at_s in itertools.takewhile(lambda at_s: at_s < self._seconds, times):
                    await asyncio.sleep(max(0.0, self._begun_s + at_s - time.monotonic()))
                    sent.create_task(self._send(next(self._prompts)))
        except Exception:
            self.failed = True
            log.exception("A burst ends early: the family's prompts cannot be made")
        finally:
            self._ended_s = time.monotonic()
            log.info("The burst is over: %d sent, %s", self._sent, dict(self._outcomes))

    async def _send(self, prompt: str) -> None:
        """Send a request and count its outcome."""
        self._sent += 1
        try:
            request = image_request(self._service, GenerationRequest(prompt=prompt), BURST)
            request.namespace = BURST  # clients' pictures and these do not resume from each other
            (picture,) = await self._service.dispatcher.serve(request)
        except Exception as error:
            self._outcomes[outcome_of(error)] += 1
        except asyncio.CancelledError as error:
            self._outcomes[outcome_of(error)] += 1
            raise
        else:
            self._outcomes["on time" if picture.on_time else "late"] += 1
