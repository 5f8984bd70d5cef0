"""Clipper (Crankshaw et al., NSDI 2017) as the Argus paper uses it: one variant for all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from argus.control.batching import AdditiveIncrease, Batching
from argus.control.policy import (
    Base,
    Cluster,
    Decision,
    Plan,
    PlanningInput,
    Slo,
    first_free,
)
from argus.control.request import Request
from argus.control.variants import EXACT, VariantTable


class ClipperHA(Base):
    """Highest accuracy: the exact variant serves every prompt; batches grow additively."""

    batching: Batching = AdditiveIncrease()
    variant = EXACT
    reason = "this policy serves every prompt exactly"

    def plan(self, inputs: PlanningInput) -> Plan:
        return Plan(np.full(len(inputs.kinds), self.table.model[self.variant]))

    def route(self, request: Request, cluster: Cluster) -> Decision:
        worker = first_free(cluster, int(self.table.model[self.variant]))
        return Decision(self.variant, worker, self.reason)


class ClipperHT(ClipperHA):
    """Highest throughput: the cheapest variant of the smaller models serves every prompt; without
    smaller models, the cheapest variant that needs no neighbour."""

    reason = "this policy serves every prompt by the fastest model"

    def __init__(self, table: VariantTable, slos: Sequence[Slo]) -> None:
        super().__init__(table, slos)
        costs = table.cost_s(math.inf).min(axis=1)
        smaller = [v for v, s in enumerate(table.strategies) if s == "model"]
        always = [v for v, s in enumerate(table.strategies) if s in ("steps", "exact")]
        self.variant = min(smaller or always, key=lambda v: costs[v])
