"""The policy in charge of workers: what it is told of a request, and of the load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from argus.config import Settings
from argus.control.policy import Decision
from argus.control.variants import EXACT
from argus.server.request import ImageRequest
from argus.server.router import Router
from argus.server.service import Service
from argus.server.slo import DEFAULT, Classes


@dataclass(frozen=True)
class Led:
    """`price` over one worker that can serve, though no process is started."""

    service: Service
    router: Router

    @property
    def exact_s(self) -> float:
        """Seconds of an exact picture alone, by the profile."""
        return float(self.service.model.table.alone_s[EXACT].min())

    def asked(self, slack_s: float, size_factor: float = 1.0) -> ImageRequest:
        request = ImageRequest(
            prompt="a red fish",
            width=32,
            height=32,
            size=(32, 32),
            guidance=3.0,
            namespace="everyone",
        )
        request.slo_class, request.size_factor = self.router.classes[DEFAULT], size_factor
        request.deadline_s = request.limit_s = time.monotonic() + slack_s
        return request

    def decide(self, request: ImageRequest) -> Decision:
        return asyncio.run(self.router.decide(request))


@pytest.fixture
def led(measured_family: Path, tmp_path: Path) -> Iterator[Led]:
    service = Service(
        Settings(
            family=str(measured_family), data=tmp_path, workers=1, window_s=0.6, policy="price"
        )
    )
    exact_s = float(service.model.table.alone_s[EXACT].min())
    service.fleet.queues[0].ready = True
    yield Led(service, service._new_router(Classes({}, exact_s, measured=True)))
    service.cache.close()


def test_a_larger_picture_takes_longer_to_make_and_waits_no_longer(led: Led) -> None:
    led.service.fleet.queues[0].queued_s = 3 * led.exact_s
    doubled = led.asked(8 * led.exact_s, size_factor=4)  # of which 3 are waited and 4 worked
    assert led.decide(doubled).worker == 0
    assert led.decide(led.asked(6 * led.exact_s, size_factor=4)).variant != EXACT


def test_a_smaller_picture_waits_as_long_as_any(led: Led) -> None:
    led.service.fleet.queues[0].queued_s = 1.5 * led.exact_s
    halved = led.asked(0.75 * led.exact_s, size_factor=0.25)
    assert led.decide(halved).worker is None


def test_workers_that_come_and_go_leave_the_forecast_as_it_is(led: Led) -> None:
    planning, metrics, rate = led.router.planning, led.service.metrics, 200.0
    request = led.asked(led.exact_s)

    async def arrivals() -> None:
        begun, arrived = time.monotonic(), 0
        while True:
            due = int(rate * (time.monotonic() - begun))
            for _ in range(due - arrived):
                led.router.arrived(request)
            arrived = due
            await asyncio.sleep(0.005)

    async def deaths() -> None:
        while True:
            await asyncio.sleep(0.07)  # more often than anyone looks at the load
            planning.changed.set()

    async def a_while() -> None:
        tasks = [asyncio.create_task(one) for one in (arrivals(), deaths(), planning.run())]
        await asyncio.sleep(2.0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(a_while())
    planning.plan()
    told = metrics.registry.get_sample_value("argus_forecast_rate")
    assert told == pytest.approx(rate, rel=0.3)


def test_fewer_steps_make_the_exact_picture_as_much_cheaper(led: Led) -> None:
    late = led.asked(0.7 * led.exact_s)
    assert led.decide(late).variant != EXACT
    limited = led.asked(0.7 * led.exact_s)
    limited.most_steps, limited.exact_share = 2, 2 / 6  # quick has three steps
    assert led.decide(limited).variant == EXACT


def test_a_policy_without_limits_does_not_make_what_a_request_forbids(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = led.service.model.table
    other = table.variants.index("other")
    chosen = Decision(other, 0, "the fastest")
    monkeypatch.setattr(led.router._controller, "route", lambda request, cluster: chosen)
    assert led.decide(led.asked(10.0)) == chosen
    fine = led.asked(10.0)
    fine.least_quality = 0.9
    decision = led.decide(fine)
    assert (decision.variant, decision.worker) == (EXACT, 0)
    assert decision.reason == "the request does not allow other"
    led.service.fleet.queues[0].model = int(table.model[other])
    assert led.decide(fine).worker is None
