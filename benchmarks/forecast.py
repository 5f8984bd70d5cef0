"""How far off forecasts of the arrival rate are, a window of 30 seconds ahead.

    python benchmarks/forecast.py [--seeds 5] [--json]

Mean absolute error in percent of the mean rate, against the true rate (Poisson counts are what the
methods see, so that even a method that knew the rate before could not be exact).
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
from argus.simulator.traces import TRACES, rates_of

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


def main(
    seeds: Annotated[int, typer.Option(help="Draws of arrivals.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    table, results = Table("trace", *METHODS), {}
    for trace in TRACES:
        rates = np.repeat(rates_of(trace), 2) / 60
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
        results[trace] = {name: float(np.mean(values)) for name, values in errors.items()}
        table.add_row(trace, *(f"{value:.1f} %" for value in results[trace].values()))
    Console().print(table)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
