"""What a plan says: its sentence, its rows, what they rest on, and a figure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from argus.core.errors import BadRequest
from argus.simulator.plan_search import Answer, Ladder
from argus.simulator.planning import ALONE, Judgement, Setting, Spread

EXACT_ALONE = (ALONE, "clipper-ha")  # the policies that serve every prompt exactly
HOURS = 8760  # of a year
NOT_MODELLED = (
    "Not modelled: network, the server's own time for a request, starting workers (all are up "
    "with the exact model when the simulation begins; loads after that take their seconds), "
    "failures, pictures of several sizes."
)


@dataclass(frozen=True)
class Row:
    """One policy's answer, on workers of the types `device`. `inverse` ones are of the peak load,
    in requests a minute, the others of the number of workers. `prices` (d,) are of a worker's hour
    by type, None if they are not known."""

    device: str
    answer: Answer
    ladder: Ladder
    inverse: bool
    prices: tuple[float, ...] | None

    @property
    def policy(self) -> str:
        return self.answer.policy

    @property
    def workers(self) -> int:
        """Of the answer; without one the most that were tried."""
        return sum(self.ladder.at(self.answer.rung or self.ladder.most)[0])

    @property
    def found(self) -> Spread | None:
        """Workers or load, with what the single runs that judge need. None: the promise is kept
        by none that was tried."""
        answer = self.answer
        if answer.rung is None:
            return None
        ends = self.value(answer.low), self.value(answer.high)
        return Spread(self.value(answer.rung), min(ends), max(ends))

    @property
    def hourly(self) -> float | None:
        if self.prices is None or self.answer.rung is None:
            return None
        counts, _ = self.ladder.at(self.answer.rung)
        return sum(n * price for n, price in zip(counts, self.prices, strict=True))

    @property
    def thing(self) -> str:
        return "worker" if self.device == "cpu" else "GPU"

    def value(self, rung: int) -> float:
        counts, peak_qpm = self.ladder.at(rung)
        return peak_qpm if self.inverse else sum(counts)

    def __str__(self) -> str:
        found = self.found
        assert found is not None
        of = "pictures a minute" if self.inverse else self.thing
        if not self.inverse and found.value != 1:
            of += "s"
        return f"{found.value:.0f} {of} {interval(found)}"


@dataclass(frozen=True)
class Planned:
    """A plan: its rows, one for each policy and type, and what was asked. `policy` is that of the
    sentence, `peak_qpm` the load asked for (of an inverse plan: about what exact carries)."""

    setting: Setting
    rows: Sequence[Row]
    policy: str
    trace: str
    peak_qpm: float
    seeds: Sequence[int]

    @property
    def inverse(self) -> bool:
        return self.rows[0].inverse

    def best(self, policies: Collection[str]) -> Row | None:
        """The cheapest answer of some policies, without prices the one of fewest workers; of an
        inverse plan the one that carries most. None if there is no answer."""

        def worth(row: Row) -> float:
            assert row.found is not None
            if row.inverse:
                return -row.found.value
            return row.found.value if row.hourly is None else row.hourly

        kept = [row for row in self.rows if row.policy in policies and row.found is not None]
        return min(kept, key=worth, default=None)

    def sentence(self) -> str:
        """The policy beside the exact variant alone. Raises BadRequest if nobody keeps the
        promise."""
        policy, mine, exact = self.policy, self.best((self.policy,)), self.best(EXACT_ALONE)
        if mine is None and exact is None and self.best({row.policy for row in self.rows}) is None:
            raise BadRequest(self._impossible())
        if self.inverse:
            some = self.rows[0]
            given = f"{some.workers} {some.thing}s" if some.workers > 1 else f"1 {some.thing}"
            carry = "carry" if some.workers > 1 else "carries"
            with_it = f"{mine} with {policy}" if mine else f"no load that was tried with {policy}"
            alone = f"carries {exact}" if exact else "carries none"
            return f"{given} {carry} {with_it} where exact {alone}."
        alone = f"needs {exact}" if exact else "does not keep this promise"
        if mine is None:
            return f"{policy} does not keep this promise; exact {alone}."
        typed = len(self.setting.world.table.types) > 1
        of = f" of type {mine.device}" if typed else ""
        theirs = f" of type {exact.device}" if typed and exact else ""
        return f"You need {mine}{of} with {policy} where exact {alone}{theirs}."

    def _impossible(self) -> str:
        row = max(self.rows, key=lambda row: row.answer.judged.quality.value)
        judged = row.answer.judged
        tried = (
            f"at {row.value(row.ladder.most):.2g} pictures a minute"
            if row.inverse
            else f"with {row.workers} workers, the most that are tried"
        )
        return (
            f"No policy keeps this promise. {row.policy} comes closest: {tried}, its effective "
            f"quality is {judged.quality.value:.3f} and {judged.violations.value:.2%} of requests "
            "are violated. Ask for less quality, allow more violations or give a longer deadline."
        )

    def assumptions(self) -> list[str]:
        """What the answers rest on, a sentence each."""
        setting, target = self.setting, self.setting.target
        marks = [mark.split(":")[0] for mark in setting.world.sources.values()]
        marked = ", ".join(f"{marks.count(m)} {m}" for m in ("sourced", "fitted", "assumed"))
        cut, lead = setting.workload.at(self.peak_qpm)
        arrivals = "random (Poisson) arrivals" if cut.at_s is None else "its own arrivals"
        some = (self.best({row.policy for row in self.rows}) or self.rows[0]).answer.judged
        return [
            f"World: {setting.world.name}; of its parameters {marked}.",
            f"Load: the shape of {self.trace}"
            + ("" if self.inverse else f", {self.peak_qpm:g} requests in its highest minute")
            + f", {arrivals}; judged over its busiest {len(cut.rates) - lead} minutes in a row, "
            f"after {lead} minutes of what comes before them.",
            f"Promise: at most {target.violations:.2%} of requests without a picture within "
            f"{setting.deadline_s:.3g} s ({setting.deadline:.3g}x), and an effective quality of at "
            f"least {target.quality:g}: the qualities of pictures in time, summed, by the number "
            "of requests; exact is 1.",
            f"Judged by {len(self.seeds)} runs (seeds {self.seeds[0]} to {self.seeds[-1]}), of "
            "which the search used none, all their requests together: about "
            f"{some.requests / len(some.runs):.0f} a run. In brackets: the least and the most that "
            "one of these runs alone needs or carries.",
            "exact: every picture by the exact variant, in batches that are joined at any step, or "
            "clipper-ha if that needs less.",
            NOT_MODELLED,
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "sentence": self.sentence(),
            "answers": [self._plain(row) for row in self.rows],
            "assumptions": self.assumptions(),
            "parameters": self.setting.world.sources,
        }

    def _plain(self, row: Row) -> dict[str, Any]:
        answer, table = row.answer, self.setting.world.table
        shares = zip(table.variants, answer.judged.shares().tolist(), strict=True)

        def told(rung: int, judged: Judgement) -> dict[str, Any]:
            counts, peak_qpm = row.ladder.at(rung)
            return {
                "workers": sum(counts),
                "peak_qpm": peak_qpm,
                "requests": judged.requests,
                "violations": asdict(judged.violations),
                "effective_quality": asdict(judged.quality),
                "p99_s": judged.p99_s,
            }

        below, rung = answer.below, answer.rung
        return {
            "policy": row.policy,
            "type": row.device,
            "peak_qpm" if row.inverse else "workers": row.found and asdict(row.found),
            "cost_per_hour": row.hourly,
            "cost_per_year": row.hourly and HOURS * row.hourly,
            "holds": self.holds(row),
            "variants": {name: share for name, share in shares if share},
            "judged": told(rung or row.ladder.most, answer.judged),
            "one_less": told(rung - 1, below) if rung and below else None,
            "tried": [told(rung, judged) for rung, judged in answer.tried.items()],
        }

    def holds(self, row: Row) -> dict[str, float]:
        """Mean number of workers by model, without those of hardly any."""
        held = zip(self.setting.world.table.models, row.answer.judged.holds().tolist(), strict=True)
        return {name: n for name, n in held if n >= 0.05}

    def draw(self, file: Path) -> None:
        """The answers as bars, and the quality of every number that was tried."""
        figure = Figure(figsize=(10, 0.5 * len(self.rows) + 2.4))
        bars, curves = figure.subplots(1, 2, width_ratios=(2, 3))
        what = "peak load, pictures a minute" if self.inverse else f"{self.rows[0].thing}s needed"
        typed = len({row.device for row in self.rows}) > 1
        for at, row in enumerate(self.rows):
            label = f"{row.policy}, {row.device}" if typed else row.policy
            found, colour = row.found, f"C{at % 10}"
            if found is None:
                bars.text(0, at, " not kept", va="center", fontsize=8)
            else:
                ends = [[found.value - found.low], [found.high - found.value]]
                bars.barh(at, found.value, xerr=ends, color=colour, height=0.6, capsize=3)
                bars.text(found.high, at, f"  {found.value:.0f}", va="center", fontsize=9)
            points = sorted((row.value(r), one) for r, one in row.answer.tried.items())
            x = [value for value, _ in points]
            y = [one.quality.value for _, one in points]
            curves.plot(x, y, color=colour, lw=1.2, label=label)
            kept = [one.keeps(self.setting.target) for _, one in points]
            faces = [colour if one else "white" for one in kept]
            curves.scatter(x, y, s=26, c=faces, edgecolors=colour, zorder=3)
        bars.set_yticks(
            range(len(self.rows)),
            [f"{row.policy}, {row.device}" if typed else row.policy for row in self.rows],
        )
        bars.invert_yaxis()
        bars.set_xlabel(what)
        bars.margins(x=0.15)
        least = self.setting.target.quality
        curves.axhline(least, color="0.5", lw=1, ls="--")
        shown = [row.found.high for row in self.rows if row.found is not None]
        if shown:
            curves.set_xlim(0, 1.3 * max(shown))
        curves.set_ylim(bottom=max(curves.get_ylim()[0], least - 0.25))
        curves.set_xlabel(
            "peak load, pictures a minute" if self.inverse else f"{self.rows[0].thing}s"
        )
        curves.set_ylabel("effective quality")
        curves.set_title("filled: the promise is kept", fontsize=9, loc="right")
        curves.legend(fontsize=8)
        curves.grid(alpha=0.3)
        figure.savefig(file, dpi=100, bbox_inches="tight")


def prices_of(given: Sequence[str], types: Sequence[str]) -> tuple[float, ...] | None:
    """Prices of an hour (d,) from `a100=2.5` for each type, or `2.5` if there is one type; None
    without any. Raises BadRequest for anything else."""
    if not given:
        return None
    prices: dict[str, float] = {}
    for one in given:
        name, _, value = one.rpartition("=")
        name = types[0] if not name and len(types) == 1 else name
        try:
            price = float(value)
        except ValueError:
            price = -1.0
        if name not in types or not 0 <= price < float("inf"):
            raise BadRequest(
                f"--gpu-price takes what a worker's hour costs, as {types[0]}=2.5, not {one!r}; "
                f"there are workers of {', '.join(types)}."
            )
        prices[name] = price
    missing = [name for name in types if name not in prices]
    if missing:
        raise BadRequest(f"--gpu-price is missing for {', '.join(missing)}: give it as well.")
    return tuple(prices[name] for name in types)


def interval(of: Spread) -> str:
    return f"[{of.low:.0f}, {of.high:.0f}]"
