"""How fast the simulator is: requests a second of wall time, planning included.

    python benchmarks/simulator.py [--requests 100000] [--policy price] [--json]

Memory is the growth of the process over the run, by request. Beside it the throughput, violations
and effective quality of the run: `docs/scale.md` has those of 1,000 and 10,000 workers.
"""

from __future__ import annotations

import json
import resource
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from argus.simulator.runs import Scenario, simulate
from argus.simulator.traces import BURSTY_HIGH, BURSTY_LOW
from argus.simulator.worlds import load_world


def main(
    requests: Annotated[int, typer.Option(help="How many to simulate.")] = 100_000,
    policy: Annotated[str, typer.Option(help="Policies, separated by commas.")] = "price",
    workers: Annotated[int, typer.Option(help="Workers; load grows with them.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    world = load_world("paper-a100")
    middle = (BURSTY_LOW + BURSTY_HIGH) / 2
    minutes = max(1, round(requests / middle * 8 / workers))
    scenario = Scenario(
        world, (0,) * workers, np.full(minutes, middle), world.slo, load=workers / 8
    )
    results: dict[str, dict[str, float]] = {}
    table = Table(
        "policy", "requests", "seconds", "requests/s", "bytes a request", "plans", "on time /min",
        "violations", "effective quality",
    )  # fmt: skip
    for name in policy.split(","):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begun = time.perf_counter()
        report, simulation = simulate(scenario, name)
        took = time.perf_counter() - begun
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        count = len(simulation.requests.outcome)
        results[name] = {
            "requests_per_s": count / took,
            "bytes_per_request": grown / count,
            "plans": simulation.ledger.plans,
            "throughput_qpm": report.whole.throughput_qpm,
            "violations": report.whole.violation_ratio,
            "effective_quality": report.whole.effective_quality,
        }
        table.add_row(
            name, str(count), f"{took:.1f}", f"{count / took:.0f}", f"{grown / count:.0f}",
            str(simulation.ledger.plans), f"{report.whole.throughput_qpm:,.0f}",
            f"{report.whole.violation_ratio:.2%}", f"{report.whole.effective_quality:.3f}",
        )  # fmt: skip
    Console().print(table)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
