"""The command line: one app of the commands in the files beside this one."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape

from argus import __version__
from argus.cli import cache, config, doctor, generate, lab, load, plan, serve, simulate
from argus.cli.consoles import err, out
from argus.core.errors import ArgusError, BadRequest, InUse, ModelError, NotEnoughMemory

EXIT_CODES = {BadRequest: 2, ModelError: 3, NotEnoughMemory: 4, InUse: 5}

app = typer.Typer(
    name="argus",
    help="Text-to-image serving that gives every prompt the cheapest variant it can bear.",
    epilog="Exit codes: 0 done, 1 failed, 2 bad request, 3 model cannot be used, 4 out of memory, "
    "5 data folder in use, 6 trained predictor not better.",
    no_args_is_help=True,
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        out.print(__version__, highlight=False)
        raise typer.Exit


app.command(
    epilog='Example: argus generate "two red fish below a small boat, sea" -o fish.png --seed 7'
)(generate.generate)
app.command(epilog="Example: argus serve --port 9000 --policy clipper-ha")(serve.serve)
app.command()(serve.key)
app.command(epilog="Example: argus doctor --config argus.yaml")(doctor.doctor)
app.command(epilog="Example: argus load --request-rate 20 --num-prompts 200")(load.load)
app.command()(generate.families)
app.command(epilog="Example: argus profile pictogram --out profile.json")(lab.profile)
app.command(epilog="Example: argus calibrate pictogram --prompts 300 --seeds 2")(lab.calibrate)
app.command(epilog="Example: argus train pictogram --out predictor")(lab.train)
app.command(
    epilog="Example: argus simulate --world paper-a100 --trace bursty --policies price,argus"
)(simulate.simulate)
app.command(
    epilog="Example: argus plan --world paper-a100 --peak-qpm 400 --min-quality 0.95 --slo 3x"
)(plan.plan)
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")


def main() -> None:
    """Run the command line; an ArgusError is printed as a sentence and sets the exit code."""
    for library in ("TRANSFORMERS", "HF_HUB"):  # their warnings are not for users
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # the number of times that a thread spins before it sleeps: costs nothing on an idle machine;
    # without it pictures take fifty times as long beside another busy process
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except ArgusError as error:
        err.print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_CODES.get(type(error), 1))
