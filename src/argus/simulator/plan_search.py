"""The search for the number of workers, or the load, at which a promise is just kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from argus.control.variants import EXACT, Numbers
from argus.core.errors import BadRequest
from argus.simulator.planning import ALONE, Job, Judgement, Run, Runs, Setting
from argus.simulator.runs import Target

MOST_WORKERS = 1000
SEARCHES = 2  # runs of each number that is tried, before it is judged
FINEST = 1.02  # ratio of the loads that are told apart
FRESH = 100  # the first seed of the runs that judge, from that of those that search


@dataclass(frozen=True)
class Ladder:
    """What a search may answer: rungs from 1 to `most`, each with the number of workers of each
    type and the peak load. The higher the rung, the easier the promise is kept. `guess` is where
    the search begins."""

    at: Callable[[int], tuple[tuple[int, ...], float]]
    guess: int
    most: int


@dataclass
class Answer:
    """The lowest rung at which a policy keeps the promise, None if it does at none that was tried.

    `low` and `high` are the lowest and the highest that the single runs which judge need. `judged`
    is of the rung, or without one of the highest; `below` is of the rung under it, by the same
    seeds. `tried` are all rungs that were simulated.
    """

    policy: str
    rung: int | None
    low: int
    high: int
    judged: Judgement
    below: Judgement | None = None
    tried: dict[int, Judgement] = field(default_factory=dict)


@dataclass
class Search:
    """The search for one policy's answer.

    Bisection over runs with the first seeds finds a rung that keeps the promise while the one below
    does not. Runs with other seeds judge it: who chooses is not who judges. If they do not keep the
    promise, the rung is raised until they do; it is never lowered by them.
    """

    policy: str
    ladder: Ladder
    target: Target
    runs: Runs
    seeds: Sequence[int]
    fresh: Sequence[int]

    def __post_init__(self) -> None:
        self._found: dict[int, dict[int, Run]] = {}

    def answer(self) -> Answer:
        ladder = self.ladder
        rung = least(lambda r: self._keeps(r, self.seeds), ladder.guess, ladder.most)
        while rung is not None and not self._keeps(rung, self.fresh):
            rung = rung + 1 if rung < ladder.most else None
        if rung is None:
            most = ladder.most
            judged = self._judgement(most, self.seeds)
            return Answer(self.policy, None, most, most, judged, None, self._tried())
        below = self._judgement(rung - 1, self.fresh) if rung > 1 else None
        each = self._each(rung)
        judged = self._judgement(rung, self.fresh)
        return Answer(self.policy, rung, min(each), max(each), judged, below, self._tried())

    def _each(self, rung: int) -> list[int]:
        """The lowest rung that each single run which judges needs, walking from `rung`."""
        needs = dict.fromkeys(self.fresh, rung)
        down = [seed for seed in self.fresh if self._kept_by(rung, seed)]
        up = [seed for seed in self.fresh if seed not in down]
        for lower in range(rung - 1, 0, -1):
            if not down:
                break
            self._make(lower, down)
            down = [seed for seed in down if self._kept_by(lower, seed)]
            needs |= dict.fromkeys(down, lower)
        for higher in range(rung + 1, self.ladder.most + 1):
            if not up:
                break
            self._make(higher, up)
            needs |= dict.fromkeys(up, higher)
            up = [seed for seed in up if not self._kept_by(higher, seed)]
        return list(needs.values())

    def _keeps(self, rung: int, seeds: Sequence[int]) -> bool:
        return self._judgement(rung, seeds).keeps(self.target)

    def _kept_by(self, rung: int, seed: int) -> bool:
        return Judgement((self._found[rung][seed],)).keeps(self.target)

    def _judgement(self, rung: int, seeds: Sequence[int]) -> Judgement:
        self._make(rung, seeds)
        return Judgement(tuple(self._found[rung][seed] for seed in seeds))

    def _make(self, rung: int, seeds: Sequence[int]) -> None:
        known = self._found.setdefault(rung, {})
        missing = [seed for seed in seeds if seed not in known]
        counts, peak_qpm = self.ladder.at(rung)
        jobs = [Job(self.policy, counts, peak_qpm, seed) for seed in missing]
        known.update(zip(missing, self.runs(jobs), strict=True))

    def _tried(self) -> dict[int, Judgement]:
        return {rung: Judgement(tuple(self._found[rung].values())) for rung in sorted(self._found)}


def solve(searches: Sequence[Search]) -> list[Answer]:
    """The answers of several searches, which take turns on the processes that run their jobs."""
    with ThreadPoolExecutor(len(searches)) as threads:
        return list(threads.map(Search.answer, searches))


def least(holds: Callable[[int], bool], guess: int, most: int) -> int | None:
    """A number from 1 to `most` that holds while the one below it does not; None if `most` does not
    hold either. For a `holds` that stays true once it is, it is the least that holds."""
    low, high = 0, most + 1  # known not to hold; known to hold
    middle = min(max(1, guess), most)
    while high - low > 1:
        if holds(middle):
            high = middle
        else:
            low = middle
        if low == most:
            return None
        middle = most if high > most else (low + high) // 2
    return high


def workers_ladder(setting: Setting, policy: str, kind: int, peak_qpm: float, seed: int) -> Ladder:
    """Numbers of workers of one type. The most is what gives every exact picture a worker of its
    own from its arrival on: where that does not keep a promise, more workers do not either. Raises
    BadRequest for a load that needs more than `MOST_WORKERS`."""
    table = setting.world.table
    scenario, _ = setting.scenario((kind,), peak_qpm, seed)
    cost_s, rate = table.cost_s(setting.deadline_s)[:, kind], scenario.scaled.max() / 60
    if rate * cost_s.min() > MOST_WORKERS:
        raise BadRequest(
            f"{peak_qpm:g} pictures a minute need at least {rate * cost_s.min():.0f} workers of "
            f"type {table.types[kind]}, each with the cheapest variant: more than the "
            f"{MOST_WORKERS} that are simulated. Plan for a part of the load: clusters of some "
            "hundreds of workers lose little by being apart."
        )
    at_s, alone_s = scenario.requests().arrived_s, table.alone_s[EXACT, kind]
    in_flight = np.arange(1, len(at_s) + 1) - np.searchsorted(at_s, at_s - alone_s)
    most = min(MOST_WORKERS, 2 + math.ceil(1.2 * in_flight.max(initial=1)))

    def at(rung: int) -> tuple[tuple[int, ...], float]:
        return tuple(rung if d == kind else 0 for d in range(len(table.types))), peak_qpm

    return Ladder(at, math.ceil(rate * _typical(policy, cost_s)), most)


def load_ladder(setting: Setting, policy: str, counts: Sequence[int]) -> Ladder:
    """Peak loads, the highest first, from what the cheapest variant alone could serve down to a
    fiftieth of what the exact one could."""
    cost_s = setting.world.table.cost_s(setting.deadline_s)

    def carried_qpm(of: Callable[[Numbers], float]) -> float:
        return sum((60 * n / of(cost_s[:, d]) for d, n in enumerate(counts) if n), 0.0)

    served = 1 - setting.target.violations
    highest = 1.3 * carried_qpm(lambda costs: float(costs.min())) / served
    lowest = carried_qpm(lambda costs: float(costs[EXACT])) / 50
    guess = carried_qpm(lambda costs: _typical(policy, costs))

    def at(rung: int) -> tuple[tuple[int, ...], float]:
        return tuple(counts), highest / FINEST ** (rung - 1)

    def rung(peak_qpm: float) -> int:
        return max(1, round(1 + math.log(highest / peak_qpm, FINEST)))

    return Ladder(at, rung(guess), rung(lowest))


def _typical(policy: str, cost_s: Numbers) -> float:
    """About the worker-seconds that a picture costs a policy: exact, or halfway to the cheapest."""
    exact = float(cost_s[EXACT])
    if policy in (ALONE, "clipper-ha"):
        return 1.15 * exact
    return math.sqrt(exact * float(cost_s.min()))


def seeds_of(seed: int, count: int) -> tuple[list[int], list[int]]:
    """The seeds of the runs that search, and of the `count` runs that judge."""
    first = 1000 * seed
    return list(range(first, first + SEARCHES)), list(range(first + FRESH, first + FRESH + count))
