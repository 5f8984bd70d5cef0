"""A light model first, the heavy one for pictures that fail review: `cascade` and `hadis`."""

from __future__ import annotations

from collections import deque
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
class CascadeTuning:
    """The threshold is a quantile of the last `recent` judged pictures; `utilisation` is the
    planned share of time in which workers are busy; `hadis` sends requests for a share `direct` of
    the heavy workers' capacity directly to them. All are assumed: the papers give none. `light` and
    `heavy` are the pair of variants; by default the cheapest smaller one and the exact one."""

    recent: int = 500
    utilisation: float = 0.9
    direct: float = 0.5
    light: int | None = None
    heavy: int = EXACT


class Cascade(Base):
    """DiffServe (Ahmad et al., MLSys 2025): a discriminator judges the light model's picture, and
    the heavy model makes it again if its score is below a threshold.

    Its programme (section 4) splits the workers and sets the threshold so that pictures are made
    again up to the heavy workers' capacity. `review` is given the discriminator's score.
    """

    reviews = True
    batching = Adaptive()

    def __init__(
        self,
        table: VariantTable,
        slos: Sequence[Slo],
        tuning: CascadeTuning = CascadeTuning(),
    ) -> None:
        super().__init__(table, slos)
        self.tuning = tuning
        smaller = [v for v, s in enumerate(table.strategies) if s == "model"]
        others = smaller or [v for v, s in enumerate(table.strategies) if s == "steps"] or [EXACT]
        cheapest = min(others, key=lambda v: self.costs_s[v].min())
        self.light = cheapest if tuning.light is None else tuning.light
        self.heavy = tuning.heavy
        self.share = 1.0
        self._judged: deque[float] = deque(maxlen=tuning.recent)

    def plan(self, inputs: PlanningInput) -> Plan:
        table, rate = self.table, max(inputs.rate, 1e-6)
        light, heavy = int(table.model[self.light]), int(table.model[self.heavy])
        workers = int(inputs.alive.sum())
        if not workers:
            return Plan(inputs.models)
        kinds = inputs.kinds[inputs.alive]
        light_s = float(self.costs_s[self.light, kinds].mean())
        heavy_s = float(self.costs_s[self.heavy, kinds].mean())
        needed = int(np.ceil(rate * light_s / self.tuning.utilisation))
        if light == heavy:
            left = self.tuning.utilisation * workers - rate * light_s
            self.share = float(np.clip(left / (rate * heavy_s), 0.0, 1.0))
            return Plan(np.full(len(inputs.kinds), heavy))
        first = max(1, min(workers, needed))
        self.share = min(1.0, self.tuning.utilisation * (workers - first) / (rate * heavy_s))
        counts = [0] * len(table.models)
        counts[light], counts[heavy] = first, workers - first
        return Plan(
            np.array(assigned(counts, inputs.models.tolist(), inputs.alive.tolist())),
            {"made again": self.share},
        )

    def route(self, request: Request, cluster: Cluster) -> Decision:
        for v in (self.light, self.heavy):
            worker = first_free(cluster, int(self.table.model[v]))
            if worker is not None:
                return Decision(v, worker, "the light model first")
        return Decision(self.heavy, None, "no worker can serve now")

    def review(self, request: Request, variant: int, judged: float) -> int | None:
        if variant != self.light:
            return None
        self._judged.append(judged)
        return self.heavy if judged < self._threshold() else None

    def _threshold(self) -> float:
        if self.share <= 0:
            return -float("inf")
        if self.share >= 1:
            return float("inf")
        ordered = sorted(self._judged)
        return ordered[min(len(ordered) - 1, int(self.share * len(ordered)))]


class Hadis(Cascade):
    """HADIS: the cascade with a direct route to the heavy model for prompts predicted hard.

    The prompts with the least predicted quality at the light model are routed directly, up to a
    share of the heavy workers' capacity; a picture that is made twice costs both runs.
    """

    informed = True

    def __init__(
        self,
        table: VariantTable,
        slos: Sequence[Slo],
        tuning: CascadeTuning = CascadeTuning(),
    ) -> None:
        super().__init__(table, slos, tuning)
        self._expected: deque[float] = deque(maxlen=tuning.recent)

    def route(self, request: Request, cluster: Cluster) -> Decision:
        expected = request.quality[self.light]
        self._expected.append(expected)
        ordered = sorted(self._expected)
        hard = ordered[min(len(ordered) - 1, int(self.tuning.direct * self.share * len(ordered)))]
        if expected < hard:
            worker = first_free(cluster, int(self.table.model[self.heavy]))
            if worker is not None:
                return Decision(self.heavy, worker, "predicted too hard for the light model")
        return super().route(request, cluster)
