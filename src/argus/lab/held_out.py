"""Judges a predictor on held-out prompts: errors, bounds, and the regret of its decisions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from argus.core.family import Family
from argus.core.profile import Profile
from argus.lab.mixes import believed, judged, judged_by, judged_knowing
from argus.lab.training import Examples, Trained, group_means
from argus.quality import table

LOADS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Errors:
    """Of one variant: the mean absolute error of the expected quality (against the mean over
    seeds, whose noise it contains), Spearman's rank correlation with it, and the share of groups of
    prompts with like expectations that are not worth less than their bound on average."""

    error: float
    rank: float
    covered: float


@dataclass(frozen=True)
class Regret:
    """Mean quality at a load (1: the exact variant's capacity) of the best mix that is the same for
    all prompts, of routing by predictions, and by the truth as estimated from pictures of every
    variant (`mixes.believed`); judged on pictures by which none of them was chosen."""

    load: float
    blind: float
    predicted: float
    truth: float

    @property
    def recovered(self) -> float:
        """The predictions' share of the truth's gain over blind. NaN without a gain."""
        gain = self.truth - self.blind
        return (self.predicted - self.blind) / gain if gain > 0 else float("nan")


def costs_of(family: Family, profile: Profile) -> dict[str, float]:
    """Worker-seconds per picture of every variant at its model's best batch, exact first."""
    return {
        name: profile.models[variant.model].picture_cost_s(
            variant, profile.models[variant.model].best_batch
        )
        for name, variant in family.variants.items()
    }


def errors(data: Examples, trained: Trained) -> dict[str, Errors]:
    """Errors by variant, without the exact one, whose quality is 1 by definition, of the prompts
    that judge."""
    result = {}
    for v, name in list(enumerate(data.variants))[1:]:
        measured, known = data.quality[:, v], ~np.isnan(data.quality[:, v]).any(1) & data.judging
        truth, mean = measured[known].mean(1), trained.mean[known, v]
        told_apart = np.ptp(mean) > 0 and np.ptp(truth) > 0
        groups = group_means(data, trained.low[:, v], v, data.judging)
        result[name] = Errors(
            float(np.abs(truth - mean).mean()),
            float(spearmanr(truth, mean).statistic) if told_apart else 0.0,
            float(np.mean([b <= got for b, got in groups])),
        )
    return result


def regret(data: Examples, guess: Numbers, costs: Numbers) -> list[Regret]:
    """The regret, by load, of routing by a guess (p, v) of quality, with `costs` (v,) as of
    `costs_of`; judged on the prompts that judge. Empty for data of one seed:
    nothing is left to judge the choice on."""
    if data.quality.shape[2] < 2:
        return []
    whole = data.judging
    q, known = _never(data.quality[whole]), _never(guess[whole])
    belief, all_prompts = believed(q), np.zeros(len(q), np.int64)
    found = []
    for load in LOADS:
        budget = float(costs[0]) / load
        blind = judged(q, costs, budget, all_prompts)
        truth = judged_knowing(q, belief, costs, budget)
        found.append(Regret(load, blind, judged_by(known, q, costs, budget), truth))
    return found


def write(data: Examples, trained: Trained, file: Path) -> None:
    """Write the held-out predictions, one row for each prompt and variant, for simulations: their
    policies get what a server's would."""
    rows = pd.DataFrame(
        {
            "prompt": np.repeat(data.prompts, len(data.variants)),
            "variant": np.tile(data.variants, len(data.prompts)),
            "mean": trained.mean.ravel().astype(np.float32),
            "low": trained.low.ravel().astype(np.float32),
        }
    )
    table.write(rows.dropna(), file)


def _never(q: Numbers) -> Numbers:
    """Qualities with a value in place of NaN that no mix chooses."""
    return np.where(np.isnan(q), -1e3, q)
