"""The plan: models of the workers, variants of the prompts, and prices of worker-seconds.

The programme of DESIGN.md section 4, solved by HiGHS. Axes of arrays are named by letters:

    p prototypes of prompts, k SLO classes, v variants, d types of device,
    r resident sets: models that a worker holds together, one in most clusters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Demand:
    """The load expected until the next plan.

    `rates` (p,) are requests a second, `quality` (p, v) the predicted quality of a variant,
    `allowed` (p, v) whether a variant may serve them (a neighbour for its skip, a lower bound above
    their floor), `slo` (p,) their SLO class.
    """

    rates: Numbers
    quality: Numbers
    allowed: Flags
    slo: Whole

    @classmethod
    def alike(cls, rate: float, quality: Numbers) -> Demand:
        """All prompts as one prototype, for policies that ignore prompts; `quality` is (v,)."""
        allowed = np.ones((1, len(quality)), dtype=bool)
        rates = np.array([max(rate, 1e-6)])
        return cls(rates, quality[None], allowed, np.zeros(1, dtype=np.int64))


@dataclass(frozen=True)
class Cluster:
    """The workers that serve it.

    `workers` (d,) is their number; `holds` (r, v) says which variants a resident set can run;
    `cost_s` (v, d) are worker-seconds per picture; `meets` (k, v, d) says whether a variant meets
    the SLO; `load_s` (d, r) are seconds to load a set, `placed` (d, r) is the number of workers
    that hold it now. `able` (d, r) says which sets a type's workers can hold, None all.
    """

    workers: Whole
    holds: Flags
    cost_s: Numbers
    meets: Flags
    load_s: Numbers
    placed: Whole
    able: Flags | None = None


@dataclass(frozen=True)
class Tuning:
    """`shed_loss` is κ: the loss of a shed request, above any quality. `load_loss` is ε: the cost
    of a load besides its time. `utilisation` is ρ, the share of time in which workers may be busy,
    and `horizon_s` is H, over which the time of a load is spread. The solver has `limit_s`
    seconds."""

    shed_loss: float = 2.0
    load_loss: float = 1e-4
    utilisation: float = 0.92
    horizon_s: float = 600.0
    limit_s: float = 1.0


@dataclass(frozen=True)
class Plan:
    """`placement` (d, r) is the number of workers to hold each set, `shares` (p, v) are those of
    each prototype's requests by variant, `shed` (p,) is the share that is shed, `flow` (k, v, d, r)
    are requests a second.

    `prices` (d, r) are quality per worker-second; NaN for a set that no worker holds. `source` is
    `solver`, `last` or `greedy`.
    """

    placement: Whole
    shares: Numbers
    shed: Numbers
    flow: Numbers
    prices: Numbers
    source: str

    def value(self, demand: Demand, tuning: Tuning) -> float:
        """Quality a second, less the loss of shed requests."""
        served = (demand.quality * self.shares).sum(axis=1)
        return float(demand.rates @ (served - tuning.shed_loss * self.shed))


def plan(
    demand: Demand, cluster: Cluster, tuning: Tuning | None = None, last: Plan | None = None
) -> Plan:
    """The best plan; demand beyond all capacity is shed where that loses least.

    When the solver fails or runs out of time, requests are placed greedily: on `last`'s placement,
    with its prices, or without `last` on the present placement.
    """
    tuning = tuning or Tuning()
    model = _Programme(demand, cluster, tuning)
    found = model.solve(None)
    if found is not None:
        fixed = model.solve(model.placement(found))
        if fixed is not None:
            return model.read(fixed)
    if last is not None and last.placement.shape == cluster.placed.shape:
        greedy = _greedy(demand, cluster, tuning, last.placement)
        return replace(greedy, prices=last.prices, source="last")
    return _greedy(demand, cluster, tuning, cluster.placed)


class _Programme:
    """The programme's columns and rows, without columns that can only be 0."""

    def __init__(self, demand: Demand, cluster: Cluster, tuning: Tuning) -> None:
        self._demand, self._cluster, self._tuning = demand, cluster, tuning
        can = cluster.meets[:, :, :, None] & cluster.holds.T[None, :, None, :]  # k v d r
        can &= (cluster.workers > 0)[None, None, :, None]
        if cluster.able is not None:
            can &= cluster.able[None, None]
        self._flows = np.argwhere(can)
        runs = np.asarray(can.any(axis=(2, 3)))[demand.slo]  # p v
        self._serves = np.argwhere(demand.allowed & runs & (demand.rates > 0)[:, None])
        p, (d, r) = len(demand.rates), cluster.placed.shape
        sizes = [len(self._serves), p, len(self._flows), d * r, d * r]
        self._y, self._z, self._x, self._n, self._a = np.cumsum([0, *sizes[:-1]])
        self._columns = sum(sizes)
        self._rows: list[tuple[float, float]] = []
        self._triplets: list[tuple[Whole, Whole, Numbers]] = []
        self._build()

    def _build(self) -> None:
        demand, cluster, tuning = self._demand, self._cluster, self._tuning
        (p_count, v_count), k_count = demand.quality.shape, len(cluster.meets)
        d_count, r_count = cluster.placed.shape
        p, v = self._serves.T
        k, fv, fd, fr = self._flows.T
        ys = self._y + np.arange(len(p))
        xs = self._x + np.arange(len(k))
        places = np.arange(d_count * r_count)
        rho, late = tuning.utilisation, cluster.load_s.ravel() / tuning.horizon_s
        at = fd * r_count + fr
        free = np.full(len(places), -math.inf)
        # every request is served or shed
        all_prompts = np.arange(p_count)
        self._add([(p, ys, 1.0), (all_prompts, self._z + all_prompts, 1.0)], np.ones(p_count), 1.0)
        # served requests of a class and variant are its flow
        used = demand.slo[p] * v_count + v
        balance = [(used, ys, demand.rates[p]), (k * v_count + fv, xs, -1.0)]
        self._add(balance, np.zeros(k_count * v_count), 0.0)
        # the flow is within the workers' capacity
        self._capacity = len(self._rows)
        work = (at, xs, cluster.cost_s[fv, fd])
        able = [(places, self._n + places, -rho), (places, self._a + places, rho * late)]
        self._add([work, *able], free, 0.0)
        # workers beyond those that hold a set now load it
        loads = [(places, self._n + places, 1.0), (places, self._a + places, -1.0)]
        self._add(loads, free, cluster.placed.ravel().astype(float))
        # every worker holds at most one set
        there = np.full(d_count, -math.inf)
        held = [(places // r_count, self._n + places, 1.0)]
        self._add(held, there, cluster.workers.astype(float))

    def _add(
        self,
        parts: Sequence[tuple[Whole, Whole, Any]],
        low: Numbers,
        high: Numbers | float,
    ) -> None:
        """Rows with entries (row, column, value), between `low` and `high`."""
        begin = len(self._rows)
        self._rows += zip(low, np.broadcast_to(high, low.shape), strict=True)
        for row, column, value in parts:
            values = np.broadcast_to(np.asarray(value, float), row.shape)
            self._triplets.append((row + begin, column, values))

    def solve(self, placement: Whole | None) -> highspy.HighsSolution | None:
        """A solution of the programme or, given a placement, of the linear programme that is left;
        None if there is none in time."""
        lp, count = highspy.HighsLp(), self._cluster.placed.size
        lp.num_col_, lp.num_row_ = self._columns, len(self._rows)
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_, low, high = self._gain(), np.zeros(self._columns), self._limits()
        whole = slice(self._n, self._columns)
        if placement is None:
            kinds = [highspy.HighsVarType.kContinuous] * self._n
            lp.integrality_ = kinds + [highspy.HighsVarType.kInteger] * (2 * count)
        else:
            loads = np.maximum(placement - self._cluster.placed, 0)
            low[whole] = high[whole] = np.concatenate([placement.ravel(), loads.ravel()])
        lp.col_lower_, lp.col_upper_ = low, high
        bounds = np.array(self._rows)
        lp.row_lower_, lp.row_upper_ = bounds[:, 0], bounds[:, 1]
        rows, columns, values = (np.concatenate(part) for part in zip(*self._triplets, strict=True))
        order = np.lexsort((columns, rows))
        starts = np.searchsorted(rows[order], np.arange(len(bounds) + 1))
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_, lp.a_matrix_.index_ = starts, columns[order]
        lp.a_matrix_.value_ = values[order]
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("time_limit", self._tuning.limit_s)
        solver.passModel(lp)
        solver.run()
        solution = solver.getSolution()
        if not solution.value_valid or (placement is not None and not solution.dual_valid):
            return None
        return solution

    def _gain(self) -> Numbers:
        demand, gain = self._demand, np.zeros(self._columns)
        p, v = self._serves.T
        gain[self._y : self._y + len(p)] = demand.rates[p] * demand.quality[p, v]
        gain[self._z : self._x] = -self._tuning.shed_loss * demand.rates
        gain[self._a :] = -self._tuning.load_loss
        return gain

    def _limits(self) -> Numbers:
        high = np.full(self._columns, math.inf)
        high[: self._x] = 1.0
        most = np.repeat(self._cluster.workers, self._cluster.placed.shape[1])
        if self._cluster.able is not None:
            most = np.where(self._cluster.able.ravel(), most, self._cluster.placed.ravel())
        high[self._n :] = np.concatenate([most, most])
        return high

    def placement(self, solution: highspy.HighsSolution) -> Whole:
        values = np.array(solution.col_value[self._n : self._a])
        placement: Whole = np.rint(values).astype(np.int64).reshape(self._cluster.placed.shape)
        return placement

    def read(self, solution: highspy.HighsSolution) -> Plan:
        """The plan of a solution of the linear programme."""
        demand, cluster = self._demand, self._cluster
        values = np.array(solution.col_value)
        shares = np.zeros(demand.quality.shape)
        shares[tuple(self._serves.T)] = values[self._y : self._z]
        k, v, d, r = (*cluster.meets.shape, cluster.placed.shape[1])
        flow = np.zeros((k, v, d, r))
        flow[tuple(self._flows.T)] = values[self._x : self._n]
        placement = self.placement(solution)
        duals = np.array(solution.row_dual)[self._capacity :][: placement.size]
        prices = _clamped(duals.reshape(placement.shape), placement, cluster, self._tuning)
        return Plan(placement, shares, values[self._z : self._x], flow, prices, "solver")


def _clamped(duals: Numbers, placement: Whole, cluster: Cluster, tuning: Tuning) -> Numbers:
    """Prices in [0, (1 + κ) / min c], NaN for a set that no worker holds."""
    most = (1 + tuning.shed_loss) / cluster.cost_s.min()
    return np.where(placement > 0, np.clip(duals, 0.0, most), np.nan)


def _greedy(demand: Demand, cluster: Cluster, tuning: Tuning, placement: Whole) -> Plan:
    """Requests go to the options of most value per worker-second while capacity lasts; the rest of
    it goes to the upgrades to dearer variants that gain most quality per worker-second."""
    placement = _fitting(placement, cluster)
    room = tuning.utilisation * placement.astype(float)
    shares, shed = np.zeros(demand.quality.shape), np.ones(len(demand.rates))
    flow = np.zeros((*cluster.meets.shape, placement.shape[1]))
    options = [
        (p, v, d, r)
        for p, v in np.argwhere(demand.allowed & (demand.rates > 0)[:, None])
        for d, r in np.argwhere(placement > 0)
        if cluster.holds[r, v]
        and cluster.meets[demand.slo[p], v, d]
        and (cluster.able is None or cluster.able[d, r])
    ]

    def worth(one: tuple[int, int, int, int]) -> float:
        p, v, d, _ = one
        return float((demand.quality[p, v] + tuning.shed_loss) / cluster.cost_s[v, d])

    def give(one: tuple[int, int, int, int], share: float) -> None:
        p, v, d, r = one
        shares[p, v] += share
        flow[demand.slo[p], v, d, r] += share * demand.rates[p]
        room[d, r] -= share * demand.rates[p] * cluster.cost_s[v, d]

    for one in sorted(options, key=worth, reverse=True):
        p, v, d, r = one
        share = min(shed[p], max(0.0, room[d, r]) / (demand.rates[p] * cluster.cost_s[v, d]))
        give(one, share)
        shed[p] -= share
    rises = [
        (gain / more, cheap, dear)
        for cheap in options
        for dear in options
        if cheap[0] == dear[0]
        and cheap[2:] == dear[2:]
        and (gain := demand.quality[dear[0], dear[1]] - demand.quality[cheap[0], cheap[1]]) > 0
        and (more := cluster.cost_s[dear[1], dear[2]] - cluster.cost_s[cheap[1], cheap[2]]) > 0
    ]
    for _, cheap, dear in sorted(rises, key=lambda rise: -rise[0]):
        p, v, d, r = cheap
        rate = demand.rates[p]
        given = min(shares[p, v], flow[demand.slo[p], v, d, r] / rate)
        more = cluster.cost_s[dear[1], d] - cluster.cost_s[v, d]
        share = min(given, max(0.0, room[d, r]) / (rate * more))
        give(cheap, -share)
        give(dear, share)
    return Plan(placement, shares, shed, flow, np.where(placement > 0, 0.0, np.nan), "greedy")


def _fitting(placement: Whole, cluster: Cluster) -> Whole:
    """The placement cut to the number of workers of each type."""
    placement = placement.copy()
    for d, count in enumerate(cluster.workers):
        while placement[d].sum() > count:
            placement[d, placement[d].argmax()] -= 1
    return placement
