"""How much of its work does the bundled family need, and for which prompts?

    python benchmarks/pilot.py [--prompts 300] [--weights FOLDER] [--rows FILE] [--json]

Paints prompts of the family's own workload at many step counts; then again resumed from the latents
of a neighbour that differs in one way, after skipping 10 to 80 % of the steps. Prints quality
(`scene`, anchored at unrelated prompts) by step count and number of things, and by skip and by what
differs. --weights tries other weights than the shipped ones, --rows keeps a row for every picture.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from argus.core.job import Job
from argus.engine.engine import Engine
from argus.families.catalog import default_family
from argus.families.pictogram.captions import caption
from argus.families.pictogram.ideas import CHANGES, SceneIdeas, changed
from argus.families.pictogram.world import Scene, sample_scene
from argus.lab.painting import Commission, paint
from argus.quality.encoder import PromptEncoder
from argus.quality.scorer import quality, unrelated_score
from argus.quality.scorers import load_scorer

STEPS = (2, 4, 6, 8, 12, 16, 20, 25, 30, 40, 50)
SKIPPED_PERCENT = (10, 20, 30, 40, 50, 60, 70, 80)
NEIGHBOURS = ("reworded", *CHANGES)


@dataclass(frozen=True)
class Case:
    """A prompt of a scene, and a neighbour that differs from it in one way."""

    number: int
    prompt: str
    things: int
    relation: bool
    differs: str
    neighbour: str


def main(
    prompts: Annotated[int, typer.Option(help="How many prompts.")] = 300,
    steps: Annotated[int | None, typer.Option(help="Of whole runs. Default: exact's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Default: the exact variant's.")] = None,
    weights: Annotated[str | None, typer.Option(help="Folder of other weights.")] = None,
    only_steps: Annotated[bool, typer.Option(help="Leave the skips out.")] = False,
    rows: Annotated[Path | None, typer.Option(help="Parquet with a row a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object as last line.")] = False,
) -> None:
    family = default_family()
    exact, spec = family.exact, family.scorer
    assert spec is not None
    folder = weights or family.models[exact.model]
    engine = Engine.load(folder, sampler=exact.sampler)
    scorer, encoder = load_scorer(spec), PromptEncoder.load(Path(folder))
    full = steps or exact.steps
    scale = exact.guidance if guidance is None else guidance
    cases = [_case(i) for i in range(prompts)]
    console = Console()

    def job(case: Case, steps: int, skip: int = 0) -> Job:
        return Job(case.prompt, seed=case.number, steps=steps, guidance=scale, skip=skip)

    def score(commissions: list[Commission[Case]], title: str) -> list[float]:
        done = paint(engine, commissions)
        images = {
            one.of.number: result.image
            for one, result in track(done, title, len(commissions), console=Console(stderr=True))
        }
        texts = [case.prompt for case in cases]
        return list(map(float, scorer.score(texts, [images[case.number] for case in cases])))

    measured = []
    for count in sorted({*STEPS, full}):
        scores = score([Commission(case, job(case, count)) for case in cases], f"{count} steps")
        measured += [_row(case, "steps", count, s) for case, s in zip(cases, scores, strict=True)]
    table = pd.DataFrame(measured)
    reference = table[table["at"] == full].set_index("number")["score"]
    some = cases[:64]
    painted = {
        one.of.number: result.image
        for one, result in paint(engine, [Commission(case, job(case, full)) for case in some])
    }
    unrelated = unrelated_score(
        scorer,
        [case.prompt for case in some],
        [painted[case.number] for case in some],
        shift=len(some) // 2 + 1,  # themes and kinds of neighbours repeat every few cases
    )
    if not only_steps:
        skips = sorted({round(full * percent / 100) for percent in SKIPPED_PERCENT})
        donors = [
            Commission(
                case,
                Job(case.neighbour, seed=10**6 + case.number, steps=full, guidance=scale),
                keep=skips,
            )
            for case in cases
        ]
        kept = {one.of.number: result.kept for one, result in paint(engine, donors)}
        similarity = {
            c.number: float(encoder.embed(c.prompt).vector @ encoder.embed(c.neighbour).vector)
            for c in cases
        }
        for skip in skips:
            resumed = [Commission(c, job(c, full, skip), kept[c.number][skip]) for c in cases]
            scores = score(resumed, f"skip {skip}")
            measured += [_row(c, "skip", skip, s) for c, s in zip(cases, scores, strict=True)]
        table = pd.DataFrame(measured)
        table["similarity"] = table["number"].map(similarity)
    best = table["number"].map(reference).to_numpy(np.float32)
    table["quality"] = quality(table["score"].to_numpy(np.float32), best, unrelated)
    if rows is not None:
        table.to_parquet(rows)
    console.print(f"unrelated prompts score {unrelated:.3f}; {full} steps, guidance {scale:g}")
    by_steps = _show(console, table[table["by"] == "steps"], "things", "score", "score by steps")
    result = {"unrelated": unrelated, "steps": full, "guidance": scale, "score_by_steps": by_steps}
    if not only_steps:
        skipped = table[table["by"] == "skip"]
        of_all = float((reference - unrelated).mean())
        for column in ("things", "differs"):
            lost = skipped.assign(q=(skipped["score"] - unrelated) / of_all)
            result[f"quality_by_skip_and_{column}"] = _show(
                console, lost, column, "q", f"(s − s₀) / mean(s_exact − s₀) by skip and {column}"
            )
    if as_json:
        print(json.dumps(result))


def _case(number: int) -> Case:
    rng = random.Random(f"pilot {number}")
    ideas = SceneIdeas()
    scene: Scene = ideas.fresh(rng, number % ideas.themes) if number % 2 else sample_scene(rng)
    differs = NEIGHBOURS[number % len(NEIGHBOURS)]
    other = scene if differs == "reworded" else changed(rng, scene, differs)
    prompt, neighbour = caption(scene, rng), caption(other, rng)
    return Case(number, prompt, scene.things, scene.relation is not None, differs, neighbour)


def _row(case: Case, by: str, at: int, score: float) -> dict[str, object]:
    return {
        "number": case.number, "prompt": case.prompt, "things": min(case.things, 3),
        "relation": case.relation, "differs": case.differs, "by": by, "at": at, "score": score,
    }  # fmt: skip


def _show(
    console: Console, table: pd.DataFrame, column: str, value: str, title: str
) -> dict[str, dict[str, float]]:
    """Means of `value` by `at` and `column`, printed and as a dict."""
    means = table.pivot_table(index="at", columns=column, values=value, aggfunc="mean")
    means["all"] = table.groupby("at")[value].mean()
    shown = Table(str(table["by"].iloc[0]), *map(str, means.columns), title=title)
    for at, line in means.iterrows():
        shown.add_row(str(at), *(f"{number:.3f}" for number in line))
    console.print(shown)
    return {
        str(at): {str(name): round(float(number), 4) for name, number in line.items()}
        for at, line in means.iterrows()
    }


if __name__ == "__main__":
    typer.run(main)
