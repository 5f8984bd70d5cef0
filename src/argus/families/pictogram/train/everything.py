"""`python -m argus.families.pictogram.train.everything`: all networks of the family, in turn.

The sizes of the stages are for a GPU, where they take minutes. `--share` scales them: 0.1 makes
a pilot. Every stage goes on where it was stopped; it waits while WORK/STAGE/PAUSE exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from argus.families.pictogram.train import detecting
from argus.families.pictogram.train.__main__ import Model, main

VAE, READER, PAINTER, GUIDANCE, PUPIL, DETECTOR = 3000, 2000, 9000, 600, 4000, 6000
GUIDED_BY = 2.0

app = typer.Typer(add_completion=False)


@app.command()
def everything(
    work: Annotated[Path, typer.Option(help="Folder for what every stage leaves.")],
    share: Annotated[float, typer.Option(help="Of every stage's batches.")] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda",
    threads: Annotated[int, typer.Option(help="Parts of a batch, on a CPU.")] = 1,
    scenes: Annotated[int, typer.Option(help="Scenes to draw.")] = 60_000,
    new_words: Annotated[bool, typer.Option(help="Learn the vocabulary anew.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of scenes and captions.")] = 21,
) -> None:
    """Train base from the shipped weights, let it take its guidance over, teach the small model,
    and train the detector. What is to be shipped is in WORK/guided, WORK/small and
    WORK/detector, beside WORK/base/components.safetensors."""

    def batches(of: int) -> int:
        return max(1, round(share * of))

    def train(stage: str, steps: int, base: Path | None = None, **options: object) -> Path:
        folder = work / stage
        if not (folder / "done").exists():
            settings: dict[str, object] = {
                "work": folder, "steps": batches(steps), "scenes": scenes, "seed": seed,
                "device": device, "threads": threads, "closeups": 0.0, "sheet_every": 0,
                "vae_steps": 0, "reader_steps": 0, **options,
            }  # fmt: skip
            if base is not None:
                settings["base"] = base
            main(**settings)  # type: ignore[arg-type]
            (folder / "done").touch()  # weights may be there in part
        return folder / "weights"

    own = train(
        "base",
        PAINTER,
        go_on=True,
        new_words=new_words,
        vae_steps=batches(VAE),
        reader_steps=batches(READER),
    )
    guided = train("guided", GUIDANCE, own, go_on=True, guidance=GUIDED_BY, seed=seed + 1)
    train("small", PUPIL, guided, go_on=True, model=Model.small, seed=seed + 1)
    detecting.main(
        work / "detector",
        steps=batches(DETECTOR),
        scenes=scenes,
        seed=seed,
        vae=own / "vae",
        components=work / "base" / "components.safetensors",
        go_on=True,
        threads=threads,
        device=device,
    )


if __name__ == "__main__":
    app()
