"""`argus cache`: show, remove and add entries of the approximate cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ByteSize
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from argus.cli.consoles import err, out
from argus.cli.serve import ConfigFile, Data, FamilyName
from argus.config import Settings, read_settings
from argus.core.errors import ArgusError, BadRequest

if TYPE_CHECKING:
    from argus.cache.cache import ApproximateCache
    from argus.server.samples import Samples

app = typer.Typer(
    help="The approximate cache of a data folder, also while a server runs on it.",
    no_args_is_help=True,
)
Namespace = Annotated[
    str | None, typer.Option(help="Only of this namespace: a key's name, everyone, or shared.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def stats(config: ConfigFile = None, data: Data = None) -> None:
    """How much is cached, and how often it was used."""
    with _opened(config, data) as (settings, cache, samples):
        kept = cache.stats()
        measured = samples.count()
    table = Table("what", "", box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("prompts", f"{kept.entries:,}")
    table.add_row("latents", f"{kept.latents:,}")
    size, limit = (
        ByteSize(n).human_readable(decimal=True) for n in (kept.size_bytes, settings.cache_limit)
    )
    share = f"{kept.size_bytes / settings.cache_limit:.1%} of " if settings.cache_limit else "of "
    table.add_row("size", f"{size} ({share}{limit})")
    table.add_row("uses", f"{kept.uses:,}")
    table.add_row("samples", f"{measured:,}")
    for namespace, entries in kept.namespaces.items():
        table.add_row(f"prompts of {namespace}", f"{entries:,}")
    out.print(table, highlight=False)


@app.command("list")
def list_entries(
    config: ConfigFile = None,
    data: Data = None,
    namespace: Namespace = None,
    limit: Annotated[int, typer.Option(help="Most entries to list.", min=1)] = 50,
) -> None:
    """The cached prompts, newest first."""
    with _opened(config, data) as (_, cache, _samples):
        entries = cache.entries(namespace, limit=limit)
    table = Table("entry", "namespace", "cached", "K", "bytes", box=None, padding=(0, 2, 0, 0))
    table.add_column("prompt", overflow="fold")
    for one in entries:
        when = datetime.fromtimestamp(one.created_at, UTC).strftime("%Y-%m-%d %H:%M")
        skips = " ".join(map(str, one.skips))
        table.add_row(
            str(one.id), one.namespace, when, skips, f"{one.size_bytes:,}",
            escape(one.prompt),
        )  # fmt: skip
    out.print(table, highlight=False)


@app.command()
def rm(
    entry: Annotated[int | None, typer.Argument(help="The entry's number, from `list`.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The exact prompt.")] = None,
    namespace: Namespace = None,
    config: ConfigFile = None,
    data: Data = None,
) -> None:
    """Remove the entries of the number, prompt and namespace given, and their samples.

    A running server notices, and runs such prompts in full again.
    """
    if entry is None and prompt is None and namespace is None:
        raise BadRequest("Say what to remove: an entry, --prompt or --namespace; or use `clear`.")
    with _opened(config, data) as (_, cache, samples):
        named = [one for one in cache.entries(namespace) if one.id == entry]
        count = _removed_from(cache, entry, prompt, namespace)
        if entry is None:
            measured = samples.remove(namespace, prompt)
        else:
            measured = sum(samples.remove(one.namespace, one.prompt) for one in named if count)
    if not count and not measured:
        raise BadRequest("Nothing in the cache matches: see `argus cache list`.")
    out.print(_removed(count, measured))


@app.command()
def clear(
    yes: Yes = False, namespace: Namespace = None, config: ConfigFile = None, data: Data = None
) -> None:
    """Remove all entries and samples, or those of a namespace.

    A running server notices, runs the next prompts in full, and stores their latents.
    """
    with _opened(config, data) as (_, cache, samples):
        count = len(cache) if namespace is None else len(cache.entries(namespace))
        if not yes and not typer.confirm(f"Remove all {count} entries?"):
            raise BadRequest("Nothing was removed.")
        count = _removed_from(cache, namespace=namespace)
        out.print(_removed(count, samples.remove(namespace)))


@app.command()
def warm(
    prompts: Annotated[Path, typer.Argument(help="Text file, one prompt a line.")],
    namespace: Annotated[
        str | None, typer.Option(help="Namespace: a key's name, if the server has keys.")
    ] = None,
    family: FamilyName = None,
    config: ConfigFile = None,
    data: Data = None,
) -> None:
    """Make the pictures of a file's prompts and store their latents.

    A running server finds them within a second.
    """
    if not prompts.is_file():
        raise BadRequest(f"There is no file {prompts}.")
    settings, _ = read_settings({"data": data, "family": family}, config)
    whose = _namespace(settings, namespace)
    wanted = [
        line.strip() for line in prompts.read_text(errors="replace").splitlines() if line.strip()
    ]
    with err.status("Loading the model …"):
        from argus.server.storage import open_cache
        from argus.server.warm import Warmer

        warmer = Warmer(settings, open_cache(settings), whose)
    kept = sum(warmer.warm(one) for one in track(wanted, "Denoising", console=err, transient=True))
    out.print(f"Stored {kept} of {len(wanted)} prompts; the others were cached already.")


def _namespace(settings: Settings, asked: str | None) -> str:
    """The namespace to warm. Raises BadRequest for one that no request can have."""
    from argus.server.keys import EVERYONE, SHARED, read_keys

    own = [EVERYONE]
    if settings.cache_scope == "shared":
        own = [SHARED]
    elif settings.api_key_file is not None:
        own = list(read_keys(settings.api_key_file))
    if asked is None and len(own) == 1:
        return own[0]
    if asked not in own:
        raise BadRequest(f"Give the --namespace to warm, one of: {', '.join(own)}.")
    return asked


@contextmanager
def _opened(
    config: Path | None, data: Path | None
) -> Iterator[tuple[Settings, ApproximateCache, Samples]]:
    settings, _ = read_settings({"data": data}, config)
    if settings.cache_catalogue is None and not (settings.data / "catalogue.db").is_file():
        raise BadRequest(f"{settings.data} holds no cache; give the server's folder with --data.")
    with err.status("Opening the cache …"):
        from argus.server.samples import Samples
        from argus.server.storage import catalogue_url, open_cache

        cache = open_cache(settings)
        samples = Samples(catalogue_url(settings))
    try:
        yield settings, cache, samples
    finally:
        samples.close()
        cache.close()


def _removed_from(
    cache: ApproximateCache,
    entry: int | None = None,
    prompt: str | None = None,
    namespace: str | None = None,
) -> int:
    """As `ApproximateCache.remove`. Raises ArgusError if the store does not delete."""
    try:
        return cache.remove(entry, prompt, namespace)
    except OSError as error:
        raise ArgusError(
            f"The store of the latents does not delete: {error}. Run this again once it answers; "
            "what was removed already is deleted by a server within an hour."
        ) from error


def _removed(count: int, measured: int) -> str:
    entries = f"{count} {'entry' if count == 1 else 'entries'}"
    also = f" and {measured} {'sample' if measured == 1 else 'samples'}" if measured else ""
    return f"Removed {entries}{also}."
