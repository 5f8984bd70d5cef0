"""The policy in charge of workers: what it is told of a request, and of the load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from argus.config import Settings
from argus.control.policy import Decision
from argus.control.request import Request
from argus.control.variants import EXACT
from argus.control.worker_queue import WorkerQueue
from argus.server.request import ImageRequest
from argus.server.router import Router, live_policy
from argus.server.service import Service
from argus.server.slo import DEFAULT, Classes
from argus.workers.fleet import Yielded
from tests.conftest import WIDTH


@dataclass(frozen=True)
class Led:
    """`price` over workers that can serve, though no process is started."""

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


@contextmanager
def leading(family: Path, data: Path, workers: int) -> Iterator[Led]:
    service = Service(
        Settings(family=str(family), data=data, workers=workers, window_s=0.6, policy="price")
    )
    exact_s = float(service.model.table.alone_s[EXACT].min())
    for queue in service.fleet.queues:
        queue.ready = True
    yield Led(service, service._new_router(Classes({}, exact_s, measured=True)))
    service.cache.close()


@pytest.fixture
def led(measured_family: Path, tmp_path: Path) -> Iterator[Led]:
    with leading(measured_family, tmp_path, workers=1) as led:
        yield led


@pytest.fixture
def two(measured_family: Path, tmp_path: Path) -> Iterator[Led]:
    with leading(measured_family, tmp_path, workers=2) as led:
        yield led


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still: what is left of a deadline does not depend on the machine."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)


def lengthen(queue: WorkerQueue[Request], seconds: float) -> None:
    """Make a worker's queue as long as if so many seconds of work were reserved."""
    queue.queued_s = seconds
    queue.next_s(time.monotonic())


@pytest.mark.usefixtures("still")
def test_a_larger_picture_takes_longer_to_make_and_waits_no_longer(led: Led) -> None:
    lengthen(led.service.fleet.queues[0], 3 * led.exact_s)
    doubled = led.asked(8 * led.exact_s, size_factor=4)  # of which 3 are waited and 4 worked
    assert led.decide(doubled).worker == 0
    assert led.decide(led.asked(6 * led.exact_s, size_factor=4)).variant != EXACT


@pytest.mark.usefixtures("still")
def test_a_smaller_picture_waits_as_long_as_any(led: Led) -> None:
    lengthen(led.service.fleet.queues[0], 1.5 * led.exact_s)
    halved = led.asked(0.75 * led.exact_s, size_factor=0.25)
    assert led.decide(halved).worker is None


@pytest.mark.usefixtures("still")
def test_a_request_goes_back_to_a_worker_it_failed_at_only_if_no_other_is_in_time(
    two: Led,
) -> None:
    failed = two.asked(8 * two.exact_s)
    failed.failed_at = (0,)
    assert two.decide(failed).worker == 1
    lengthen(two.service.fleet.queues[1], 60 * two.exact_s)
    assert two.decide(failed).worker == 0


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("policy", ["price", "clipper-ht"])
@pytest.mark.parametrize("slack", [8.0, 0.5], ids=["in time", "late"])
def test_a_request_goes_back_to_a_worker_it_failed_at_if_no_other_makes_what_it_allows(
    two: Led, policy: str, slack: float
) -> None:
    slos = two.router.classes.slos(two.service.fleet.scale)
    two.router.planning.adopt(live_policy(policy, two.service.model.table, slos))
    two.service.fleet.queues[1].model = 1
    failed = two.asked(slack * two.exact_s)
    failed.failed_at, failed.least_quality = (0,), 1.0  # which exact alone meets
    decision = two.decide(failed)
    assert (decision.variant, decision.worker) == (EXACT, 0)


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


@pytest.mark.usefixtures("still")
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


def test_what_only_the_exact_model_can_serve_has_a_worker_load_it(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    router, queue = led.router, led.service.fleet.queues[0]
    other, exact = led.service.model.table.variants.index("other"), queue.model
    queue.model = int(led.service.model.table.model[other])
    chosen = Decision(other, 0, "the fastest")
    monkeypatch.setattr(router._controller, "route", lambda request, cluster: chosen)
    asked: list[int] = []

    def load(model: int) -> None:
        asked.append(model)
        queue.model = queue.target = model

    monkeypatch.setattr(led.service.fleet, "require", load)
    queue.target = queue.model
    fine = led.asked(10.0)
    fine.least_quality = 0.9
    decision = led.decide(fine)
    assert (decision.variant, decision.worker, asked) == (EXACT, 0, [exact])
    queue.model = queue.target = int(led.service.model.table.model[other])
    hasty = led.asked(0.05)  # loading takes 0.1 s
    hasty.least_quality, hasty.slack_s = 0.9, 0.05
    assert led.decide(hasty).worker is None
    assert asked == [exact]


def test_a_background_picture_takes_no_model_away_from_others(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, queue = led.service.fleet, led.service.fleet.queues[0]
    required: list[int] = []

    def load(model: int) -> None:
        required.append(model)
        queue.model = model

    monkeypatch.setattr(fleet, "require", load)
    other = int(led.service.model.table.model[led.service.model.table.variants.index("other")])
    pinned = led.asked(10.0)
    pinned.pinned_variant, pinned.background = "other", True
    queue.queued_s = 1.0
    with pytest.raises(Yielded):
        led.decide(pinned)
    assert required == []
    queue.queued_s = 0.0
    assert led.decide(pinned).worker == 0
    assert required == [other]


@pytest.mark.usefixtures("still")
def test_the_cheapest_picture_that_can_be_in_time_is_the_policy_s_choice(led: Led) -> None:
    names, queue = led.service.model.table.variants, led.service.fleet.queues[0]
    request = led.asked(10.0)
    request.prediction = led.service.predictions.predict(np.zeros(WIDTH, np.float32), None)
    request.least_quality, request.cheapest = 0.65, True
    assert names[led.decide(request).variant] == "quick"  # `other` is held by no worker
    assert max(request.quality) == 1  # what it is worth stays what is predicted
    request.least_quality = 0.75  # which the bound of `quick` is below
    assert led.decide(request).variant == EXACT
    request.least_quality, request.most_steps = 0.65, 2
    request.exact_share = 0.1
    assert led.decide(request).variant == EXACT
    lengthen(queue, 20.0)
    assert led.decide(request).worker is None


@pytest.mark.usefixtures("still")
def test_a_negative_prompt_is_made_by_variants_with_guidance(
    led: Led, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(led.router, "_guided", [v == EXACT for v in range(5)])
    request = led.asked(0.7 * led.exact_s)
    assert led.decide(request).variant != EXACT
    request.negative_prompt = "fog"
    decision = led.decide(request)
    assert (decision.variant, decision.best_effort) == (EXACT, True)  # none can be in time
    request.deadline_s += 10
    decision = led.decide(request)
    assert (decision.variant, decision.best_effort) == (EXACT, False)
