"""The worked example of the page on decisions: real predictions, measured costs, the real policy.

    python docs/tools/worked_example.py --figure docs/figures/decision.png

Plans two workers of the bundled family for 600 prompts of its workload at three loads, and routes
two requests while the queue grows: one whose neighbour in the cache says the same in other words,
and one without a neighbour. Prints what every variant was worth to them, and draws it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure

from argus.config import Settings
from argus.control.policy import Cluster, PlanningInput, Slo
from argus.control.price import Price
from argus.control.request import Request
from argus.control.variants import EXACT, Numbers, VariantTable
from argus.lab.prompts import ideas_of
from argus.lab.workload import workload
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor
from argus.server.model import ServedFamily

PROMPTS, WORKERS, MULTIPLE = 400, 2, 3.0
LOADS = (0.5, 1.5, 4.0)  # multiples of what exact pictures alone can carry
WAITS = (0.0, 0.2, 0.1)  # shares of the deadline that a new request waits
# a prompt, and the one in the cache that is nearest to it
REQUESTS: tuple[tuple[str, str | None], ...] = (
    ("a red fish in the sea", "one red fish, in the sea"),
    ("two yellow houses with green roofs", None),
)


@dataclass(frozen=True)
class Offer:
    """What a variant is worth to a request now: its predicted `quality`, what its time costs
    (`spent`, price times worker-seconds), what the chance of being late takes off (`risk`), and
    what is left."""

    variant: str
    quality: float
    cost_s: float
    spent: float
    risk: float

    @property
    def worth(self) -> float:
        return self.quality - self.risk - self.spent


@dataclass(frozen=True)
class Case:
    """A decision for one request at one load and queue."""

    prompt: str
    load: float
    wait_share: float
    holds: tuple[str, ...]
    price: float
    chosen: str
    offers: tuple[Offer, ...]


class Example:
    """The bundled family on two workers, as a server of it would plan and route."""

    def __init__(self) -> None:
        served = ServedFamily.of(Settings(device="cpu", workers=WORKERS))
        assert served.predictor is not None  # the bundled family ships one
        self.table: VariantTable = served.table
        self._predictor: Predictor = served.predictor
        self._order = [self._predictor.variants.index(name) for name in self.table.variants]
        self._encoder = PromptEncoder.load(served.encoder)
        self.slo = Slo(MULTIPLE * self.table.slo_s)
        prompts = [one.prompt for one in islice(workload(ideas_of(served.family)), PROMPTS)]
        vectors = np.stack([one.vector for one in self._encoder.embed_all(prompts)])
        self._quality = np.nan_to_num(
            self._predictor.predict_all(vectors)[0][:, self._order].astype(float)
        )

    def similarity(self, prompt: str, neighbour: str) -> float:
        """The cosine of two prompts' embeddings."""
        one, other = self._encoder.embed_all([prompt, neighbour])
        return float(one.vector @ other.vector)

    def _predicted(self, prompt: str, neighbour: str | None) -> Numbers:
        """The predicted quality (v,) of every variant; 0 for skips without a neighbour."""
        vector = self._encoder.embed(prompt).vector
        near = None if neighbour is None else self._encoder.embed(neighbour).vector
        mean = self._predictor.predict(vector, near).mean[self._order].astype(float)
        known: Numbers = np.nan_to_num(mean)
        return known

    def case(self, prompt: str, neighbour: str | None, load: float, wait_share: float) -> Case:
        """The decision for a prompt after a plan for a load, with a queue of a share of the
        deadline. The policy's own choice, checked against the offers."""
        policy = Price(self.table, [self.slo])
        skips, quality = self.table.skip > 0, self._quality
        similarity = None if neighbour is None else self.similarity(prompt, neighbour)
        rate = load * WORKERS / float(self.table.cost_s(self.slo.deadline_s)[EXACT].min())
        held = policy.plan(
            PlanningInput(
                now_s=0.0,
                rate=rate,
                quality=quality,
                allowed=np.broadcast_to(~skips, quality.shape).copy(),
                slo=np.zeros(len(quality), np.int64),
                kinds=np.zeros(WORKERS, np.int64),
                models=np.zeros(WORKERS, np.int64),
                alive=np.ones(WORKERS, bool),
                wait_s=np.zeros(WORKERS),
            )
        ).models
        busy = 0 if load < 1 and wait_share == 0 else 4
        wait_s = wait_share * self.slo.deadline_s
        cluster = Cluster(0.0, [0] * WORKERS, held.tolist(), [wait_s] * WORKERS, [busy] * WORKERS)
        request = Request(
            quality=self._predicted(prompt, neighbour).tolist(),
            allowed=(~skips if similarity is None else np.ones_like(skips)).tolist(),
            slack_s=self.slo.deadline_s,
            similarity=similarity,
        )
        decision = copy.deepcopy(policy).route(request, cluster)
        chosen = self.table.variants[decision.variant]
        offers = self._offers(policy, request, cluster, chosen)
        holds = tuple(self.table.models[model] for model in cluster.models)
        return Case(prompt, load, wait_share, holds, decision.price or 0.0, chosen, tuple(offers))

    def _offers(
        self, policy: Price, request: Request, cluster: Cluster, chosen: str
    ) -> list[Offer]:
        """Every variant that could serve the request in time, the best first. Raises AssertionError
        if another than the chosen one is worth more: the page would explain another policy."""
        table, tuning = self.table, policy.tuning
        offers = []
        for worker, model in enumerate(cluster.models):
            alone = cluster.without([w for w in range(WORKERS) if w != worker])
            price = copy.deepcopy(policy).route(request, alone).price
            if price is None or model in cluster.models[:worker]:
                continue
            wait_s = cluster.wait_s[worker]
            joined = cluster.running[worker] + (wait_s == 0)
            size = max(1, min(joined, int(table.best_batch[0, model])))
            step_s = table.batch_step_s(0, model, size)
            for v in np.flatnonzero((table.model == model) & request.allowed).tolist():
                share = (wait_s + table.steps[v] * step_s) / request.slack_s
                if share <= 1:
                    quality, cost_s = request.quality[v], float(policy.costs_s[v, 0])
                    risk = quality * tuning.late * share**tuning.late_power
                    name = table.variants[v]
                    offers.append(Offer(name, quality, cost_s, price * cost_s, risk))
        offers.sort(key=lambda one: -one.worth)
        taken = next(one for one in offers if one.variant == chosen)
        if taken.worth < offers[0].worth - tuning.tie:
            raise AssertionError(f"{taken} was chosen, but {offers[0]} is worth more")
        return offers


def cases(example: Example) -> list[Case]:
    """The decisions of the example: as load and queue grow, for both requests."""
    return [
        example.case(prompt, neighbour, load, wait)
        for load, wait in zip(LOADS, WAITS, strict=True)
        for prompt, neighbour in REQUESTS
    ]


def draw(found: list[Case], file: Path) -> None:
    """A panel a case: bars of quality, of which the time's cost is taken off."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(2, len(found) // 2, sharex=True)
    for number, case in enumerate(found):
        axes = grid[number % 2][number // 2]
        names = [one.variant for one in case.offers][::-1]
        worth = [one.worth for one in case.offers][::-1]
        spent = [one.spent + one.risk for one in case.offers][::-1]
        colours = ["#2a78d6" if name == case.chosen else "#9bbce6" for name in names]
        axes.barh(names, worth, color=colours)
        axes.barh(names, spent, left=worth, color="#eeeeee", edgecolor="#bbbbbb", hatch="///")
        axes.set_title(
            f"{case.prompt}\nload {case.load:g}, price {case.price:.2f} a second: {case.chosen}",
            fontsize=9, loc="left",
        )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("quality; hatched: the price of the time" if number % 2 else "")
    figure.savefig(file, dpi=110)


def main(
    figure: Annotated[Path | None, typer.Option(help="Where to draw it.")] = None,
) -> None:
    example = Example()
    found = cases(example)
    capacity = WORKERS / float(example.table.cost_s(example.slo.deadline_s)[EXACT].min())
    (prompt, neighbour), _ = REQUESTS
    assert neighbour is not None
    print(f"{prompt!r} and {neighbour!r}: {example.similarity(prompt, neighbour):.3f}")
    print(f"exact pictures a second {capacity:.2f}, deadline {example.slo.deadline_s:.2f} s")
    for case in found:
        print(
            f"\n{case.prompt!r}, load {case.load:g}, waiting {case.wait_share:.0%} of the "
            f"deadline, workers hold {', '.join(case.holds)}, price {case.price:.3f}: "
            f"{case.chosen}\n"
        )
        print("| variant | quality | seconds | price of them | lateness | worth |")
        print("|---|---|---|---|---|---|")
        for one in case.offers:
            print(
                f"| {one.variant} | {one.quality:.3f} | {one.cost_s:.3f} | {one.spent:.3f} "
                f"| {one.risk:.3f} | {one.worth:.3f} |"
            )
    if figure is not None:
        draw(found, figure)


if __name__ == "__main__":
    typer.run(main)
