"""`python -m argus.families.pictogram.grid FILE`: pictures by the shipped weights, and prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import typer

from argus.core.family import EXACT
from argus.engine.engine import Engine
from argus.families.catalog import default_family
from argus.families.pictogram.captions import caption
from argus.families.pictogram.draw import draw_scene
from argus.families.pictogram.train.sheet import UNSEEN, lay_out
from argus.families.pictogram.world import sample_scene

app = typer.Typer(add_completion=False)


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="The picture to write.")],
    variant: Annotated[str, typer.Option(help="How to make them; resumed ones are not.")] = EXACT,
    world: Annotated[bool, typer.Option("--world", help="Scenes as code draws them.")] = False,
) -> None:
    """Paint the prompts of the training's contact sheet, each once, from its own seed."""
    if world:
        rng = random.Random(3)
        scenes = [sample_scene(rng) for _ in UNSEEN]
        labels = [caption(scene, rng) for scene in scenes]
        lay_out([draw_scene(scene) for scene in scenes], labels).save(file)
        typer.echo(f"saved {file}")
        return
    family = default_family()
    ways = {name: way for name, way in family.variants.items() if not way.skip}
    if variant not in ways:
        raise typer.BadParameter(f"{variant!r} is none of {', '.join(ways)}")
    way = ways[variant]
    engine = Engine.load(family.models[way.model], sampler=way.sampler)
    jobs = [way.job(prompt, seed) for seed, prompt in enumerate(UNSEEN)]
    lay_out([engine.run(job).image for job in jobs], UNSEEN).save(file)
    typer.echo(f"saved {file}")


if __name__ == "__main__":
    app()
