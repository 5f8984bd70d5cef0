"""Checks of what a server keeps: its folder, the catalogue's database, the store of latents."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from argus.cache.migrations import HEAD
from argus.config import Settings, without_passwords
from argus.core.family import Family
from argus.server.doctor.finding import Finding, ok, problem, sized, warning

LEAST_FREE_BYTES = 1_000_000_000
SLOW_MS = 500.0


def folder(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """The data folder: whether it can be written, has room, and is free."""
    from argus.server.lock import holder

    data = settings.data.absolute()
    there = _nearest(data)
    if not there.is_dir():
        yield problem("data folder", f"{there} is a file", "Name another folder with --data.")
        return
    if not _writable(there):
        yield problem(
            "data folder", f"{there} cannot be written by this user",
            f"Give it to the server's user: chown, or another --data than {data}.",
        )  # fmt: skip
        return
    made = "" if there == data else ", will be made"
    free = shutil.disk_usage(there).free
    local = settings.cache_latents is None
    wanted = float(settings.cache_limit if local else settings.cache_disk)
    held = _size(data / ("latents" if local else "latents-near"))
    if free < LEAST_FREE_BYTES:
        advice = "Free some, or name a folder on another disk with --data."
        yield problem("data folder", f"{data}: {sized(free)} are free", advice)
    elif free < wanted - held:
        setting = "cache_limit" if local else "cache_disk"
        yield warning(
            "data folder", f"{data}{made}: {sized(free)} are free, {setting} allows "
            f"{sized(wanted)}", f"Set {setting} lower: a full disk keeps no pictures either.",
        )  # fmt: skip
    else:
        yield ok("data folder", f"{data}{made}: {sized(free)} are free")
    who = holder(data)
    if who is not None:
        yield warning(
            "data folder", f"a server runs on it{who}",
            "A second one needs a data folder of its own (--data).",
        )  # fmt: skip


def _nearest(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    while not path.exists() and path.parent != path:
        path = path.parent
    return path


def _writable(folder: Path) -> bool:
    probe = folder / f".argus-doctor-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"1")
        return True
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    if not folder.is_dir():
        return 0
    found = 0
    for one in os.scandir(folder):
        with suppress(FileNotFoundError):  # a server beside may evict it
            found += one.stat().st_size if one.is_file() else 0
    return found


def database(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """The catalogue's database: whether it answers, and the version of its tables."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from argus.cache.database import revision_of
    from argus.server.storage import catalogue_url

    url = catalogue_url(settings)
    shown = without_passwords(url)
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        yield ok("database", f"{shown} is made at the first start")
        return
    begun = time.perf_counter()
    try:
        revision = revision_of(url)
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        yield problem(
            "database", f"{shown} cannot be opened: {cause}",
            "See that it runs, that this machine may connect, and user, password and name.",
        )  # fmt: skip
        return
    took_ms = 1000 * (time.perf_counter() - begun)
    if revision == HEAD:
        yield ok("database", f"{shown}: tables of version {HEAD}, {took_ms:.0f} ms to connect")
    elif revision is None:
        yield ok("database", f"{shown} is empty, or older than versions: the first start fills it")
    elif revision < HEAD:
        yield warning(
            "database", f"{shown} has tables of version {revision}; this Argus needs {HEAD}",
            "The next start upgrades them. Servers of the older version must be stopped before.",
        )  # fmt: skip
    else:
        yield problem(
            "database", f"{shown} has tables of a newer Argus (version {revision}, not {HEAD})",
            "Upgrade Argus here, or name another database.",
        )  # fmt: skip


def latents(settings: Settings, _: Family | None) -> Iterator[Finding]:
    """The store of latents: whether it takes and deletes an object."""
    from argus.cache.latents import LatentStore, is_local

    if settings.cache_latents is None:
        yield ok("latent store", "in the data folder")
        return
    url, shown = settings.cache_latents, without_passwords(settings.cache_latents)
    advice = "See that it runs, the bucket exists, AWS_ENDPOINT_URL and the keys are right."
    if is_local(url):
        path = _nearest(Path(url.removeprefix("file://")))
        if not path.is_dir() or not _writable(path):
            yield problem("latent store", f"{path} cannot be written", "Give it to this user.")
        else:
            yield ok("latent store", f"{shown} can be written")
        return
    begun = time.perf_counter()
    try:
        LatentStore(url, f"doctor-{uuid.uuid4().hex}").probe()
    except (OSError, ValueError, ImportError) as error:
        said = without_passwords(str(error).splitlines()[0] if str(error) else type(error).__name__)
        yield problem("latent store", f"{shown} takes no object: {said}", advice)
        return
    took_ms = 1000 * (time.perf_counter() - begun)
    says = f"{shown} takes and deletes an object ({took_ms:.0f} ms)"
    if took_ms > SLOW_MS:
        yield warning(
            "latent store", says, "Such a store is left alone in short deadlines: use a nearer one."
        )
    else:
        yield ok("latent store", says)
