"""Traces: requests a minute, minute by minute, and arrival times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from argus.control.variants import Numbers, Whole
from argus.core.errors import BadRequest
from argus.simulator.world import Drawing

# argus_reference.json, bursty_trace: requests a minute for 8 A100 that make 189 exact ones.
BURSTY_MINUTES, BURSTY_LOW, BURSTY_HIGH = 840, 50.0, 390.0
BURSTS = ((150, 270), (410, 540), (675, 800))
PAPER_CAPACITY = 8 * 14.29 * 1.65
TWITTER_MINUTES, TWITTER_LOW, TWITTER_HIGH = 800, 80.0, 210.0
LONGEST_S = 400 * 86400.0  # of a trace
GENTD26 = "gentd26:"
GENTD26_SHARE = 0.5  # of the published cluster's capacity: the mean load it is scaled to


def bursty() -> Numbers:
    """The published trace: low load with three bursts."""
    rates = np.full(BURSTY_MINUTES, BURSTY_LOW)
    for begin, end in BURSTS:
        rates[begin:end] = BURSTY_HIGH
    return rates


def twitter(values: Numbers | None = None) -> Numbers:
    """The Twitter curve of the Proteus artifact, scaled to 80 to 210 requests a minute.

    Without its `values`, a curve of similar shape: two slow waves, and noise that lasts minutes.
    """
    if values is None:
        rng = np.random.default_rng(2013)
        at = np.linspace(0, 2 * np.pi, 291)
        noise = np.convolve(rng.normal(size=330), np.ones(40) / 40, mode="valid")[:291]
        values = np.sin(at - 1.2) + 0.35 * np.sin(2 * at) + 1.5 * noise + 0.1 * rng.normal(size=291)
    share = (values - values.min()) / (values.max() - values.min())
    minutes = np.interp(
        np.linspace(0, len(share) - 1, TWITTER_MINUTES), np.arange(len(share)), share
    )
    scaled: Numbers = TWITTER_LOW + (TWITTER_HIGH - TWITTER_LOW) * minutes
    return scaled


def diurnal() -> Numbers:
    """A day of 1,440 minutes, a sine between a quarter of the published high load and all of it."""
    at = np.linspace(0, 2 * np.pi, 1440, endpoint=False)
    wave: Numbers = BURSTY_HIGH * (0.625 - 0.375 * np.cos(at))
    return wave


def poisson() -> Numbers:
    """Two hours at the mean of the published low and high load."""
    return np.full(120, (BURSTY_LOW + BURSTY_HIGH) / 2)


def step() -> Numbers:
    """Half an hour of the published low load, then an hour of the high one."""
    return np.concatenate([np.full(30, BURSTY_LOW), np.full(60, BURSTY_HIGH)])


TRACES: dict[str, Callable[[], Numbers]] = {
    "bursty": bursty, "twitter": twitter, "diurnal": diurnal, "poisson": poisson, "step": step,
}  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """`rates` (minutes,) are requests a minute: the user's `own`, or for the published cluster, to
    be scaled to the simulated one. `at_s` (n,) are arrival times in seconds, ascending, where they
    are known. `compressed` ones are for the published cluster: one of twice its capacity gets them
    in half of the time. `topics` (n,) number what each arrival asks for, where that is known."""

    rates: Numbers
    own: bool = False
    at_s: Numbers | None = None
    topics: Whole | None = None
    compressed: bool = False

    def first(self, minutes: int | None) -> Trace:
        """The trace's first minutes; all of it for None."""
        if minutes is None:
            return self
        if self.at_s is None:
            return replace(self, rates=self.rates[:minutes])
        early = self.at_s < 60.0 * minutes
        topics = None if self.topics is None else self.topics[early]
        return replace(self, rates=self.rates[:minutes], at_s=self.at_s[early], topics=topics)

    def at_peak(self, qpm: float) -> Trace:
        """The trace with `qpm` requests in its highest minute, used as it is.

        Rates are multiplied; known arrivals are then drawn at random, unless that is their own
        highest minute. `compressed` ones come in less time instead, and meet `qpm` about.
        """
        if self.at_s is None or not self.compressed:
            highest = float(self.rates.max())
            if self.at_s is not None and qpm == highest:
                return replace(self, own=True)
            return replace(self, rates=self.rates * (qpm / highest), own=True, at_s=None)
        slowest, fastest = 1e-4, 1e4
        for _ in range(50):
            middle = (slowest * fastest) ** 0.5
            if _by_minute(self.at_s / middle).max() < qpm:
                slowest = middle
            else:
                fastest = middle
        at_s = self.at_s / fastest
        return Trace(_by_minute(at_s), own=True, at_s=at_s, topics=self.topics)

    def busiest(self, minutes: int, lead: int) -> tuple[Trace, int]:
        """The `minutes` consecutive minutes with most requests, the first such ones, and up to
        `lead` minutes before them; and the number of those. Where rates begin later, their first
        minute is what comes before."""
        minutes = min(minutes, len(self.rates))
        until = np.concatenate([[0.0], np.cumsum(self.rates)])
        begin = int(np.argmax(np.round(until[minutes:] - until[:-minutes], 6)))
        if self.at_s is None:
            before = self.rates[np.maximum(0, np.arange(begin - lead, begin))]
            rates = np.concatenate([before, self.rates[begin : begin + minutes]])
            return replace(self, rates=rates), lead
        lead = min(lead, begin)
        rates = self.rates[begin - lead : begin + minutes]
        from_s, to_s = 60.0 * (begin - lead), 60.0 * (begin + minutes)
        chosen = (self.at_s >= from_s) & (self.at_s < to_s)
        topics = None if self.topics is None else self.topics[chosen]
        return replace(self, rates=rates, at_s=self.at_s[chosen] - from_s, topics=topics), lead


def load_trace(name: str) -> Trace:
    """A trace by name, or from a CSV file.

    A CSV has a column `per_minute` of requests a minute, `at_s` of arrivals in seconds from the
    trace's beginning, or `requests` of a curve that is scaled as by `twitter`. Raises BadRequest
    for anything else, and for values that are not finite numbers of 0 or more.
    """
    if name in TRACES:
        return Trace(TRACES[name]())
    if name.startswith(GENTD26):
        return gentd26(Path(name.removeprefix(GENTD26)))
    file = Path(name)
    if not file.is_file():
        raise BadRequest(
            f"There is no trace {name!r}: use {', '.join(TRACES)}, {GENTD26}FILE, or a CSV file."
        )
    try:
        table = pd.read_csv(file)
    except ValueError as error:
        raise BadRequest(f"{file} is no CSV file: {error}") from None
    if "per_minute" in table:
        return Trace(_numbers(file, table["per_minute"]), own=True)
    if "at_s" in table:
        at_s = np.sort(_numbers(file, table["at_s"]))
        if at_s[-1] > LONGEST_S:
            raise BadRequest(
                f"The column at_s of {file} ends {at_s[-1] / 86400:.0f} days from the trace's "
                "beginning: it counts seconds from there, not from 1970, and not milliseconds."
            )
        return Trace(_by_minute(at_s), own=True, at_s=at_s)
    if "requests" in table:
        return Trace(twitter(_numbers(file, table["requests"])))
    raise BadRequest(f"{file} needs a column at_s (seconds), per_minute (rates) or requests.")


def gentd26(file: Path) -> Trace:
    """The requests of a production service (GenTD26, alibaba/clusterdata), from its CSV.

    Of text-to-image requests that succeeded, each of the `n` pictures is an arrival at the same
    time. Time is compressed until the mean load is `GENTD26_SHARE` of the published cluster's
    capacity: what comes in bursts, comes in bursts still. Prompts are not published; a request
    whose lengths, model and steps are those of the same user's last one is taken for a re-roll of
    the same prompt, any other for a new one (`topics`). Raises BadRequest for another file.
    """
    try:
        table = pd.read_csv(file)
        table = table[(table["type"] == "text") & (table["status"] == "succeed")]
        table = table.sort_values("at_s", kind="stable")
        same = ["prompt_chars", "negative_chars", "model", "steps"]
        asked = table.fillna(dict.fromkeys(same, 0)).groupby(same, sort=False).ngroup()
        new = asked != asked.groupby(table["user"]).shift()
        count = table["n"].fillna(1).clip(lower=1).to_numpy(int)
        numbers = np.where(new, np.cumsum(new) - 1, -1)
        users = pd.Series(numbers, index=table.index).where(new).groupby(table["user"]).ffill()
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise BadRequest(f"{file} is no table of GenTD26's requests: {error}") from None
    if table.empty:
        raise BadRequest(f"{file} has no text-to-image request that succeeded.")
    at_s = np.repeat(_numbers(file, table["at_s"]), count)
    minutes = len(at_s) / (GENTD26_SHARE * PAPER_CAPACITY)
    at_s = (at_s - at_s[0]) * 60.0 * minutes / max(float(at_s[-1] - at_s[0]), 1.0)
    rates = _by_minute(at_s)
    return Trace(rates, at_s=at_s, topics=np.repeat(users.to_numpy(int), count), compressed=True)


def rates_of(name: str) -> Numbers:
    """Requests a minute (minutes,) of a trace. Raises as `load_trace`."""
    return load_trace(name).rates


def _by_minute(at_s: Numbers) -> Numbers:
    """Requests a minute (minutes,) of arrivals."""
    return np.bincount((at_s // 60).astype(int)).astype(float)


def _numbers(file: Path, column: pd.Series[Any]) -> Numbers:
    """A column as finite numbers of 0 or more."""
    if column.empty:
        raise BadRequest(f"{file} has no rows.")
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=float)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if len(wrong):
        raise BadRequest(
            f"The column {column.name} of {file} has {column.iloc[wrong[0]]} in row "
            f"{wrong[0] + 1}: it must be numbers of 0 or more."
        )
    return values


def arrivals(rates: Numbers, rng: np.random.Generator) -> Numbers:
    """Seconds of Poisson arrivals at `rates` (minutes,) a minute, ascending."""
    counts = rng.poisson(rates)
    minutes = np.repeat(np.arange(len(rates)), counts)
    times: Numbers = np.sort(60.0 * (minutes + rng.random(len(minutes))))
    return times


def topics(count: int, drawing: Drawing, rng: np.random.Generator) -> Whole:
    """Topics (count,) of arrivals: new ones count from 0, those before the trace are negative."""
    novel = rng.random(count) < drawing.novel
    newest = np.cumsum(novel) - 1
    age = np.minimum(rng.exponential(drawing.alive / 3, count).astype(int), drawing.alive - 1)
    return np.where(novel, newest, newest - age)
