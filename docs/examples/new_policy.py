"""A policy of one's own: exact while the queue is short, then the cheapest variant that may serve.

    python docs/examples/new_policy.py

compares it with two others on a virtual cluster. With a line in `POLICIES` of
`control/policies.py` it runs live, too: `argus serve --policy two-level`.
"""

from __future__ import annotations

import numpy as np

from argus.control.policy import Base, Cluster, Decision, first_free
from argus.control.request import Request
from argus.control.variants import EXACT
from argus.simulator.report import Report
from argus.simulator.runs import Scenario, kinds_of, simulate
from argus.simulator.worlds import load_world, workers_of

BUSY = 0.15  # share of the deadline that a request may wait before pictures are made cheaply


class TwoLevel(Base):
    """Two levels by the queue alone, on workers that all hold the exact model (`Base.plan`)."""

    def route(self, request: Request, cluster: Cluster) -> Decision:
        worker = first_free(cluster, int(self.table.model[EXACT]))
        if worker is None:
            return Decision(EXACT, None, "no worker can serve now")
        if cluster.wait_s[worker] <= BUSY * self.deadline_s:
            return Decision(EXACT, worker, "the queue is short")
        own = self.table.model == self.table.model[EXACT]
        able = np.flatnonzero(own & np.array(request.allowed))
        cheapest = min(able.tolist(), key=lambda v: self.costs_s[v, 0])
        return Decision(cheapest, worker, "the queue is long")


def compare(minutes: int = 10, load: float = 2.0) -> dict[str, Report]:
    """Reports of `two-level` and two others, at `load` times what exact pictures can carry."""
    world = load_world("pictogram")
    kinds = kinds_of(workers_of("pictogram"))
    rates = np.full(minutes, 60 * load * world.capacity_rps(list(kinds)))
    scenario = Scenario(world, kinds, rates, world.slo, own=True)
    reports = {name: simulate(scenario, name)[0] for name in ("price", "clipper-ha")}
    policy = TwoLevel(world.table, [scenario.slo])
    return {"two-level": simulate(scenario, "two-level", policy=policy)[0], **reports}


if __name__ == "__main__":
    for name, report in compare().items():
        whole = report.whole
        print(
            f"{name:10} {100 * whole.violation_ratio:5.1f} % violations, "
            f"effective quality {whole.effective_quality:.3f}"
        )
