"""`argus simulate`: policies on a virtual cluster, under a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from argus.cli import worlds
from argus.cli.consoles import err, out
from argus.core.errors import BadRequest


def simulate(
    world: worlds.WorldOption = "paper-a100",
    trace: Annotated[
        str,
        typer.Option(
            help="bursty, twitter, diurnal, poisson or step, scaled to the world's capacity; "
            "gentd26:FILE, a production service's requests in less time, scaled likewise; or a CSV "
            "of your own with a column at_s (arrivals in seconds from its beginning, used as they "
            "are), per_minute (rates, used as they are) or requests (a curve, scaled as twitter's)."
        ),
    ] = "bursty",
    policies: Annotated[str, typer.Option(help="Policies, separated by commas, or all.")] = "all",
    workers: Annotated[
        str | None, typer.Option(help="Workers, or of each type, as 4,8. Default: the world's.")
    ] = None,
    slo: worlds.SloOption = None,
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
            help="Multiplies the trace's rates. Unless it is 1, arrivals of at_s are drawn at "
            "random at their rates by minute, so multiplied."
        ),
    ] = 1.0,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of the predictions' error; inf makes them useless. Default: "
            "the world's."
        ),
    ] = None,
    minutes: Annotated[
        int | None, typer.Option(help="Use only so many first minutes of the trace.", min=1)
    ] = None,
    at_hand: Annotated[
        bool,
        typer.Option(
            "--at-hand",
            help="Workers have loaded every model and take one up at once, as a server does where "
            "half of the device's memory stays free.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed; the same one repeats a run.")] = 0,
    table: worlds.TableOption = None,
    profile: worlds.ProfileOption = None,
    scores: worlds.ScoresOption = None,
    predictor: worlds.PredictorOption = None,
    encoder: worlds.EncoderOption = None,
    ranks: worlds.RanksOption = False,
    unrelated: worlds.UnrelatedOption = None,
    output: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for tables and the figure.")
    ] = None,
    find_load: Annotated[
        bool, typer.Option("--find-load", help="Find the most load at which each meets the SLO.")
    ] = False,
    max_violations: Annotated[
        float, typer.Option(help="With --find-load: the SLO's highest ratio of violations.")
    ] = 0.01,
    min_quality: Annotated[
        float, typer.Option(help="With --find-load: the SLO's least effective quality.")
    ] = 0.95,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object as the last line.")
    ] = False,
) -> None:
    """Serve a trace with every policy on a virtual cluster, and compare them."""
    from argus.simulator.runs import Scenario, Target, kinds_of, most_load
    from argus.simulator.runs import simulate as run
    from argus.simulator.traces import load_trace

    here, counts = worlds.prepared(
        world, table, profile, scores, predictor, encoder, ranks, unrelated
    )
    if load <= 0:
        raise BadRequest(f"--load is {load:g}; it multiplies the rates and must be more than 0.")
    if noise is not None:
        here = here.with_noise(noise, seed + 1)
    counts = worlds.counts_of(workers, counts, here)
    asked = load_trace(trace).first(minutes)
    scenario = Scenario(
        here,
        kinds_of(counts),
        asked.rates,
        worlds.multiple_of(slo, here),
        seed,
        load,
        own=asked.own and not scale,
        at_s=asked.at_s,
        topics=asked.topics,
        compressed=asked.compressed,
        at_hand=at_hand,
    )
    names = worlds.policies_of(policies)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=err, transient=True,
    )  # fmt: skip
    if find_load:
        target = Target(max_violations, min_quality)
        with progress:
            task = progress.add_task("finding loads", total=len(names))
            loads = {}
            for name in names:
                loads[name] = most_load(scenario, name, target)
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
    out.print(_table(reports))
    if output is not None:
        from argus.simulator.figures import save

        for file in save(output, reports, runs, scenario):
            out.print(f"wrote {file}", highlight=False)
    if as_json:
        print(json.dumps({name: r.to_json() for name, r in reports.items()}))


def _table(reports: dict[str, Any]) -> Table:
    table = Table(
        "policy", "on time /min", "violations", "quality", "effective", "p50", "p99", "late",
        "shed", "dropped", "busy", "loads", "worker-h /1000", box=SIMPLE_HEAD,
        caption="In the minutes of highest load; the last three over the whole trace.",
    )  # fmt: skip
    for name, report in reports.items():
        high = report.high_load
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
