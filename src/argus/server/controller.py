"""Puts the policy in charge of real workers: asks it about each request, and for plans."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from argus.control.forecast import Forecast
from argus.control.policies import new_policy
from argus.control.policy import (
    Cluster,
    Decision,
    PlanningInput,
    Policy,
    Slo,
    first_free,
)
from argus.control.request import Request
from argus.control.slowness import LOOKS, SlownessTracker
from argus.control.variants import EXACT, VariantTable
from argus.core.errors import BadRequest
from argus.core.family import Family, skip_name
from argus.server.metrics import Metrics
from argus.server.slo import Classes, ServedSlo
from argus.workers.fleet import Fleet

if TYPE_CHECKING:
    from argus.quality.predictor import Prediction

log = logging.getLogger(__name__)

RECENT = 1000
FUTURE = ("oracle",)  # they know what is to come


@dataclass(frozen=True)
class Asked:
    """A picture that is to be made.

    `similarity` and `stored` are of the neighbour: none, or the K whose latents are there.
    `slack_s` is what is left of its deadline, `size_factor` its work as a multiple of that at the
    family's own size and guidance. `least` is the quality it must have, by the lower bound. With
    `own_guidance` only variants of the exact model make sense.
    """

    prediction: Prediction | None
    similarity: float | None
    stored: Sequence[int]
    slo: ServedSlo
    slack_s: float
    size_factor: float = 1.0
    least: float = 0.0
    own_guidance: bool = False


@dataclass(frozen=True)
class Choice:
    """How a picture is to be made, by whom, and why, for who reads the answer. Nobody is to make it
    when `worker` is None: it is shed. `quality` and `low` are predicted, `price` is of a second.
    `patient` ones are made however late it gets. `instead_of` is what the policy chose, where it
    decides nothing."""

    variant: str
    worker: int | None
    reason: str
    quality: float | None = None
    low: float | None = None
    price: float | None = None
    patient: bool = False
    instead_of: Choice | None = None

    def because(self, reason: str) -> Choice:
        return replace(self, reason=reason)


class Controller:
    """One policy in charge of a fleet. Raises BadRequest for a policy that cannot be served.

    Policies reckon in seconds of the table; `Fleet.scale` makes them seconds of this machine.
    `rollout` is the share of requests that the policy decides; plans move models only if it is
    above nothing.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        table: VariantTable,
        classes: Classes,
        fleet: Fleet,
        metrics: Metrics,
        window_s: float,
        rollout: float = 1.0,
    ) -> None:
        scale = fleet.scale
        self._classes = classes
        self.policy: Policy = policy_of(name, table, classes.slos(scale))
        self._family, self._table, self._fleet, self._metrics = family, table, fleet, metrics
        self._window_s, self._rollout = window_s, rollout
        self._names = {name: v for v, name in enumerate(table.variants)}
        self._skips = table.skip.tolist()
        self._mean = table.mean_quality.tolist()
        self._forecast = Forecast(window_s)
        self._recent: deque[tuple[list[float], list[bool], int]] = deque(maxlen=RECENT)
        self._count = self._counted = self._seen = 0  # in all, till the last window, the last look
        self._looked = self._added = time.monotonic()  # at the last look, at the end of the window
        self._slowness = SlownessTracker(scale)
        self._planned: list[int] = []  # only where the policy moves nothing
        self.usable = 1.0
        self.changed = asyncio.Event()

    def arrived(self, asked: Asked, governed: bool = True) -> None:
        """Count a picture that was asked for into the inputs; one that is not `governed` is made
        exactly whatever the policy says."""
        request = self._request(asked)
        allowed = list(request.allowed)
        if not governed:
            allowed = [v == EXACT for v in range(len(allowed))]
        self._count += 1
        self._recent.append((list(request.quality), allowed, asked.slo.index))

    def refused(self, count: int) -> None:
        """Count pictures into the rate that were asked for and refused before anything was known of
        them."""
        self._count += count

    def choose(self, asked: Asked) -> Choice:
        """What the policy says.

        Where it decides nothing it is asked as if workers held what it planned; their queues are
        those of exact pictures, longer than its own would be.
        """
        request, cluster = self._request(asked), self._fleet.cluster()
        if self._planned:
            cluster.models = self._planned
        decision = self.policy.route(request, cluster)
        return self._choice(decision, asked)

    def forced(self, variant: str, worker: int, reason: str, asked: Asked) -> Choice:
        """A variant made by a worker, whatever the policy says."""
        return self._choice(Decision(self._names[variant], worker, reason), asked)

    def however_late(self, asked: Asked, reason: str) -> Choice:
        """The best that a worker can make now, whenever that is done."""
        request, cluster = self._request(asked), self._fleet.cluster()
        held, model = set(cluster.models), self._table.model.tolist()
        able = [v for v, allowed in enumerate(request.allowed) if allowed and model[v] in held]
        if not able:
            return self._choice(Decision(EXACT, None, reason), asked)
        best = max(able, key=lambda v: request.quality[v])
        worker = first_free(cluster, model[best])
        return replace(self._choice(Decision(best, worker, reason), asked), patient=True)

    def again(self, asked: Asked, variant: str, judged: float) -> str | None:
        """The variant that is to replace a picture that was made, None if it will do."""
        found = self.policy.review(self._request(asked), self._names[variant], judged)
        return None if found is None else self._table.variants[found]

    def retry_after_s(self, asked: Asked) -> int:
        """Seconds until the backlog should be short enough for a request like this one."""
        wait_s = shortest_wait_s(self._fleet.cluster()) or 0.0
        cheapest = asked.size_factor * float(self._table.alone_s.min())
        slack_s = asked.slack_s / self._fleet.scale if math.isfinite(asked.slack_s) else 0.0
        late_s = wait_s + cheapest - slack_s
        return max(1, math.ceil(late_s * self._fleet.scale))

    def saved_s(self, variant: str) -> float:
        """Worker-seconds that a variant saves beside the exact one, alone."""
        alone = self._table.alone_s
        return float(alone[EXACT].min() - alone[self._names[variant]].min()) * self._fleet.scale

    async def run(self) -> None:
        """Plan every window, and at once when the rate jumps, when workers turn out to be slower
        or faster, or when one comes or goes.

        Looks and windows go by the clock: a plan that a worker caused moves neither.
        """
        pause, looks = self._window_s / LOOKS, 0
        at = time.monotonic() + pause
        while True:
            try:
                await asyncio.wait_for(self.changed.wait(), max(0.0, at - time.monotonic()))
            except TimeoutError:
                looks, at = looks + 1, time.monotonic() + pause
                self._slowness.saw(self._fleet.scale)
                jumped = self._is_burst()
                if looks % LOOKS == 0:
                    self._end_window()
                elif not jumped and not self._slowness.outdated:
                    continue
            self.changed.clear()
            try:
                self.plan()
            except Exception:
                log.exception("A plan failed; the last one stays")

    def plan(self) -> None:
        """Ask the policy what the workers are to hold, and have them hold it."""
        inputs = self._planning_input()
        if self._slowness.outdated:
            self._slowness.planned()
            self.policy.set_slos(self._classes.slos(self._slowness.slowness))
        plan = self.policy.plan(inputs)
        for name, value in plan.figures.items():
            self._metrics.figures.labels(name.replace(" ", "_")).set(value)
        self._metrics.rate.set(self._forecast.next())
        models = [int(model) for model in plan.models]
        if self._rollout > 0:
            self._fleet.move(models)
        else:
            self._planned = models

    def _end_window(self) -> None:
        now = time.monotonic()
        self._forecast.add(self._count - self._counted, now - self._added)
        self._counted, self._added = self._count, now

    def _is_burst(self) -> bool:
        """Whether far more or fewer came since the last look than were expected."""
        now = time.monotonic()
        count, elapsed = self._count - self._seen, now - self._looked
        self._seen, self._looked = self._count, now
        if self._forecast.level is None and not count:
            return False
        if self._forecast.level is None or self._forecast.is_burst(count, elapsed):
            self._forecast.jump(count / elapsed)
            return True
        return False

    def _planning_input(self) -> PlanningInput:
        cluster, fleet = self._fleet.cluster(), self._fleet
        count = len(self._table.variants)
        recent = list(self._recent)
        return PlanningInput(
            now_s=cluster.now_s,
            rate=self._forecast.next() * self._slowness.slowness,
            quality=np.array([row for row, _, _ in recent], float).reshape(-1, count),
            allowed=np.array([row for _, row, _ in recent], bool).reshape(-1, count),
            slo=np.array([index for _, _, index in recent], np.int64),
            kinds=np.array(cluster.kinds),
            models=np.array(self._planned or fleet.targets),
            alive=np.array([queue.alive for queue in fleet.queues]),
            wait_s=np.array(cluster.wait_s),
            usable=self.usable,
        )

    def _request(self, asked: Asked) -> Request:
        told = asked.prediction
        stored = set(asked.stored)
        allowed = [not k or k in stored for k in self._skips]
        least = max(asked.least, asked.slo.floor)
        if told is not None and least > 0:
            low = told.low.tolist()
            allowed = [a and bound >= least for a, bound in zip(allowed, low, strict=True)]
        elif least > 0:
            allowed = [v == EXACT for v in range(len(allowed))]
        if asked.own_guidance:
            own = self._table.model == self._table.model[EXACT]
            allowed = [a and same for a, same in zip(allowed, own.tolist(), strict=True)]
        if told is None or not self.policy.informed:
            quality = self._mean
        else:
            quality = np.nan_to_num(told.mean, nan=0.0).tolist()
        slack_s = asked.slack_s / self._fleet.scale
        return Request(
            quality, allowed, slack_s, asked.similarity, asked.slo.index, asked.size_factor
        )

    def _choice(self, decision: Decision, asked: Asked) -> Choice:
        v, told = decision.variant, asked.prediction
        return Choice(
            self._table.variants[v],
            decision.worker,
            decision.reason,
            None if told is None else float(told.mean[v]),
            None if told is None else float(told.low[v]),
            decision.price,
        )

    def usable_skip(self, asked: str, stored: Sequence[int]) -> str:
        """The pinned variant that skips, or the largest skip below it that is stored."""
        return skip_name(self._family.usable_skip(self._family.variants[asked].skip, tuple(stored)))


def shortest_wait_s(cluster: Cluster) -> float | None:
    """Seconds of the table until a worker that serves begins one more; None if none serves."""
    waits = [wait for wait, held in zip(cluster.wait_s, cluster.models, strict=True) if held >= 0]
    return min(waits, default=None)


def policy_of(name: str, table: VariantTable, slos: Sequence[Slo]) -> Policy:
    """Raises BadRequest for a policy that there is not, or that knows the future."""
    if name in FUTURE:
        raise BadRequest(f"The policy {name!r} knows the future: simulate it (`argus simulate`).")
    return new_policy(name, table, slos)
