"""`price`: every prompt gets the variant of most value at the price of a worker-second now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from argus.control import planner
from argus.control.policy import (
    KEPT,
    Base,
    Cluster,
    Decision,
    Option,
    Plan,
    PlanningInput,
    Slo,
    dealt,
    placed,
)
from argus.control.prototypes import demand_of
from argus.control.request import Request
from argus.control.variants import EXACT, RESERVE, VariantTable

STRATEGIES = ("exact", "cache", "model", "steps")  # `refine` is for `modm` alone


@dataclass(frozen=True)
class PriceTuning:
    """The constants of `price`, chosen by simulation (`benchmarks/feedback.py`,
    `benchmarks/evaluation.py`) unless stated otherwise.

    Prices: they rise from the plan's to the highest between a wait of `calm` and one of `pressed`
    shares of the deadline. Options whose values differ by less than `tie`, in quality, count as
    equal: the plan's shares decide between them.

    Time: a wait of the whole slack costs `wait_loss` of quality, so that of two models the one with
    the shorter queue is chosen. A picture whose wait and work take a share x of the slack is late
    with a probability of `late`·x^`late_power`.

    Plans: a plan is kept for up to `stale_s` seconds while the rate and the share of usable latents
    stay within `moved` of what it was made for. At most a share `moves` of the workers load at
    once, but at least one. A load must gain `load_loss` of quality for the requests that its worker
    serves; where forecasts are off by more than a share `doubt`, by the cube of the ratio more, up
    to `most_doubt` times as much: a load that answers a burst of a single user comes too late. Of n
    workers under a deadline of x exact pictures, a share of 1 - `spare`/√(nx) is to be busy,
    between `least_busy` and `most_busy` (square-root staffing, Halfin and Whitt 1981).
    """

    calm: float = 0.1
    pressed: float = 0.5
    tie: float = 1e-3
    wait_loss: float = 0.1
    late: float = 0.2
    late_power: int = 6
    moved: float = 0.05
    stale_s: float = 300.0
    moves: float = 0.25
    load_loss: float = 0.02
    doubt: float = 0.3
    most_doubt: float = 10.0
    spare: float = 0.5
    least_busy: float = 0.5
    most_busy: float = 0.95
    feedback: bool = True
    planner: planner.Tuning | None = None


class Price(Base):
    """The plan's prices rise with the queue; the variant of most value, less its cost, wins.

    The value of a picture is its quality times the probability that it is in time. The less slack
    it leaves, the lower that is: requests take fewer steps while a burst builds up.
    """

    informed = True

    def __init__(
        self,
        table: VariantTable,
        slos: Sequence[Slo],
        tuning: PriceTuning = PriceTuning(),
    ) -> None:
        super().__init__(table, slos)
        self.tuning = tuning
        self._steps = table.steps.tolist()
        self._own = np.array([strategy in STRATEGIES for strategy in table.strategies])
        self._mine = np.flatnonzero(self._own).tolist()
        self._best_batch = table.best_batch.tolist()
        self._model = table.model.tolist()
        self._prices = np.zeros((len(table.types), len(table.models))).tolist()
        self._highest = self._prices
        self._shares = [0.0] * len(table.variants)
        self._served = [0] * len(table.variants)
        self._last: planner.Plan | None = None
        self._wanted: list[int] = []

    def set_slos(self, slos: Sequence[Slo]) -> None:
        super().set_slos(slos)
        self._full_s = self.table.full_s(self.deadline_s)
        self._cost_rows = self.costs_s.tolist()
        self._planned: tuple[float, float, float, list[bool]] | None = None

    def plan(self, inputs: PlanningInput) -> Plan:
        table = self.table
        if not len(inputs.quality) or inputs.rate <= 0 or not self._outdated(inputs):
            return Plan(inputs.models, source=KEPT)
        quality = self.valued(inputs.quality)
        costs = self._expected_costs(inputs.usable)
        self._cost_rows = costs.tolist()
        costs[EXACT] *= inputs.exact_share
        allowed = inputs.allowed & self._own
        demand = demand_of(inputs.rate, quality, allowed, inputs.slo)
        counts = placed(inputs, table)
        deadlines = np.array([slo.deadline_s for slo in self.slos])
        cluster = planner.Cluster(
            workers=counts.sum(axis=1),
            holds=np.arange(len(table.models))[:, None] == table.model[None, :],
            cost_s=costs,
            meets=self._full_s[None] <= RESERVE * deadlines[:, None, None] + 1e-9,
            load_s=table.load_s,
            placed=counts,
            able=table.able,
        )
        tuning = self._tuned(inputs, max(1, int(counts.sum())))
        plan = planner.plan(demand, cluster, tuning, self._last)
        self._last = plan
        self._highest = self._dearest(quality, allowed)
        self._prices = self._bounded(np.nan_to_num(plan.prices))
        self._shares = (demand.rates @ plan.shares / demand.rates.sum()).tolist()
        self._served = [0] * len(table.variants)
        wanted = dealt(plan.placement, inputs)
        self._wanted = wanted.tolist()
        models = self._staged(wanted, inputs)
        dearest = float(np.nanmax(plan.prices, initial=0.0))
        return Plan(models, {"price": dearest}, plan.source, plan.prices)

    def _tuned(self, inputs: PlanningInput, workers: int) -> planner.Tuning:
        """The planner's constants. Fewer workers average out less of a random burst, and a shorter
        deadline leaves less time to wait: more capacity must be spare. A load costs more than its
        time: queued requests are routed again, and what it was for may be over."""
        tuning = self.tuning
        if tuning.planner is not None:
            return tuning.planner
        doubted = min(tuning.most_doubt, max(1.0, inputs.doubt / tuning.doubt) ** 3)
        alone = self.deadline_s / self.table.slo_s  # exact pictures that fit into a deadline
        busy = 1 - tuning.spare / (workers * alone) ** 0.5
        return planner.Tuning(
            utilisation=min(tuning.most_busy, max(tuning.least_busy, busy)),
            load_loss=tuning.load_loss * doubted * inputs.rate / workers,
        )

    def _outdated(self, inputs: PlanningInput) -> bool:
        """Whether a new plan would differ from the last by more than noise."""
        now = (inputs.now_s, inputs.rate, inputs.usable, inputs.alive.tolist())
        if self._planned is not None and inputs.models.tolist() == self._wanted:
            at, rate, usable, alive = self._planned
            most = self.tuning.moved
            moved = abs(inputs.rate - rate) > most * rate or abs(inputs.usable - usable) > most
            if not moved and inputs.now_s - at < self.tuning.stale_s and alive == now[3]:
                return False
        self._planned = now
        return True

    def _expected_costs(self, usable: float) -> planner.Numbers:
        """Costs (v, d) when a share `usable` of latents comes in time, and all other requests that
        were to skip steps run in full."""
        table, costs = self.table, self.costs_s.copy()
        skips = table.skip > 0
        costs[skips] = usable * costs[skips] + (1 - usable) * costs[EXACT]
        return costs

    def _staged(self, models: planner.Whole, inputs: PlanningInput) -> planner.Whole:
        """Models (w,) after the next few loads towards a plan, so that service goes on."""
        moving = np.flatnonzero((models != inputs.models) & inputs.alive)
        most = max(1, int(self.tuning.moves * inputs.alive.sum()))
        models[moving[most:]] = inputs.models[moving[most:]]
        return models

    def _dearest(self, quality: planner.Numbers, allowed: planner.Flags) -> list[list[float]]:
        """The price (d, m) at which nearly all prompts prefer the cheapest variant of the model."""
        table, result = self.table, np.zeros((len(self.table.types), len(self.table.models)))
        for d in range(len(table.types)):
            for m in set(table.model.tolist()):
                of = np.flatnonzero(table.model == m)
                cheap = of[self.costs_s[of, d].argmin()]
                slopes = [0.0]
                for v in of:
                    saved = self.costs_s[v, d] - self.costs_s[cheap, d]
                    both = allowed[:, v] & allowed[:, cheap]
                    if saved > 0 and both.any():
                        gaps = quality[both, v] - quality[both, cheap]
                        slopes.append(float(np.quantile(gaps, 0.95)) / saved)
                result[d, m] = max(slopes)
        rows: list[list[float]] = result.tolist()
        return rows

    def _bounded(self, prices: planner.Numbers) -> list[list[float]]:
        """A plan's prices (d, m), all lowered by one factor until none is above its highest. Those
        of an overload are so high that quality counts for nothing; what they say of workers' worth
        beside each other holds."""
        highest = np.array(self._highest)
        over = (prices > highest) & (highest > 0)
        if over.any():
            prices = prices * (highest[over] / prices[over]).min()
        rows: list[list[float]] = prices.tolist()
        return rows

    def valued(self, quality: planner.Numbers) -> planner.Numbers:
        """The quality (p, v) of prompts that the policy plans with."""
        return quality

    def quality_of(self, request: Request) -> Sequence[float]:
        """The quality (v,) of one request that the policy routes by."""
        return request.quality

    def route(self, request: Request, cluster: Cluster) -> Decision:
        floor = self.slos[request.slo].floor
        quality, allowed = self.quality_of(request), request.allowed
        slack_s, size_factor = max(1e-9, request.slack_s), request.size_factor
        tuning = self.tuning
        options: list[Option] = []
        best = -float("inf")
        for (kind, model), (wait, running, worker) in cluster.soonest().items():
            price = self._price(kind, model, wait, running)
            joined = running if wait > 0 else running + 1  # one is done before it runs
            size = max(1, min(joined, self._best_batch[kind][model]))
            waiting = tuning.wait_loss * wait / slack_s
            step_s = size_factor * self.table.batch_step_s(kind, model, size)
            for v in self._mine:
                if self._model[v] != model or not allowed[v] or quality[v] < floor:
                    continue
                part = request.exact_share if v == EXACT else 1.0
                share = (wait + part * self._steps[v] * step_s) / slack_s
                if share > 1:
                    continue
                hoped = quality[v] * (1 - tuning.late * share**tuning.late_power)
                cost_s = self._cost_rows[v][kind]
                worth = hoped - price * part * size_factor * cost_s - waiting
                options.append((worth, v, worker, price, share, part * size_factor * cost_s))
                if worth > best:
                    best = worth
        if not options:
            return Decision(EXACT, None, "no variant meets the deadline")
        tied = [option for option in options if option[0] > best - tuning.tie]
        if len(tied) > 1:
            total = sum(self._served) + 1
            _, v, worker, price, _, _ = max(  # of a variant on several types the one done first
                tied, key=lambda one: (self._shares[one[1]] * total - self._served[one[1]], -one[4])
            )
        else:
            _, v, worker, price, _, _ = tied[0]
        self._served[v] += 1
        reason = "worth most at today's prices"
        return Decision(v, worker, reason, price, options=options)

    def prices(self, cluster: Cluster) -> Mapping[int, float]:
        found: dict[int, float] = {}
        for (kind, model), (wait, running, _) in cluster.soonest().items():
            price = self._price(kind, model, wait, running)
            found[model] = min(price, found.get(model, price))
        return found

    def _price(self, kind: int, model: int, wait: float, running: int) -> float:
        """The plan's price; 0 on an idle worker, up to the highest as the queue grows."""
        price, highest = self._prices[kind][model], self._highest[kind][model]
        if not self.tuning.feedback:
            return price
        if not running:
            return 0.0
        calm = self.tuning.calm * self.deadline_s
        pressed = self.tuning.pressed * self.deadline_s
        pressure = min(1.0, max(0.0, (wait - calm) / (pressed - calm)))
        return price + pressure * max(0.0, highest - price)


class PriceBlind(Price):
    """`price` with the mean quality for every prompt: the baseline for prompt-awareness."""

    informed = False

    @cached_property
    def _mean(self) -> list[float]:
        mean: list[float] = self.table.mean_quality.tolist()
        return mean

    def valued(self, quality: planner.Numbers) -> planner.Numbers:
        return np.broadcast_to(self.table.mean_quality, quality.shape).copy()

    def quality_of(self, request: Request) -> Sequence[float]:
        return self._mean


class Oracle(Price):
    """`price` with the true quality of every prompt and the true future rates: the upper bound."""
