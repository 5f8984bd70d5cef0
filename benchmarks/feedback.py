"""What the backlog's pressure on prices does when load jumps: the step response.

    python benchmarks/feedback.py [--figure docs/figures/feedback.png] [--json]

Load jumps from a quarter to nine tenths of the published high load, in `paper-a100`. In one case
plans go on; in one the plan stays that of the low load, so that feedback answers alone; in one
there is no feedback. Settling is the seconds until half a minute's mean steps stay within a tenth
of what they come to (the mean of minutes two to five); swing is the deviation there of the mean
steps of five seconds' requests, as a share. Without feedback that is chance alone.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from argus.control.policy import Plan, PlanningInput
from argus.control.price import Price, PriceTuning
from argus.simulator.cluster import Simulation
from argus.simulator.requests import ON_TIME
from argus.simulator.runs import Scenario, simulate
from argus.simulator.traces import BURSTY_HIGH
from argus.simulator.worlds import load_world

BEFORE, AFTER, BIN_S = 5, 10, 5.0  # minutes, minutes, seconds


class Frozen(Price):
    """Plans for the low load, and never again."""

    def plan(self, inputs: PlanningInput) -> Plan:
        if inputs.now_s > 60 * BEFORE - 30:
            return Plan(inputs.models)
        return super().plan(inputs)


def main(
    figure: Annotated[Path | None, typer.Option(help="Where to draw it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    world = load_world("paper-a100")
    rates = BURSTY_HIGH * np.repeat([0.25, 0.9], [BEFORE, AFTER])
    scenario = Scenario(world, (0,) * 8, rates, world.slo)
    slo = scenario.slo
    cases = {
        "plans and feedback": Price(world.table, [slo]),
        "feedback alone": Frozen(world.table, [slo]),
        "plans alone": Price(world.table, [slo], PriceTuning(feedback=False)),
    }
    runs = {
        name: simulate(replace(scenario), "price", policy=policy)[1]
        for name, policy in cases.items()
    }
    table, results = Table("case", "settles in", "swing", "violations", "p99 after"), {}
    for name, run in runs.items():
        at, steps, _ = binned(run)
        after, settled = steps[(at >= 0) & (at < 300)], steps[(at >= 120) & (at < 300)]
        final = settled.mean()
        outside = np.flatnonzero(np.abs(smooth(after) - final) > 0.1 * final)
        settles = BIN_S * (outside[-1] + 1) if len(outside) else 0.0
        swing = float(settled.std() / final)
        requests = run.requests
        late = requests.arrived_s >= 60 * BEFORE
        violations = float((requests.outcome[late] != ON_TIME).mean())
        p99 = float(np.nanpercentile((requests.ended_s - requests.arrived_s)[late], 99))
        results[name] = {
            "settles_s": settles, "swing": swing, "violations": violations, "p99_s": p99,
        }  # fmt: skip
        table.add_row(name, f"{settles:.0f} s", f"{swing:.3f}", f"{violations:.3f}", f"{p99:.1f} s")
    Console().print(table)
    if figure is not None:
        draw(runs, figure)
        print(f"wrote {figure}")
    if as_json:
        print(json.dumps(results))


def binned(run: Simulation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds from the jump, mean steps run and longest time taken, by `BIN_S` of arrivals."""
    requests = run.requests
    served = requests.variant >= 0
    which = (requests.arrived_s[served] // BIN_S).astype(int)
    count = int(60 * (BEFORE + AFTER) / BIN_S)
    steps = run.world.table.steps[requests.variant[served]]
    number = np.maximum(np.bincount(which, minlength=count), 1)
    taken = np.zeros(count)
    np.maximum.at(taken, which, (requests.ended_s - requests.arrived_s)[served])
    at = BIN_S * np.arange(count) - 60 * BEFORE
    return at, np.bincount(which, weights=steps, minlength=count) / number, taken


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean of six bins, which is half a minute."""
    padded = np.pad(values, (3, 2), mode="edge")
    return np.convolve(padded, np.ones(6) / 6, mode="valid")


def draw(runs: dict[str, Simulation], file: Path) -> None:
    drawn = Figure(figsize=(9, 5))
    above, below = drawn.subplots(2, 1, sharex=True)
    for name, run in runs.items():
        at, steps, taken = binned(run)
        above.plot(at, steps, label=name, lw=1.2)
        below.plot(at, taken, label=name, lw=1.2)
    deadline = next(iter(runs.values())).setup.slo.deadline_s
    below.axhline(deadline, color="black", ls=":", lw=1, label="deadline")
    above.set_ylabel("mean steps run")
    below.set_ylabel("longest answer, s")
    below.set_xlabel("seconds from the jump")
    above.legend(fontsize=8)
    below.legend(fontsize=8)
    for panel in (above, below):
        panel.set_xlim(-60, 300)
        panel.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    typer.run(main)
