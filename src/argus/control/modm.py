"""MoDM: cached final pictures, noised again and refined by a smaller model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from argus.control.batching import Adaptive
from argus.control.policy import (
    Base,
    Cluster,
    Decision,
    Plan,
    PlanningInput,
    Slo,
    assigned,
    first_free,
)
from argus.control.request import Request
from argus.control.variants import EXACT, VariantTable


@dataclass(frozen=True)
class MoDMTuning:
    """`memory` is the weight of one request in the moving hit rate. Assumed."""

    memory: float = 0.02


class MoDM(Base):
    """A mixture of diffusion models (Xia et al., 2025): the smaller model refines hits, the large
    one serves misses; workers are split between both by the hit rate.

    A hit is a neighbour more similar than the `refine` variant's threshold. A family without such
    a variant uses its exact model with the largest skip.
    """

    batching = Adaptive()

    def __init__(
        self, table: VariantTable, slos: Sequence[Slo], tuning: MoDMTuning = MoDMTuning()
    ) -> None:
        super().__init__(table, slos)
        self.tuning = tuning
        refining = [v for v, s in enumerate(table.strategies) if s == "refine"]
        skipping = [v for v, s in enumerate(table.strategies) if s == "cache"]
        self.refine = min(refining or skipping or [EXACT], key=lambda v: self.costs_s[v].min())
        self._hits = 0.5

    def plan(self, inputs: PlanningInput) -> Plan:
        small, large = int(self.table.model[self.refine]), int(self.table.model[EXACT])
        workers = int(inputs.alive.sum())
        if small == large or not workers:
            return Plan(np.full(len(inputs.kinds), large))
        hits = self._hits * float(self.costs_s[self.refine].mean())
        misses = (1 - self._hits) * float(self.costs_s[EXACT].mean())
        counts = [0] * len(self.table.models)
        counts[small] = min(workers - 1, round(workers * hits / (hits + misses)))
        counts[large] = workers - counts[small]
        return Plan(np.array(assigned(counts, inputs.models.tolist(), inputs.alive.tolist())))

    def route(self, request: Request, cluster: Cluster) -> Decision:
        similarity, least = request.similarity, self.table.least_similarity[self.refine]
        hit = similarity is not None and similarity > least and request.allowed[self.refine]
        self._hits += self.tuning.memory * (hit - self._hits)
        for v in (self.refine, EXACT) if hit else (EXACT,):
            worker = first_free(cluster, int(self.table.model[v]))
            if worker is not None:
                return Decision(v, worker, "refines a neighbour" if v != EXACT else "no hit")
        return Decision(EXACT, None, "no worker can serve now")
