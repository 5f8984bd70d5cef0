"""`argus plan`: how many workers a load needs, and how much load workers carry."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from argus.cli import worlds
from argus.cli.consoles import err, out
from argus.core.errors import BadRequest
from argus.core.machine import cores

if TYPE_CHECKING:
    from argus.simulator.plan_report import Planned
    from argus.simulator.traces import Trace

DEFAULT = "price,price-blind,clipper-ha"


def plan(
    peak_qpm: Annotated[
        float | None,
        typer.Option(
            help="Requests in the highest minute: how many workers do they need? Default: those of "
            "your own trace."
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            help="The inverse: how much load do so many workers carry? Of each type, as 4,8."
        ),
    ] = None,
    min_quality: Annotated[
        float,
        typer.Option(
            help="Least mean quality, where a request without a picture in time counts as 0."
        ),
    ] = 0.95,
    slo: worlds.SloOption = None,
    max_violations: Annotated[
        float, typer.Option(help="Highest share of requests without a picture in time.")
    ] = 0.01,
    world: worlds.WorldOption = "paper-a100",
    trace: Annotated[
        str,
        typer.Option(
            help="The load's shape: bursty, twitter, diurnal, poisson, step, gentd26:FILE, or your "
            "own CSV with a column at_s (arrivals in seconds from its beginning) or per_minute "
            "(rates)."
        ),
    ] = "bursty",
    minutes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The promise is judged over so many minutes, the busiest of the trace in a row. "
            "Default: as many as have 8,000 requests at the peak, at least 20.",
        ),
    ] = None,
    policies: Annotated[
        str,
        typer.Option(help="Policies, separated by commas, or all. Exact alone is always compared."),
    ] = DEFAULT,
    gpu_price: Annotated[
        list[str] | None,
        typer.Option(help="Price of a worker's hour: 2.5, or a100=2.5 once for each type."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fresh runs that judge each answer.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same repeats a plan.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time. Default: one on each core.")
    ] = None,
    table: worlds.TableOption = None,
    profile: worlds.ProfileOption = None,
    scores: worlds.ScoresOption = None,
    predictor: worlds.PredictorOption = None,
    encoder: worlds.EncoderOption = None,
    ranks: worlds.RanksOption = False,
    unrelated: worlds.UnrelatedOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the answers into this file.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object as the last line.")
    ] = False,
) -> None:
    """Say how many workers each policy needs for a load, or how much load it carries."""
    from argus.simulator import plan_search, planning
    from argus.simulator.plan_report import Planned, Row, prices_of
    from argus.simulator.runs import Target, kinds_of
    from argus.simulator.traces import load_trace

    if peak_qpm is not None and workers is not None:
        raise BadRequest("Give --peak-qpm or --workers: each is the answer to the other.")
    if not 0 <= max_violations < 1:
        raise BadRequest(f"--max-violations is {max_violations:g}; it is a share, such as 0.01.")
    if not (math.isfinite(min_quality) and min_quality >= 0):
        raise BadRequest(f"--min-quality is {min_quality:g}; it must be a number of 0 or more.")
    if plot is not None and not plot.absolute().parent.is_dir():
        raise BadRequest(f"There is no folder {plot.absolute().parent} to write --plot into.")
    names = worlds.policies_of(policies)
    shape = load_trace(trace)
    here, counts = worlds.prepared(
        world, table, profile, scores, predictor, encoder, ranks, unrelated
    )
    prices = prices_of(gpu_price or [], here.table.types)
    if workers is None:
        height = _peak(peak_qpm, shape)
    else:
        counts = worlds.counts_of(workers, counts, here)
        height = 60 * here.capacity_rps(list(kinds_of(counts)))
    setting = planning.Setting(
        here,
        planning.Workload(shape, minutes or planning.default_minutes(height)),
        worlds.multiple_of(slo, here),
        Target(max_violations, min_quality),
    )
    planning.check(setting, height)
    ladders = {}
    for name in dict.fromkeys((*names, planning.ALONE)):
        if workers is not None:
            label = ", ".join(here.table.types)
            ladders[name, label] = plan_search.load_ladder(setting, name, counts)
            continue
        for kind, label in enumerate(here.table.types):
            ladders[name, label] = plan_search.workers_ladder(setting, name, kind, height, seed)
    begin, judge = plan_search.seeds_of(seed, seeds)
    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:.0f} runs"),
        console=err, transient=True,
    )  # fmt: skip
    compared = list(dict.fromkeys(name for name, _ in ladders))
    err.print(f"Simulating {', '.join(compared)}: some minutes.")
    with progress:
        tasks = {name: progress.add_task(name, total=None) for name in compared}

        def show(job: planning.Job) -> None:
            load = f"{sum(job.counts)} workers, {job.peak_qpm:.0f} a minute"
            progress.update(tasks[job.policy], advance=1, description=f"{job.policy}: {load}")

        with planning.runner(setting, processes or cores(), show) as runs:
            answers = plan_search.solve(
                [
                    plan_search.Search(name, ladder, setting.target, runs, begin, judge)
                    for (name, _), ladder in ladders.items()
                ]
            )
    rows = [
        Row(label, answer, ladder, workers is not None, prices)
        for ((_, label), ladder), answer in zip(ladders.items(), answers, strict=True)
    ]
    planned = Planned(
        setting, rows, "price" if "price" in names else names[0], trace, height, judge
    )
    out.print(f"\n[bold]{escape(planned.sentence())}[/]", highlight=False, soft_wrap=True)
    out.print(_table(planned))
    for line in planned.assumptions():
        out.print(f"- {escape(line)}", highlight=False, soft_wrap=True)
    if plot is not None:
        planned.draw(plot)
        out.print(f"wrote {plot}", highlight=False)
    if as_json:
        print(json.dumps(planned.to_json()))


def _peak(asked: float | None, shape: Trace) -> float:
    """The requests in the highest minute: as asked, or those of a trace of one's own."""
    highest = float(shape.rates.max(initial=0.0))
    if highest <= 0:
        raise BadRequest("The trace has no requests: give one with some.")
    if asked is None:
        if not shape.own:
            raise BadRequest(
                "Give --peak-qpm, the requests in the highest minute, or --workers; only a trace "
                "of your own has a height of its own."
            )
        return highest
    if not (math.isfinite(asked) and asked > 0):
        raise BadRequest(f"--peak-qpm is {asked:g}; it must be a number above 0.")
    return asked


def _table(planned: Planned) -> Table:
    from argus.simulator.plan_report import HOURS, interval

    inverse, priced = planned.inverse, planned.rows[0].prices is not None
    table = Table(
        "policy", "type", "peak load /min" if inverse else "needed", "single runs", "violations",
        "effective quality", "p99", "holds", "load 2 % higher" if inverse else "one less",
        box=SIMPLE_HEAD,
    )  # fmt: skip
    if priced:
        table.add_column("an hour")
        table.add_column("a year")
    for row in planned.rows:
        found, judged, below = row.found, row.answer.judged, row.answer.below
        cells = [
            row.policy,
            row.device,
            "not kept" if found is None else f"{found.value:.0f}",
            "" if found is None else interval(found),
            f"{judged.violations.value:.2%}",
            f"{judged.quality.value:.3f}",
            f"{judged.p99_s:.1f} s",
            ", ".join(f"{n:.1f} {name}" for name, n in planned.holds(row).items()),
            "" if below is None else f"{below.violations.value:.2%}, {below.quality.value:.3f}",
        ]
        if priced:
            hourly = row.hourly
            cells += ["", ""] if hourly is None else [f"{hourly:,.2f}", f"{HOURS * hourly:,.0f}"]
        table.add_row(*cells)
    return table
