"""Runs the checks, each in a thread and with a time limit of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from argus.config import Settings, without_passwords
from argus.core.errors import ArgusError
from argus.core.family import Family
from argus.server.doctor import family, machine, network, storage
from argus.server.doctor.finding import Finding, problem
from argus.server.threads import Threads


@dataclass(frozen=True)
class Check:
    """`find` gives findings about settings and their family, which is None if it cannot be read;
    `limit_s` is for all of them."""

    name: str
    find: Callable[[Settings, Family | None], Iterable[Finding]]
    limit_s: float = 10.0


# The first one imports what the others use: they run at the same time, after it.
CHECKS = (
    Check("python", machine.python, 120.0),
    Check("device", machine.device, 30.0),
    Check("memory", machine.memory, 30.0),
    Check("processes", machine.processes, 30.0),
    Check("family", family.described),
    Check("models", family.models, 30.0),
    Check("profile", family.profile, 30.0),
    Check("predictor", family.predictor, 30.0),
    Check("quality table", family.table),
    Check("policy", family.policy),
    Check("data folder", storage.folder, 60.0),
    Check("database", storage.database, 15.0),
    Check("latent store", storage.latents, 20.0),
    Check("port", network.port),
    Check("keys", network.keys),
    Check("upstreams", network.upstreams, 20.0),
    Check("Ray", network.ray_cluster, 45.0),
    Check("traces", network.collector),
)


async def check_all(settings: Settings) -> AsyncIterator[Finding]:
    """The findings of all checks, in their order."""
    found: Family | None = None
    with suppress(ArgusError):
        found = family.of(settings)
    first, *others = CHECKS
    with _quietly():
        for finding in await _limited(first, settings, found):
            yield finding
        running = [asyncio.create_task(_limited(one, settings, found)) for one in others]
        for task in running:
            for finding in await task:
                yield finding


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the log of the code that is called: what it says is a finding."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


async def _limited(check: Check, settings: Settings, found: Family | None) -> list[Finding]:
    """The findings of one check, whatever it raises and however long it takes."""
    threads = Threads(f"doctor-{check.name}", 1)
    try:
        return await threads.run(lambda: list(check.find(settings, found)), check.limit_s)
    except TimeoutError:
        return [
            problem(
                check.name,
                f"the check was not done within {check.limit_s:g} s",
                "What it asks hangs: see whether it can be reached, and what keeps it.",
            )
        ]
    except ArgusError as error:
        return [problem(check.name, without_passwords(str(error)))]
    except Exception as error:
        said = without_passwords(f"{type(error).__name__}: {error}".splitlines()[0])
        return [problem(check.name, f"the check failed: {said}")]
