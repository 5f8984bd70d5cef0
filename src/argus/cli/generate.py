"""`argus generate` and `argus families`: pictures without a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from argus.cli.consoles import err, out
from argus.core.job import MAX_SEED
from argus.families.catalog import default_family, list_families
from argus.studio import check_path, load


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File; with -n, NAME-1.png, NAME-2.png, …")
    ] = Path("argus.png"),
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Family, folder or hub id. Default: the bundled one."),
    ] = None,
    count: Annotated[int, typer.Option("-n", help="Number of pictures.", min=1, max=100)] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first picture; each next one adds 1.", min=0, max=MAX_SEED),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    negative: Annotated[str, typer.Option(help="What the picture should not show.")] = "",
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
) -> None:
    """Make pictures from a prompt."""
    files = [output] if count == 1 else [_numbered(output, i + 1) for i in range(count)]
    for file in files:
        check_path(file)
    begun = time.perf_counter()
    with err.status("Loading the model …"):
        studio = load(model or default_family().name, device=device, dtype=dtype)
    err.print(f"[dim]Loaded {escape(studio.model)} in {time.perf_counter() - begun:.1f} s[/]")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    for i, file in enumerate(files):
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task("Denoising", total=None)

            def advance(done: int, steps: int, bar: Progress = bar, task: TaskID = task) -> None:
                bar.update(task, completed=done, total=steps)

            picture = studio.generate(
                prompt,
                negative_prompt=negative,
                seed=None if seed is None else seed + i,
                steps=steps,
                guidance=guidance,
                width=width,
                height=height,
                on_step=advance,
            )
        picture.save(file)
        out.print(
            f"[bold]{escape(str(file))}[/]  {escape(picture.model)}, {picture.steps} steps, "
            f"guidance {picture.guidance:g}, seed {picture.seed}, {picture.seconds:.2f} s",
            highlight=False,
            soft_wrap=True,
        )


def families() -> None:
    """List the families that Argus knows by name."""
    table = Table("family", "exact variant", box=None, padding=(0, 2, 0, 0))
    table.add_column("weights", overflow="fold")
    table.add_column("what it is")
    for family in list_families().values():
        exact = family.exact
        table.add_row(
            family.name,
            f"{exact.model}, {exact.width}×{exact.height}, {exact.steps} steps",
            "bundled" if family.bundled else "\n".join(family.models.values()),
            family.description,
        )
    out.print(table)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")
