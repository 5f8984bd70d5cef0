"""How often drift is reported where there is none, and how soon where there is.

    python benchmarks/drift.py [--days 100] [--rate 5] [--other prompts.txt] [--json]

Days of a working day's load are drawn from the bundled family's own prompts: stretches of its
workload, hours in which one theme alone is asked for, bursts of simple prompts, and scripts that
repeat a few. Errors are the held-out ones of the predictor that ships, of variants whose mix
changes by the hour; as many pictures are measured as `truth_share` takes. Only vectors and errors
are drawn: no picture is made. `before` are the tests that these replaced.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_matrix

from argus.engine.sources import family_fingerprint, model_folder
from argus.families.catalog import default_family
from argus.lab.prompts import ideas_of, read_prompts
from argus.lab.workload import workload
from argus.quality import table as quality_table
from argus.quality.drift import FEWEST_PROMPTS, WINDOW, Drift, moved
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor

Numbers = NDArray[np.floating[Any]]
Whole = NDArray[np.int64]

DAY_S = 86_400
EVERY = 20  # prompts between two tests, as the server tests
TRUTH_SHARE = 0.02
OWN = 6000
SIMPLE = [
    f"{number} {colour} {thing}"
    for number in ("a", "two", "three")
    for colour in ("red", "blue", "green", "black", "purple", "orange")
    for thing in ("fish", "house", "boat", "tree", "sun", "key", "cup", "star")
]
FOREIGN = [
    f"{what} of {owner} {thing}{style}"
    for what in ("a photo", "an oil painting", "a cinematic portrait", "a blurry selfie")
    for owner in ("my old", "the president's", "an angry", "somebody's broken", "a cyberpunk")
    for thing in ("dog", "laptop", "neighbour", "bicycle", "grandmother", "violin", "cathedral")
    for style in ("", ", trending on artstation", " by rembrandt", ", unreal engine")
]


def main(
    days: Annotated[int, typer.Option(help="Simulated days without drift.")] = 100,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 5.0,
    other: Annotated[Path | None, typer.Option(help="Prompts of another world.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    family = default_family()
    predictor = Predictor.load(Path(family.folder) / "predictor", family_fingerprint(family))
    encoder = PromptEncoder.load(model_folder(family.models[family.exact.model]))
    asked = list(itertools.islice(workload(ideas_of(family), seed=1), OWN))
    texts = [one.prompt for one in asked] + SIMPLE
    known = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    pool = vectors_of(encoder, list(known))
    load = Load(
        pool, np.array([known[text] for text in texts]), np.array([one.theme for one in asked])
    )
    own = pool[load.places[:OWN]]
    worlds = {"other words": vectors_of(encoder, FOREIGN)}
    if other is not None:
        worlds[other.name] = vectors_of(encoder, read_prompts(other)[:OWN])
    centre, spread = predictor.weights["centre"], predictor.weights["spread"]
    rng = np.random.default_rng(0)
    check(load, centre, spread, rng)

    results: dict[str, Any] = {"days": days, "rate": rate}
    alarms, before, furthest = 0, 0, 0.0
    for _ in range(days):
        order = load.day(rng, int(rate * DAY_S))
        means, different = windows(order, pool)
        share = np.where(different >= FEWEST_PROMPTS, moved(means, centre, spread), 0.0)
        alarms += rises(share > 1)
        furthest = max(furthest, float(share.max()))
        old = old_means(order, pool)
        before += rises(np.square(old - centre).sum(1) / np.trace(spread) - 1 / 400 > 0.2)
    results["prompts"] = {
        "false alarms a day": alarms / days, "before": before / days, "furthest": furthest
    }  # fmt: skip
    results["found after"] = {}
    for name, world in worlds.items():
        for part in (1.0, 0.7):
            found = [delay(own, world, part, centre, spread, rng) for _ in range(20)]
            results["found after"][f"{name}, {part:.0%} of requests"] = quantiles(found)

    errors = residuals(family, Path(family.folder))
    taken = int(rate * DAY_S * TRUTH_SHARE)
    drift, raised, was, old_raised = Drift(), 0, False, 0
    latest: Numbers = np.zeros(0)
    for _ in range(days):
        drawn = measured(rng, errors, taken)
        for error in drawn.tolist():
            drift.saw_error(error)
            raised, was = raised + (drift.errors and not was), drift.errors
        old_raised += rises(old_errors(np.r_[latest, drawn]))
        latest = drawn[-99:]
    results["errors"] = {"false alarms a day": raised / days, "before": old_raised / days}
    results["measured pictures until found"] = {
        f"{shift:+g}": quantiles([error_delay(rng, errors, shift) for _ in range(40)])
        for shift in (-0.15, -0.3, -0.5)
    }
    show(results)
    if as_json:
        print(json.dumps(results))


def vectors_of(encoder: PromptEncoder, prompts: list[str]) -> Numbers:
    return np.stack([encoder.embed(prompt).vector for prompt in prompts])


@dataclass(frozen=True)
class Load:
    """A `pool` (m, d) of different prompts; the places in it of a workload's prompts and, after
    them, of the simple ones; the workload's themes."""

    pool: Numbers
    places: Whole
    themes: Whole

    def day(self, rng: np.random.Generator, count: int) -> Whole:
        """Places in the pool of a day's prompts."""
        parts, length = [], 0
        while length < count:
            part = self.places[_stretch(rng, self.themes, len(self.places) - len(self.themes))]
            parts.append(part)
            length += len(part)
        return np.concatenate(parts)[:count]


def _stretch(rng: np.random.Generator, themes: Whole, simple: int) -> Whole:
    """What is asked for, for a while."""
    own = len(themes)
    kind = rng.choice(4, p=[0.6, 0.1, 0.2, 0.1])
    if kind == 0:  # people
        at, size = rng.integers(own), rng.integers(200, 3000)
        return (at + np.arange(size)) % own
    if kind == 1:  # an hour of one theme
        those = np.flatnonzero(themes == rng.choice(themes))
        return rng.choice(those, rng.integers(1000, 10_000))
    if kind == 2:  # somebody tries simple prompts
        return own + rng.integers(0, simple, rng.integers(20, 600))
    return rng.choice(rng.integers(0, own + simple, rng.integers(1, 20)), 500)  # a script


def windows(order: Whole, pool: Numbers, window: int = WINDOW) -> tuple[Numbers, Whole]:
    """At every test of a server (t,): the mean (t, d) of the different ones of the latest prompts,
    and how many they are."""
    count = len(order)
    by_prompt = np.lexsort((np.arange(count), order))
    again = np.full(count, count + window)
    same = order[by_prompt[1:]] == order[by_prompt[:-1]]
    again[by_prompt[:-1][same]] = by_prompt[1:][same]
    at = np.arange(count)
    first, last = at // EVERY + 1, np.minimum(again, at + window) // EVERY + 1
    tests = count // EVERY + 1
    last = np.minimum(last, tests)
    signs = np.r_[np.ones(count), -np.ones(count)]
    changes = csr_matrix(
        (signs, (np.r_[first, last], np.r_[order, order])), (tests + 1, len(pool))
    )  # fmt: skip
    sums = np.cumsum(changes @ pool.astype(np.float64), axis=0)[1:tests]
    different = np.cumsum(np.asarray(changes.sum(1)).ravel())[1:tests].round().astype(np.int64)
    return sums / np.maximum(different, 1)[:, None], different


def check(load: Load, centre: Numbers, spread: Numbers, rng: np.random.Generator) -> None:
    """That the above is what a server sees."""
    order, pool = load.day(rng, 4000), load.pool
    means, different = windows(order, pool)
    drift = Drift(centre, spread)
    for n, place in enumerate(order, start=1):
        drift.saw_prompt(pool[place])
        if n % EVERY == 0 and different[n // EVERY - 1] >= FEWEST_PROMPTS:
            told = moved(means[n // EVERY - 1][None], centre, spread)[0]
            assert abs(told - drift.moved) < 1e-3, (n, told, drift.moved)


def old_means(order: Whole, pool: Numbers, window: int = 400) -> Numbers:
    """The means of the latest 400 prompts at every test."""
    of = csr_matrix(
        (np.ones(len(order)), (np.arange(len(order)) // EVERY, order)),
        (len(order) // EVERY + 1, len(pool)),
    )
    sums = np.cumsum(of @ pool.astype(np.float64), axis=0)
    back = window // EVERY
    means: Numbers = (sums[back:-1] - sums[: -back - 1]) / window
    return means


def rises(alarm: NDArray[np.bool_]) -> int:
    return int((np.diff(alarm.astype(np.int8), prepend=0) == 1).sum())


def delay(
    own: Numbers, world: Numbers, part: float, centre: Numbers, spread: Numbers,
    rng: np.random.Generator,
) -> int:  # fmt: skip
    """Pictures from a shift until it is reported; 2000 if it is not by then."""
    drift, at = Drift(centre, spread), rng.integers(len(own))
    for n in range(WINDOW):
        drift.saw_prompt(own[(at + n) % len(own)])
    for n in range(1, 2001):
        new = rng.random() < part
        drift.saw_prompt(world[rng.integers(len(world))] if new else own[(at - n) % len(own)])
        if n % EVERY == 0 and drift.prompts:
            return n
    return 2000


def residuals(family: Any, folder: Path) -> Numbers:
    """Measured minus predicted (p, v, s) of prompts that the predictor had not seen."""
    rows = quality_table.judged(quality_table.read(folder / "quality.parquet"))
    told = pd.read_parquet(folder / "predictor" / "held_out.parquet")
    names = list(family.variants)
    prompts, quality, _ = quality_table.by_prompt(rows, names)
    mean = told.pivot(index="prompt", columns="variant", values="mean")
    off: Numbers = quality - mean.reindex(index=prompts, columns=names).to_numpy()[:, :, None]
    return off[:, 1:]  # the exact one is what quality is measured by


def measured(rng: np.random.Generator, errors: Numbers, count: int) -> Numbers:
    """Errors of so many pictures: the mix of variants changes, and prompts come in pairs."""
    prompts, variants, seeds = errors.shape
    parts: list[Numbers] = []
    for _ in range(0, count, 360):
        mix = rng.dirichlet(np.full(variants, 0.3))
        v = rng.choice(variants, 360, p=mix)
        p = np.repeat(rng.integers(0, prompts, 180), 2)
        parts.append(errors[p, v, rng.integers(0, seeds, 360)])
    drawn = np.concatenate(parts)
    known: Numbers = drawn[~np.isnan(drawn)][:count]
    return known


def old_errors(errors: Numbers) -> NDArray[np.bool_]:
    first, second = (np.cumsum(np.r_[0, errors**n]) for n in (1, 2))
    mean = (first[100:] - first[:-100]) / 100
    square = (second[100:] - second[:-100]) / 100
    chance = np.sqrt(np.maximum(square - mean**2, 0) / 99)
    alarm: NDArray[np.bool_] = (abs(mean) > 0.05) & (abs(mean) > 4 * chance)
    return alarm


def error_delay(rng: np.random.Generator, errors: Numbers, shift: float) -> int:
    """Measured pictures from a shift until it is reported."""
    drift = Drift()
    for error in measured(rng, errors, 1080).tolist():
        drift.saw_error(error)
    drawn: Iterator[float] = iter((measured(rng, errors, 2160) + shift).tolist())
    for n, error in enumerate(drawn, start=1):
        drift.saw_error(error)
        if drift.errors:
            return n
    return 2160


def quantiles(found: list[int]) -> dict[str, float]:
    return {"median": float(np.median(found)), "most": float(np.max(found))}


def show(results: dict[str, Any]) -> None:
    shown = Table("test", "false alarms a day", "with the test before")
    for test in ("prompts", "errors"):
        one = results[test]
        shown.add_row(test, f"{one['false alarms a day']:.3g}", f"{one['before']:.3g}")
    shown.caption = (
        f"{results['days']} days at {results['rate']:g} requests a second; the mean prompt moved "
        f"by {results['prompts']['furthest']:.2f} of what is reported at most"
    )
    Console().print(shown)
    delays = Table("shift", "found after (median)", "at most")
    for shift, one in results["found after"].items():
        delays.add_row(shift, f"{one['median']:.0f} pictures", f"{one['most']:.0f}")
    for shift, one in results["measured pictures until found"].items():
        words = f"{shift} of quality"
        delays.add_row(words, f"{one['median']:.0f} measured pictures", f"{one['most']:.0f}")
    Console().print(delays)


if __name__ == "__main__":
    typer.run(main)
