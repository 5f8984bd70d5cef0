"""The figures of a run, by which policies are compared."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from argus.control.variants import Flags, Numbers
from argus.simulator.cluster import Simulation
from argus.simulator.requests import ON_TIME, OUTCOMES, Requests

HIGH = 0.9  # share of the highest rate from which a minute counts as high load


@dataclass(frozen=True)
class Figures:
    """Figures of some minutes of a run. `offered_qpm` and `throughput_qpm` are per minute;
    `quality` is the mean over on-time answers, `effective_quality` over all requests, those without
    one counted as 0; `p50_s` and `p99_s` are latencies of answers."""

    offered_qpm: float
    throughput_qpm: float
    violation_ratio: float
    quality: float
    effective_quality: float
    p50_s: float
    p99_s: float
    outcomes: dict[str, int]


@dataclass(frozen=True)
class Report:
    """A run: figures of the whole trace and of the minutes of high load, the share of time in which
    workers were busy, the number of loads, the share of requests with a neighbour, and worker-hours
    per 1,000 on-time pictures."""

    policy: str
    whole: Figures
    high_load: Figures
    utilisation: float
    loads: int
    hit_ratio: float
    worker_hours_per_1000: float

    def to_json(self) -> dict[str, object]:
        """As plain data, the figures of the whole trace at its top."""
        content = asdict(self)
        return {**content.pop("whole"), **content}


def report(name: str, simulation: Simulation, rates: Numbers) -> Report:
    requests = simulation.requests
    minute = (requests.arrived_s // 60).astype(int)
    high = rates >= HIGH * rates.max()
    whole = figures(requests, np.ones(len(requests.outcome), dtype=bool), len(rates))
    seconds = 60.0 * len(rates)
    workers = len(simulation.workers)
    on_time = max(1, whole.outcomes["on time"])
    return Report(
        name,
        whole,
        figures(requests, high[minute], int(high.sum())),
        sum(worker.busy_s for worker in simulation.workers) / (seconds * workers),
        simulation.ledger.loads,
        simulation.ledger.hits / max(1, simulation.ledger.lookups),
        workers * seconds / 3600 * 1000 / on_time,
    )


def figures(requests: Requests, chosen: Flags, minutes: float) -> Figures:
    """The figures of the `chosen` requests (n,), which arrived within `minutes` minutes."""
    outcome = requests.outcome[chosen]
    offered = len(outcome)
    on_time = outcome == ON_TIME
    quality = requests.quality[chosen][on_time].astype(float)
    taken = (requests.ended_s - requests.arrived_s)[chosen][requests.variant[chosen] >= 0]
    p50, p99 = np.percentile(taken, [50, 99]) if len(taken) else (np.nan, np.nan)
    counts = np.bincount(outcome, minlength=len(OUTCOMES))
    return Figures(
        offered / max(minutes, 1e-9),
        float(on_time.sum()) / max(minutes, 1e-9),
        float((~on_time).sum()) / max(1, offered),
        float(quality.mean()) if len(quality) else 0.0,
        float(quality.sum()) / max(1, offered),
        float(p50),
        float(p99),
        {name: int(count) for name, count in zip(OUTCOMES, counts, strict=True)},
    )
