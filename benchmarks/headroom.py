"""What is it worth to know a prompt before choosing how to make its picture?

    python benchmarks/headroom.py [--table quality.parquet --profile profile.json] [--json]
        [--figures docs/figures] [--ratings genai_bench_ratings.csv]

Reads the bundled family's table of qualities and its profile; paints some single things anew, to
count them. A load of 2 is twice what the exact
variant can carry; a mix of variants carries it if its mean cost is half the exact one's. At every
load it compares the best mix that is the same for all prompts (blind), that knows how many things a
prompt asks for (rule), and that has seen pictures of every variant for each prompt and knows how
far such pictures are to be believed (oracle): chosen on all seeds but one, judged on that one, for
each in turn, with bootstrap intervals over prompts; and the mix chosen by the predictor's held-out
predictions. What no mix can carry is shed, at quality 0.

Mean quality is (mean s − s₀) / (mean s_exact − s₀) over prompts. Dividing by each prompt's own
s_exact, an unlucky exact picture would raise all qualities of its prompt, where they are chosen and
where they are judged.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import isotonic_regression

from argus.core.family import EXACT, Family, skip_name
from argus.core.profile import Profile
from argus.engine.engine import Engine
from argus.engine.sources import model_folder
from argus.families.catalog import default_family
from argus.families.pictogram.captions import caption
from argus.families.pictogram.draw import draw_scene
from argus.families.pictogram.prompts import read_prompt
from argus.families.pictogram.scene.detector import load_detector
from argus.families.pictogram.world import sample_scene
from argus.lab.held_out import costs_of
from argus.lab.mixes import believed, judged, judged_by, judged_knowing
from argus.lab.painting import Commission, paint
from argus.quality import table as qualities
from argus.quality.scorers import load_scorer

LOADS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
RESAMPLES = 400
RENDERED = 2000
SINGLE = 500
KEPT = 0.95
Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]


def main(
    table: Annotated[Path | None, typer.Option(help="Default: the shipped one.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Default: the shipped one.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for figures.")] = None,
    ratings: Annotated[Path | None, typer.Option(help="GenAI-Bench's ratings.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    family = default_family()
    rows = qualities.judged(qualities.read(table or Path(family.folder) / "quality.parquet"))
    costs = costs_of(family, Profile.read(profile or Path(family.folder) / "profile.json"))
    console = Console()
    result: dict[str, Any] = {"seeds": int(rows["seed"].nunique())}
    result["scene_accuracy"] = round(_scene_accuracy(family), 4)
    console.print(f"the scorer gives rendered scenes {result['scene_accuracy']}")
    result |= _exact_scores(console, rows)
    prompts, q = by_prompt(rows, list(costs))
    result["single"] = _single(console, family, prompts)
    result["as_good"] = _as_good(console, q, costs)
    result["thresholds"] = thresholds(console, rows, family)
    groups = np.array([sum(g.count for g in read_prompt(p).groups) for p in prompts])
    guess = _guess(family, table, prompts, list(costs))
    curves = _headroom(console, q, np.array(list(costs.values())), groups, guess)
    for name, points in curves.items():
        for load, (value, _, _) in zip(LOADS, points, strict=True):
            result[f"{name}_{load:g}x"] = round(value, 4)
    if ratings is not None:
        result |= _genai(console, ratings)
    if figures is not None:
        from figures_headroom import draw

        draw(figures, rows, costs, groups, prompts, LOADS, curves)
    if as_json:
        print(json.dumps(result))


def by_prompt(rows: pd.DataFrame, variants: list[str]) -> tuple[list[str], Numbers]:
    """Prompts, and (prompts, variants, seeds): how much better than unrelated pictures theirs
    score, in work_steps of what exact pictures do on average."""
    wide = rows.pivot_table(index="prompt", columns=["variant", "seed"], values="score")
    seeds = sorted(rows["seed"].unique())
    scores = np.stack([[wide[v, s].to_numpy() for s in seeds] for v in variants])
    unrelated = float(rows["s0"].iloc[0])
    q = (scores - unrelated) / (scores[variants.index(EXACT)].mean() - unrelated)
    return list(wide.index), q.transpose(2, 0, 1)


def _guess(
    family: Family, table: Path | None, prompts: list[str], variants: list[str]
) -> Numbers | None:
    """The predictor's held-out predictions (n, v) of the shipped table; None for another table."""
    if table is not None:
        return None
    held_out = pd.read_parquet(Path(family.folder) / "predictor" / "held_out.parquet")
    wide = held_out.pivot_table(index="prompt", columns="variant", values="mean")
    found: Numbers = wide.reindex(index=prompts, columns=variants).to_numpy(float)
    return np.where(np.isnan(found), -1e3, found)


def _headroom(
    console: Console, q: Numbers, costs: Numbers, things: Whole, guess: Numbers | None
) -> dict[str, list[tuple[float, float, float]]]:
    """For each policy and load: judged quality, and its 95 % interval over prompts."""
    n = len(q)
    rng = np.random.default_rng(0)
    samples = [np.arange(n), *(rng.integers(0, n, n) for _ in range(RESAMPLES))]
    belief, one_group = believed(q), np.zeros(n, np.int64)
    ways: dict[str, Callable[[Whole, float], float]] = {
        "blind": lambda some, budget: judged(q[some], costs, budget, one_group),
        "rule": lambda some, budget: judged(q[some], costs, budget, things[some]),
        "oracle": lambda some, budget: judged_knowing(q[some], belief[some], costs, budget),
    }
    if guess is not None:
        ways["predictor"] = lambda some, budget: judged_by(guess[some], q[some], costs, budget)
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for name, way in ways.items():
        curves[name] = []
        for load in LOADS:
            value, *spread = [way(some, costs[0] / load) for some in samples]
            low, high = np.quantile(spread, (0.025, 0.975))
            curves[name].append((value, float(low), float(high)))
    shown = Table("load", *curves, title="mean quality, judged on other seeds [95 %]")
    for i, load in enumerate(LOADS):
        cells = [f"{v:.3f} [{a:.3f}, {b:.3f}]" for v, a, b in (c[i] for c in curves.values())]
        shown.add_row(f"{load:g}x", *cells)
    console.print(shown)
    return curves


def _scene_accuracy(family: Family) -> float:
    """The mean score of scenes as code draws them, under prompts that say what is in them."""
    assert family.scorer is not None
    rng = random.Random("scene accuracy")
    scenes = [sample_scene(rng) for _ in range(RENDERED)]
    prompts = [caption(scene, rng) for scene in scenes]
    scores = load_scorer(family.scorer).score(prompts, [draw_scene(scene) for scene in scenes])
    return float(scores.mean())


def _exact_scores(console: Console, rows: pd.DataFrame) -> dict[str, float]:
    """Of exact pictures the shares that are right, and of their parts that hold, by number of
    things; the shares that are right of single things, and of prompts with a relation."""
    exact = rows[rows["variant"] == EXACT]
    asked = {prompt: read_prompt(prompt) for prompt in exact["prompt"].unique()}
    things = exact["prompt"].map(lambda p: sum(g.count for g in asked[p].groups))
    related = exact["prompt"].map(lambda p: asked[p].relation is not None)
    result: dict[str, float] = {}
    for name in [name for name in ("right", "parts") if name in exact] or ["score"]:
        values = exact[name]
        result |= {
            f"{name}_1": values[things == 1].mean(),
            f"{name}_2": values[things == 2].mean(),
            f"{name}_3plus": values[things >= 3].mean(),
        }
        if name != "parts":
            result |= {
                f"{name}_relation": values[related].mean(),
            }
    result = {name: round(float(value), 4) for name, value in result.items()}
    console.print(result)
    return result


def _single(console: Console, family: Family, prompts: list[str]) -> float:
    """Of exact's pictures of one thing, the share in which one thing is found."""
    alone = [p for p in prompts if [g.count for g in read_prompt(p).groups] == [1]][:SINGLE]
    if not alone:
        return float("nan")
    exact = family.exact
    engine = Engine.load(
        str(model_folder(family.models[exact.model])), "cpu", "float32", exact.sampler
    )
    asked = [Commission(p, exact.job(p, seed)) for seed, p in enumerate(alone)]
    sights = load_detector().look([result.image for _, result in paint(engine, asked)])
    share = round(float(np.mean([len(sight.things) == 1 for sight in sights])), 4)
    console.print(f"of {len(alone)} single things {share} are single")
    return share


def _as_good(console: Console, q: Numbers, costs: dict[str, float]) -> dict[str, float]:
    """The share of prompts that each variant serves as well as exact does, within seed noise: the
    deviation of the difference of two exact pictures' means over seeds."""
    means, seeds = q.mean(2), q.shape[2]
    noise = float(np.sqrt(2 * q[:, 0].var(axis=1, ddof=1).mean() / seeds))
    shown = Table("variant", "cost of exact", "mean quality", "as good", title=f"noise {noise:.3f}")
    shares = {}
    for i, (name, cost) in enumerate(costs.items()):
        shares[name] = round(float((means[:, i] >= means[:, 0] - noise).mean()), 4)
        mean = means[:, i].mean()
        shown.add_row(name, f"{cost / costs[EXACT]:.2f}", f"{mean:.3f}", f"{shares[name]:.1%}")
    console.print(shown)
    return {name: share for name, share in shares.items() if name != EXACT}


def thresholds(console: Console, rows: pd.DataFrame, family: Family) -> dict[str, float]:
    """The least similarity at which each skip keeps `KEPT` of the quality on average: where the
    isotonic regression of quality on similarity reaches that; 1 where it never does."""
    found = {}
    for k in family.skips:
        of = rows[rows["variant"] == skip_name(k)].dropna(subset=["similarity"])
        of = of.sort_values("similarity")
        fit = isotonic_regression(qualities.steady(of).to_numpy()).x
        good = of["similarity"].to_numpy()[fit >= KEPT]
        found[str(k)] = round(float(good[0]), 3) if len(good) else 1.0
    console.print(f"skips keep {KEPT} of the quality from these similarities on: {found}")
    return found


def _genai(console: Console, path: Path) -> dict[str, float]:
    """Half of the prompts to SDXL-Turbo: at random, and those that it serves best by two raters,
    judged by the third; as a ratio to SDXL base."""
    ratings = pd.read_csv(path)
    base, turbo = (
        ratings[[f"{name}_{i}" for i in (1, 2, 3)]].to_numpy(float)
        for name in ("sdxl_base", "sdxl_turbo")
    )

    def halves(sample: NDArray[np.int64]) -> tuple[float, float]:
        blind, oracle = [], []
        for judge in range(3):
            others = [i for i in range(3) if i != judge]
            gain = (turbo[sample][:, others] - base[sample][:, others]).mean(1)
            order = np.argsort(-gain, kind="stable")
            half = len(sample) // 2
            b, t = base[sample][:, judge], turbo[sample][:, judge]
            blind.append((b.mean() + t.mean()) / 2 / b.mean())
            oracle.append((t[order[:half]].sum() + b[order[half:]].sum()) / len(sample) / b.mean())
        return float(np.mean(blind)), float(np.mean(oracle))

    rng = np.random.default_rng(0)
    n = len(ratings)
    blind, oracle = halves(np.arange(n))
    spread = np.array([halves(rng.integers(0, n, n)) for _ in range(RESAMPLES)])
    for name, value, column in (("blind", blind, 0), ("oracle", oracle, 1)):
        low, high = np.quantile(spread[:, column], (0.025, 0.975))
        console.print(f"GenAI-Bench, half to Turbo, {name}: {value:.3f} [{low:.3f}, {high:.3f}]")
    return {"genai_blind_half": round(blind, 4), "genai_oracle_half": round(oracle, 4)}


if __name__ == "__main__":
    typer.run(main)
