"""What a policy is: it plans what the workers hold, and routes each request.

Axes of arrays: p prompts, v variants, w workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from argus.control.batching import Batching, StepBatching
from argus.control.request import Request
from argus.control.variants import EXACT, Flags, Numbers, VariantTable, Whole

NOTHING = -1  # the model of a worker that is dead or loading


@dataclass(frozen=True)
class Slo:
    """What a class of requests is promised: seconds from arrival, and the least quality."""

    deadline_s: float
    floor: float = 0.0


@dataclass(frozen=True)
class PlanningInput:
    """What is known when a plan is made.

    `rate` is the forecast of requests a second. Of recent prompts, `quality` (p, v) is predicted,
    `allowed` (p, v) says which variants could serve them and `slo` (p,) is their class; there
    may be none. `kinds` (w,) are the workers' types of device, `models` (w,) what they hold or
    load, `alive` (w,) who is there, `wait_s` (w,) how long a request that is sent there now waits.
    `usable` is the share of cached latents that come in time.
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


@dataclass
class Cluster:
    """The workers now, as lists by worker.

    `models` are what they can serve at once (`NOTHING` for one that loads or is dead), `wait_s` the
    estimated time until a request that is sent there runs, in seconds of the variant table,
    `running` the requests that are being denoised. `slowness` is the time that the workers take as
    a multiple of the table's.
    """

    now_s: float
    kinds: list[int]
    models: list[int]
    wait_s: list[float]
    running: list[int]
    slowness: float = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """Variant and worker for a request; without a worker it is shed. `reason` is for people, as is
    the `price` of a second of the worker, for policies that have one.

    A `best_effort` picture is made however late it gets. `instead_of` is what the policy decided,
    where its decision is not carried out.
    """

    variant: int
    worker: int | None
    reason: str
    price: float | None = None
    best_effort: bool = False
    instead_of: Decision | None = None


@dataclass(frozen=True)
class Plan:
    """The model every worker is to hold (w,), and what a plot of the policy would show."""

    models: Whole
    figures: dict[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """`informed` says whether it is told the prompts' predicted quality; `batching` is how its
    workers form batches; `reviews` says whether it judges pictures that were made. A policy may
    keep state, but no clock: times are given to it."""

    @property
    def informed(self) -> bool: ...

    @property
    def reviews(self) -> bool: ...

    @property
    def batching(self) -> Batching: ...

    def set_slos(self, slos: Sequence[Slo]) -> None:
        """What is promised from now on, by class, in seconds of the table: less of them when the
        workers turn out to be slower."""

    def plan(self, inputs: PlanningInput) -> Plan:
        """What the workers are to hold. Called every window, and when something happens."""

    def route(self, request: Request, cluster: Cluster) -> Decision:
        """Who serves a request, and how."""

    def review(self, request: Request, variant: int, judged: float) -> int | None:
        """The variant that is to replace a picture that was made, None if it will do.

        `judged` is what a discriminator thinks the picture is worth.
        """


class Base:
    """What most policies share: all workers hold the exact model, pictures are final.

    `costs_s` (v, d) are worker-seconds of a picture, in batches that the first deadline allows.
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


def first_free(cluster: Cluster, model: int) -> int | None:
    """The worker that holds a model and begins soonest; None if nobody holds it."""
    able = [worker for worker, held in enumerate(cluster.models) if held == model]
    return soonest(able, cluster)


def soonest(workers: Iterable[int], cluster: Cluster) -> int | None:
    """Who of the workers begins soonest; of those, who makes fewest."""
    return min(workers, key=lambda w: (cluster.wait_s[w], cluster.running[w]), default=None)


def assigned(counts: Sequence[int], held: Sequence[int], usable: Sequence[bool]) -> list[int]:
    """Models by worker, `counts[m]` of each, with as few loads as can be; the rest keep theirs."""
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
    """How many workers of each type hold or load each model (d, m)."""
    counts = np.zeros((len(table.types), len(table.models)), dtype=np.int64)
    np.add.at(counts, (inputs.kinds[inputs.alive], inputs.models[inputs.alive]), 1)
    return counts


def dealt(placement: Whole, inputs: PlanningInput) -> Whole:
    """A placement (d, m) as models by worker (w,), type by type, with as few loads as can be."""
    models = inputs.models
    for kind, counts in enumerate(placement.tolist()):
        usable = (inputs.alive & (inputs.kinds == kind)).tolist()
        models = np.array(assigned(counts, models.tolist(), usable))
    return models
