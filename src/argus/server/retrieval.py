"""The cache for asyncio: every call has a time limit, and failures are logged, not raised."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError
from torch import Tensor

from argus.cache.cache import ApproximateCache, Neighbour
from argus.cache.index import Vector
from argus.cache.scope import Scope
from argus.control.breaker import LEAST_S, PROBE_S, Breaker
from argus.core.errors import named
from argus.server.health import StorageHealth
from argus.server.threads import Threads, TooManyHang
from argus.workers.packing import pack, unpack

log = logging.getLogger(__name__)

T = TypeVar("T")

LIMIT_S = 5.0  # for a search or a fetch; less if the request has less time
STORE_LIMIT_S = 60.0  # for storing the latents of one run
LOAD_LIMIT_S = 600.0  # for the index to be built, before requests are served without it
FOLLOW_S = 0.5  # between two looks at what other servers changed
SAVE_EVERY_S, SAVE_LIMIT_S = 60.0, 600.0  # for the index
SAVE_PAUSE, MOST_PAUSE_S = 1000, 3600.0  # times what a save took, since it stops other threads
SAVE_SHARE = 0.01  # of the index that changes before it is saved; a start catches up with less
COUNT_AFTER_S = 1.0  # so long uses of latents are collected, to be written together
NEAR_LIMIT_S = 0.5  # for a read from the disk tier, before the store is asked
READERS = 4
MOST_STORING = 256
LATENTS, CATALOGUE = "latents", "catalogue"
# errors of one request's data, which say nothing about the store; IntegrityError: another process
# has just stored the same
OF_ONE_REQUEST = (IntegrityError, DataError, UnicodeError)


class Retrieval:
    """Uses the cache from an asyncio loop. Failures and timeouts are logged, never raised: a search
    then finds nothing, a fetch returns None, latents are not stored. After a failed write, writes
    stop until `health` reports that the store works.

    Searches, fetches and writes have separate threads: none waits for another, and calls that hang
    delay neither later calls nor the end of the process.
    """

    def __init__(self, cache: ApproximateCache, health: StorageHealth | None = None) -> None:
        self._cache = cache
        self._health = health or StorageHealth()
        self._health.add(LATENTS, cache.probe_store)
        self._health.add(CATALOGUE, cache.probe_catalogue)
        self._storing: set[asyncio.Task[None]] = set()
        self._searching = Threads("cache-search", READERS)
        self._fetching = Threads("cache-fetch", READERS)
        self._fetching_near = Threads("cache-near", READERS)
        self._writing = Threads("cache-write", 1)
        self._counting = Threads("cache-count", 1)
        self._following = Threads("cache-follow", 1)
        self._saving = Threads("cache-index", 1)
        self._count_later: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()  # runs are stored one by one, each within its own limit
        self._breaker = Breaker(time.monotonic)

    @property
    def usable(self) -> float:
        """The recent share of fetches that brought latents in time."""
        return self._breaker.usable

    @property
    def shut(self) -> bool:
        """Whether the circuit breaker is open: fetches fail at once."""
        return self._breaker.open

    @property
    def failing(self) -> bool:
        """Whether the breaker opened and no fetch has succeeded since."""
        return self._breaker.failing

    @property
    def storing(self) -> int:
        """Number of full runs whose latents are not stored yet."""
        return len(self._storing)

    async def load(self) -> None:
        """Restore or build the similarity index, so that the first search does not have to."""
        try:
            await self._searching.run(self._cache.load, LOAD_LIMIT_S)
        except Exception as error:
            log.warning("The cache's index cannot be built yet: %s", named(error))

    async def follow(self) -> None:
        """Apply what other servers change in the cache, every `FOLLOW_S` seconds; does not
        return."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            if not self._health.works(CATALOGUE):
                continue
            try:
                await self._following.run(self._cache.follow, LOAD_LIMIT_S)
            except Exception as error:
                self._health.failed(CATALOGUE, error)

    async def keep_saved(self) -> None:
        """Save the similarity index now and then, a large one once an hour; does not return.

        The server stands still while a graph is copied, for about 2.5 s with a million entries.
        """
        pause_s = SAVE_EVERY_S
        while True:
            await asyncio.sleep(pause_s)
            begun = time.monotonic()
            await self._save(SAVE_SHARE)
            pause_s = min(SAVE_PAUSE * (time.monotonic() - begun), MOST_PAUSE_S)
            pause_s = max(pause_s, SAVE_EVERY_S)

    async def _save(self, least: float = 0.0) -> None:
        """Save the similarity index if more than the share `least` of it has changed."""
        try:
            await self._saving.run(lambda: self._cache.save_index(least), SAVE_LIMIT_S)
        except Exception as error:
            log.warning("The cache's index cannot be saved: %s", named(error))

    async def find(
        self, scope: Scope, vector: Vector, count: int, limit_s: float = math.inf
    ) -> list[Neighbour]:
        """The `count` nearest entries of a scope, nearest first; none if the search fails or takes
        longer than `limit_s` seconds or `LIMIT_S`."""
        if limit_s <= 0 or self._cache.is_empty(scope):
            return []
        try:
            return await self._searching.run(
                lambda: self._cache.find(scope, vector, count), min(limit_s, LIMIT_S)
            )
        except TooManyHang:
            return []
        except Exception as error:
            log.warning("The cache cannot be searched: %s", named(error))
            return []

    async def fetch(self, neighbour: Neighbour, k: int, limit_s: float = math.inf) -> bytes | None:
        """A neighbour's latents after K steps, packed for a worker; None if they do not come within
        `limit_s` seconds or `LIMIT_S`."""

        def read() -> Tensor | None:
            return self._cache.fetch(neighbour, k)

        begun = time.monotonic()
        if limit_s < LEAST_S:
            return None
        latents = await self._near(neighbour, k, limit_s) if self._cache.tiered else None
        limit_s -= time.monotonic() - begun
        if latents is None:
            if self._breaker.open or limit_s < LEAST_S:
                return None
            latents = await self._asked(read, limit_s)
        if latents is None:
            return None
        if self._count_later is None or self._count_later.done():
            self._count_later = asyncio.create_task(self._count(COUNT_AFTER_S))
        return pack(latents)

    async def _near(self, neighbour: Neighbour, k: int, limit_s: float) -> Tensor | None:
        """Latents from the disk tier, whatever state the store is in; None if it does not give
        them in time."""
        try:
            return await self._fetching_near.run(
                lambda: self._cache.fetch_near(neighbour, k), min(limit_s, NEAR_LIMIT_S)
            )
        except TooManyHang:
            return None
        except SQLAlchemyError as error:
            log.warning("The cache's catalogue cannot be read: %s", named(error))
            return None
        except Exception as error:
            log.warning("Latents cannot be read from the disk tier: %s", named(error))
            return None

    async def _count(self, after_s: float = 0.0) -> None:
        """Write the counts of fetched latents to the catalogue."""
        await asyncio.sleep(after_s)
        if not self._health.works(CATALOGUE):
            return  # the cache keeps them in memory
        try:
            await self._counting.run(self._cache.count_uses, STORE_LIMIT_S)
        except Exception as error:
            self._health.failed(CATALOGUE, error)

    async def watch(self, limit_s: float) -> None:
        """Probe a store that failed now and then, for at most `limit_s` seconds; does not
        return."""
        while True:
            await asyncio.sleep(PROBE_S)
            if self._breaker.doubted and not self._breaker.open:
                await self._asked(self._cache.probe, limit_s)

    async def _asked(self, read: Callable[[], T], limit_s: float) -> T | None:
        """The result of a read from the store; None if it fails or takes too long."""
        trial = self._breaker.begin()
        try:
            result = await self._fetching.run(read, min(limit_s, LIMIT_S))
        except Exception as error:
            self._breaker.failure(trial)
            if not isinstance(error, TooManyHang):
                log.warning("Latents cannot be fetched: %s", named(error))
            return None
        except asyncio.CancelledError:
            self._breaker.abandon(trial)
            raise
        self._breaker.success()  # even if what was asked for is gone: the store answers
        return result

    def keep(self, scope: Scope, prompt: str, vector: Vector, packed: Mapping[int, bytes]) -> None:
        """Store a full run's latents in the background, unless the store is known to fail or too
        many runs wait already."""
        if not self._health.works(LATENTS, CATALOGUE):
            return
        if self.storing >= MOST_STORING:
            log.warning("Too many latents are queued to be stored; one picture's are dropped")
            return

        def store() -> None:
            latents = {k: unpack(data) for k, data in packed.items()}
            self._cache.keep(scope, prompt, vector, latents)

        async def stored() -> None:
            try:
                async with self._turn:
                    if self._health.works(LATENTS, CATALOGUE):
                        await self._writing.run(store, STORE_LIMIT_S)
            except OF_ONE_REQUEST as error:
                log.warning("Latents were not stored: %s", named(error))
            except Exception as error:
                of = CATALOGUE if isinstance(error, SQLAlchemyError) else LATENTS
                self._health.failed(of, error)

        task = asyncio.create_task(stored())
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def close(self, limit_s: float) -> None:
        """Wait up to `limit_s` seconds for writes to finish, uses to be counted and the index to be
        saved; drop the rest."""
        if self._count_later is not None:
            self._count_later.cancel()
        more = (self._count(), self._save())
        last = {*self._storing, *map(asyncio.create_task, more)}
        _, late = await asyncio.wait(last, timeout=limit_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
