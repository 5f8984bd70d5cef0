"""Runs of a world under a trace, by policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from argus.control.policies import new_policy
from argus.control.policy import Policy, Slo
from argus.control.variants import Numbers, Whole
from argus.simulator.cluster import Happening, Setup, Simulation
from argus.simulator.report import Report, report
from argus.simulator.requests import Requests
from argus.simulator.traces import PAPER_CAPACITY, arrivals, topics
from argus.simulator.world import World


@dataclass(frozen=True)
class Scenario:
    """The world, workers and workload that all policies of a comparison share.

    `rates` (minutes,) are requests a minute before they are multiplied by `load`. Unless they are
    the user's `own`, they are for the published cluster, and are scaled to the exact pictures a
    minute of this one (the world's `capacity_qpm`, or what the workers serve). Arrivals are random,
    or at `at_s` (n,) seconds, ascending, if those are given for an `own` workload and the load is
    1, or, if they are to be `compressed`, in less time the higher the load and the capacity are.
    `topics` (n,) are theirs; None: drawn at random.
    `slo_multiple` is the deadline in multiples of the exact variant's latency. `at_hand`: workers
    change models without a load.
    """

    world: World
    kinds: tuple[int, ...]
    rates: Numbers
    slo_multiple: float
    seed: int = 0
    load: float = 1.0
    events: tuple[tuple[float, Happening], ...] = ()
    own: bool = False
    at_s: Numbers | None = None
    topics: Whole | None = None
    compressed: bool = False
    at_hand: bool = False

    @property
    def slo(self) -> Slo:
        return Slo(self.slo_multiple * self.world.table.slo_s)

    @property
    def scaled(self) -> Numbers:
        """Requests a minute (minutes,) of this scenario."""
        if self.own:
            return self.load * self.rates
        times = self._times_s
        if times is None:
            return self._height * self.rates
        return np.bincount((times // 60).astype(int)).astype(float)

    @property
    def _height(self) -> float:
        """The load beside the published cluster's."""
        carried = 60 * self.world.capacity_rps(list(self.kinds))
        return self.load * (self.world.capacity_qpm or carried) / PAPER_CAPACITY

    @property
    def _times_s(self) -> Numbers | None:
        """Seconds (n,) at which requests arrive, None if at random."""
        if self.at_s is None:
            return None
        if self.compressed:
            return self.at_s / self._height
        return self.at_s if self.own and self.load == 1 else None

    def requests(self) -> Requests:
        """New requests, the same for every policy."""
        rng = np.random.default_rng(self.seed)
        times = self._times_s
        if times is None:
            times = arrivals(self.scaled, rng)
        if self.topics is None or self._times_s is None:
            prompts = rng.integers(len(self.world.truth), size=len(times))
            return Requests.new(times, prompts, topics(len(times), self.world.drawing, rng))
        of_topic = rng.integers(len(self.world.truth), size=self.topics.max() + 1)
        return Requests.new(times, of_topic[self.topics], self.topics)


def simulate(
    scenario: Scenario,
    name: str,
    on_progress: Callable[[int], None] | None = None,
    policy: Policy | None = None,
) -> tuple[Report, Simulation]:
    """Run a scenario with the policy of a name, or with `policy` if that is given."""
    scaled = scenario.scaled

    def rate(now: float) -> float:
        return float(scaled[min(len(scaled) - 1, int((now + 15) // 60))]) / 60

    oracle = name == "oracle"
    setup = Setup(
        scenario.slo, scenario.kinds, scenario.seed, scenario.events,
        at_hand=scenario.at_hand, known_rate=rate if oracle else None, truthful=oracle,
    )  # fmt: skip
    chosen = policy or new_policy(name, scenario.world.table, [scenario.slo])
    simulation = Simulation(scenario.world, chosen, scenario.requests(), setup, on_progress)
    simulation.run()
    return report(name, simulation, scaled), simulation


@dataclass(frozen=True)
class Target:
    """The SLO of a run: the highest ratio of violations and the least effective quality."""

    violations: float
    quality: float


def most_load(
    scenario: Scenario,
    name: str,
    target: Target,
    steps: int = 7,
    top: float = 4.0,
    known: dict[float, Report] | None = None,
) -> float:
    """The highest load, as a multiple of the trace's rates, at which a policy meets the SLO
    `target`; 0 if it meets it at none, and at most `top`.

    The trace keeps its shape; its height is found by `steps` bisections. `known` caches reports by
    load for other SLOs.
    """
    reports = {} if known is None else known

    def holds(load: float) -> bool:
        if load not in reports:
            reports[load], _ = simulate(replace(scenario, load=load), name)
        whole = reports[load].whole
        return (
            whole.violation_ratio <= target.violations and whole.effective_quality >= target.quality
        )

    low, high = 0.0, top
    for _ in range(steps):
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def kinds_of(counts: Sequence[int]) -> tuple[int, ...]:
    """The type of device of every worker, from the number of workers of each type."""
    return tuple(kind for kind, count in enumerate(counts) for _ in range(count))
