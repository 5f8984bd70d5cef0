"""`argus simulate`: policies on a virtual cluster, under a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from argus.cli.consoles import err, out
from argus.core.errors import BadRequest


def simulate(
    world: Annotated[
        str, typer.Option(help="A world's name, or the path of its YAML file.")
    ] = "paper-a100",
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
    slo: Annotated[
        str | None,
        typer.Option(
            help="The deadline: 3x the exact variant's latency, or 12s. Default: the world's."
        ),
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
    seed: Annotated[int, typer.Option(help="Random seed; the same one repeats a run.")] = 0,
    table: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a world: scores of your own models' pictures, parquet or CSV, with "
            "columns prompt, seed and one for each variant (docs/your-models.md)."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="With --table: YAML or JSON of each variant's seconds a picture."),
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(help="The file of scores of the world sd35 (not part of Argus).")
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option(
            help="With --table or --scores: what `argus train --table` wrote. Default: trained now."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="With --table or --scores: words (the default), or the folder or hub id of a "
            "sentence encoder."
        ),
    ] = None,
    ranks: Annotated[
        bool,
        typer.Option(
            "--ranks", help="With --table or --scores: quality by the scores' ranks instead."
        ),
    ] = False,
    unrelated: Annotated[
        float | None,
        typer.Option(
            help="With --table: the mean score of pictures of other prompts, quality 0. Default: "
            "what 1 % of the exact variant's pictures score less than."
        ),
    ] = None,
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
    from argus.simulator.scored import WORDS, Source, world_of_table
    from argus.simulator.traces import load_trace
    from argus.simulator.worlds import load_world, workers_of

    own = table or scores or predictor or encoder or ranks
    source = Source(table or scores, predictor, encoder or WORDS, ranks) if own else None
    if table is None:
        if profile is not None or unrelated is not None:
            raise BadRequest("--profile and --unrelated go with --table.")
        with err.status(f"Preparing {world} …"):
            here, counts = load_world(world, source), workers_of(world)
    else:
        if profile is None or scores is not None:
            raise BadRequest(
                "--table needs --profile, a file with each variant's seconds a picture, and goes "
                "without --scores (docs/your-models.md)."
            )
        world = str(table)
        with err.status("Training on the scores …"):
            here, counts = world_of_table(source or Source(table), profile, unrelated)
    if load <= 0:
        raise BadRequest(f"--load is {load:g}; it multiplies the rates and must be more than 0.")
    if noise is not None:
        here = here.with_noise(noise, seed + 1)
    counts = counts if workers is None else _counts(workers)
    if len(counts) != len(here.table.types):
        raise BadRequest(
            f"{world} has workers of {', '.join(here.table.types)}: give as many numbers."
        )
    asked = load_trace(trace).first(minutes)
    scenario = Scenario(
        here,
        kinds_of(counts),
        asked.rates,
        _multiple(slo, here.table.slo_s) if slo else here.slo,
        seed,
        load,
        own=asked.own and not scale,
        at_s=asked.at_s,
        topics=asked.topics,
        compressed=asked.compressed,
    )
    names = _names(policies)
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
        raise BadRequest("--workers must give at least one worker.")
    return counts


def _multiple(slo: str, exact_s: float) -> float:
    try:
        value = float(slo[:-1])
        if slo[-1] in "xs" and value > 0:
            return value if slo[-1] == "x" else value / exact_s
    except ValueError:
        pass
    raise BadRequest(f"--slo takes 3x or 12s, not {slo!r}.")


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
