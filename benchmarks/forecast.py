"""How far off forecasts of the arrival rate are, a window of 30 seconds ahead.

    python benchmarks/forecast.py [--seeds 5] [--json]
    python benchmarks/forecast.py --trace gentd26:FILE [--json]

Mean absolute error in percent of the mean rate, against the true rate (Poisson counts are what the
methods see, so that even a method that knew the rate before could not be exact).

With --trace, real arrivals: the error against the rate of the windows ahead, by horizon, and the
share of bursts that the method knew of one window after they began. A burst is a window with more
than twice the requests of the hour around it, and more than `BURST` in all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from argus.control.forecast import Forecast
from argus.core.errors import BadRequest
from argus.simulator.traces import TRACES, load_trace, rates_of

WINDOW_S = 30.0


class Last:
    """The last window's rate."""

    def __init__(self) -> None:
        self.rate = 0.0

    def add(self, count: int) -> None:
        self.rate = count / WINDOW_S

    def next(self) -> float:
        return self.rate


class Mean(Last):
    """The mean of the last ten windows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def add(self, count: int) -> None:
        self.seen = [*self.seen[-9:], count / WINDOW_S]
        self.rate = sum(self.seen) / len(self.seen)


class Method(Protocol):
    def add(self, count: int) -> None: ...

    def next(self) -> float: ...


METHODS: dict[str, Callable[[], Method]] = {
    "last window": Last,
    "mean of ten": Mean,
    "Holt": lambda: Forecast(WINDOW_S, burst=float("inf")),
    "Holt, with bursts": lambda: Forecast(WINDOW_S),
}


GENTD26_DAYS = 17.3  # that its file holds
HORIZONS = (1, 2, 4, 10)  # windows
BURST, HOUR = 20, 120  # requests; windows


class Season(Last):
    """The mean of the windows at this time of the trace's day so far, of the last one if none."""

    def __init__(self, day: int) -> None:
        super().__init__()
        self.seen: list[float] = []
        self.day = day

    def add(self, count: int) -> None:
        self.seen.append(count / WINDOW_S)
        same = self.seen[len(self.seen) % self.day :: self.day]
        self.rate = float(np.mean(same)) if len(self.seen) > self.day else self.seen[-1]


def real(name: str) -> dict[str, dict[str, float]]:
    """By method: the error at each horizon, in percent of the mean rate, and the bursts caught."""
    trace = load_trace(name)
    if trace.at_s is None:
        raise BadRequest(f"{name} says when requests arrive by the minute only.")
    counts = np.bincount((trace.at_s // WINDOW_S).astype(int))
    day = max(1, round(len(counts) / GENTD26_DAYS))
    around = np.convolve(counts, np.ones(HOUR) / HOUR, mode="same")
    begins = (counts > 2 * around) & (counts > BURST)
    begins[1:] &= ~begins[:-1]
    goes_on = begins[:-1] & (counts[1:] > BURST)
    results = {}
    for method, make in (METHODS | {"same time of day": lambda: Season(day)}).items():
        forecast, told = make(), []
        for count in counts:
            forecast.add(int(count))
            told.append(forecast.next() * WINDOW_S)
        ahead = np.array(told)
        found = {
            f"{h} ahead": 100 * float(np.abs(ahead[:-h] - counts[h:]).mean() / counts.mean())
            for h in HORIZONS
        }
        known = ahead[:-1][goes_on] > counts[1:][goes_on] / 2
        results[method] = found | {"bursts caught": 100 * float(known.mean())}
    print(
        f"{int(counts.sum())} pictures in {len(counts)} windows; {int(goes_on.sum())} bursts last"
    )
    return results


def main(
    seeds: Annotated[int, typer.Option(help="Draws of arrivals.")] = 5,
    trace: Annotated[str | None, typer.Option(help="Real arrivals: as `argus simulate`'s.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    if trace is not None:
        found = real(trace)
        shown = Table("method", *next(iter(found.values())))
        for name, row in found.items():
            shown.add_row(name, *(f"{value:.0f} %" for value in row.values()))
        Console().print(shown)
        if as_json:
            print(json.dumps(found))
        return
    table, results = Table("trace", *METHODS), {}
    for made in TRACES:
        rates = np.repeat(rates_of(made), 2) / 60
        errors: dict[str, list[float]] = {name: [] for name in METHODS}
        for seed in range(seeds):
            counts = np.random.default_rng(seed).poisson(rates * WINDOW_S)
            for name, method in METHODS.items():
                forecast = method()
                off = []
                for count, ahead in zip(counts[:-1], rates[1:], strict=True):
                    forecast.add(int(count))
                    off.append(abs(forecast.next() - ahead))
                errors[name].append(100 * float(np.mean(off)) / float(rates.mean()))
        results[made] = {name: float(np.mean(values)) for name, values in errors.items()}
        table.add_row(made, *(f"{value:.1f} %" for value in results[made].values()))
    Console().print(table)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
