"""`argus simulate`: policies on a virtual cluster, under a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from argus.cli.consoles import err, out
from argus.core.errors import BadRequest

if TYPE_CHECKING:
    from argus.simulator.gentd26 import RequestLog
    from argus.simulator.runs import Scenario
    from argus.simulator.traces import Trace


def simulate(
    world: Annotated[
        str, typer.Option(help="A world's name, or the path of its YAML file.")
    ] = "paper-a100",
    trace: Annotated[
        str,
        typer.Option(
            help="bursty, twitter, diurnal, poisson or step, scaled to what the world carries; or "
            "a CSV of your own with a column at_s (arrivals in seconds from its beginning, used as "
            "they are), per_minute (rates, used as they are) or requests (a curve, scaled as "
            "twitter's); or gentd26:FILE, a production service's requests with their users, "
            "replayed as fast as --load says."
        ),
    ] = "bursty",
    policies: Annotated[str, typer.Option(help="Policies, parted by commas, or all.")] = "all",
    workers: Annotated[
        str | None, typer.Option(help="Workers, or workers of each type as 4,8; the world's own.")
    ] = None,
    slo: Annotated[
        str | None,
        typer.Option(help="The deadline: 3x the exact variant's latency, or 12s; the world's own."),
    ] = None,
    scale: Annotated[
        bool,
        typer.Option(
            "--scale-to-capacity",
            help="Scale the rates of at_s and per_minute too, as if they were for the published "
            "cluster, which makes 189 exact pictures a minute; arrivals are drawn at random.",
        ),
    ] = False,
    load: Annotated[
        float,
        typer.Option(
            help="Times the trace's rates. Unless it is 1, arrivals of at_s are drawn at random "
            "at so many times their rates by minute. Of gentd26: the mean, as a multiple of the "
            "exact pictures that the workers make."
        ),
    ] = 1.0,
    overlay: Annotated[
        int,
        typer.Option(
            help="Of gentd26: so many copies of its days at once, as of a service with so many "
            "times the users. Users' gaps are then compressed less, and bursts are milder.",
            min=1,
        ),
    ] = 1,
    noise: Annotated[
        float | None,
        typer.Option(help="Deviation of predicted quality; inf is useless; the world's own."),
    ] = None,
    minutes: Annotated[
        int | None, typer.Option(help="Only the trace's first; of gentd26 in its own time.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Repeats a run exactly.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for tables and the figure.")
    ] = None,
    find_load: Annotated[
        bool, typer.Option("--find-load", help="Find the most load each carries at a promise.")
    ] = False,
    max_violations: Annotated[float, typer.Option(help="The promise, with --find-load.")] = 0.01,
    min_quality: Annotated[float, typer.Option(help="The promise, with --find-load.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    """Serve a trace with every policy on a virtual cluster, and compare them."""
    from argus.simulator.runs import Promised, Scenario, kinds_of, most_load
    from argus.simulator.runs import simulate as run
    from argus.simulator.traces import load_trace
    from argus.simulator.worlds import load_world, workers_of

    here = load_world(world)
    if load <= 0:
        raise BadRequest(f"--load is {load:g}; it multiplies the trace's rates, so more than 0.")
    if noise is not None:
        here = here.with_noise(noise, seed + 1)
    counts = workers_of(world) if workers is None else _counts(workers)
    if len(counts) != len(here.table.types):
        raise BadRequest(
            f"{world} has workers of {', '.join(here.table.types)}: give as many numbers."
        )
    asked = load_trace(trace).overlaid(overlay).first(minutes)
    scenario = Scenario(
        here,
        kinds_of(counts),
        asked.rates,
        _multiple(slo, here.table.slo_s) if slo else here.slo,
        seed,
        load,
        own=asked.own and not scale,
        at_s=asked.at_s,
        log=asked.log,
    )
    names = _names(policies)
    if scenario.replayed is not None:
        _say_replay(scenario.replayed, asked, scenario)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=err, transient=True,
    )  # fmt: skip
    if find_load:
        promised = Promised(max_violations, min_quality)
        with progress:
            task = progress.add_task("finding loads", total=len(names))
            loads = {}
            for name in names:
                loads[name] = most_load(scenario, name, promised)
                progress.advance(task)
        out.print(_loads_table(loads, scenario.scaled.max() / load))
        if as_json:
            print(json.dumps(loads))
        return
    reports, runs = {}, {}
    with progress:
        task = progress.add_task("", total=len(scenario.requests().outcome))
        for name in names:
            progress.reset(task, description=name)
            reports[name], runs[name] = run(
                scenario, name, lambda done: progress.update(task, completed=done)
            )
    out.print(_table(reports, asked.log is not None))
    if output is not None:
        from argus.simulator.figures import save

        for file in save(output, reports, runs, scenario):
            out.print(f"wrote {file}", highlight=False)
    if as_json:
        print(json.dumps({name: r.to_json() for name, r in reports.items()}))


def _names(policies: str) -> list[str]:
    from argus.control.policies import POLICIES

    names = list(POLICIES) if policies == "all" else policies.split(",")
    for name in names:
        if name not in POLICIES:
            raise BadRequest(f"There is no policy {name!r}: use {', '.join(POLICIES)}, or all.")
    return names


def _counts(workers: str) -> list[int]:
    try:
        counts = [int(count) for count in workers.split(",")]
    except ValueError as error:
        raise BadRequest(f"--workers takes numbers such as 8 or 4,8, not {workers!r}.") from error
    if min(counts) < 0 or not sum(counts):
        raise BadRequest("There must be a worker.")
    return counts


def _multiple(slo: str, exact_s: float) -> float:
    try:
        value = float(slo[:-1])
        if slo[-1] in "xs" and value > 0:
            return value if slo[-1] == "x" else value / exact_s
    except ValueError:
        pass
    raise BadRequest(f"--slo takes 3x or 12s, not {slo!r}.")


def _say_replay(played: RequestLog, asked: Trace, scenario: Scenario) -> None:
    """Say what is replayed of a log, and how fast."""
    own_s = asked.log.span_s if asked.log else played.span_s
    out.print(
        f"{len(played.at_s):,} text requests for {played.pictures.sum():,} pictures by "
        f"{len(set(played.user)):,} users in {own_s / 3600:.1f} h, replayed "
        f"{own_s / played.span_s:.3g} times as fast: {played.mean_qpm:.3g} pictures a minute for "
        f"{played.span_s / 60:.0f} minutes, {scenario.scaled.max():.0f} in the busiest; the "
        f"workers make {scenario.exact_qpm:.3g} exact ones.",
        highlight=False,
    )


def _table(reports: dict[str, Any], whole: bool) -> Table:
    """Figures of the whole trace, or of its minutes of high load."""
    table = Table(
        "policy", "on time /min", "violations", "quality", "effective", "p50", "p99", "late",
        "shed", "dropped", "busy", "loads", "worker-h /1000", box=SIMPLE_HEAD,
        caption="Over the whole trace." if whole
        else "In the minutes of highest load; the last three over the whole trace.",
    )  # fmt: skip
    for name, report in reports.items():
        high = report.whole if whole else report.high_load
        table.add_row(
            name,
            f"{high.throughput_qpm:.0f} of {high.offered_qpm:.0f}",
            f"{100 * high.violation_ratio:.1f} %",
            f"{high.quality:.3f}",
            f"{high.effective_quality:.3f}",
            f"{high.p50_s:.1f} s",
            f"{high.p99_s:.1f} s",
            *(str(high.outcomes[outcome]) for outcome in ("late", "shed", "dropped")),
            f"{100 * report.utilisation:.0f} %",
            str(report.loads),
            f"{report.worker_hours_per_1000:.2f}",
        )
    return table


def _loads_table(loads: dict[str, float], peak: float) -> Table:
    table = Table("policy", "load", "peak pictures /min")
    for name, load in sorted(loads.items(), key=lambda one: -one[1]):
        table.add_row(name, f"{load:.2f}", f"{load * peak:.0f}")
    return table
