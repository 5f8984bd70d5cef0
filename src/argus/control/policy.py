"""The interface of policies, which plan the workers' models and route each request.

Axes of arrays: p prompts, v variants, w workers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from argus.control.batching import Batching, StepBatching
from argus.control.request import Request
from argus.control.variants import EXACT, Flags, Numbers, VariantTable, Whole

KEPT = "kept"  # the source of a plan that is the last one
NOTHING = -1  # the model of a worker that is dead or loading

# A variant on a worker as a policy weighed it for a request: its worth, the variant, the worker,
# the price of the worker's second, the share of the slack that wait and work take, and the cost in
# worker-seconds of the variant table. A tuple, since every decision makes a dozen.
Option = tuple[float, int, int, float, float, float]
Place = tuple[int, int]  # type of device and model
Soonest = tuple[float, int, int]  # wait in seconds, number of running requests, worker


@dataclass(frozen=True)
class Slo:
    """An SLO class: the deadline in seconds from arrival, and the least quality."""

    deadline_s: float
    floor: float = 0.0


@dataclass(frozen=True)
class PlanningInput:
    """What a plan is made from.

    `rate` is the forecast of requests a second. For recent prompts, `quality` (p, v) is predicted,
    `allowed` (p, v) says which variants can serve them and `slo` (p,) is their SLO class; p may be
    0. `kinds` (w,) are the workers' types of device, `models` (w,) what they are to hold, `alive`
    (w,) which of them are alive, `wait_s` (w,) the predicted wait of a request sent there now.
    `usable` is the share of cached latents that come in time, `exact_share` the mean share of an
    exact picture's work that these requests allow. `doubt` is the mean relative error of the
    forecast so far.
    """

    now_s: float
    rate: float
    quality: Numbers
    allowed: Flags
    slo: Whole
    kinds: Whole
    models: Whole
    alive: Flags
    wait_s: Numbers
    usable: float = 1.0
    exact_share: float = 1.0
    doubt: float = 0.0


@dataclass
class Cluster:
    """The workers now, as lists by worker.

    `models` are what they can serve now (`NOTHING` for one that loads or is dead), `wait_s` the
    predicted wait of a request sent there now, in seconds of the variant table, `running` the
    numbers of running requests. `slowness` is the time that the workers take as a multiple of the
    table's. `index` finds what `soonest` gives without looking at all workers.
    """

    now_s: float
    kinds: list[int]
    models: list[int]
    wait_s: Sequence[float]
    running: list[int]
    slowness: float = 1.0
    index: Callable[[], dict[Place, Soonest]] | None = None

    def soonest(self) -> dict[Place, Soonest]:
        """Of each type and model the worker that begins soonest, among equals the one with fewest
        running requests."""
        if self.index is not None:
            return self.index()
        best: dict[Place, Soonest] = {}
        for worker, model in enumerate(self.models):
            if model >= 0:
                place = self.kinds[worker], model
                wait, running = self.wait_s[worker], self.running[worker]
                known = best.get(place)
                if known is None or (wait, running) < known[:2]:
                    best[place] = wait, running, worker
        return best

    def without(self, numbers: Collection[int]) -> Cluster:
        """The workers, of which some serve nothing; all as they are if no other serves."""
        models = [NOTHING if w in numbers else held for w, held in enumerate(self.models)]
        if all(held == NOTHING for held in models):
            return self
        return replace(self, models=models, index=None)

    def rather_without(self, numbers: Collection[int]) -> tuple[Cluster, ...]:
        """To be tried in turn: the workers without some, where others serve, and all of them."""
        others = self.without(numbers) if numbers else self
        return (self,) if others is self else (others, self)


@dataclass(frozen=True, slots=True)
class Decision:
    """Variant and worker for a request; without a worker it is shed. `reason` and, for policies
    that have them, the `price` of a worker-second and the `options` weighed are for reports.

    A `best_effort` request is never dropped for lateness. `instead_of` is the policy's decision
    where another one is carried out.
    """

    variant: int
    worker: int | None
    reason: str
    price: float | None = None
    best_effort: bool = False
    instead_of: Decision | None = None
    options: Sequence[Option] = ()


@dataclass(frozen=True)
class Plan:
    """The model every worker is to hold (w,), and figures for plots.

    `source` says where it comes from: a `policy`, a `solver` or what stood in for it (`last`,
    `greedy`), or that the last one was `kept`. `prices` (d, m) are quality per worker-second, NaN
    for a model that no worker is to hold; None from policies without prices.
    """

    models: Whole
    figures: dict[str, float] = field(default_factory=dict)
    source: str = "policy"
    prices: Numbers | None = None


class Policy(Protocol):
    """Called by the controller, and for reviews by its driver. `informed` says whether the policy
    gets the prompts' predicted quality, `reviews` whether it reviews pictures; `batching` is how
    its workers form batches. A policy may keep state, but has no clock: times are arguments."""

    @property
    def informed(self) -> bool: ...

    @property
    def reviews(self) -> bool: ...

    @property
    def batching(self) -> Batching: ...

    def set_slos(self, slos: Sequence[Slo]) -> None:
        """Set the SLO classes, with deadlines in seconds of the variant table: the slower the
        workers, the shorter."""

    def plan(self, inputs: PlanningInput) -> Plan:
        """The models to hold. Called every window, and when the load or the workers change."""

    def route(self, request: Request, cluster: Cluster) -> Decision:
        """The variant and the worker of a request."""

    def review(self, request: Request, variant: int, judged: float) -> int | None:
        """The variant by which a picture is to be made again, None to keep it.

        `judged` is the picture's quality by a discriminator.
        """

    def prices(self, cluster: Cluster) -> Mapping[int, float]:
        """The price of a worker-second now, in quality, by number of the model; none for models
        that no worker serves, and for policies without prices."""


class Base:
    """What most policies share: all workers hold the exact model, pictures are not reviewed.

    `costs_s` (v, d) are worker-seconds per picture, in batches that the shortest deadline allows.
    """

    informed = False
    reviews = False
    batching: Batching = StepBatching()

    def __init__(self, table: VariantTable, slos: Sequence[Slo]) -> None:
        self.table = table
        self.set_slos(slos)

    def set_slos(self, slos: Sequence[Slo]) -> None:
        self.slos = tuple(slos)
        self.deadline_s = min(slo.deadline_s for slo in slos)
        self.costs_s = self.table.cost_s(self.deadline_s)

    def plan(self, inputs: PlanningInput) -> Plan:
        return Plan(np.full(len(inputs.kinds), self.table.model[EXACT]))

    def review(self, request: Request, variant: int, judged: float) -> int | None:
        del request, variant, judged
        return None

    def prices(self, cluster: Cluster) -> Mapping[int, float]:
        del cluster
        return {}


def first_free(cluster: Cluster, model: int) -> int | None:
    """The worker that holds a model and begins soonest; None if no worker holds it."""
    able = [one for (_, held), one in cluster.soonest().items() if held == model]
    return min(able)[2] if able else None


def soonest(workers: Iterable[int], cluster: Cluster) -> int | None:
    """The worker that begins soonest, among equals the one with fewest running requests."""
    return min(workers, key=lambda w: (cluster.wait_s[w], cluster.running[w]), default=None)


def assigned(counts: Sequence[int], held: Sequence[int], usable: Sequence[bool]) -> list[int]:
    """Models by worker (w,), `counts[m]` of each, with as few loads as possible; the other workers
    keep theirs."""
    left = list(counts)
    result = list(held)
    moving = []
    for worker, model in enumerate(held):
        if not usable[worker]:
            continue
        if model >= 0 and left[model] > 0:
            left[model] -= 1
        else:
            moving.append(worker)
    wanted = [model for model, count in enumerate(left) for _ in range(count)]
    for worker, model in zip(moving, wanted, strict=False):
        result[worker] = model
    return result


def placed(inputs: PlanningInput, table: VariantTable) -> Whole:
    """Number of workers (d, m) of each type that hold or load each model."""
    counts = np.zeros((len(table.types), len(table.models)), dtype=np.int64)
    np.add.at(counts, (inputs.kinds[inputs.alive], inputs.models[inputs.alive]), 1)
    return counts


def dealt(placement: Whole, inputs: PlanningInput) -> Whole:
    """A placement (d, m) as models by worker (w,), with as few loads as possible."""
    models = inputs.models
    for kind, counts in enumerate(placement.tolist()):
        usable = (inputs.alive & (inputs.kinds == kind)).tolist()
        models = np.array(assigned(counts, models.tolist(), usable))
    return models
