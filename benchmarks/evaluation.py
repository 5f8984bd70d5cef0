"""The evaluation on virtual clusters: what is beaten, what each part is worth, what happens when.

    python benchmarks/evaluation.py beaten [--world paper-a100] [--trace bursty] [--seeds 3]
    python benchmarks/evaluation.py equal [--world paper-a100] [--trace bursty] [--load 0.75]
    python benchmarks/evaluation.py parts
    python benchmarks/evaluation.py events [--figure docs/figures/events.png]
    python benchmarks/evaluation.py scale

Each takes --json for an object as last line. `docs/results.md` holds the tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from argus.control.policies import POLICIES, new_policy
from argus.control.price import Price, PriceTuning
from argus.control.variants import Flags
from argus.core.machine import cores
from argus.simulator.cluster import Happening, Simulation
from argus.simulator.report import Figures, Report
from argus.simulator.requests import ON_TIME
from argus.simulator.runs import Scenario, Target, kinds_of, most_load, simulate
from argus.simulator.traces import Trace, load_trace, rates_of
from argus.simulator.world import World
from argus.simulator.worlds import load_world, workers_of

COMPARED = ("price", "price-blind", "argus", "pac", "proteus", "nirvana", "clipper-ht", "oracle")
BLIND = ("price-blind", "pac", "proteus", "nirvana", "clipper-ht")
# One burst with its flanks; the published trace has three alike.
EXCERPTS = {"bursty": slice(140, 280), "twitter": slice(0, 200), "twitter_rate": slice(0, 200)}
PARTS, PICTURES = 6, 1000  # of a trace of arrivals: excerpts from so many parts, of so many each
MINUTES = 90
STEPS = 6  # of the bisection
QUALITIES = (0.95, 0.90)
T = TypeVar("T")

app = typer.Typer(pretty_exceptions_enable=False)
JsonFlag = Annotated[bool, typer.Option("--json", help="A JSON object as last line.")]


def scenario(
    world: World, name: str, trace: str, seed: int = 0, every: int = 1, workers: int | None = None
) -> Scenario:
    """`every` leaves out all but each so-many-th minute of a trace of rates. Of one of arrivals,
    each seed has another excerpt."""
    kinds = kinds_of(workers_of(name) if workers is None else [workers])
    read = load_trace(trace)
    if read.at_s is not None:
        read = excerpt(read, seed)
        return Scenario(
            world, kinds, read.rates, world.slo, seed, own=read.own, at_s=read.at_s,
            topics=read.topics, compressed=read.compressed,
        )  # fmt: skip
    rates = read.rates[EXCERPTS.get(Path(trace).stem, slice(None))][::every]
    return Scenario(world, kinds, rates, world.slo, seed)


def excerpt(trace: Trace, number: int) -> Trace:
    """Consecutive arrivals from the middle of the trace's part of that number, stretched or
    compressed to the mean rate of the whole."""
    assert trace.at_s is not None
    count = len(trace.at_s)
    part = slice(first := int((number % PARTS + 0.5) * count / PARTS), first + PICTURES)
    at_s = trace.at_s[part] - trace.at_s[first]
    at_s = at_s * (len(at_s) / at_s[-1]) / (count / trace.at_s[-1])
    topics = None if trace.topics is None else trace.topics[part]
    rates = np.bincount((at_s // 60).astype(int)).astype(float)
    return replace(trace, rates=rates, at_s=at_s, topics=topics)


def on_all_cores(
    work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], title: str = "Simulating"
) -> list[T]:
    """What `work` returns for the arguments of each job, in their order."""
    with ProcessPoolExecutor(cores(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(work, *job) for job in jobs]
        return [one.result() for one in track(running, title, transient=True)]


def most_carried(
    world: str, trace: str, seed: int, every: int, workers: int | None,
    policy: str, violations: float, top: float,
) -> list[float]:  # fmt: skip
    """The most load that a policy carries at each of `QUALITIES`, as peak pictures a minute."""
    one = scenario(load_world(world), world, trace, seed, every, workers)
    known: dict[float, Report] = {}
    targets = [Target(violations, quality) for quality in QUALITIES]
    loads = [most_load(one, policy, target, STEPS, top, known) for target in targets]
    return [float(load * one.scaled.max()) for load in loads]


def at_load(
    world: str, trace: str, seed: int, every: int, workers: int | None, policy: str, load: float
) -> Figures:
    """What a policy does at so many times the trace's load."""
    one = replace(scenario(load_world(world), world, trace, seed, every, workers), load=load)
    return simulate(one, policy)[0].whole


@app.command()
def beaten(
    world: str = "paper-a100",
    trace: str = "bursty",
    seeds: int = 3,
    violations: float = 0.01,
    top: float = 1.5,
    every: int = 1,
    workers: int | None = None,
    as_json: JsonFlag = False,
) -> None:
    """The most load, as peak pictures a minute, that each policy carries at a promise; no more
    than `top` times the trace's is tried."""
    result = {}
    table = Table("effective quality", *COMPARED)
    jobs = [(name, seed) for name in COMPARED for seed in range(seeds)]
    asked = [(world, trace, seed, every, workers, name, violations, top) for name, seed in jobs]
    loads: dict[tuple[float, str], list[float]] = {}
    for (name, _), carried in zip(jobs, on_all_cores(most_carried, asked), strict=True):
        for quality, height in zip(QUALITIES, carried, strict=True):
            loads.setdefault((quality, name), []).append(height)
    for quality in QUALITIES:
        cells = []
        for name in COMPARED:
            found = loads[quality, name]
            cells.append(f"{np.mean(found):.0f} [{min(found):.0f}, {max(found):.0f}]")
        table.add_row(f"≥ {quality:.2f}", *cells)
        mean = {name: float(np.mean(loads[quality, name])) for name in COMPARED}
        result[f"{quality:.2f}"] = mean | {
            "price/argus": mean["price"] / max(mean["argus"], 1e-9),
            "price/best blind": mean["price"] / max(max(mean[name] for name in BLIND), 1e-9),
            "price/oracle": mean["price"] / max(mean["oracle"], 1e-9),
        }
    Console(width=200).print(table)
    print_ratios(result)
    if as_json:
        print(json.dumps(result))


@app.command()
def equal(
    world: str = "paper-a100",
    trace: str = "bursty",
    load: float = 0.75,
    seeds: int = 3,
    every: int = 1,
    workers: int | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Every policy at the same load: means over seeds, and the least and most of them."""
    result = {}
    table = Table("policy", "on time /min", "violations, %", "quality", "effective quality")
    jobs = [(name, seed) for name in POLICIES for seed in range(seeds)]
    asked = [(world, trace, seed, every, workers, name, load) for name, seed in jobs]
    done = dict(zip(jobs, on_all_cores(at_load, asked), strict=True))
    for name in POLICIES:
        found = [done[name, seed] for seed in range(seeds)]
        columns = {
            "throughput_qpm": [one.throughput_qpm for one in found],
            "violation_ratio": [one.violation_ratio for one in found],
            "quality": [one.quality for one in found],
            "effective_quality": [one.effective_quality for one in found],
        }
        cells = []
        for values, form, times in zip(
            columns.values(), ("{:.0f}", "{:.1f}", "{:.3f}", "{:.3f}"), (1, 100, 1, 1), strict=True
        ):
            low, mean, high = (times * float(f(values)) for f in (min, np.mean, max))
            spread = f" [{form.format(low)}, {form.format(high)}]"
            cells.append(
                form.format(mean) + (spread if form.format(low) != form.format(high) else "")
            )
        table.add_row(name, *cells)
        result[name] = {key: float(np.mean(values)) for key, values in columns.items()}
    Console(width=120).print(table)
    if as_json:
        print(json.dumps(result))


def print_ratios(result: dict[str, dict[str, float]]) -> None:
    for quality, values in result.items():
        ratios = {name: value for name, value in values.items() if "/" in name}
        print(quality, ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))


@app.command()
def parts(world: str = "paper-a100", load: float = 0.75, as_json: JsonFlag = False) -> None:
    """What each part of `price` is worth, at a share of the published high load.

    All of the published high load is more than even the fastest variants can carry: nothing is
    left to decide there.
    """
    here = load_world(world)
    variants = np.array(here.table.strategies)
    cases: dict[str, World] = {"all of it": here}
    for strategy in ("cache", "model", "steps"):
        if (variants == strategy).any():
            cases[f"without {strategy}"] = without(here, variants == strategy)
    cases["without batches"] = alone(here)
    for noise in (0.0, 0.05, 0.1, float("inf")):
        cases[f"noise {noise:g}"] = here.with_noise(noise, 1)
    reports = {}
    for name, one in track(cases.items(), transient=True):
        reports[name] = busy(one, world, "price", load)
    reports["without prompts"] = busy(here, world, "price-blind", load)
    reports["without feedback"] = busy(here, world, "price", load, feedback=False)
    reports["argus, as published"] = busy(here, world, "argus", load)
    show(reports, as_json)


def busy(world: World, name: str, policy: str, load: float, feedback: bool = True) -> Report:
    rates = np.full(MINUTES, rates_of("step").max())
    made = replace(scenario(world, name, "step"), rates=rates, load=load)
    chosen = new_policy(policy, world.table, [made.slo])
    if not feedback:
        chosen = Price(world.table, [made.slo], PriceTuning(feedback=False))
    return simulate(made, policy, policy=chosen)[0]


def without(world: World, gone: Flags) -> World:
    """The world without some variants."""
    keep = ~gone
    table = world.table
    names = [v for v, stays in zip(range(len(keep)), keep, strict=True) if stays]
    return replace(
        world,
        table=replace(
            table,
            variants=tuple(table.variants[v] for v in names),
            strategies=tuple(table.strategies[v] for v in names),
            model=table.model[keep],
            steps=table.steps[keep],
            skip=table.skip[keep],
            least_similarity=table.least_similarity[keep],
            mean_quality=table.mean_quality[keep],
        ),
        truth=world.truth[:, keep],
        predicted=world.predicted[:, keep],
    )


def alone(world: World) -> World:
    """The world with one picture at a time."""
    table = world.table
    single = replace(table, batches=table.batches[:1], step_s=table.step_s[:, :, :1], _curves={})
    return replace(world, table=single)


@app.command()
def events(
    world: str = "paper-a100",
    figure: Annotated[Path | None, typer.Option(help="Where to draw them.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """A slow latent store, workers that die, a stale predictor: three hours of middling load."""
    here = load_world(world)
    hour = 3600.0
    cases: dict[str, tuple[World, list[tuple[float, Happening]]]] = {
        "nothing happens": (here, []),
        "store 100 times slower for an hour": (
            here,
            [(hour, lambda s: s.slow_store(100.0)), (2 * hour, lambda s: s.slow_store(1.0))],
        ),
        "2 workers die and return": (
            here,
            [(hour + w, dying(w)) for w in range(2)] + [(2 * hour + w, back(w)) for w in range(2)],
        ),
        "themes drift, the predictor is stale": (drifted(here), []),
    }
    reports, runs = {}, {}
    for name, (one, happenings) in track(cases.items(), transient=True):
        rates = np.full(180, 0.75 * rates_of("bursty").max())
        made = replace(scenario(one, world, "step"), rates=rates, events=tuple(happenings))
        reports[name], runs[name] = simulate(made, "price")
    if figure is not None:
        draw(runs, figure)
        print(f"wrote {figure}")
    show(reports, as_json)


def dying(worker: int) -> Happening:
    return lambda simulation: simulation.kill(worker)


def back(worker: int) -> Happening:
    return lambda simulation: simulation.revive(worker)


def drifted(world: World) -> World:
    """Half of the prompts are predicted as if they were others."""
    rng = np.random.default_rng(0)
    predicted = world.predicted.copy()
    half = rng.permutation(len(predicted))[: len(predicted) // 2]
    predicted[half] = predicted[rng.permutation(half)]
    return replace(world, predicted=predicted)


@app.command()
def scale(world: str = "paper-a100", as_json: JsonFlag = False) -> None:
    """8 to 1,000 workers at proportional load, and 4 fast with 8 slow ones."""
    here = load_world(world)
    reports = {}
    for workers in track((8, 32, 128, 1000), transient=True):
        made = Scenario(
            here,
            (0,) * workers,
            np.full(max(10, 240 // workers), 300.0),
            here.slo,
            load=workers / 8,
        )
        reports[f"{workers} workers"] = simulate(made, "price")[0]
    mixed = two_types(here, 3.0)
    for policy in ("price", "argus", "proteus"):
        made = Scenario(mixed, (0,) * 4 + (1,) * 8, np.full(60, 250.0), here.slo)
        reports[f"4 fast and 8 slow, {policy}"] = simulate(made, policy)[0]
    show(reports, as_json)


def two_types(world: World, slower: float) -> World:
    """The world with a second type of device that takes `slower` times as long."""
    table = world.table
    both = replace(
        table,
        types=(*table.types, "slow"),
        step_s=np.concatenate([table.step_s, slower * table.step_s]),
        load_s=np.concatenate([table.load_s, table.load_s]),
        _curves={},
    )
    return replace(world, table=both)


def show(reports: dict[str, Report], as_json: bool) -> None:
    table = Table("case", "on time /min", "violations", "quality", "effective", "p99", "loads")
    for name, report in reports.items():
        whole = report.whole
        table.add_row(
            name,
            f"{whole.throughput_qpm:.0f} of {whole.offered_qpm:.0f}",
            f"{100 * whole.violation_ratio:.1f} %",
            f"{whole.quality:.3f}",
            f"{whole.effective_quality:.3f}",
            f"{whole.p99_s:.1f} s",
            str(report.loads),
        )
    Console(width=120).print(table)
    if as_json:
        print(json.dumps({name: report.to_json() for name, report in reports.items()}))


def draw(runs: dict[str, Simulation], file: Path) -> None:
    """Shares of strategies and violations, minute by minute, for every case."""
    drawn = Figure(figsize=(9, 2.2 * len(runs)))
    panels = drawn.subplots(len(runs), 1, sharex=True)
    for panel, (name, run) in zip(panels, runs.items(), strict=True):
        requests, table = run.requests, run.world.table
        minute = (requests.arrived_s // 60).astype(int)
        count = np.bincount(minute)
        bottom = np.zeros(len(count))
        for strategy in dict.fromkeys(table.strategies):
            of = np.isin(
                requests.variant, [v for v, s in enumerate(table.strategies) if s == strategy]
            )
            share = np.bincount(minute, weights=of, minlength=len(count)) / np.maximum(count, 1)
            panel.fill_between(range(len(count)), bottom, bottom + share, label=strategy, lw=0)
            bottom += share
        late = np.bincount(minute, weights=requests.outcome != ON_TIME, minlength=len(count))
        panel.plot(late / np.maximum(count, 1), color="black", lw=1, label="violations")
        panel.set_title(name, fontsize=9, loc="left")
        panel.set_ylim(0, 1)
        panel.set_ylabel("share")
    panels[0].legend(ncol=6, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1))
    panels[-1].set_xlabel("minute")
    drawn.savefig(file, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    app()
