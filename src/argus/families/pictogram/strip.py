"""`python -m argus.families.pictogram.strip FILE`: shortcuts with plain and crowded prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from argus.core.family import EXACT, Family, Variant, skip_name
from argus.core.profile import Profile
from argus.engine.engine import Engine
from argus.families.catalog import default_family
from argus.families.pictogram.scene.scorer import SceneScorer
from argus.lab.held_out import costs_of

SEED = 1
CASES = (  # a prompt, the same in other words, and another of the same background
    ("a red house in the snow", "a red cottage in winter", "two blue fish in the snow"),
    (
        "two yellow houses with green roofs, meadow",
        "two golden cottages with green roofs on the grass",
        "a black cup right of a pink heart, meadow",
    ),
    (
        "two striped orange squares left of three black keys, desert",
        "three black keys to the right of two stripy orange boxes on the sand",
        "four small green stars in the desert",
    ),
)
ZOOM, GAP, HEAD, FOOT, SIDE = 3, 14, 40, 74, 150
INK, RED, GREEN = (40, 40, 50), (200, 40, 44), (36, 130, 70)

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Column:
    """A way to make a picture, and which of a case's prompts it resumes from, if any."""

    title: str
    variant: Variant
    cost: float
    neighbour: int | None = None


@app.command()
def main(file: Annotated[Path, typer.Argument(help="The picture to write.")]) -> None:
    """Paint each of `CASES` exactly and by shortcuts, all from one seed, with what is wrong by the
    scorer below."""
    family = default_family()
    columns = list(_columns(family))
    engines = {one: Engine.load(family.models[one]) for one in {c.variant.model for c in columns}}
    scorer = SceneScorer.load()
    side = 64 * ZOOM
    width = SIDE + len(columns) * (side + GAP)
    page = Image.new("RGB", (width, HEAD + len(CASES) * (side + FOOT)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=14)
    for c, column in enumerate(columns):
        title = f"{column.title}\n{column.cost:.0%} of exact's cost"
        pen.multiline_text((SIDE + c * (side + GAP), 2), title, INK, font, spacing=2)
    for row, case in enumerate(CASES):
        y = HEAD + row * (side + FOOT)
        prompt = "\n".join(textwrap.wrap(case[0], 19))
        pen.multiline_text((8, y + 30), prompt, INK, font, spacing=3)
        for c, column in enumerate(columns):
            picture = _painted(engines, family, column, case)
            x = SIDE + c * (side + GAP)
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (x, y))
            (atoms,) = scorer.judge([case[0]], [picture])
            wrong = list(dict.fromkeys(atom.part for atom in atoms if not atom.satisfied))
            told = f"wrong: {', '.join(wrong)}" if wrong else "right"
            lines = "\n".join(textwrap.wrap(told, 27)[:3])
            pen.multiline_text((x, y + side + 4), lines, RED if wrong else GREEN, font, spacing=2)
    page.save(file)
    typer.echo(f"saved {file}")


def _columns(family: Family) -> Iterator[Column]:
    costs = costs_of(family, Profile.read(Path(family.folder) / "profile.json"))

    def column(title: str, name: str, neighbour: int | None = None) -> Column:
        variant = family.variants[name]
        return Column(title, variant, costs[name] / costs[EXACT], neighbour)

    fewer = [name for name, one in family.cheaper.items() if one.model == family.exact.model]
    deepest = max(family.skips)
    few = min(fewer, key=lambda name: family.cheaper[name].steps)
    yield column(f"exact: {family.exact.steps} steps", EXACT)
    yield column(f"{family.cheaper[few].steps} steps", few)
    yield column("the small model", "small")
    for neighbour, which in ((1, "a near"), (2, "a far")):
        yield column(f"{deepest} skipped, from {which} prompt", skip_name(deepest), neighbour)


def _painted(
    engines: dict[str, Engine], family: Family, column: Column, case: tuple[str, ...]
) -> Image.Image:
    variant, start = column.variant, None
    engine = engines[variant.model]
    if column.neighbour is not None:
        job = family.exact.job(case[column.neighbour], SEED)
        start = engine.run(job, keep=[variant.skip]).kept[variant.skip]
    return engine.run(variant.job(case[0], SEED), start=start).image


if __name__ == "__main__":
    app()
