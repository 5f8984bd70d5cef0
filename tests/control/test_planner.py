"""The plan is the best there is, its prices are what capacity is worth, and it always exists."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import highspy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from argus.control.planner import Cluster, Demand, Numbers, Plan, Tuning, Whole, plan

TUNING = Tuning(load_loss=1e-3)
EPS = 1e-6


@st.composite
def cases(draw: st.DrawFn) -> tuple[Demand, Cluster]:
    """Small clusters: two types of device, three variants of two models, sets of one or both."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    p, k, v, d = draw(st.integers(1, 4)), 2, 3, 2
    holds = np.array([[True, True, False], [False, False, True], [True, True, True]])
    r = draw(st.integers(1, 3))
    workers = rng.integers(0, 4, d)
    demand = Demand(
        rates=rng.uniform(0.1, 2.0, p),
        quality=rng.uniform(0.2, 1.0, (p, v)),
        allowed=rng.random((p, v)) < 0.8,
        slo=rng.integers(0, k, p),
    )
    cluster = Cluster(
        workers=workers,
        holds=holds[:r],
        cost_s=rng.uniform(0.2, 2.0, (v, d)),
        meets=rng.random((k, v, d)) < 0.8,
        load_s=rng.uniform(1.0, 200.0, (d, r)),
        placed=np.array([[min(1, n), *[0] * (r - 1)] for n in workers]),
    )
    return demand, cluster


def placements(cluster: Cluster) -> Iterator[Whole]:
    """Every way to place the sets."""
    r = cluster.placed.shape[1]
    by_type = [
        [row for row in itertools.product(range(n + 1), repeat=r) if sum(row) <= n]
        for n in cluster.workers
    ]
    for rows in itertools.product(*by_type):
        yield np.array(rows)


def worth(demand: Demand, cluster: Cluster, capacity: Numbers) -> float:
    """The best value a second with `capacity` (d, r) worker-seconds a second, written down anew:
    one column for every way to serve a prototype, one for shedding it."""
    ways = [
        (p, v, d, r)
        for p, v in np.argwhere(demand.allowed)
        for d, r in np.argwhere(capacity > 0)
        if cluster.holds[r, v] and cluster.meets[demand.slo[p], v, d]
    ]
    gain = [demand.rates[p] * demand.quality[p, v] for p, v, _, _ in ways]
    gain += [-TUNING.shed_loss * rate for rate in demand.rates]
    used = np.zeros((capacity.size, len(gain)))
    served = np.zeros((len(demand.rates), len(gain)))
    for i, (p, v, d, r) in enumerate(ways):
        used[d * capacity.shape[1] + r, i] = demand.rates[p] * cluster.cost_s[v, d]
        served[p, i] = 1
    served[:, len(ways) :] = np.eye(len(demand.rates))
    found = linprog(
        -np.array(gain), used, np.maximum(capacity, 0).ravel(), served, np.ones(len(served))
    )
    return -float(found.fun or 0.0)


def capacity_of(placement: Whole, cluster: Cluster) -> Numbers:
    loads = np.maximum(placement - cluster.placed, 0)
    able: Numbers = placement - loads * cluster.load_s / TUNING.horizon_s
    return TUNING.utilisation * able


def value_of(demand: Demand, cluster: Cluster, placement: Whole) -> float:
    loads = np.maximum(placement - cluster.placed, 0)
    value = worth(demand, cluster, capacity_of(placement, cluster))
    return value - TUNING.load_loss * float(loads.sum())


def check(demand: Demand, cluster: Cluster, made: Plan) -> None:
    """What holds of every plan, wherever it comes from."""
    assert (made.placement.sum(axis=1) <= cluster.workers).all()
    assert np.allclose(made.shares.sum(axis=1) + made.shed, 1, atol=EPS)
    assert (made.shares >= -EPS).all()
    assert (made.shed >= -EPS).all()
    assert not made.shares[~demand.allowed].any()
    assert not made.flow[~cluster.meets].any()
    busy = (made.flow * cluster.cost_s[None, :, :, None]).sum(axis=(0, 1))
    assert (busy <= TUNING.utilisation * made.placement + EPS).all()
    served = np.zeros(made.flow.shape[:2])
    np.add.at(served, demand.slo, demand.rates[:, None] * made.shares)
    assert np.allclose(made.flow.sum(axis=(2, 3)), served, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_no_placement_is_better_than_the_plan_s(case: tuple[Demand, Cluster]) -> None:
    demand, cluster = case
    made = plan(demand, cluster, TUNING)
    assert made.source == "solver"
    check(demand, cluster, made)
    best = max(value_of(demand, cluster, placement) for placement in placements(cluster))
    loads = np.maximum(made.placement - cluster.placed, 0).sum()
    assert made.value(demand, TUNING) - TUNING.load_loss * loads == pytest.approx(best, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(cases(), st.floats(-0.3, 0.3))
def test_a_price_is_what_a_little_more_capacity_is_worth(
    case: tuple[Demand, Cluster], more: float
) -> None:
    """The worth of capacity is concave, so it lies below its tangents, whose slopes are prices."""
    demand, cluster = case
    made = plan(demand, cluster, TUNING)
    capacity = capacity_of(made.placement, cluster)
    now = worth(demand, cluster, capacity)
    for d, r in np.argwhere(made.placement > 0):
        other = capacity.copy()
        other[d, r] = max(EPS, capacity[d, r] + more)
        gained = worth(demand, cluster, other) - now
        assert gained <= made.prices[d, r] * (other[d, r] - capacity[d, r]) + 1e-5
    assert np.isnan(made.prices[made.placement == 0]).all()


@settings(max_examples=30, deadline=None)
@given(cases())
def test_without_a_solver_there_is_still_a_plan(case: tuple[Demand, Cluster]) -> None:
    demand, cluster = case
    solved = plan(demand, cluster, TUNING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(highspy.Highs, "run", lambda self: None)
        patch.setattr(highspy.Highs, "getSolution", lambda self: highspy.HighsSolution())
        greedy = plan(demand, cluster, TUNING)
        after = plan(demand, cluster, TUNING, last=solved)
        fewer = replace(cluster, workers=np.maximum(cluster.workers - 1, 0))
        smaller = plan(demand, fewer, TUNING, last=solved)
    assert (greedy.source, after.source) == ("greedy", "last")
    check(demand, cluster, greedy)
    check(demand, cluster, after)
    check(demand, fewer, smaller)
    assert (after.placement == solved.placement).all()


def test_more_demand_than_the_cluster_can_serve_is_shed_where_it_loses_least() -> None:
    demand = Demand(
        rates=np.array([1.0, 1.0]),
        quality=np.array([[1.0], [0.5]]),
        allowed=np.ones((2, 1), bool),
        slo=np.zeros(2, np.int64),
    )
    cluster = Cluster(
        workers=np.array([1]),
        holds=np.ones((1, 1), bool),
        cost_s=np.array([[0.8]]),
        meets=np.ones((1, 1, 1), bool),
        load_s=np.array([[10.0]]),
        placed=np.array([[1]]),
    )
    made = plan(demand, cluster, TUNING)
    served = TUNING.utilisation / 0.8
    assert made.shed == pytest.approx([0.0, 2 - served])
    assert made.prices[0, 0] == pytest.approx((0.5 + TUNING.shed_loss) / 0.8)
