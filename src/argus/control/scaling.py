"""Accuracy scaling by smaller models, whatever the prompts: `proteus` and `sommelier`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from argus.control import planner
from argus.control.batching import Adaptive
from argus.control.policy import (
    Base,
    Cluster,
    Decision,
    Plan,
    PlanningInput,
    Slo,
    dealt,
    placed,
    soonest,
)
from argus.control.request import Request
from argus.control.variants import EXACT, VariantTable


class _Scaling(Base):
    """What both share: every worker serves by the exact variant or by one smaller model."""

    batching = Adaptive()

    def __init__(self, table: VariantTable, slos: Sequence[Slo]) -> None:
        super().__init__(table, slos)
        chosen = [v for v, s in enumerate(table.strategies) if s == "model" or v == EXACT]
        self._ladder = sorted(chosen, key=lambda v: -self.costs_s[v, 0])
        self._of_model = {int(table.model[v]): v for v in reversed(self._ladder)}

    def route(self, request: Request, cluster: Cluster) -> Decision:
        able = [w for w, model in enumerate(cluster.models) if model in self._of_model]
        worker = soonest(able, cluster)
        v = EXACT if worker is None else self._of_model[cluster.models[worker]]
        return Decision(v, worker, "the worker that begins soonest")


class Proteus(_Scaling):
    """Proteus (Ahmad et al., ASPLOS 2024): a MILP places model variants for the highest mean
    accuracy at the forecast load (section 4), requests are spread by its shares, and batches are as
    large as the deadline allows (section 5).

    Deviation: batch sizes are those of the variant table's costs, not variables of the programme.
    """

    def __init__(self, table: VariantTable, slos: Sequence[Slo]) -> None:
        super().__init__(table, slos)
        self._shares = np.zeros(len(table.models))
        self._served = np.zeros(len(table.models))
        self._last: planner.Plan | None = None

    def plan(self, inputs: PlanningInput) -> Plan:
        table, ladder = self.table, self._ladder
        counts = placed(inputs, table)
        self._last = plan = planner.plan(
            planner.Demand.alike(inputs.rate, table.mean_quality[ladder]),
            planner.Cluster(
                workers=counts.sum(axis=1),
                holds=np.arange(len(table.models))[:, None] == table.model[ladder][None],
                cost_s=self.costs_s[ladder],
                meets=np.ones((1, len(ladder), len(table.types)), dtype=bool),
                load_s=table.load_s,
                placed=counts,
                able=table.able,
            ),
            planner.Tuning(utilisation=1.0),
            self._last,
        )
        self._shares = plan.flow.sum(axis=(0, 1, 2))
        self._served = np.zeros(len(table.models))
        return Plan(dealt(plan.placement, inputs))

    def route(self, request: Request, cluster: Cluster) -> Decision:
        del request
        held = {model for model in cluster.models if model in self._of_model}
        if not held:
            return Decision(EXACT, None, "no worker can serve now")
        total = self._served.sum() + 1
        share = self._shares / max(self._shares.sum(), 1e-9)
        model = max(held, key=lambda m: share[m] * total - self._served[m])
        self._served[model] += 1
        able = [w for w, one in enumerate(cluster.models) if one == model]
        worker = soonest(able, cluster)
        return Decision(self._of_model[model], worker, "the plan's share")


@dataclass(frozen=True)
class SommelierTuning:
    """A worker changes to a smaller model when its wait is above `long` shares of the deadline, and
    to a larger one when it is below `short`. Assumed: the papers give neither."""

    long: float = 0.5
    short: float = 0.05


class Sommelier(_Scaling):
    """Sommelier (Guo et al., SIGMOD 2022) as the Argus paper uses it: each worker by itself
    changes to a smaller model when its queue is long, and to a larger one when it is short."""

    def __init__(
        self, table: VariantTable, slos: Sequence[Slo], tuning: SommelierTuning = SommelierTuning()
    ) -> None:
        super().__init__(table, slos)
        self.tuning = tuning

    def plan(self, inputs: PlanningInput) -> Plan:
        table, models = self.table, inputs.models.copy()
        for w in np.flatnonzero(inputs.alive):
            at = self._ladder.index(self._of_model.get(int(models[w]), EXACT))
            if inputs.wait_s[w] > self.tuning.long * self.deadline_s and at + 1 < len(self._ladder):
                models[w] = table.model[self._ladder[at + 1]]
            elif inputs.wait_s[w] < self.tuning.short * self.deadline_s and at > 0:
                models[w] = table.model[self._ladder[at - 1]]
        return Plan(models)
