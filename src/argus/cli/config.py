"""`argus config show`."""

from __future__ import annotations

import typer
from rich.markup import escape
from rich.table import Table

from argus.cli.consoles import out
from argus.cli.serve import ConfigFile
from argus.config import Settings, read_settings, without_passwords

app = typer.Typer(help="The configuration: a YAML file, the environment (ARGUS_*), flags.",
                  no_args_is_help=True)  # fmt: skip


@app.callback()
def _root() -> None:
    """Keeps `show` a subcommand: Typer drops the name of an only command."""


@app.command()
def show(config: ConfigFile = None) -> None:
    """Print every setting in force, where it comes from, and what it means."""
    settings, origins = read_settings({}, config)
    table = Table("setting", "value", "from", "meaning", box=None, padding=(0, 2, 0, 0))
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        shown = "" if value is None else str(value)
        table.add_row(
            name, escape(without_passwords(shown)), origins.get(name, "default"), field.description
        )
    out.print(table, highlight=False)
