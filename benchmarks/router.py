"""How many requests a second a policy routes on one core: 12 variants, 64 workers of 2 types.

python benchmarks/router.py [--requests 20000] [--json]
"""

from __future__ import annotations

import json
import time
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from argus.control.policies import new_policy
from argus.control.policy import Cluster, PlanningInput, Slo
from argus.control.request import Request
from argus.control.variants import VariantTable

WORKERS, TYPES, PROMPTS = 64, 2, 500
STEPS = np.array([50.0, 45, 40, 35, 30, 25, 25, 15, 10, 50, 50, 4])
MODEL = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3])


def variant_table() -> VariantTable:
    batches, count = np.array([1, 2, 4, 8]), len(STEPS)
    alone = np.outer([1.0, 2.0], [0.08, 0.03, 0.02, 0.04])
    return VariantTable(
        variants=tuple(f"v{i}" for i in range(count)),
        strategies=("exact", *["cache"] * 5, *["steps"] * 3, *["model"] * 3),
        models=("a", "b", "c", "d"),
        types=("fast", "slow"),
        model=MODEL,
        steps=STEPS,
        skip=np.array([0, 5, 10, 15, 20, 25, 0, 0, 0, 0, 0, 0]),
        least_similarity=np.linspace(0, 0.9, count),
        mean_quality=1 - 0.1 * (1 - STEPS / 50),
        batches=batches,
        step_s=alone[:, :, None] * batches / np.array([1.0, 1.3, 1.5, 1.65]),
        load_s=np.full((TYPES, 4), 20.0),
    )


def main(
    requests: Annotated[int, typer.Option(help="Routed by each policy.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    rng, served = np.random.default_rng(0), variant_table()
    quality = 1 - rng.gamma(1.0, 1.0, (PROMPTS, 1)) * (1 - served.mean_quality)
    kinds = np.arange(WORKERS) % TYPES
    models = np.where(np.arange(WORKERS) < 40, 0, np.arange(WORKERS) % 4)
    inputs = PlanningInput(
        now_s=0.0, rate=30.0, quality=quality, allowed=np.ones(quality.shape, bool),
        slo=np.zeros(PROMPTS, np.int64), kinds=kinds, models=models,
        alive=np.ones(WORKERS, bool), wait_s=np.zeros(WORKERS),
    )  # fmt: skip
    rows, allowed = quality.tolist(), [True] * len(STEPS)
    table, results = Table("policy", "routed /s"), {}
    for name in ("price", "argus", "nirvana"):
        policy = new_policy(name, served, [Slo(12.6)])
        policy.plan(inputs)
        waits = rng.exponential(1.0, (100, WORKERS)).tolist()
        cluster = Cluster(0.0, kinds.tolist(), models.tolist(), waits[0], [1] * WORKERS)
        begun = time.perf_counter()
        for number in range(requests):
            cluster.wait_s = waits[number % 100]
            policy.route(Request(rows[number % PROMPTS], allowed, 12.6, 0.8), cluster)
        results[name] = requests / (time.perf_counter() - begun)
        table.add_row(name, f"{results[name]:.0f}")
    Console().print(table)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
