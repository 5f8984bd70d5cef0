"""`argus` as published (arXiv 2511.06724), and `pac`, its prompt-agnostic baseline."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from argus.control import planner
from argus.control.batching import Switch
from argus.control.oda import align
from argus.control.policy import (
    Base,
    Cluster,
    Decision,
    Plan,
    PlanningInput,
    Slo,
    first_free,
    soonest,
)
from argus.control.request import Request
from argus.control.variants import EXACT, Numbers, VariantTable


@dataclass(frozen=True)
class ArgusTuning:
    """`good_enough` is the least predicted quality at which a level suits a prompt. Levels skip
    steps while at least a share `slow_store` of the cached latents comes in time. Both are assumed:
    the paper gives neither."""

    good_enough: float = 0.95
    slow_store: float = 0.5


class Argus(Base):
    """A best level per prompt, levels assigned to workers by a MILP, ODA to match the two.

    Every worker serves one approximation level: skips of the exact model (approximate caching), or,
    when fewer than a share `slow_store` of latents come in time, smaller models. The allocator
    maximises the mean quality of what it can serve of the forecast load; ODA (`oda.align`) spreads
    prompts of a best level over the levels that are served.

    Deviations: the best level is the fastest whose predicted quality is at least `good_enough`,
    where the paper trains a classifier on such labels; a prompt without a neighbour that is routed
    to a level with skips runs the exact variant there.
    """

    informed = True
    batching = Switch()

    def __init__(
        self,
        table: VariantTable,
        slos: Sequence[Slo],
        tuning: ArgusTuning = ArgusTuning(),
        seed: int = 0,
    ) -> None:
        super().__init__(table, slos)
        self.tuning = tuning
        self._random = random.Random(f"argus {seed}")
        self._caching = self._by_speed("cache")
        self._smaller = self._by_speed("model")
        self._levels = self._caching
        self._coupling: list[list[float]] = []
        self._of_worker: list[int] = []

    def _by_speed(self, strategy: str) -> list[int]:
        """The exact variant and those of a strategy, from slowest to fastest."""
        chosen = [v for v, s in enumerate(self.table.strategies) if s == strategy or v == EXACT]
        return sorted(chosen, key=lambda v: -self.costs_s[v, 0])

    def plan(self, inputs: PlanningInput) -> Plan:
        usable = inputs.usable >= self.tuning.slow_store
        self._levels = self._caching if usable and len(self._caching) > 1 else self._smaller
        levels, table = self._levels, self.table
        value = self.level_quality(inputs)[levels]
        kinds, alive = inputs.kinds, inputs.alive
        workers = np.bincount(kinds[alive], minlength=len(table.types))
        held = self._counted(inputs)
        load_s = table.load_s[:, table.model[levels]]
        if len(set(table.model[levels].tolist())) == 1:
            load_s = np.zeros_like(load_s)
        plan = planner.plan(
            planner.Demand.alike(inputs.rate, value),
            planner.Cluster(
                workers=workers,
                holds=np.eye(len(levels), dtype=bool),
                cost_s=self.costs_s[levels],
                meets=np.ones((1, len(levels), len(table.types)), dtype=bool),
                load_s=load_s,
                placed=held,
                able=table.holds[:, table.model[levels]],
            ),
            planner.Tuning(utilisation=1.0),
        )
        spare = workers - plan.placement.sum(axis=1)
        counts = plan.placement.copy()
        served = plan.flow.sum(axis=(0, 2, 3))
        busiest = int(served.argmax())
        counts[:, busiest] += spare
        shares = served / served.sum() if served.sum() > 0 else np.eye(len(levels))[0]
        self._coupling = align(self.best_shares(inputs), shares).tolist()
        self._of_worker = self._dealt(counts, inputs)
        models = np.where(alive, table.model[self._of_worker], inputs.models)
        return Plan(models, {"level": float(shares @ np.arange(len(levels)))})

    def _counted(self, inputs: PlanningInput) -> planner.Whole:
        """Number of workers (d, level) that serve each level now."""
        held = np.zeros((len(self.table.types), len(self._levels)), dtype=np.int64)
        for worker, v in enumerate(self._of_worker):
            if inputs.alive[worker] and v in self._levels:
                held[inputs.kinds[worker], self._levels.index(v)] += 1
        return held

    def _dealt(self, counts: planner.Whole, inputs: PlanningInput) -> list[int]:
        """The variant of every worker, for `counts` (d, level), with as few changes as possible."""
        left, result = counts.tolist(), [EXACT] * len(inputs.kinds)
        waiting = []
        for worker, kind in enumerate(inputs.kinds.tolist()):
            now = self._of_worker[worker] if worker < len(self._of_worker) else None
            if now in self._levels and inputs.alive[worker]:
                at = self._levels.index(now)
                if left[kind][at] > 0:
                    left[kind][at] -= 1
                    result[worker] = now
                    continue
            waiting.append(worker)
        for worker in waiting:
            kind = int(inputs.kinds[worker])
            at = next((at for at, count in enumerate(left[kind]) if count > 0), 0)
            left[kind][at] -= 1
            result[worker] = self._levels[at]
        return result

    def level_quality(self, inputs: PlanningInput) -> Numbers:
        """Mean quality (v,) over the recent prompts that each variant can serve."""
        if not len(inputs.quality):
            return self.table.mean_quality
        seen = inputs.allowed.sum(axis=0)
        total = np.where(inputs.allowed, inputs.quality, 0.0).sum(axis=0)
        mean: Numbers = np.where(seen > 0, total / np.maximum(seen, 1), self.table.mean_quality)
        return mean

    def best_shares(self, inputs: PlanningInput) -> Numbers:
        """Shares (level,) of recent prompts by their best level."""
        levels = self._levels
        if not len(inputs.quality):
            exact: Numbers = np.eye(len(levels))[0]
            return exact
        good = (inputs.quality[:, levels] >= self.tuning.good_enough) & inputs.allowed[:, levels]
        good[:, 0] = True
        fastest = len(levels) - 1 - good[:, ::-1].argmax(axis=1)
        shares: Numbers = np.bincount(fastest, minlength=len(levels)) / len(fastest)
        return shares

    def best_level(self, request: Request) -> int:
        """Index of the fastest level that is good enough for a request's prompt."""
        quality, allowed = request.quality, request.allowed
        for at in range(len(self._levels) - 1, 0, -1):
            v = self._levels[at]
            if allowed[v] and quality[v] >= self.tuning.good_enough:
                return at
        return 0

    def route(self, request: Request, cluster: Cluster) -> Decision:
        if not self._coupling:
            worker = first_free(cluster, int(self.table.model[EXACT]))
            return Decision(EXACT, worker, "no plan yet")
        best = self.best_level(request)
        at = self._random.choices(range(len(self._levels)), self._coupling[best])[0]
        v = self._levels[at]
        serving = [w for w in _serving(cluster) if self._of_worker[w] == v]
        worker = soonest(serving, cluster)
        if worker is None:
            worker = soonest(_serving(cluster), cluster)
        if worker is None:
            return Decision(v, None, "no worker can serve now")
        v = self._of_worker[worker] if self.table.model[v] != cluster.models[worker] else v
        if not request.allowed[v]:
            v = EXACT
        if self.table.model[v] != cluster.models[worker]:  # the worker holds another model
            v = int(np.flatnonzero(self.table.model == cluster.models[worker])[0])
        return Decision(v, worker, f"best level {best}, served at {at}")


class Pac(Argus):
    """Prompt-agnostic: the level of every request is drawn from the planned shares."""

    informed = False

    def level_quality(self, inputs: PlanningInput) -> Numbers:
        return self.table.mean_quality

    def best_shares(self, inputs: PlanningInput) -> Numbers:
        exact: Numbers = np.eye(len(self._levels))[0]
        return exact

    def best_level(self, request: Request) -> int:
        return 0


def _serving(cluster: Cluster) -> list[int]:
    return [worker for worker, model in enumerate(cluster.models) if model >= 0]
