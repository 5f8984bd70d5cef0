"""`python -m argus.families.pictogram.grid FILE`: pictures by the shipped weights, and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argus.core.job import Job
from argus.engine.engine import Engine
from argus.families.pictogram import WEIGHTS
from argus.families.pictogram.train.sheet import UNSEEN, lay_out

app = typer.Typer(add_completion=False)


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="The picture to write.")],
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 3.0,
) -> None:
    """Paint the prompts of the training's contact sheet, each once, from its own seed."""
    engine = Engine.load(str(WEIGHTS))
    jobs = [
        Job(prompt, seed=seed, steps=steps, guidance=guidance) for seed, prompt in enumerate(UNSEEN)
    ]
    lay_out([engine.run(job).image for job in jobs], UNSEEN).save(file)
    typer.echo(f"saved {file}")


if __name__ == "__main__":
    app()
