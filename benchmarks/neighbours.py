"""Which neighbour is a picture to be resumed from, and what does the predictor know of it?

    python benchmarks/neighbours.py [--scenes 60] [--queries 300] [--json]

By what a neighbour's prompt differs in: exact pictures of scenes are resumed for the same scenes
with one thing about them changed, which the new prompt says, or said in other words. `quality` is 1
+ (mean s - mean s_exact) / g, where s are the scores of resumed pictures, s_exact those of exact
ones of the same prompts, and g the mean of s_exact over the shipped table; `predicted` is what the
shipped predictor says, `by similarity` what a straight line through that table's qualities by
similarity says.

Of several neighbours: prompts of the workload generator, beside a cache of those that came before.
Each is resumed from its nearest neighbour, from the one of the four nearest that a server would
take (`Predictions.predict_best_first`), and from the one of the four whose pictures were best with
neighbours of another seed (hindsight). In brackets 95 % by bootstrap over prompts.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from argus.cache.cache import Neighbour
from argus.control.variants import DeviceType, variant_table
from argus.core.family import EXACT, Family, skip_name
from argus.engine.engine import Engine
from argus.engine.sources import family_fingerprint, model_folder
from argus.families.catalog import default_family
from argus.families.pictogram.captions import caption
from argus.families.pictogram.ideas import CHANGES, changed
from argus.families.pictogram.prompts import read_prompt
from argus.families.pictogram.world import sample_scene
from argus.lab.painting import Commission, paint
from argus.lab.prompts import ideas_of
from argus.lab.workload import workload
from argus.quality import table as qualities
from argus.quality.encoder import PromptEncoder
from argus.quality.predictor import Predictor
from argus.quality.scorers import load_scorer
from argus.server.predictions import Predictions
from argus.server.preparation import OTHERS

Numbers = NDArray[np.float64]
Vectors = NDArray[np.float32]
RESAMPLES = 2000
REWORDED = "other words"


def main(
    scenes: Annotated[int, typer.Option(min=2, help="Scenes for each kind of change.")] = 60,
    cached: Annotated[int, typer.Option(min=8, help="Prompts in the cache.")] = 2500,
    queries: Annotated[int, typer.Option(min=2, help="Prompts that look for neighbours.")] = 300,
    seed: Annotated[int, typer.Option(help="Of scenes, prompts and pictures.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    studio, console = Studio(default_family()), Console(width=140)
    result: dict[str, Any] = {}
    shown = Table("differs in", "similarity", *studio.skip_names, "mean error", "by similarity")
    for kind in (REWORDED, *CHANGES):
        told = result[kind] = by_change(studio, kind, scenes, seed)
        each = [told[name] for name in studio.skip_names]
        shown.add_row(
            kind,
            f"{told['similarity']:.3f}",
            *(f"{one['quality']:.2f}, predicted {one['predicted']:.2f}" for one in each),
            f"{told['error_predicted']:.3f}",
            f"{told['error_by_similarity']:.3f}",
        )
    console.print(shown)
    chosen = result["chosen"] = of_several(studio, cached, queries, seed)
    shown = Table(f"of {1 + OTHERS} neighbours", *studio.skip_names)
    for name in ("nearest", "predicted best", "best in hindsight"):
        shown.add_row(name, *(f"{chosen[name][skip]:.3f}" for skip in studio.skip_names))
    interval = "{:+.3f} [{:+.3f}, {:+.3f}]"
    gains = [
        interval.format(*(chosen[what][skip] for what in ("gained", "low", "high")))
        for skip in studio.skip_names
    ]
    shown.add_row("predicted best - nearest", *gains)
    console.print(shown)
    print(f"{chosen['others']} of {queries} prompts do not take the nearest")
    if as_json:
        print(json.dumps(result))


class Studio:
    """Paints, resumes and judges pictures of a family, and says what is predicted of them."""

    def __init__(self, family: Family) -> None:
        assert family.scorer is not None
        self.family, self.exact = family, family.exact
        folder = model_folder(family.models[self.exact.model])
        self._engine = Engine.load(str(folder), sampler=self.exact.sampler)
        self._encoder = PromptEncoder.load(folder)
        self._scorer = load_scorer(family.scorer)
        self.ks = tuple(family.skips)
        self.skip_names = [skip_name(k) for k in self.ks]
        self.predictor = Predictor.load(
            Path(family.folder) / "predictor", family_fingerprint(family)
        )
        self.table = variant_table(family, [DeviceType("any")])
        self._columns = [self.predictor.variants.index(name) for name in self.skip_names]
        self._learn()

    def embed(self, prompts: list[str]) -> Vectors:
        return np.stack([self._encoder.embed(prompt).vector for prompt in prompts])

    def started(self, prompts: list[str], seed: int) -> list[dict[int, Tensor]]:
        """The latents of exact runs, by K."""
        jobs = (
            Commission(i, self.exact.job(p, seed + i), keep=self.ks) for i, p in enumerate(prompts)
        )
        kept = {one.of: made.kept for one, made in self._painted(jobs, len(prompts), "neighbours")}
        return [kept[i] for i in range(len(prompts))]

    def scores(
        self, prompts: list[str], starts: list[dict[int, Tensor]] | None, seed: int
    ) -> Numbers:
        """Scores (n,) of exact pictures or, from latents that each starts from, (n, k)."""
        ks = (0,) if starts is None else self.ks
        variants = {k: self.exact if k == 0 else self.family.variants[skip_name(k)] for k in ks}
        jobs = (
            Commission(
                (i, k), variants[k].job(p, seed + i), None if starts is None else starts[i][k]
            )
            for i, p in enumerate(prompts)
            for k in ks
        )
        images: dict[tuple[int, int], Image.Image] = {
            one.of: made.image
            for one, made in self._painted(jobs, len(prompts) * len(ks), "pictures")
        }
        asked = [prompts[i] for i in range(len(prompts)) for _ in ks]
        scores = self._scorer.score(asked, [images[i, k] for i in range(len(prompts)) for k in ks])
        found = np.asarray(scores, float).reshape(len(prompts), len(ks))
        return found[:, 0] if starts is None else found

    def quality(self, scores: Numbers, exact: Numbers) -> Numbers:
        """Quality of pictures with scores (n, ...), their prompts' exact scores being (n,)."""
        beside = exact.reshape(-1, *[1] * (scores.ndim - 1))
        result: Numbers = 1 + (scores - beside) / self._gain
        return result

    def predicted(self, vectors: Vectors, near: Vectors) -> Numbers:
        """What the predictor says of resumed pictures (n, k)."""
        return self.predictor.predict_all(vectors, near)[0][:, self._columns].astype(float)

    def by_similarity(self, similarity: Numbers) -> Numbers:
        """What the table's lines say of resumed pictures (n, k)."""
        return np.stack([np.polyval(line, similarity) for line in self._lines], axis=1)

    def _painted(self, jobs: Iterator[Any], count: int, what: str) -> Iterable[Any]:
        return track(paint(self._engine, jobs), what, count, transient=True)

    def _learn(self) -> None:
        """Read the table: what exact pictures score, and a line for each K."""
        rows = qualities.judged(qualities.read(Path(self.family.folder) / "quality.parquet"))
        scores = rows.pivot_table(index=["prompt", "seed"], columns="variant", values="score")
        self._gain = float(scores[EXACT].mean() - rows["s0"].iloc[0])
        similar = rows[rows.variant == self.skip_names[0]].groupby("prompt").similarity.first()
        at = similar.loc[scores.index.get_level_values("prompt")].to_numpy(float)
        self._lines = [
            np.polyfit(at, 1 + (scores[name] - scores[EXACT]).to_numpy(float) / self._gain, 1)
            for name in self.skip_names
        ]


def by_change(studio: Studio, kind: str, count: int, seed: int) -> dict[str, Any]:
    """What resumed pictures are worth where the neighbour differs in one thing."""
    rng = random.Random(f"{kind} {seed}")
    asked: list[str] = []
    near: list[str] = []
    while len(asked) < count:
        scene = sample_scene(rng)
        try:
            other = scene if kind == REWORDED else changed(rng, scene, kind)
        except ValueError:  # nothing of this scene can change so
            continue
        new, old = caption(other, rng), caption(scene, rng)
        if new != old and (kind == REWORDED or said(new, kind) - said(old, kind)):
            asked.append(new)
            near.append(old)
    vectors, others = studio.embed(asked), studio.embed(near)
    similarity = (vectors * others).sum(1).astype(float)
    exact = studio.scores(asked, None, seed)
    quality = studio.quality(studio.scores(asked, studio.started(near, seed + 1000), seed), exact)
    predicted, line = studio.predicted(vectors, others), studio.by_similarity(similarity)
    told: dict[str, Any] = {
        "similarity": float(similarity.mean()),
        "exact": float(exact.mean()),
        "error_predicted": float(np.abs(predicted.mean(0) - quality.mean(0)).mean()),
        "error_by_similarity": float(np.abs(line.mean(0) - quality.mean(0)).mean()),
    }
    for k, name in enumerate(studio.skip_names):
        told[name] = {
            "quality": round(float(quality[:, k].mean()), 4),
            "predicted": round(float(predicted[:, k].mean()), 4),
            "by_similarity": round(float(line[:, k].mean()), 4),
        }
    return told


def said(prompt: str, kind: str) -> Counter[Any]:
    """What a prompt says about that which a change is of."""
    read = read_prompt(prompt)
    if kind == "background":
        return Counter([read.background] if read.background else [])
    if kind == "layout":
        return Counter([(read.relation, *((group.count, group.kind) for group in read.groups))])
    if kind == "scene":
        return Counter([prompt])
    looks = [getattr(group, kind) for group in read.groups]
    return Counter(look for look in looks if look is not None)


def of_several(studio: Studio, cached: int, queries: int, seed: int) -> dict[str, Any]:
    """What pictures are worth, resumed from the nearest, the chosen and the best neighbour."""
    requests = workload(ideas_of(studio.family), seed)
    earlier = list(dict.fromkeys(one.prompt for one in islice(requests, cached)))
    known = set(earlier)
    asked = list(islice((one.prompt for one in requests if one.prompt not in known), queries))
    cache, vectors = studio.embed(earlier), studio.embed(asked)
    similar = vectors @ cache.T
    places = np.argsort(-similar, axis=1)[:, : 1 + OTHERS]
    predictions = Predictions(studio.predictor, studio.table)
    first = np.zeros(queries, dtype=int)  # which of its neighbours a server takes
    for i, near in enumerate(places):
        found = [
            Neighbour(int(at), earlier[at], float(similar[i, at]), studio.ks, cache[at])
            for at in near
        ]
        first[i] = found.index(next(iter(predictions.predict_best_first(vectors[i], found))))
    used = sorted({int(at) for at in places.ravel()})
    exact = studio.scores(asked, None, seed + 9000)
    each = np.empty((2, queries, 1 + OTHERS, len(studio.ks)))  # by seed of the neighbours
    for number in range(2):
        made = studio.started([earlier[at] for at in used], seed + 20_000 * number)
        latents = dict(zip(used, made, strict=True))
        for n, near in enumerate(places.T):
            starts = [latents[int(at)] for at in near]
            each[number, :, n] = studio.quality(studio.scores(asked, starts, seed + 9000), exact)
    rows, both = np.arange(queries), each.mean(0)
    best = each.sum(3).argmax(2)  # chosen by one seed, judged by the other
    hindsight = (each[1, rows, best[0]] + each[0, rows, best[1]]) / 2
    ways = {
        "nearest": both[:, 0],
        "predicted best": both[rows, first],
        "best in hindsight": hindsight,
    }
    told: dict[str, Any] = {name: named(studio, values.mean(0)) for name, values in ways.items()}
    rng = np.random.default_rng(0)
    gained = both[rows, first] - both[:, 0]
    means = np.stack([gained[rng.integers(0, queries, queries)].mean(0) for _ in range(RESAMPLES)])
    told["gained"] = named(studio, gained.mean(0))
    told["low"], told["high"] = (named(studio, np.quantile(means, q, 0)) for q in (0.025, 0.975))
    told["others"] = int((first > 0).sum())
    return told


def named(studio: Studio, values: Numbers) -> dict[str, float]:
    return dict(zip(studio.skip_names, values.round(4).tolist(), strict=True))


if __name__ == "__main__":
    typer.run(main)
