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
from math import sqrt
from typing import TYPE_CHECKING

from argus.lab.prompts import ideas_of
from argus.lab.workload import Ideas, workload
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

TIMES_EXACT = 2.0  # the usual rate, as a multiple of what the workers can make exactly
USUAL_S = 40.0
RAMP_S, RAMP_SHARE = 10.0, 0.25  # the usual rise of the rate, at most that share of the burst
MOST_RATE, MOST_S = 500.0, 600.0


class Bursts:
    """Sends bursts, one at a time, the same way as clients' requests, at the times of a Poisson
    process, whatever is answered. Its rate rises linearly at first. The pictures are discarded. For
    use from one asyncio loop."""

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
            ramp_s=_usual_ramp_s(USUAL_S),
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

    async def begin(
        self, rate: float | None, seconds: float | None, ramp_s: float | None
    ) -> BurstReport:
        """Begin a burst. Raises ApiError while one runs, while the server starts or stops, and for
        what cannot be sent."""
        service = self._service
        rate, seconds = rate or self._usual_rate, seconds or USUAL_S
        ramp_s = _usual_ramp_s(seconds) if ramp_s is None else ramp_s
        if rate > MOST_RATE:
            raise invalid(f"rate is {rate:g}; at most {MOST_RATE:g} a second are sent.", "rate")
        if seconds > MOST_S:
            raise invalid(f"seconds is {seconds:g}; at most {MOST_S:g} are possible.", "seconds")
        if ramp_s > seconds:
            raise invalid(
                f"ramp_s is {ramp_s:g}; it can be no longer than the burst, {seconds:g} s.",
                "ramp_s",
            )
        prompts = await self._workload()  # may raise: this family may have none
        if self.running:
            raise ApiError(
                HTTPStatus.CONFLICT,
                "A burst runs already: wait for its end, or end it by a DELETE.",
                "burst_runs",
            )
        if service.router is None or service.leaving:
            raise service.unavailable()
        self._prompts = prompts
        self._last = _Burst(service, prompts, rate, seconds, ramp_s)
        log.info(
            "A burst begins: %g requests a second for %g s, after a rise of %g s",
            rate, seconds, ramp_s,
        )  # fmt: skip
        return self._last.report

    async def _workload(self) -> Iterator[str]:
        """The family's prompts: those that the last burst left, unless they ended with an error."""
        failed = self._last is not None and self._last.failed
        if self._prompts is not None and not failed:
            return self._prompts
        return await asyncio.to_thread(_prompts, ideas_of(self._service.family))

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


def _usual_ramp_s(seconds: float) -> float:
    return min(RAMP_S, RAMP_SHARE * seconds)


def _prompts(ideas: Ideas) -> Iterator[str]:
    """Prompts without an end. The first is made at once: what all share takes a second to draw."""
    made = (one.prompt for one in workload(ideas, seed=random.getrandbits(32)))
    return itertools.chain([next(made)], made)


def ramped(at_s: float, ramp_s: float) -> float:
    """When a request is sent whose time is `at_s` in a process of constant rate, if that rate is
    reached linearly in `ramp_s` seconds, in which half as many are sent."""
    return sqrt(2 * ramp_s * at_s) if at_s < ramp_s / 2 else at_s + ramp_s / 2


class _Burst:
    """Requests that are being sent."""

    def __init__(
        self,
        service: Service,
        prompts: Iterator[str],
        rate: float,
        seconds: float,
        ramp_s: float,
    ) -> None:
        self._service, self._prompts = service, prompts
        self._rate, self._seconds, self._ramp_s = rate, seconds, ramp_s
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
            ramp_s=self._ramp_s,
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
        steady = poisson_times(self._rate, random.Random())
        times = (ramped(at_s, self._ramp_s) for at_s in steady)
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
