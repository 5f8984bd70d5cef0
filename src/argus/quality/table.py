"""The quality table, which `argus calibrate` writes and predictors are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from argus.core.errors import BadRequest
from argus.core.family import EXACT
from argus.files import written_aside
from argus.quality.scorer import quality, raw_ratio

MEASURED = (
    "prompt", "variant", "seed", "similarity", "neighbour", "score", "unrelated", "seconds",
)  # fmt: skip
COLUMNS = (*MEASURED[:-2], "s0", "s_exact", "quality", "raw_ratio", "seconds")


def finish(measured: pd.DataFrame) -> pd.DataFrame:
    """Quality from scores: one row per (prompt, variant, seed), `COLUMNS`.

    s₀ is the mean of `unrelated`, the scores of exact pictures for another prompt. s_exact is the
    mean of a prompt's exact scores over its seeds.

    A scorer's other scores NAME, with `unrelated NAME` of exact pictures, are kept as NAME and
    `s0 NAME`, for `scored_by`.
    """
    table = measured.copy()
    exact = table[table["variant"] == EXACT]
    table["s0"] = np.float32(exact["unrelated"].mean())
    table["s_exact"] = table["prompt"].map(exact.groupby("prompt")["score"].mean())
    score, best = (table[name].to_numpy(np.float32) for name in ("score", "s_exact"))
    table["quality"] = quality(score, best, float(table["s0"].iloc[0]))
    table["raw_ratio"] = raw_ratio(score, best)
    others = _others(table.columns)
    for name in others:
        table[f"s0 {name}"] = np.float32(exact[f"unrelated {name}"].mean())
    return table[[*COLUMNS, *others, *(f"s0 {name}" for name in others)]]


def scored_by(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The table as if it had been made with another of its scorer's scores.

    Raises BadRequest if it does not hold that one.
    """
    if name not in table or f"s0 {name}" not in table:
        raise BadRequest(
            f"The table holds no score {name!r}, but {', '.join(_scores(table)) or 'one only'}."
        )
    measured = table.copy()
    measured["score"], measured["unrelated"] = measured[name], measured[f"s0 {name}"]
    for other in _scores(table):
        measured[f"unrelated {other}"] = measured[f"s0 {other}"]
    return finish(measured)


def _scores(table: pd.DataFrame) -> list[str]:
    """The names of a finished table's scores."""
    return [str(name).removeprefix("s0 ") for name in table.columns if str(name).startswith("s0 ")]


def _others(columns: pd.Index[str]) -> list[str]:
    return [str(c).removeprefix("unrelated ") for c in columns if str(c).startswith("unrelated ")]


def by_prompt(
    table: pd.DataFrame, variants: Sequence[str]
) -> tuple[list[str], NDArray[np.float64], list[str | None]]:
    """The prompts (p,); quality (p, v, s) of every variant and seed, NaN without a picture; and the
    prompts (p,) of the neighbours that pictures were resumed from, None without one.

    Quality is here 1 + (s_v − s_exact) / mean(s_exact − s₀) of the same prompt and seed: it has the
    mean of DESIGN's ratio, but does not divide by the score of one exact picture.

    Raises BadRequest if the table lacks a variant.
    """
    lacking = [name for name in variants if name not in set(table["variant"])]
    if lacking:
        raise BadRequest(
            f"The table has no rows of {lacking[0]!r}: it is not of the family as it is now. "
            "Calibrate again."
        )
    scores = scores_by_prompt(table, variants)
    exact = scores[:, [list(variants).index(EXACT)]]
    quality = 1 + (scores - exact) / np.nanmean(exact - float(table["s0"].iloc[0]))
    found = table.groupby("prompt")["neighbour"].first()
    neighbours = [None if pd.isna(one) else str(one) for one in found]
    return [str(prompt) for prompt in found.index], quality, neighbours


def judged(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the prompts whose pictures were made under most seeds: decisions are judged on
    these, and others only learnt from."""
    seeds = table.groupby("prompt")["seed"].transform("nunique")
    chosen: pd.DataFrame = table[seeds == seeds.max()]
    return chosen


def similarities(table: pd.DataFrame) -> NDArray[np.float32]:
    """The similarity (p,) of every prompt's neighbour, NaN without one; prompts in the order of
    `by_prompt`."""
    found: NDArray[np.float32] = table.groupby("prompt")["similarity"].first().to_numpy(np.float32)
    return found


def scores_by_prompt(table: pd.DataFrame, variants: Sequence[str]) -> NDArray[np.float64]:
    """The score (p, v, s) of every variant and seed, NaN where nothing was made; prompts in the
    order of `by_prompt`."""
    wide = table.pivot_table(index="prompt", columns=["variant", "seed"], values="score")
    columns = pd.MultiIndex.from_product([variants, sorted(table["seed"].unique())])
    return wide.reindex(columns=columns).to_numpy(float).reshape(len(wide), len(variants), -1)


def steady(table: pd.DataFrame) -> pd.Series[float]:
    """The quality of every row in the form of `by_prompt`, with the mean exact score over its
    prompt's seeds."""
    gained: pd.Series[float] = table["s_exact"] - table["s0"]
    return 1 + (table["score"] - table["s_exact"]) / gained.mean()


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all."""
    with written_aside(path) as aside:
        table.to_parquet(aside, index=False, compression="zstd")


def read(path: Path) -> pd.DataFrame:
    """Read what `write` wrote. Raises BadRequest if it is not such a table."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read as a table of qualities: {error}") from error
    lacking = sorted(set(COLUMNS) - set(table.columns))
    if lacking:
        raise BadRequest(f"{path} is no table of qualities: it has no column {lacking[0]!r}.")
    return table
