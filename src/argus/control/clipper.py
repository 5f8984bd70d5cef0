"""Clipper (Crankshaw et al., NSDI 2017) as the Argus paper uses it: one variant for everyone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from argus.control.batching import AdditiveIncrease
from argus.control.menu import EXACT, Menu
from argus.control.policy import (
    Base,
    Candidate,
    Cluster,
    Decision,
    Outlook,
    Plan,
    Promise,
    first_free,
)


class ClipperHA(Base):
    """Highest accuracy: every prompt gets the exact variant; batches grow additively."""

    batching = AdditiveIncrease()
    variant = EXACT
    reason = "this policy serves every prompt exactly"

    def plan(self, outlook: Outlook) -> Plan:
        return Plan(np.full(len(outlook.kinds), self.menu.model[self.variant]))

    def route(self, candidate: Candidate, cluster: Cluster) -> Decision:
        worker = first_free(cluster, int(self.menu.model[self.variant]))
        return Decision(self.variant, worker, self.reason)


class ClipperHT(ClipperHA):
    """Highest throughput: every prompt gets the cheapest variant of the smaller models; of all
    variants that need no neighbour where there are none."""

    reason = "this policy serves every prompt by the fastest model"

    def __init__(self, menu: Menu, promises: Sequence[Promise]) -> None:
        super().__init__(menu, promises)
        costs = menu.cost_s(math.inf).min(axis=1)
        smaller = [v for v, s in enumerate(menu.strategies) if s == "model"]
        always = [v for v, s in enumerate(menu.strategies) if s in ("steps", "exact")]
        self.variant = min(smaller or always, key=lambda v: costs[v])
