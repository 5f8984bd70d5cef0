"""Does one plan use two types of device, and does work go on while a node leaves and comes back?

    python benchmarks/clusters.py [--rates 1,2,4] [--seconds 40] [--figure FILE] [--json]

A Ray cluster of two nodes on this machine: a worker of the type `one` with one CPU thread on the
first, a worker of the type `two` with two on the second. Both types are profiled on their nodes,
alone; then `argus serve --workers ray` gets requests in an open loop at each of the rates. For each
type: pictures, variants, and the worker's seconds. In the last part, at the middle rate, the second
node is killed after a third of the time and another joins after two thirds. Both workers and the
server share two cores, so that neither is as fast beside the other as its profile says: the server
learns by how much (`slowness`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from argus.families.catalog import default_family
from argus.lab.prompts import ideas_of
from argus.lab.workload import workload

COMMAND = [sys.executable, "-c", "from argus.cli.main import main; main()"]
TYPES = {
    "one": {"resources": {"one": 1}, "cpus": 1, "threads": 1},
    "two": {"resources": {"two": 1}, "cpus": 2, "threads": 2},
}
LOST = "node killed, node joins"


@dataclass(frozen=True)
class Answer:
    """What came of a request that was sent `at_s` seconds after the first: its status and, of a
    picture, the type that made it, the variant, and whether it was in time."""

    at_s: float
    status: int
    kind: str = ""
    variant: str = ""
    on_time: bool = False
    worker_s: float = 0.0


def main(
    rates: Annotated[str, typer.Option(help="Requests a second.")] = "1,2,4",
    seconds: Annotated[float, typer.Option(help="Of each rate.")] = 40.0,
    figure: Annotated[Path | None, typer.Option(help="Where to draw it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"include_dashboard": False, "num_cpus": 1, "resources": {"one": 1}},
    )
    second = [cluster.add_node(num_cpus=2, resources={"two": 1})]
    found: dict[str, list[Answer]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            settings = profiled(cluster.address, Path(folder))
            with_server(settings, lambda url: measure(url, rates, seconds, cluster, second, found))
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]
    figures = {name: summed(answers) for name, answers in found.items()}
    show(figures)
    if figure is not None:
        draw(found, seconds).savefig(figure, dpi=110)
    if as_json:
        print(json.dumps(figures))


def profiled(address: str, folder: Path) -> Path:
    """Profile every type on its node; the file of settings for the server."""
    settings = {
        "workers": "ray", "ray_address": address, "ray_auth": "disabled", "worker_types": TYPES,
        "data": str(folder / "data"), "port": 0, "window_s": 5.0, "truth_share": 0,
        "queue_limit": 500,
    }  # fmt: skip
    file = folder / "argus.yaml"
    file.write_text(yaml.safe_dump(settings))
    for name in TYPES:
        profile = [
            *COMMAND, "profile", default_family().name, "--config", str(file), "--worker-type",
            name, "--batches", "1,2,4,8", "--repeats", "3", "--rounds", "1", "-o",
            str(folder / f"{name}.json"),
        ]  # fmt: skip
        subprocess.run(profile, check=True, stdout=subprocess.DEVNULL)
    types = {name: one | {"profile": str(folder / f"{name}.json")} for name, one in TYPES.items()}
    file.write_text(yaml.safe_dump(settings | {"worker_types": types}))
    return file


def with_server(settings: Path, use: Callable[[str], None]) -> None:
    ours = [*COMMAND, "serve", "--config", str(settings)]
    log = settings.with_name("log")
    with log.open("w") as file:
        process = subprocess.Popen(ours, stderr=file)
    try:
        while (said := re.search(r"Serving on (\S+)", log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        url = said[1]
        until(url, lambda ready: ready == len(TYPES))
        use(url)
    finally:
        process.terminate()
        process.wait(60)


def until(url: str, true: Callable[[int], bool]) -> None:
    """Wait until the number of workers that are ready is right."""
    while True:
        with suppress(httpx.TransportError):
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            ready = [line for line in lines if line.startswith("argus_worker_ready{")]
            serving = httpx.get(f"{url}/ready").is_success
            if serving and true(sum(line.endswith(" 1.0") for line in ready)):
                return
        time.sleep(0.5)


def measure(
    url: str,
    rates: str,
    seconds: float,
    cluster: Any,
    second: list[Any],
    found: dict[str, list[Answer]],
) -> None:
    given = [float(rate) for rate in rates.split(",")]
    for rate in given:
        found[f"{rate:g}/s"] = asyncio.run(load(url, rate, seconds))
    rate = given[len(given) // 2]
    with ThreadPoolExecutor(1) as beside:  # Ray starts nodes from the main thread only
        begun = time.perf_counter()
        loaded = beside.submit(lambda: asyncio.run(load(url, rate, 3 * seconds)))
        time.sleep(seconds)
        cluster.remove_node(second.pop(), allow_graceful=False)
        time.sleep(max(0.0, begun + 2 * seconds - time.perf_counter()))
        second.append(cluster.add_node(num_cpus=2, resources={"two": 1}))
        found[LOST] = loaded.result()


async def load(url: str, rate: float, seconds: float) -> list[Answer]:
    """Send requests in an open loop."""
    prompts = (one.prompt for one in workload(ideas_of(default_family()), seed=1))
    drawn, begun = random.Random(0), time.perf_counter()

    async def one(http: httpx.AsyncClient, prompt: str) -> Answer:
        at_s = time.perf_counter() - begun
        answer = await http.post("/v1/images/generations", json={"prompt": prompt})
        if not answer.is_success:
            return Answer(at_s, answer.status_code)
        made = answer.json()["argus"][0]
        kind = made["worker_type"]
        return Answer(at_s, 200, kind, made["variant"], made["on_time"], made["gpu_seconds"])

    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        tasks, at = [], 0.0
        while at < seconds:
            tasks.append(asyncio.create_task(one(http, next(prompts))))
            at += drawn.expovariate(rate)
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
        return list(await asyncio.gather(*tasks))


def summed(answers: list[Answer]) -> dict[str, Any]:
    made = [one for one in answers if one.status == 200]
    return {
        "requests": len(answers),
        "on_time": round(sum(one.on_time for one in made) / len(answers), 4),
        "statuses": Counter(one.status for one in answers),
        **{
            name: {
                "pictures": sum(one.kind == name for one in made),
                "worker_s": round(sum(one.worker_s for one in made if one.kind == name), 2),
                "variants": Counter(one.variant for one in made if one.kind == name),
            }
            for name in TYPES
        },
    }


def show(figures: dict[str, dict[str, Any]]) -> None:
    table = Table("load", "requests", "in time", *(f"by {name}" for name in TYPES), "variants")
    for name, one in figures.items():
        variants = {
            kind: ", ".join(f"{v} {n}" for v, n in one[kind]["variants"].most_common(3))
            for kind in TYPES
        }
        table.add_row(
            name, str(one["requests"]), f"{one['on_time']:.1%}",
            *(f"{one[kind]['pictures']} in {one[kind]['worker_s']:.0f} s" for kind in TYPES),
            "\n".join(f"{kind}: {said}" for kind, said in variants.items()),
        )  # fmt: skip
    Console().print(table)


def draw(found: dict[str, list[Answer]], seconds: float) -> Figure:
    """Pictures by type and variant at each rate, and over time while a node leaves and joins."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    loads = [name for name in found if name != LOST]
    names = sorted({one.variant for answers in found.values() for one in answers if one.variant})
    for place, load in enumerate(loads):
        for beside, kind in zip((-0.2, 0.2), TYPES, strict=True):
            bottom = 0
            for number, variant in enumerate(names):
                height = sum(one.kind == kind and one.variant == variant for one in found[load])
                left.bar(place + beside, height, 0.36, bottom, color=f"C{number}")
                bottom += height
            left.annotate(kind, (place + beside, bottom), ha="center", va="bottom", fontsize=8)
    left.set_xticks(range(len(loads)), [f"{load} requests" for load in loads])
    left.set_ylabel(f"pictures in {seconds:g} s")
    for number, variant in enumerate(names):
        left.bar(0, 0, color=f"C{number}", label=variant)
    left.legend(fontsize=8)
    left.set_title("by type of worker and variant", fontsize=10)
    bins = [n * seconds / 8 for n in range(25)]
    over = [[one.at_s for one in found[LOST] if one.kind == kind] for kind in TYPES]
    failed = [one.at_s for one in found[LOST] if one.status != 200]
    right.hist(
        [*over, failed], bins, stacked=True, color=["C7", "C9", "C3"],
        label=[*(f"by {kind}" for kind in TYPES), "refused or failed"],
    )  # fmt: skip
    for at, what in ((seconds, "node killed"), (2 * seconds, "node joins")):
        right.axvline(at, color="black", linewidth=1)
        right.annotate(what, (at, right.get_ylim()[1]), fontsize=8, va="top")
    right.set_xlabel("seconds")
    right.set_ylabel("requests")
    right.legend(fontsize=8)
    right.set_title("while a node leaves and another joins", fontsize=10)
    return figure


if __name__ == "__main__":
    typer.run(main)
