"""How long does a decision take: from a request parsed to a job handed over?

    python benchmarks/decision.py [--rates 20,60,100] [--json]

A real server (`argus serve`, policy `clipper-ht`, whose pictures the bundled family's smallest
model makes) gets constant loads; every answer says how long its prompt was embedded, its neighbour
searched, its quality predicted, its variant and worker chosen and its latents fetched. `route` of
`price` is timed in `router.py`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer
import yaml
from rich.console import Console
from rich.table import Table
from serving import running, until_ready

from argus.families.catalog import default_family
from argus.lab.prompts import ideas_of
from argus.lab.workload import workload

PARTS = ("embed", "search", "predict", "route", "fetch")


def main(
    rates: Annotated[
        str, typer.Option(help="Requests a second, separated by commas.")
    ] = "20,60,100",
    seconds: Annotated[float, typer.Option(help="Of each.")] = 15.0,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    result = {}
    titles = [f"{part} {q}" for part in ("all", *PARTS) for q in ("p50", "p99")]
    table = Table("requests/s", "answered", *titles, title="milliseconds")
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "argus.yaml"
        content = {
            "policy": "clipper-ht", "port": 0, "data": f"{folder}/data", "queue_limit": 1000,
            "slo": {"default": {"latency": "60s"}},
        }  # fmt: skip
        settings.write_text(yaml.safe_dump(content))
        with running(settings) as (url, _):
            until_ready(url)
            asyncio.run(load(url, 5.0, 5.0))  # the first plan puts the smallest model in place
            for rate in (float(one) for one in rates.split(",")):
                rows = asyncio.run(load(url, rate, seconds))
                spent = {part: [row[part] for row in rows] for part in PARTS}
                spent["all"] = [sum(row.values()) for row in rows]
                found = {
                    f"{part}_{name}_ms": float(np.quantile(values, q))
                    for part, values in spent.items()
                    for name, q in (("p50", 0.5), ("p99", 0.99))
                }
                result[f"{rate:g}"] = found | {"answered_per_s": len(rows) / seconds}
                cells = [
                    f"{found[f'{part}_{q}_ms']:.2f}" for part in ("all", *PARTS)
                    for q in ("p50", "p99")
                ]  # fmt: skip
                table.add_row(f"{rate:g}", f"{len(rows) / seconds:.1f} /s", *cells)
    Console(width=160).print(table)
    if as_json:
        print(json.dumps(result))


async def load(url: str, rate: float, seconds: float) -> list[dict[str, float]]:
    """What every answer says its decision took, at a constant rate of arrivals."""
    count = int(rate * seconds)
    prompts = [one.prompt for one in islice(workload(ideas_of(default_family()), 5), count)]
    rng = np.random.default_rng(5)
    arrived_s = np.sort(rng.random(count) * seconds)
    found: list[dict[str, float]] = []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        loop = asyncio.get_running_loop()
        begun = loop.time()

        async def one(number: int) -> None:
            await asyncio.sleep(max(0.0, begun + arrived_s[number] - loop.time()))
            answer = await client.post(
                f"{url}/v1/images/generations", json={"prompt": prompts[number]}
            )
            if answer.status_code == 200:
                found.append(answer.json()["argus"][0]["decision_ms"])

        await asyncio.gather(*(one(number) for number in range(count)))
    return found


if __name__ == "__main__":
    typer.run(main)
