"""The options of `argus simulate` and `argus plan` that say what is simulated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from argus.cli.consoles import err
from argus.core.errors import BadRequest

if TYPE_CHECKING:
    from argus.simulator.world import World

WorldOption = Annotated[str, typer.Option(help="A world's name, or the path of its YAML file.")]
SloOption = Annotated[
    str | None,
    typer.Option(
        help="The deadline: 3x the exact variant's latency, or 12s. Default: the world's."
    ),
]
TableOption = Annotated[
    Path | None,
    typer.Option(
        help="Instead of a world: scores of your own models' pictures, parquet or CSV, with "
        "columns prompt, seed and one for each variant (docs/your-models.md)."
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(help="With --table: YAML or JSON of each variant's seconds a picture."),
]
ScoresOption = Annotated[
    Path | None, typer.Option(help="The file of scores of the world sd35 (not part of Argus).")
]
PredictorOption = Annotated[
    Path | None,
    typer.Option(
        help="With --table or --scores: what `argus train --table` wrote. Default: trained now."
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        help="With --table or --scores: words (the default), or the folder or hub id of a "
        "sentence encoder."
    ),
]
RanksOption = Annotated[
    bool,
    typer.Option("--ranks", help="With --table or --scores: quality by the scores' ranks instead."),
]
UnrelatedOption = Annotated[
    float | None,
    typer.Option(
        help="With --table: the mean score of pictures of other prompts, quality 0. Default: "
        "what 1 % of the exact variant's pictures score less than."
    ),
]


def prepared(
    world: str,
    table: Path | None,
    profile: Path | None,
    scores: Path | None,
    predictor: Path | None,
    encoder: str | None,
    ranks: bool,
    unrelated: float | None,
) -> tuple[World, list[int]]:
    """The world that the options describe, and its numbers of workers by type. Raises BadRequest
    for options that do not go together."""
    from argus.simulator.scored import WORDS, Source, world_of_table
    from argus.simulator.worlds import load_world, workers_of

    own = table or scores or predictor or encoder or ranks
    source = Source(table or scores, predictor, encoder or WORDS, ranks) if own else None
    if table is None:
        if profile is not None or unrelated is not None:
            raise BadRequest("--profile and --unrelated go with --table.")
        with err.status(f"Preparing {world} …"):
            return load_world(world, source), workers_of(world)
    if profile is None or scores is not None:
        raise BadRequest(
            "--table needs --profile, a file with each variant's seconds a picture, and goes "
            "without --scores (docs/your-models.md)."
        )
    with err.status("Training on the scores …"):
        return world_of_table(source or Source(table), profile, unrelated)


def counts_of(workers: str | None, default: list[int], world: World) -> list[int]:
    """Workers of each type from `8` or `4,8`. Raises BadRequest for anything else."""
    try:
        counts = default if workers is None else [int(count) for count in workers.split(",")]
    except ValueError as error:
        raise BadRequest(f"--workers takes numbers such as 8 or 4,8, not {workers!r}.") from error
    if min(counts) < 0 or not sum(counts):
        raise BadRequest("--workers must give at least one worker.")
    types = world.table.types
    if len(counts) != len(types):
        raise BadRequest(f"{world.name} has workers of {', '.join(types)}: give as many numbers.")
    return counts


def multiple_of(slo: str | None, world: World) -> float:
    """The deadline as a multiple of the exact variant's latency, from `3x` or `12s`; None: the
    world's. Raises BadRequest for anything else."""
    if not slo:
        return world.slo
    try:
        value = float(slo[:-1])
        if slo[-1] in "xs" and 0 < value < float("inf"):
            return value if slo[-1] == "x" else value / world.table.slo_s
    except ValueError:
        pass
    raise BadRequest(f"--slo takes 3x or 12s, not {slo!r}.")


def policies_of(policies: str) -> list[str]:
    """The policies of a list with commas, or `all`. Raises BadRequest for an unknown one."""
    from argus.control.policies import POLICIES

    names = list(POLICIES) if policies == "all" else policies.split(",")
    for name in names:
        if name not in POLICIES:
            raise BadRequest(f"There is no policy {name!r}: use {', '.join(POLICIES)}, or all.")
    return names
