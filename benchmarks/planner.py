"""How long a plan takes, from 8 workers of one type to 10,000 of four.

    python benchmarks/planner.py [--repeats 5] [--json]

20 variants of 6 models, 64 prototypes of prompts, load at 1.5 times what exact variants alone could
carry, from a placement that has to change. Medians.
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from argus.control.planner import Cluster, Demand, Tuning, plan

SIZES = ((8, 1), (100, 4), (1000, 4), (10_000, 4))
VARIANTS, MODELS, PROTOTYPES = 20, 6, 64


def problem(workers: int, types: int, seed: int) -> tuple[Demand, Cluster]:
    """A cluster of `workers` of `types`, and demand beyond what it carries exactly."""
    rng = np.random.default_rng(seed)
    model = np.sort(np.r_[np.arange(MODELS), rng.integers(MODELS, size=VARIANTS - MODELS)])
    speed = np.sort(rng.uniform(0.1, 1.0, VARIANTS))[::-1]
    quality = (
        1
        - (1 - speed) * rng.gamma(2.0, 0.1, (PROTOTYPES, 1))
        - 0.02 * rng.random((PROTOTYPES, VARIANTS))
    )
    cost = speed[:, None] * 3.0 * np.linspace(1.0, 4.0, types)
    counts = np.full(types, workers // types)
    rates = rng.dirichlet(np.ones(PROTOTYPES)) * 1.5 * (counts / cost[0]).sum()
    placed = np.zeros((types, MODELS), dtype=np.int64)
    placed[:, 0] = counts
    return (
        Demand(rates, quality, np.ones(quality.shape, bool), np.zeros(PROTOTYPES, np.int64)),
        Cluster(
            workers=counts,
            holds=np.arange(MODELS)[:, None] == model[None, :],
            cost_s=cost,
            meets=np.ones((1, VARIANTS, types), bool),
            load_s=np.full((types, MODELS), 20.0),
            placed=placed,
        ),
    )


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Instances a size.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    table = Table("workers", "types", "median ms", "slowest ms", "by")
    results = {}
    for workers, types in SIZES:
        times, sources = [], set()
        for seed in range(repeats):
            demand, cluster = problem(workers, types, seed)
            begun = time.perf_counter()
            found = plan(demand, cluster, Tuning(limit_s=30.0))
            times.append(1000 * (time.perf_counter() - begun))
            sources.add(found.source)
        results[str(workers)] = {"median_ms": float(np.median(times)), "worst_ms": max(times)}
        row = (f"{np.median(times):.0f}", f"{max(times):.0f}", ", ".join(sorted(sources)))
        table.add_row(str(workers), str(types), *row)
    Console().print(table)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
