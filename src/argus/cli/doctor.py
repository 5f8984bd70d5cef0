"""`argus doctor`."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from argus.cli.consoles import err, out
from argus.cli.serve import ConfigFile, Data, FamilyName
from argus.config import read_settings
from argus.core.errors import BadRequest
from argus.server.doctor.finding import Finding, Level, problem

COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}


def doctor(
    config: ConfigFile = None,
    data: Data = None,
    family: FamilyName = None,
    port: Annotated[int | None, typer.Option(help="Port that the server would listen on.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print findings as one JSON object.")
    ] = False,
) -> None:
    """Check this machine and the settings before serving, and say what to do.

    Makes and changes nothing. A problem keeps a server from starting or from making pictures; a
    warning does not.
    """
    flags = {"data": data, "family": family, "port": port}
    findings = asyncio.run(_found(flags, config, quiet=as_json))
    counts = Counter(one.level for one in findings)
    if as_json:
        found = {level.value: counts[level] for level in Level}
        out.print_json(json.dumps({**found, "findings": [asdict(one) for one in findings]}))
    else:
        out.print(_summary(counts), highlight=False)
    if counts[Level.PROBLEM]:
        raise typer.Exit(1)


async def _found(
    flags: dict[str, Path | str | int | None], config: Path | None, quiet: bool
) -> list[Finding]:
    """All findings, each printed when it is there unless `quiet`."""
    findings = []
    with err.status("Checking ..."):
        async for one in _checked(flags, config):
            findings.append(one)
            if not quiet:
                _print(one)
    return findings


async def _checked(
    flags: dict[str, Path | str | int | None], config: Path | None
) -> AsyncIterator[Finding]:
    try:
        settings, _ = read_settings(flags, config)
    except BadRequest as error:
        yield problem("settings", str(error), "`argus config show` lists all settings.")
        return
    from argus.server.doctor.checkup import check_all

    async for one in check_all(settings):
        yield one


def _print(one: Finding) -> None:
    colour, level = COLOURS[one.level], one.level.value
    line = f"[{colour}]{level:<8}[/] {one.check:<13} {escape(one.says)}"
    out.print(line, highlight=False, soft_wrap=True)
    if one.advice:
        out.print(f"{'':<23}→ {escape(one.advice)}", highlight=False, soft_wrap=True)


def _summary(counts: Counter[Level]) -> str:
    problems, warnings = counts[Level.PROBLEM], counts[Level.WARNING]
    if not problems and not warnings:
        return "Everything is in order."
    parts = [
        f"{count} {word}" + "s" * (count != 1)
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    return f"{' and '.join(parts)}."
