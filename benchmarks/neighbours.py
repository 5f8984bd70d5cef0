"""Which neighbour is a picture to be resumed from, and what does the predictor know of it?

    python benchmarks/neighbours.py [--scenes 60] [--queries 300] [--json]

By what a neighbour's prompt differs in: exact pictures of scenes are resumed for the same scenes
with one thing about them changed, or said in other words. `right` is the share of resumed pictures
that are right, as a ratio to that of exact ones; `predicted` is what the shipped predictor says,
`by similarity` what a line through the similarities of the table that it was trained on says.

Of several neighbours: prompts of the workload generator, beside a cache of those that came before.
Each is resumed from its nearest neighbour, from the one of the four nearest that a server would
take (`Predictions.best_first`), and from the one of the four that turned out best.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
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
REWORDED = "other words"


def main(
    scenes: Annotated[int, typer.Option(min=2, help="Scenes for each kind of change.")] = 60,
    cached: Annotated[int, typer.Option(min=8, help="Prompts in the cache.")] = 2500,
    queries: Annotated[int, typer.Option(min=2, help="Prompts that look for neighbours.")] = 300,
    seed: Annotated[int, typer.Option(help="Of scenes, prompts and pictures.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    studio, console = Studio(default_family()), Console(width=120)
    result: dict[str, Any] = {}
    shown = Table("neighbour differs in", "similarity", *studio.skip_names)
    for kind in (REWORDED, *CHANGES):
        told = by_change(studio, kind, scenes, seed)
        result[kind] = told
        shown.add_row(
            kind,
            f"{told['similarity']:.3f}",
            *(
                f"{one['right']:.2f}, predicted {one['predicted']:.2f}, by similarity "
                f"{one['by_similarity']:.2f}"
                for one in (told[name] for name in studio.skip_names)
            ),
        )
    console.print(shown)
    chosen = of_several(studio, cached, queries, seed)
    result["chosen"] = chosen
    shown = Table(f"of {1 + OTHERS} neighbours", *studio.skip_names)
    for name in ("nearest", "predicted best", "best in hindsight"):
        shown.add_row(name, *(f"{chosen[name][skip]:.3f}" for skip in studio.skip_names))
    console.print(shown)
    print(f"{chosen['others']} of {queries} prompts do not take the nearest; those alone:")
    for name, (nearest, taken) in chosen["of others"].items():
        print(f"  {name}: {nearest:.3f} from the nearest, {taken:.3f} from the one taken")
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
        self._lines = self._by_similarity()

    def embed(self, prompts: list[str]) -> NDArray[np.float32]:
        return np.stack([self._encoder.embed(prompt).vector for prompt in prompts])

    def started(self, prompts: list[str], seed: int) -> list[dict[int, Tensor]]:
        """The latents of exact runs, by K."""
        jobs = (
            Commission(i, self.exact.job(p, seed + i), keep=self.ks) for i, p in enumerate(prompts)
        )
        kept = {one.of: made.kept for one, made in self._painted(jobs, len(prompts), "neighbours")}
        return [kept[i] for i in range(len(prompts))]

    def right(
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

    def predicted(self, vectors: NDArray[np.float32], near: NDArray[np.float32]) -> Numbers:
        """What the predictor says of resumed pictures (n, k)."""
        return self.predictor.predict_all(vectors, near)[0][:, self._columns].astype(float)

    def by_similarity(self, similarity: Numbers) -> Numbers:
        """What the table's line says of resumed pictures (n, k)."""
        return np.stack([np.polyval(line, similarity) for line in self._lines], axis=1)

    def _painted(self, jobs: Iterator[Any], count: int, what: str) -> Iterator[Any]:
        return track(paint(self._engine, jobs), what, count, transient=True)

    def _by_similarity(self) -> list[Numbers]:
        rows = qualities.judged(qualities.read(Path(self.family.folder) / "quality.parquet"))
        exact = rows[rows.variant == EXACT].score.mean()
        lines = []
        for name in self.skip_names:
            mine = rows[rows.variant == name]
            lines.append(np.polyfit(mine.similarity, mine.score / exact, 1))
        return lines


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
        words = caption(other, rng), caption(scene, rng)
        if words[0] != words[1]:
            asked.append(words[0])
            near.append(words[1])
    vectors, others = studio.embed(asked), studio.embed(near)
    similarity = (vectors * others).sum(1).astype(float)
    exact = studio.right(asked, None, seed).mean()
    right = studio.right(asked, studio.started(near, seed + 1000), seed).mean(0) / exact
    predicted, line = studio.predicted(vectors, others), studio.by_similarity(similarity)
    told: dict[str, Any] = {"similarity": float(similarity.mean()), "exact": float(exact)}
    for k, name in enumerate(studio.skip_names):
        told[name] = {
            "right": round(float(right[k]), 4),
            "predicted": round(float(predicted[:, k].mean()), 4),
            "by_similarity": round(float(line[:, k].mean()), 4),
        }
    return told


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
        first[i] = found.index(predictions.best_first(vectors[i], found)[0])
    used = sorted({int(at) for at in places.ravel()})
    latents = dict(zip(used, studio.started([earlier[at] for at in used], seed), strict=True))
    exact = studio.right(asked, None, seed + 9000).mean()
    each = np.stack(
        [studio.right(asked, [latents[int(at)] for at in near], seed + 9000) for near in places.T],
        axis=1,
    )  # queries, neighbours, k
    taken = each[np.arange(queries), first]
    other = first > 0
    told: dict[str, Any] = {
        name: dict(zip(studio.skip_names, (values.mean(0) / exact).round(4).tolist(), strict=True))
        for name, values in (
            ("nearest", each[:, 0]),
            ("predicted best", taken),
            ("best in hindsight", each.max(axis=1)),
        )
    }
    told["others"] = int(other.sum())
    told["of others"] = (
        {
            name: [
                round(float(each[other, 0, k].mean()), 3),
                round(float(taken[other, k].mean()), 3),
            ]
            for k, name in enumerate(studio.skip_names)
        }
        if other.any()
        else {}
    )
    return told


if __name__ == "__main__":
    typer.run(main)
