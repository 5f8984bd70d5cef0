"""One policy in charge: when it plans, and what it makes of a request that waited too long."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from argus.control.controller import Controller
from argus.control.policy import Base, Cluster, Decision, Plan, PlanningInput, Slo, first_free
from argus.control.request import Request
from argus.control.slowness import LOOKS
from tests.control.tables import small_table

WINDOW_S = 30.0


class Noting(Base):
    """Routes to the last variant that is allowed, and keeps what it was told."""

    def __init__(self) -> None:
        super().__init__(small_table(), [Slo(10.0)])
        self.inputs: list[PlanningInput] = []
        self.told: list[Sequence[Slo]] = []

    def set_slos(self, slos: Sequence[Slo]) -> None:
        super().set_slos(slos)
        if hasattr(self, "told"):
            self.told.append(slos)

    def plan(self, inputs: PlanningInput) -> Plan:
        self.inputs.append(inputs)
        return Plan(inputs.models)

    def route(self, request: Request, cluster: Cluster) -> Decision:
        fits = [v for v, allowed in enumerate(request.allowed) if allowed]
        return Decision(fits[-1], first_free(cluster, int(self.table.model[fits[-1]])), "a test")


@pytest.fixture
def policy() -> Noting:
    return Noting()


@pytest.fixture
def controller(policy: Noting) -> Controller:
    return Controller(policy, lambda slowness: [Slo(10.0 / slowness)], WINDOW_S)


def cluster(now: float = 0.0, slowness: float = 1.0) -> Cluster:
    return Cluster(now, [0], [0], [0.0], [0], slowness)


def request(allowed: Sequence[bool]) -> Request:
    return Request(quality=[1.0] * len(allowed), allowed=list(allowed), deadline_s=10.0)


def only(*variants: int) -> list[bool]:
    return [v in variants for v in range(len(small_table().variants))]


def plan(controller: Controller, now: float = 0.0) -> None:
    controller.plan(cluster(now), [0], [True], usable=1.0)


def test_a_plan_is_made_for_the_requests_that_came(controller: Controller, policy: Noting) -> None:
    for allowed in (only(0), only(0, 1)):
        controller.arrived(request(allowed))
    plan(controller)
    assert policy.inputs[-1].allowed.tolist() == [only(0), only(0, 1)]
    assert policy.inputs[-1].slo.tolist() == [0, 0]


def test_a_plan_knows_how_much_of_exact_pictures_the_requests_allow(
    controller: Controller, policy: Noting
) -> None:
    plan(controller)
    assert policy.inputs[-1].exact_share == 1
    for share in (1.0, 0.5):
        limited = request(only(0))
        limited.exact_share = share
        controller.arrived(limited)
    plan(controller)
    assert policy.inputs[-1].exact_share == 0.75


def test_without_requests_a_plan_is_asked_for_nobody(
    controller: Controller, policy: Noting
) -> None:
    plan(controller)
    assert len(policy.inputs[-1].quality) == 0
    assert policy.inputs[-1].rate == 0


def test_the_first_requests_and_a_burst_make_the_plan_outdated(controller: Controller) -> None:
    look_s = WINDOW_S / LOOKS
    assert not controller.look(look_s, 1.0)  # nothing came yet
    for _ in range(50):
        controller.arrived(request(only(0)))
    assert controller.look(2 * look_s, 1.0)
    assert controller.rate(2 * look_s) == pytest.approx(50 / look_s)
    controller.refused(50)
    assert not controller.look(3 * look_s, 1.0)  # as many as expected, though refused
    for _ in range(150):
        controller.arrived(request(only(0)))
    assert controller.look(4 * look_s, 1.0)


def test_a_window_is_counted_by_the_time_it_took(controller: Controller) -> None:
    controller.refused(60)
    controller.end_window(2 * WINDOW_S)
    assert controller.rate(0.0) == pytest.approx(1 / WINDOW_S * 30)


def test_what_came_before_a_burst_does_not_lessen_it(controller: Controller) -> None:
    """A window that was idle at first, or slower, would halve the forecast in mid-burst."""
    look_s = WINDOW_S / LOOKS
    for at in range(1, LOOKS + 1):
        busy = at > LOOKS // 2
        for _ in range(12 if busy else 0):
            controller.arrived(request(only(0, 1)))
        if at == LOOKS:
            controller.end_window(at * look_s)
        controller.look(at * look_s, 1.0)
    assert controller.rate(WINDOW_S) == pytest.approx(12 / look_s)


@pytest.mark.parametrize("window_s, outdated", [(2.0, False), (30.0, True)])
def test_a_hiccup_outdates_no_plan_where_windows_are_short(
    policy: Noting, window_s: float, outdated: bool
) -> None:
    controller = Controller(policy, lambda slowness: [Slo(10.0 / slowness)], window_s)
    looks = [controller.look(at * controller.look_s, 2.0 if at < 2 else 1.0) for at in range(1, 6)]
    assert any(looks) == outdated
    lasting = Controller(policy, lambda slowness: [Slo(10.0 / slowness)], window_s)
    assert any(lasting.look(at * lasting.look_s, 2.0) for at in range(1, LOOKS + 1))


def test_slower_workers_make_the_plan_outdated_and_leave_less_of_deadlines(
    controller: Controller, policy: Noting
) -> None:
    looks = 1
    while not controller.look(looks * controller.look_s, 2.0):
        looks += 1
    plan(controller)
    (slo,) = policy.told[-1]
    assert 5.0 < slo.deadline_s < 10.0
    assert not controller.look((looks + 1) * controller.look_s, 10.0 / slo.deadline_s)


def test_another_policy_keeps_the_forecast_and_plans_for_the_requests_that_come_next(
    controller: Controller, policy: Noting
) -> None:
    for _ in range(60):
        controller.arrived(request(only(0)))
    controller.end_window(30.0)
    controller.look(30.0, slowness=2.0)
    other = Noting()
    other.informed = True  # another quality than the recent requests came with
    controller.adopt(other)
    assert controller.policy is other
    assert other.told[-1][0].deadline_s < 10.0  # the workers have become slower
    assert controller.rate(30.0) == pytest.approx(2.0)
    plan(controller, 30.0)
    assert len(other.inputs[-1].quality) == 0  # nothing is known yet of what it is told
    assert not controller.look(31.0, slowness=2.0)
    for _ in range(2):
        controller.arrived(request(only(1)))
    assert controller.look(32.0, slowness=2.0)
    plan(controller, 32.0)
    assert other.inputs[-1].allowed.tolist() == [only(1)] * 2
    assert not controller.look(33.0, slowness=2.0)
    assert len(policy.inputs) == 0


def test_another_policy_of_the_same_kind_plans_for_the_recent_requests(
    controller: Controller,
) -> None:
    controller.arrived(request(only(1)))
    other = Noting()
    controller.adopt(other)
    plan(controller)
    assert other.inputs[-1].allowed.tolist() == [only(1)]


def test_a_request_is_routed_in_seconds_of_the_table(controller: Controller) -> None:
    one = request(only(0))
    controller.route(one, cluster(now=4.0, slowness=3.0))
    assert one.slack_s == pytest.approx(2.0)


def test_a_request_without_time_for_its_variant_is_routed_anew_once(
    controller: Controller,
) -> None:
    one = request(only(0, 1))
    one.variant = 0
    decision = controller.faster(one, cluster())
    assert decision is not None
    assert decision.variant == 1
    one.variant = decision.variant
    one.allowed = only(0, 1, 2)
    assert controller.faster(one, cluster()) is None


def test_a_request_without_time_is_dropped_where_its_variant_is_the_fastest(
    controller: Controller,
) -> None:
    one = request(only(0, 1))
    one.variant = 1
    assert controller.faster(one, cluster()) is None


def test_known_rates_are_told_instead_of_a_forecast(policy: Noting) -> None:
    controller = Controller(
        policy, lambda slowness: [Slo(10.0)], WINDOW_S, known_rate=lambda now: 7.0 + now
    )
    plan(controller, now=1.0)
    assert policy.inputs[-1].rate == pytest.approx(8.0)
    assert np.isfinite(policy.inputs[-1].rate)


def test_a_plan_knows_how_far_forecasts_were_off(controller: Controller, policy: Noting) -> None:
    now = 0.0

    def window(count: int) -> float:
        nonlocal now
        now += WINDOW_S
        for _ in range(count):
            controller.arrived(request(only(0)))
        controller.end_window(now)
        plan(controller, now)
        return policy.inputs[-1].doubt

    assert window(30) == 0  # nothing was forecast
    assert max(window(count) for count in [30, 33, 27] * 10) < 0.1
    assert min([window(count) for count in [0, 0, 0, 12] * 20][-20:]) > 0.5
    assert max([window(30) for _ in range(120)][-20:]) < 0.02


def test_a_plan_for_known_rates_has_no_doubt(policy: Noting) -> None:
    known = Controller(policy, lambda slowness: [Slo(10.0)], WINDOW_S, known_rate=lambda now: 1.0)
    for now, count in ((30.0, 5), (60.0, 50), (90.0, 0)):
        for _ in range(count):
            known.arrived(request(only(0)))
        known.end_window(now)
    plan(known, 90.0)
    assert policy.inputs[-1].doubt == 0
