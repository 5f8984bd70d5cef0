"""What do the users of a real service mean for the approximate cache?

    python benchmarks/real_load.py --requests gentd26_requests.csv \\
        --sessions diffusiondb_prompts.txt --neighbours prompt_neighbours.csv --minilm [--json]

GenTD26 (alibaba/clusterdata) says when each user of a production service asked, but not with which
words. When is taken from it, the words from prompts that people wrote elsewhere:

- A run is requests of one user with at most half an hour between two. It is given a family, and
  walks through its prompts. A request whose prompt is as long and whose model is the same as those
  of the run's request before is a re-roll, and has its prompt again; any other has the family's
  next one. A run that comes to the end of its family goes on to another. Families are drawn without
  replacement, so that users are as like each other as the prompts are; only when none is left, all
  are drawn again.
- Families are the sessions found in `--sessions`, prompts in the order in which many users sent
  them (a prompt goes on the session among the last 100 prompts with which it has most words in
  common, if that is half of the words of both), and in `--neighbours`, a prompt with all those
  whose nearest cached one it is.

Each request looks for a neighbour once, for all of its pictures, as policy `nirvana` would; a full
run is stored at once. The thresholds are fitted as in `cache.py`, without users. An entry's age
counts from when it was stored.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from cache import SCOPE, SHARES, STEPS, Matrix, embed, resumed, thresholds_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

from argus.cache.cache import ApproximateCache
from argus.cache.catalogue import ORDERS, Catalogue
from argus.cache.latents import LatentStore, StoredLatents

NOTHING = torch.zeros(1)
RUN_GAP_S = 1800.0
BACK, ALIKE = 100, 0.5  # prompts, share of words
AGES_H = (0.25, 1.0, 4.0, 24.0)
ROOMS = (0.01, 0.02, 0.05, 0.2)  # of what all the prompts' latents would fill


class Names(LatentStore):
    """A store of names, a byte each: which latents stay is asked here, not what they cost."""

    _names = count()

    def put(self, k: int, latents: Tensor) -> StoredLatents:
        return StoredLatents(k, str(next(self._names)), "", 1)

    def get(self, stored: StoredLatents) -> Tensor:
        return NOTHING

    def delete(self, names: Iterable[str]) -> None:
        pass


@dataclass(frozen=True)
class Ask:
    """A request of a user for some pictures of a prompt."""

    at_s: float
    run: int
    pictures: int
    text: str


def main(
    requests: Annotated[Path, typer.Option(help="GenTD26's table of requests.")],
    sessions: Annotated[Path, typer.Option(help="Prompts as they were sent, one a line.")],
    neighbours: Annotated[Path, typer.Option(help="CSV: prompt, cached_prompt (may be empty).")],
    minilm: Annotated[bool, typer.Option(help="Embed with MiniLM.")] = False,
    embeddings: Annotated[
        Path | None, typer.Option(help="File (.npy) to keep the embeddings in.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of which family each run gets.")] = 0,
    rooms: Annotated[list[float] | None, typer.Option(help="Sizes of the cache.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    sent = [line.strip() for line in sessions.read_text().splitlines() if line.strip()]
    with neighbours.open() as rows:
        pairs = [(row["prompt"], row["cached_prompt"]) for row in csv.DictReader(rows)]
    chains = sessions_of(sent)
    families = [list(dict.fromkeys(chain)) for chain in chains] + stars(pairs)
    texts = list(dict.fromkeys(text for family in families for text in family))
    vectors = _embedded(texts, minilm, embeddings)
    number = {text: i for i, text in enumerate(texts)}
    apart = list(dict.fromkeys(number[prompt] for prompt, _ in pairs))
    thresholds = thresholds_of(vectors[apart])
    asks = asks_of(pd.read_csv(requests), families, np.random.default_rng(seed))
    result: dict[str, Any] = {"likeness": likeness(asks, chains)}
    print(json.dumps(result["likeness"], indent=1))
    console = Console()
    table = Table("order", "room", "entries", "hits", "steps saved", "own run's", "evicted")
    result["eviction"] = []
    for room in [*(rooms or ROOMS), 1.0]:
        entries = int(room * len({ask.text for ask in asks}))
        for order in ORDERS if room < 1 else ("fifo",):
            row = replay(asks, number, vectors, thresholds, order, entries)
            ages = row.pop("ages_h")
            result["eviction"].append({"order": order, "room": room, **row})
            table.add_row(
                order if room < 1 else "any", f"{room:.0%}", f"{entries:,}", f"{row['hits']:.1%}",
                f"{row['steps_saved']:.1%}", f"{row['own']:.1%}", f"{row['evicted']:,}",
            )  # fmt: skip
    console.print(table)
    result["ages"] = {
        "quantiles_h": {str(q): float(np.quantile(ages, q)) for q in (0.25, 0.5, 0.75, 0.9)},
        "within": {f"{h:g} h": float((ages <= h).mean()) for h in AGES_H},
    }
    print(f"age of the entry at a hit, nothing evicted: {json.dumps(result['ages'])}")
    if as_json:
        print(json.dumps(result))


def sessions_of(sent: list[str]) -> list[list[str]]:
    """Prompts that many users sent, by session."""
    found: list[list[str]] = []
    recent: list[tuple[frozenset[str], int]] = []
    for text in sent:
        words = frozenset(re.findall(r"\w+", text.lower()))
        alike = [(len(words & w) / max(1, len(words | w)), which) for w, which in recent]
        best, which = max(alike, default=(0.0, 0))
        if best < ALIKE:
            which = len(found)
            found.append([])
        found[which].append(text)
        recent = [*recent[1 - BACK :], (words, which)]
    return found


def stars(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Cached prompts, each with those whose nearest it is; those without one are alone."""
    found: dict[str, dict[str, None]] = {}
    for prompt, cached in pairs:
        found.setdefault(cached or prompt, {cached or prompt: None})[prompt] = None
    return [list(family) for family in found.values()]


def asks_of(table: pd.DataFrame, families: list[list[str]], rng: np.random.Generator) -> list[Ask]:
    """GenTD26's text-to-image requests, with prompts."""
    table = table[(table["type"] == "text") & table["n"].notna()].sort_values("at_s", kind="stable")
    drawn = _drawn(families, rng)
    last: dict[str, tuple[float, int, Any]] = {}  # by user: when, run, what
    walks: list[Iterator[str]] = []
    texts: dict[int, str] = {}
    asks = []
    rows: Iterable[Any] = table.itertuples()
    for row in rows:
        at_s, asked = float(row.at_s), (row.prompt_chars, row.model)
        before_s, run, before = last.get(row.user, (-np.inf, -1, None))
        if at_s - before_s > RUN_GAP_S:
            run, before = len(walks), None
            walks.append(_walk(drawn))
        if asked != before:
            texts[run] = next(walks[run])
        last[row.user] = at_s, run, asked
        asks.append(Ask(at_s, run, int(row.n), texts[run]))
    return asks


def _drawn(families: list[list[str]], rng: np.random.Generator) -> Iterator[list[str]]:
    while True:
        for i in rng.permutation(len(families)):
            yield families[i]


def _walk(drawn: Iterator[list[str]]) -> Iterator[str]:
    """The prompts of a run: a family's, then another's."""
    for family in drawn:
        yield from family


def likeness(asks: list[Ask], chains: list[list[str]]) -> dict[str, float]:
    """The share of re-rolls among requests that go on, in GenTD26's runs and in the sessions of
    prompts that were found without them."""
    last: dict[int, str] = {}
    again = within = 0
    for ask in asks:
        within += ask.run in last
        again += last.get(ask.run) == ask.text
        last[ask.run] = ask.text
    steps = [(a, b) for chain in chains for a, b in pairwise(chain)]
    return {
        "requests": len(asks),
        "runs": len(last),
        "prompts": len({ask.text for ask in asks}),
        "rerolls_in_runs": again / within,
        "rerolls_in_sessions": sum(a == b for a, b in steps) / len(steps),
    }


def replay(
    asks: list[Ask],
    number: dict[str, int],
    vectors: Matrix,
    thresholds: dict[int, float],
    order: str,
    entries: int,
) -> dict[str, Any]:
    """Serve the requests with room for so many whole entries."""
    latents = dict.fromkeys(SHARES, NOTHING)
    now = [0.0]
    cache = ApproximateCache(
        Catalogue("sqlite://"),
        Names("memory://real-load", "bench"),
        entries * len(SHARES),
        clock=lambda: now[0],
        eviction=order,
    )
    stored: dict[int, Ask] = {}
    hits = own = saved = kept = 0
    ages = []
    for ask in asks:
        now[0], vector = ask.at_s, vectors[number[ask.text]]
        neighbour, k = resumed(cache, vector, thresholds)
        if neighbour is not None:
            source = stored[neighbour.entry]
            hits, saved = hits + 1, saved + k * ask.pictures
            own += source.run == ask.run
            ages.append((ask.at_s - source.at_s) / 3600)
            continue
        entry = cache.keep(SCOPE, ask.text, vector, latents)
        if entry is not None:
            stored.setdefault(entry, ask)
            kept += len(latents)
    return {
        "hits": hits / len(asks),
        "steps_saved": saved / (STEPS * sum(ask.pictures for ask in asks)),
        "own": own / max(1, hits),
        "evicted": kept - cache.stats().latents,
        "ages_h": np.array(ages),
    }


def _embedded(texts: list[str], minilm: bool, file: Path | None) -> Matrix:
    if file is not None and file.exists():
        vectors: Matrix = np.load(file)
        if len(vectors) != len(texts):
            raise typer.BadParameter(f"{file} has {len(vectors)} embeddings, not {len(texts)}.")
        return vectors
    vectors = embed(texts, minilm)
    if file is not None:
        np.save(file, vectors)
    return vectors


if __name__ == "__main__":
    typer.run(main)
