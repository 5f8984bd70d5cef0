"""Tables of logged scores: what somebody's own models' pictures of prompts were worth.

A table is a parquet or CSV file with a row for every prompt and seed and a column for every variant
(`prompt`, `seed`, and the scores), or with a row for every picture (`prompt`, `seed`, `variant`,
`score`). Higher scores are better, whatever their unit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from argus.core.errors import BadRequest

log = logging.getLogger(__name__)

Numbers = NDArray[np.float64]
LONG = {"prompt", "variant", "score"}
WORST = 0.01  # share of the exact variant's scores that are taken for those of unrelated pictures


@dataclass(frozen=True)
class Scores:
    """Scores (p, v, s) of the pictures of p prompts by v variants, the exact one first, and s
    seeds; NaN without one, but every prompt has one of every variant."""

    prompts: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    values: Numbers

    def ranks(self) -> Scores:
        """The same with the share of all scores that are no higher in place of each: another scale,
        which keeps the order and nothing else."""
        known = ~np.isnan(self.values)
        ranked = np.full_like(self.values, np.nan)
        ranked[known] = rankdata(self.values[known]) / known.sum()
        return Scores(self.prompts, self.variants, self.seeds, ranked)

    def only(self, variants: Sequence[str]) -> Scores:
        """Some of its variants, the exact one first."""
        chosen = [self.variants.index(name) for name in variants]
        return Scores(self.prompts, tuple(variants), self.seeds, self.values[:, chosen])

    def zero(self, unrelated: float | None = None) -> float:
        """The score of quality 0: that of `unrelated` pictures, or what is taken for it."""
        return float(np.nanquantile(self.values[:, 0], WORST)) if unrelated is None else unrelated

    def unit(self, unrelated: float | None = None) -> float:
        """The difference of scores that is a quality of 1: the exact variant's mean less `zero`.
        Raises BadRequest if that is not above 0."""
        mean, zero = float(np.nanmean(self.values[:, 0])), self.zero(unrelated)
        if mean <= zero:
            raise BadRequest(
                f"The exact variant {self.variants[0]} scores {mean:.4g} on average: unrelated "
                f"pictures must score less than that, not {zero:.4g}."
            )
        return mean - zero

    def quality(self, unit: float) -> Numbers:
        """Quality (p, v, s): 1 + (s_v - s_exact) / unit, both of the same prompt and seed, so that
        the exact variant's is 1."""
        quality: Numbers = 1 + (self.values - self.values[:, :1]) / unit
        return quality


def read_scores(file: Path, exact: str | None = None) -> Scores:
    """The scores of a file. `exact` is the exact variant: by default the one called so, or that of
    the highest mean score.

    Prompts that differ in case or spaces alone are one; of several pictures of a prompt by the
    same variant and seed the first counts; prompts that lack a variant are left out. Raises
    BadRequest for files that are no such tables.
    """
    try:
        table = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise BadRequest(f"{file} cannot be read as a table of scores: {error}") from error
    if "prompt" not in table:
        raise BadRequest(f"{file} has no column `prompt`.")
    if table["prompt"].isna().any():
        row = int(np.flatnonzero(table["prompt"].isna())[0]) + 1
        raise BadRequest(f"{file} has no prompt in row {row}.")
    table = table.assign(prompt=table["prompt"].astype(str).str.split().str.join(" "))
    if "seed" not in table:
        by = ["prompt", "variant"] if set(table) >= LONG else ["prompt"]
        table = table.assign(seed=table.groupby(by).cumcount())
    key = table["prompt"].str.lower()
    table = table.assign(prompt=table.groupby(key)["prompt"].transform("first"))
    if set(table) >= LONG:
        table = table.drop_duplicates(["prompt", "seed", "variant"])
        wide = table.pivot(index=["prompt", "seed"], columns="variant", values="score")
    else:
        wide = table.drop_duplicates(["prompt", "seed"]).set_index(["prompt", "seed"])
    odd = [str(name) for name in wide if not pd.api.types.is_numeric_dtype(wide[name])]
    if odd:
        raise BadRequest(f"The column {odd[0]} of {file} must hold scores: numbers.")
    if np.isinf(wide.to_numpy(float)).any():
        raise BadRequest(f"{file} has infinite scores.")
    names = [str(name) for name in wide]
    wide.columns = pd.Index(names)
    if len(names) < 2:
        raise BadRequest(f"{file} has scores of {len(names)} variants; two or more are compared.")
    if exact is None:
        exact = "exact" if "exact" in names else str(wide.mean().idxmax())
    if exact not in names:
        raise BadRequest(f"{file} has no variant {exact!r}; it has {', '.join(names)}.")
    names = [exact, *(name for name in names if name != exact)]
    whole = wide[names].dropna()
    if whole.empty:
        raise BadRequest(f"{file} has no prompt and seed with a score of every variant.")
    whole, seeds = _even(whole, file)
    cube = np.stack([whole[name].unstack("seed").to_numpy(float) for name in names], axis=1)
    prompts = tuple(str(one) for one in whole[exact].unstack("seed").index)
    return Scores(prompts, tuple(names), tuple(range(seeds)), cube)


def _even(whole: pd.DataFrame, file: Path) -> tuple[pd.DataFrame, int]:
    """The rows (prompt, seed) with as many seeds, counted from 0, for every prompt: so many that
    most pictures are kept. Prompts with fewer are left out."""
    order = whole.groupby(level="prompt").cumcount()
    counts = whole.groupby(level="prompt").size()
    seeds = max(counts.unique(), key=lambda count: (count * (counts >= count).sum(), count))
    full = whole.groupby(level="prompt")[whole.columns[0]].transform("size") >= seeds
    dropped = int((counts < seeds).sum())
    if dropped:
        log.warning(
            "%d of %d prompts of %s have fewer than %d pictures by every variant and are left out",
            dropped, len(counts), file, seeds,
        )  # fmt: skip
    even = whole.assign(seed=order).reset_index("seed", drop=True).set_index("seed", append=True)
    return even[(full & (order < seeds)).to_numpy()], int(seeds)


def words_of(prompt: str) -> str:
    """A prompt without what people spell differently: its words in lower case."""
    return " ".join(re.findall(r"\w+", prompt.lower()))
